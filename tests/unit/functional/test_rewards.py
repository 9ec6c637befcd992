"""Rewards against hand-worked values. Shapes: B sequences, T positions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional import DenseReward, DenseWithValueReward, Reward, SentenceReward, TeacherLogprobReward
from dpr_lightning.functional.rewards import last_token_mask
from dpr_lightning.types import TokenScores

# A prompt of one token and a response of three; a left-padded response of two; a row without a response.
MASK_BT = torch.tensor([[False, True, True, True], [False, False, True, True], [False, False, False, False]])
TEACHER_BT = torch.tensor([[0.0, -1.0, -2.0, -0.5], [0.0, 0.0, -3.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
REFERENCE_BT = torch.tensor([[0.0, -1.5, -1.0, -2.0], [0.0, 0.0, -1.0, -1.25], [0.0, 0.0, 0.0, 0.0]])
TEACHER_VALUE_BT = torch.tensor([[0.0, 8.0, 4.0, 2.0], [0.0, 0.0, 5.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
REFERENCE_VALUE_BT = torch.tensor([[0.0, 7.0, 1.0, 3.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
ALL = [
    DenseReward(),
    DenseReward(clip_low=-0.75, clip_high=0.75),
    SentenceReward(),
    SentenceReward(clip_low=-0.75, clip_high=0.75),
    TeacherLogprobReward(),
    DenseWithValueReward(),
    DenseWithValueReward(relative=False),
]


def _scores(poison: float = 0.0) -> TokenScores:
    def fill(x_BT: Tensor) -> Tensor:
        return x_BT.masked_fill(~MASK_BT, poison)

    return TokenScores(
        response_mask_BT=MASK_BT,
        old_logp_BT=fill(TEACHER_BT),
        teacher_logp_BT=fill(TEACHER_BT),
        reference_logp_BT=fill(REFERENCE_BT),
        old_entropy_BT=fill(torch.zeros(3, 4)),
        teacher_value_BT=fill(TEACHER_VALUE_BT),
        reference_value_BT=fill(REFERENCE_VALUE_BT),
    )


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        # teacher - reference: -1 + 1.5, -2 + 1, -0.5 + 2; -3 + 1, -1 + 1.25
        (DenseReward(), [[0, 0.5, -1.0, 1.5], [0, 0, -2.0, 0.25], [0, 0, 0, 0]]),
        (DenseReward(clip_low=-0.75, clip_high=0.75), [[0, 0.5, -0.75, 0.75], [0, 0, -0.75, 0.25], [0, 0, 0, 0]]),
        # 0.5 - 1 + 1.5 = 1; -2 + 0.25 = -1.75: at the last token alone
        (SentenceReward(), [[0, 0, 0, 1.0], [0, 0, 0, -1.75], [0, 0, 0, 0]]),
        (SentenceReward(clip_low=-1.25, clip_high=1.25), [[0, 0, 0, 1.0], [0, 0, 0, -1.25], [0, 0, 0, 0]]),
        (TeacherLogprobReward(), [[0, -1.0, -2.0, -0.5], [0, 0, -3.0, -1.0], [0, 0, 0, 0]]),
        # dV: 1, 3, -1; 4, 2. r_hat + dV - next dV: 0.5+1-3, -1+3+1, 1.5-1-0; -2+4-2, 0.25+2-0
        (DenseWithValueReward(), [[0, -1.5, 3.0, 0.5], [0, 0, 0.0, 2.25], [0, 0, 0, 0]]),
        # log pi + V - next V: -1+8-4, -2+4-2, -0.5+2-0; -3+5-3, -1+3-0
        (DenseWithValueReward(relative=False), [[0, 3.0, 0.0, 1.5], [0, 0, -1.0, 2.0], [0, 0, 0, 0]]),
    ],
)
def test_hand_worked_rewards(reward: Reward, expected: list[list[float]]) -> None:
    reward_BT = reward(_scores())
    assert reward_BT.dtype == torch.float32
    torch.testing.assert_close(reward_BT, torch.tensor(expected))


@pytest.mark.parametrize("poison", [1e6, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reward", ALL)
def test_masked_positions_are_inert(reward: Reward, poison: float) -> None:
    torch.testing.assert_close(reward(_scores(poison)), reward(_scores()), rtol=0, atol=0)


def test_sentence_reward_lies_before_right_padding() -> None:
    mask_BT = torch.tensor([[False, True, True, False]])
    scores = dataclasses.replace(
        _scores(),
        response_mask_BT=mask_BT,
        teacher_logp_BT=torch.tensor([[0.0, -1.0, -1.0, 0.0]]),
        reference_logp_BT=torch.tensor([[0.0, -2.0, -3.0, 0.0]]),
    )
    # 1 + 2 = 3, at column 2
    torch.testing.assert_close(SentenceReward()(scores), torch.tensor([[0.0, 0.0, 3.0, 0.0]]))


def test_values_telescope_to_the_first_state() -> None:
    scores = _scores()
    total_B = DenseWithValueReward()(scores).sum(dim=1)
    # dV of the first state of the response: 8 - 7 = 1, 5 - 1 = 4, none
    torch.testing.assert_close(total_B, DenseReward()(scores).sum(dim=1) + torch.tensor([1.0, 4.0, 0.0]))


def test_dense_and_sentence_rewards_have_the_same_sum() -> None:
    torch.testing.assert_close(SentenceReward()(_scores()).sum(dim=1), DenseReward()(_scores()).sum(dim=1))


def test_last_token_mask() -> None:
    expected_BT = torch.tensor([[False, False, False, True], [False, False, False, True], [False] * 4])
    torch.testing.assert_close(last_token_mask(MASK_BT), expected_BT)
    torch.testing.assert_close(
        last_token_mask(torch.tensor([[True, True, False, False]])), torch.tensor([[False, True, False, False]])
    )


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, -2.0), (math.nan, 1.0), (0.0, math.nan)])
@pytest.mark.parametrize("kind", [DenseReward, SentenceReward])
def test_limits_must_be_in_order(kind: type[DenseReward | SentenceReward], low: float, high: float) -> None:
    with pytest.raises(ValueError, match="clip_low must be below clip_high, got"):
        kind(clip_low=low, clip_high=high)


def test_one_sided_limit_leaves_costs_alone() -> None:
    expected = torch.tensor([[0, 0.0, -1.0, 0.0], [0, 0, -2.0, 0.0], [0, 0, 0, 0.0]])
    torch.testing.assert_close(DenseReward(clip_high=0.0)(_scores()), expected)


def test_clip_counts_what_a_limit_changed() -> None:
    # Of 5 token rewards 0.5, -1, 1.5, -2, 0.25 three lie outside [-0.75, 0.75]; of 2 sums 1, -1.75 one outside 1.25.
    dense = DenseReward(clip_low=-0.75, clip_high=0.75)
    assert dense.is_clipped
    assert dense.clip_counts(_scores()).tolist() == [3, 5]
    assert SentenceReward(clip_low=-1.25, clip_high=1.25).clip_counts(_scores()).tolist() == [1, 2]
    assert DenseReward().clip_counts(_scores(math.nan)).tolist() == [0, 5]
    assert not DenseReward().is_clipped


def test_missing_values_are_our_own_mistake() -> None:
    assert [reward.needs_values for reward in ALL] == [False] * 5 + [True] * 2
    with pytest.raises(AssertionError, match="not asked for values"):
        DenseWithValueReward()(dataclasses.replace(_scores(), teacher_value_BT=None))
    with pytest.raises(AssertionError, match="not asked for values"):
        DenseWithValueReward()(dataclasses.replace(_scores(), reference_value_BT=None))
