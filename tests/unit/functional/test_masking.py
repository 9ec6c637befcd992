"""Masks from lengths, masked sums and means. Shapes: B sequences, T positions."""

from __future__ import annotations

import math

import pytest
import torch

from dpr_lightning.functional import length_mask, masked_mean, masked_sum


def test_length_mask_marks_the_first_positions() -> None:
    mask_BT = length_mask(torch.tensor([0, 2, 4]), num_positions=4)
    expected_BT = torch.tensor([[False] * 4, [True, True, False, False], [True] * 4])
    assert mask_BT.dtype == torch.bool
    torch.testing.assert_close(mask_BT, expected_BT)


def test_length_mask_without_rows_or_positions() -> None:
    assert length_mask(torch.empty(0, dtype=torch.int64), num_positions=3).shape == (0, 3)
    assert length_mask(torch.tensor([0]), num_positions=0).shape == (1, 0)


def test_sum_and_mean_count_what_the_mask_holds() -> None:
    x_BT = torch.tensor([[1.0, 2.0], [4.0, 9.0]])
    mask_BT = torch.tensor([[True, False], [True, True]])
    # 1 + 4 + 9 = 14; 14 / 3
    assert masked_sum(x_BT, mask_BT).item() == 14.0
    assert masked_mean(x_BT, mask_BT).item() == pytest.approx(14.0 / 3.0)


@pytest.mark.parametrize("poison", [1e6, math.inf, -math.inf, math.nan])
def test_masked_values_are_inert_forward_and_backward(poison: float) -> None:
    mask_BT = torch.tensor([[True, False], [True, True]])
    for reduce, gradient in ((masked_sum, 1.0), (masked_mean, 1.0 / 3.0)):
        clean_BT = torch.tensor([[1.0, 0.0], [4.0, 9.0]], requires_grad=True)
        dirty_BT = torch.tensor([[1.0, poison], [4.0, 9.0]], requires_grad=True)
        clean, dirty = reduce(clean_BT, mask_BT), reduce(dirty_BT, mask_BT)
        clean.backward()
        dirty.backward()
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        assert dirty_BT.grad is not None
        torch.testing.assert_close(dirty_BT.grad, clean_BT.grad, rtol=0, atol=0)
        torch.testing.assert_close(dirty_BT.grad, torch.where(mask_BT, gradient, 0.0))


def test_sum_of_nothing_is_zero_and_its_mean_is_refused() -> None:
    mask_BT = torch.zeros(2, 2, dtype=torch.bool)
    assert masked_sum(torch.full((2, 2), math.nan), mask_BT).item() == 0.0
    with pytest.raises(ValueError, match="False everywhere"):
        masked_mean(torch.ones(2, 2), mask_BT)
