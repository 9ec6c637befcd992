"""Token rewards read out of teacher and reference (ALGORITHM.md section 2; paper Eq. 4, Eq. 5, Table 2).

Every reward maps ``TokenScores`` to [B, T] float32, 0 outside the response.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from dpr_lightning.types import TokenScores


class Reward(ABC):
    """A token reward."""

    needs_values: bool = False
    """True where the reward uses V of teacher and reference."""

    @abstractmethod
    def __call__(self, scores: TokenScores) -> Tensor:
        """Return [B, T] float32 rewards, 0 outside the response."""


class ClippedReward(Reward):
    """A reward whose values can be limited.

    Args:
        clip_low: Values below are raised to this; None sets no limit.
        clip_high: Values above are lowered to this; None sets no limit.
    """

    def __init__(self, clip_low: float | None = None, clip_high: float | None = None) -> None:
        low = -math.inf if clip_low is None else clip_low
        high = math.inf if clip_high is None else clip_high
        if not low < high:
            raise ValueError(f"clip_low must be below clip_high, got {clip_low} and {clip_high}")
        self.low = low
        self.high = high

    @property
    def is_clipped(self) -> bool:
        """True where a limit is set."""
        return self.low > -math.inf or self.high < math.inf

    @abstractmethod
    def unclipped(self, scores: TokenScores) -> tuple[Tensor, Tensor]:
        """Return [B, T] values before any limit, and [B, T] bool, True on the tokens that carry one."""

    @override
    def __call__(self, scores: TokenScores) -> Tensor:
        value_BT, carries_BT = self.unclipped(scores)
        return torch.where(carries_BT, value_BT.clamp(self.low, self.high), 0.0)

    def clip_counts(self, scores: TokenScores) -> Tensor:
        """Return [2] float64: how many values hit a limit, and how many there are."""
        value_BT, carries_BT = self.unclipped(scores)
        is_hit_BT = carries_BT & ((value_BT < self.low) | (value_BT > self.high))
        return torch.stack([is_hit_BT.sum(), carries_BT.sum()]).double()


class DenseReward(ClippedReward):
    """r_hat_t = log pi_SFT(a_t|s_t) - log pi_ref(a_t|s_t), the EOS token's included (paper Eq. 5).

    Args:
        clip_low: Limit of each token's reward from below, in nats; None sets none, as in the paper.
        clip_high: Limit from above, likewise. With 0, tokens that SFT moved away from cost, and none pays.
    """

    @override
    def unclipped(self, scores: TokenScores) -> tuple[Tensor, Tensor]:
        return scores.teacher_logp_BT - scores.reference_logp_BT, scores.response_mask_BT


class SentenceReward(ClippedReward):
    """The sum of the token rewards over the response, given at its last token only (paper section 5.1, SR).

    Args:
        clip_low: Limit of the sum from below, in nats; None sets none. OpenRLHF uses -10.
        clip_high: Limit of the sum from above, likewise. OpenRLHF uses 10.
        token_reward: What is summed; None is r_hat, as in the paper.
    """

    def __init__(
        self, clip_low: float | None = None, clip_high: float | None = None, token_reward: Reward | None = None
    ) -> None:
        super().__init__(clip_low, clip_high)
        self.token_reward = token_reward if token_reward is not None else DenseReward()
        self.needs_values = self.token_reward.needs_values

    @override
    def unclipped(self, scores: TokenScores) -> tuple[Tensor, Tensor]:
        sum_B = self.token_reward(scores).sum(dim=1)
        return sum_B[:, None].expand(scores.response_mask_BT.shape), last_token_mask(scores.response_mask_BT)


class TeacherLogprobReward(Reward):
    """log pi_SFT(a_t|s_t) alone: the ablation without the reference as a baseline (paper Table 2, wo/Baseline)."""

    @override
    def __call__(self, scores: TokenScores) -> Tensor:
        return torch.where(scores.response_mask_BT, scores.teacher_logp_BT, 0.0)


class DenseWithValueReward(Reward):
    """r_hat_t + dV(s_t) - dV(s_{t+1}), dV = V_SFT - V_ref, and V = 0 after the last token (paper Eq. 4; Table 2, w/V).

    Args:
        relative: False gives the table's literal caption, log pi_SFT + V_SFT(s_t) - V_SFT(s_{t+1}), with no reference.
    """

    needs_values = True

    def __init__(self, relative: bool = True) -> None:
        self.relative = relative

    @override
    def __call__(self, scores: TokenScores) -> Tensor:
        assert scores.teacher_value_BT is not None, "score_tokens was not asked for values"
        assert scores.reference_value_BT is not None, "score_tokens was not asked for values"
        reward_BT, value_BT = scores.teacher_logp_BT, scores.teacher_value_BT
        if self.relative:
            reward_BT = reward_BT - scores.reference_logp_BT
            value_BT = value_BT - scores.reference_value_BT
        value_BT = torch.where(scores.response_mask_BT, value_BT, 0.0)
        # value_BT[b, t] is V of the state in which token t was chosen; the next state's stands one column further on,
        # and is 0 behind the last token of the response.
        next_value_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], dim=1)
        return torch.where(scores.response_mask_BT, reward_BT + value_BT - next_value_BT, 0.0)


def last_token_mask(response_mask_BT: Tensor) -> Tensor:
    """Return [B, T] bool, True at the last token of each response; rows without a response have none."""
    following_BT = torch.cat([response_mask_BT[:, 1:], torch.zeros_like(response_mask_BT[:, :1])], dim=1)
    return response_mask_BT & ~following_BT
