from __future__ import annotations

import math

import pytest
import torch

from dpr_lightning.functional import truncated_importance

MASK_BT = torch.tensor([[False, True, True, True]])


def test_weights_worked_by_hand() -> None:
    logp_BT = torch.tensor([[0.0, -1.0, -2.0, -0.5]])
    # ratios 1/2, 1 and 4 on the response
    sampler_BT = logp_BT - torch.tensor([[5.0, math.log(0.5), 0.0, math.log(4.0)]])
    found = truncated_importance(logp_BT, sampler_BT, MASK_BT, cap=2.0)
    torch.testing.assert_close(found.weight_BT, torch.tensor([[0.0, 0.5, 1.0, 2.0]]))
    assert found.is_capped_BT.tolist() == [[False, False, False, True]]
    torch.testing.assert_close(
        truncated_importance(logp_BT, sampler_BT, MASK_BT, cap=8.0).weight_BT, torch.tensor([[0.0, 0.5, 1.0, 4.0]])
    )


def test_masked_positions_are_inert_and_weights_are_constants() -> None:
    logp_BT = torch.tensor([[float("nan"), -1.0, -2.0, -0.5]], requires_grad=True)
    sampler_BT = torch.tensor([[-float("inf"), -1.0, -2.0, -0.5]])
    found = truncated_importance(logp_BT, sampler_BT, MASK_BT, cap=1.0)
    assert found.weight_BT.tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert not found.is_capped_BT.any()
    assert not found.weight_BT.requires_grad


def test_a_ratio_that_overflows_is_capped() -> None:
    found = truncated_importance(torch.zeros(1, 4), torch.full((1, 4), -1000.0), MASK_BT, cap=3.0)
    torch.testing.assert_close(found.weight_BT, torch.tensor([[0.0, 3.0, 3.0, 3.0]]))


@pytest.mark.parametrize("cap", [0.99, 0.0, -1.0, float("nan")])
def test_a_cap_below_one_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match="at least 1, got"):
        truncated_importance(torch.zeros(1, 4), torch.zeros(1, 4), MASK_BT, cap=cap)
