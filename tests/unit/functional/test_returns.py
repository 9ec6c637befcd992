"""Returns against hand-worked values and brute force. Shapes: B sequences, T positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional import (
    DiscountedReturns,
    ExpectedReturns,
    expected_reward_to_go,
    length_mask,
    reward_to_go,
)


def _brute_force(reward_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """Sum gamma^(number of response tokens between) * reward over this and later response tokens, term by term."""
    return_BT = torch.zeros_like(reward_BT)
    for b in range(reward_BT.shape[0]):
        columns = [t for t in range(reward_BT.shape[1]) if mask_BT[b, t]]
        for i, t in enumerate(columns):
            return_BT[b, t] = sum(gamma**k * float(reward_BT[b, u]) for k, u in enumerate(columns[i:]))
    return return_BT


def _rewards(num_sequences: int = 4, num_positions: int = 6) -> Tensor:
    return torch.randn(num_sequences, num_positions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        # 4 + 9 = 13; 2 + 13 = 15
        (1.0, [[0.0, 15.0, 13.0, 9.0, 0.0]]),
        # 4 + 9/2 = 8.5; 2 + 8.5/2 = 6.25
        (0.5, [[0.0, 6.25, 8.5, 9.0, 0.0]]),
        (0.0, [[0.0, 2.0, 4.0, 9.0, 0.0]]),
    ],
)
def test_hand_worked_reward_to_go(gamma: float, expected: list[list[float]]) -> None:
    reward_BT = torch.tensor([[1.0, 2.0, 4.0, 9.0, 16.0]])
    mask_BT = torch.tensor([[False, True, True, True, False]])
    torch.testing.assert_close(reward_to_go(reward_BT, mask_BT, gamma=gamma), torch.tensor(expected))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
def test_reward_to_go_equals_brute_force(gamma: float) -> None:
    reward_BT = _rewards()
    # Right padding, left padding, a response with gaps, no response.
    mask_BT = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    torch.testing.assert_close(
        reward_to_go(reward_BT, mask_BT, gamma=gamma), _brute_force(reward_BT, mask_BT, gamma), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("gamma", [0.7, 1.0])
def test_left_and_right_padding_give_the_same_returns(gamma: float) -> None:
    reward_BT = _rewards(3, 6)
    expected_BT = _rewards(3, 6).flip(0)
    right_BT = length_mask(torch.tensor([4, 4, 4]), num_positions=6)
    left_BT = right_BT.roll(2, dims=1)
    rolled = reward_to_go(reward_BT.roll(2, dims=1), left_BT, gamma=gamma).roll(-2, dims=1)
    torch.testing.assert_close(rolled, reward_to_go(reward_BT, right_BT, gamma=gamma), rtol=1e-12, atol=1e-12)
    rolled = expected_reward_to_go(reward_BT.roll(2, dims=1), expected_BT.roll(2, dims=1), left_BT).roll(-2, dims=1)
    torch.testing.assert_close(rolled, expected_reward_to_go(reward_BT, expected_BT, right_BT), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poison", [1e6, math.inf, math.nan])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_masked_positions_are_inert(gamma: float, poison: float) -> None:
    reward_BT, expected_BT = _rewards(), _rewards().flip(0)
    mask_BT = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    dirty_BT = reward_BT.masked_fill(~mask_BT, poison)
    dirty_expected_BT = expected_BT.masked_fill(~mask_BT, poison)
    for clean, dirty in (
        (reward_to_go(reward_BT, mask_BT, gamma=gamma), reward_to_go(dirty_BT, mask_BT, gamma=gamma)),
        (
            expected_reward_to_go(reward_BT, expected_BT, mask_BT),
            expected_reward_to_go(dirty_BT, dirty_expected_BT, mask_BT),
        ),
    ):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        assert not dirty[~mask_BT].any()


def test_hand_worked_expected_reward_to_go() -> None:
    reward_BT = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    expected_BT = torch.tensor([[0.5, 1.0, 3.0, 7.0]])
    mask_BT = torch.tensor([[True, True, True, False]])
    # t=2: 4 - 3 = 1; t=1: (2 - 1) + 3 = 4; t=0: (1 - 0.5) + 1 + 3 = 4.5
    torch.testing.assert_close(
        expected_reward_to_go(reward_BT, expected_BT, mask_BT), torch.tensor([[4.5, 4.0, 1.0, 0.0]])
    )


def test_inputs_are_left_as_they_were() -> None:
    reward_BT, mask_BT = _rewards(), torch.ones(4, 6, dtype=torch.bool)
    before_BT = reward_BT.clone()
    reward_to_go(reward_BT, mask_BT, gamma=0.5)
    expected_reward_to_go(reward_BT, reward_BT, mask_BT)
    torch.testing.assert_close(reward_BT, before_BT, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [-0.1, 1.5, math.nan])
def test_discount_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got"):
        reward_to_go(_rewards(), torch.ones(4, 6, dtype=torch.bool), gamma=gamma)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got"):
        DiscountedReturns(gamma=gamma)


def test_estimators_apply_their_functions() -> None:
    reward_BT, expected_BT, mask_BT = _rewards(), _rewards().flip(0), torch.ones(4, 6, dtype=torch.bool)
    torch.testing.assert_close(
        DiscountedReturns(gamma=0.5)(reward_BT, None, mask_BT), reward_to_go(reward_BT, mask_BT, gamma=0.5)
    )
    torch.testing.assert_close(
        ExpectedReturns()(reward_BT, expected_BT, mask_BT), expected_reward_to_go(reward_BT, expected_BT, mask_BT)
    )
    assert ExpectedReturns.needs_expected_reward
    assert not DiscountedReturns.needs_expected_reward
    with pytest.raises(AssertionError, match="not asked for the KLs"):
        ExpectedReturns()(reward_BT, None, mask_BT)
