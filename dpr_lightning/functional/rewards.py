"""Token rewards read out of teacher and reference (ALGORITHM.md section 2; paper Eq. 4, Eq. 5, Table 2).

Every reward maps ``TokenScores`` to [B, T] float32, 0 outside the response.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dpr_lightning.types import TokenScores


class Reward(ABC):
    """A token reward."""

    needs_values: ClassVar[bool] = False
    """True where the reward uses V of teacher and reference."""

    @abstractmethod
    def __call__(self, scores: TokenScores) -> Tensor:
        """Return [B, T] float32 rewards, 0 outside the response."""


def _check_clip(clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or null, got {clip}")


class DenseReward(Reward):
    """r_hat_t = log pi_SFT(a_t|s_t) - log pi_ref(a_t|s_t), the EOS token's included (paper Eq. 5).

    Args:
        clip: Limit each token's reward to [-clip, clip] nats; None leaves it as it is, as in the paper.
    """

    def __init__(self, clip: float | None = None) -> None:
        _check_clip(clip)
        self.clip = clip

    @override
    def __call__(self, scores: TokenScores) -> Tensor:
        reward_BT = scores.teacher_logp_BT - scores.reference_logp_BT
        if self.clip is not None:
            reward_BT = reward_BT.clamp(-self.clip, self.clip)
        return torch.where(scores.response_mask_BT, reward_BT, 0.0)


class SentenceReward(Reward):
    """The sum of r_hat over the response, given at its last token only (paper section 5.1, SR).

    Args:
        clip: Limit the sum to [-clip, clip]; None leaves it as it is. OpenRLHF uses 10.
    """

    def __init__(self, clip: float | None = None) -> None:
        _check_clip(clip)
        self.clip = clip

    @override
    def __call__(self, scores: TokenScores) -> Tensor:
        sum_B = DenseReward()(scores).sum(dim=1)
        if self.clip is not None:
            sum_B = sum_B.clamp(-self.clip, self.clip)
        return torch.where(last_token_mask(scores.response_mask_BT), sum_B[:, None], 0.0)


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
