"""Advantages: returns less a baseline, on one scale for the whole rollout batch (ALGORITHM.md section 3, step 5)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

AllReduce = Callable[[Tensor], Tensor]
"""Returns the sum of a float64 tensor over all ranks; the identity on one rank."""


def _one_rank(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantages and what was taken out of them."""

    advantage_BT: Tensor
    """[B, T], 0 outside the response."""
    mean: Tensor
    """Scalar mean of the returns over all response tokens of all ranks."""
    std: Tensor
    """Scalar standard deviation of the same, biased."""


def moments(return_BT: Tensor, mask_BT: Tensor, *, all_reduce: AllReduce = _one_rank) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over all response tokens of all ranks, float64, in two passes.

    Raises:
        ValueError: No rank has a response token.
    """
    value_N = return_BT[mask_BT].double()
    count, total = all_reduce(torch.stack([mask_BT.sum().double(), value_N.sum()])).unbind()
    if count == 0:
        raise ValueError("there is no response token in the rollout batch")
    mean = total / count
    variance = all_reduce((value_N - mean).square().sum()) / count
    return mean, variance


def normalize(
    return_BT: Tensor, mask_BT: Tensor, *, all_reduce: AllReduce = _one_rank, eps: float = 1e-8
) -> Advantages:
    """Return (G - mean) / sqrt(max(var, eps)) over all response tokens of the rollout batch and all ranks.

    Args:
        return_BT: [B, T] returns.
        mask_BT: [B, T] bool, True on response tokens.
        all_reduce: Sums a float64 tensor over ranks.
        eps: Floor of the variance.
    """
    mean, variance = moments(return_BT, mask_BT, all_reduce=all_reduce)
    scaled_BT = (return_BT.double() - mean) / variance.clamp(min=eps).sqrt()
    return Advantages(
        advantage_BT=torch.where(mask_BT, scaled_BT, 0.0).to(return_BT.dtype), mean=mean, std=variance.sqrt()
    )


def leave_one_out(return_BT: Tensor, mask_BT: Tensor, prompt_index_B: Tensor) -> Tensor:
    """Return each G_t less the mean return of the other samples of its prompt; 0 outside the response.

    The baseline of a sample is the mean over the *other* samples j of their G at the response's first token. It does
    not depend on the sample's own actions, so the gradient stays unbiased for every t.

    Args:
        return_BT: [B, T] returns.
        mask_BT: [B, T] bool, True on response tokens.
        prompt_index_B: [B] int64; rows with the same number answer the same prompt, and all are on this rank.

    Raises:
        ValueError: Some prompt has one sample only.
    """
    is_first_BT = mask_BT & (mask_BT.cumsum(dim=1) == 1)
    total_B = torch.where(is_first_BT, return_BT, 0.0).sum(dim=1)
    _, group_B, count_G = prompt_index_B.unique(return_inverse=True, return_counts=True)
    if int(count_G.min()) < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 samples of each prompt (data.samples_per_prompt)")
    sum_G = torch.zeros(len(count_G), dtype=total_B.dtype, device=total_B.device).index_add_(0, group_B, total_B)
    baseline_B = (sum_G[group_B] - total_B) / (count_G[group_B] - 1)
    return torch.where(mask_BT, return_BT - baseline_B[:, None], 0.0)


class AdvantageEstimator(ABC):
    """Turns returns into advantages.

    Args:
        leave_one_out: First subtract the mean return of the prompt's other samples; needs several samples a prompt.
    """

    def __init__(self, leave_one_out: bool = False) -> None:
        self.leave_one_out = leave_one_out

    @abstractmethod
    def __call__(
        self, return_BT: Tensor, mask_BT: Tensor, prompt_index_B: Tensor, *, all_reduce: AllReduce = _one_rank
    ) -> Advantages:
        """Return advantages of this rank's responses, on the scale of all ranks."""


class WhitenedAdvantage(AdvantageEstimator):
    """Mean 0 and variance 1 over all response tokens of the rollout batch and all ranks.

    Args:
        leave_one_out: First subtract the mean return of the prompt's other samples; needs several samples a prompt.
    """

    @override
    def __call__(
        self, return_BT: Tensor, mask_BT: Tensor, prompt_index_B: Tensor, *, all_reduce: AllReduce = _one_rank
    ) -> Advantages:
        if self.leave_one_out:
            return_BT = leave_one_out(return_BT, mask_BT, prompt_index_B)
        return normalize(return_BT, mask_BT, all_reduce=all_reduce)


class RawAdvantage(AdvantageEstimator):
    """The returns themselves, as in the letter of the paper's Algorithm 1.

    Args:
        leave_one_out: Subtract the mean return of the prompt's other samples; needs several samples a prompt.
    """

    @override
    def __call__(
        self, return_BT: Tensor, mask_BT: Tensor, prompt_index_B: Tensor, *, all_reduce: AllReduce = _one_rank
    ) -> Advantages:
        if self.leave_one_out:
            return_BT = leave_one_out(return_BT, mask_BT, prompt_index_B)
        mean, variance = moments(return_BT, mask_BT, all_reduce=all_reduce)
        return Advantages(advantage_BT=torch.where(mask_BT, return_BT, 0.0), mean=mean, std=variance.sqrt())
