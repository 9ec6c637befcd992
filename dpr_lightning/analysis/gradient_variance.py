"""The variance of the policy gradient under each way of crediting tokens (ALGORITHM.md section 4).

The samples of a prompt are split into two halves. Each half's mean gradient is one draw of the same estimator, so half
their squared distance is an unbiased estimate of its variance, baselines over the half's own samples included; and the
gradients of different prompts are independent, which gives the squared norm of the mean without the noise in it.

Shapes: B responses, T positions, P prompts, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpr_lightning.functional.advantages import leave_one_out
from dpr_lightning.functional.masking import masked_mean
from dpr_lightning.functional.returns import DiscountedReturns, ExpectedReturns
from dpr_lightning.functional.rewards import DenseReward, SentenceReward
from dpr_lightning.types import TokenScores

BASELINES = ("none", "batch mean", "leave one out")
"""What is taken off the returns. The batch's mean is what whitening takes; its scale changes no direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """One way of crediting tokens."""

    reward: str
    """dense, sentence or expected."""
    gamma: float
    baseline: str

    @property
    def is_undiscounted(self) -> bool:
        """True where the gradient of the undiscounted return is estimated: all such have the same mean."""
        return self.gamma == 1.0


def credits_of(
    scores: TokenScores,
    half_B: Tensor,
    *,
    dense: DenseReward,
    gammas: Sequence[float] = (1.0,),
) -> dict[Credit, Tensor]:
    """Return [B, T] advantages under each way of crediting, by the package's own rewards, returns and baselines.

    Args:
        scores: Scored responses, with expectations.
        half_B: [B] int64, which half of which prompt's samples each response belongs to.
        dense: The token reward, with its limits.
        gammas: Discounts of the plain returns; 1 is always among them.
    """
    mask_BT = scores.response_mask_BT
    dense_BT, sentence_BT = dense(scores), SentenceReward(token_reward=dense)(scores)
    returns = {("expected", 1.0): ExpectedReturns()(dense_BT, scores.expected_dense_BT, mask_BT)}
    for gamma in dict.fromkeys([1.0, *gammas]):
        plain = DiscountedReturns(gamma)
        returns["dense", gamma] = plain(dense_BT, None, mask_BT)
        # A discounted sentence reward pays early tokens less for nothing; it is no method of anyone's.
        if gamma == 1.0:
            returns["sentence", gamma] = plain(sentence_BT, None, mask_BT)
    found = {}
    for (reward, gamma), return_BT in sorted(returns.items()):
        centred_BT = torch.where(mask_BT, return_BT - masked_mean(return_BT, mask_BT), 0.0)
        others_BT = leave_one_out(return_BT, mask_BT, half_B)
        for baseline, advantage_BT in zip(BASELINES, (return_BT, centred_BT, others_BT), strict=True):
            found[Credit(reward=reward, gamma=gamma, baseline=baseline)] = advantage_BT
    return found


@dataclass(slots=True)
class GradientMoments:
    """What is kept of one estimator's gradients: two vectors, and a number for each prompt."""

    num_samples: int
    """Responses of half a prompt's samples."""
    within_P: list[float] = field(default_factory=list)
    """Unbiased estimate of tr Cov of a single response's gradient given its prompt."""
    squared_norms: float = 0.0
    """Sum over prompts of the squared norm of the prompt's mean gradient."""
    inner_products: float = 0.0
    """Sum over prompts of its inner product with the base estimator's."""
    total_D: Tensor | None = None
    """Sum over prompts of the mean gradient."""

    def add(self, first_D: Tensor, second_D: Tensor, base_D: Tensor) -> None:
        """Take the mean gradients of a prompt's two halves, and the base estimator's mean of both."""
        mean_D = (first_D + second_D) / 2
        self.within_P.append(self.num_samples / 2 * float((first_D - second_D).square().sum(dtype=torch.float64)))
        self.squared_norms += float(mean_D.square().sum(dtype=torch.float64))
        self.inner_products += float((mean_D * base_D).sum(dtype=torch.float64))
        self.total_D = mean_D.clone() if self.total_D is None else self.total_D.add_(mean_D)

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.within_P)

    @property
    def within(self) -> float:
        """Tr Cov of a single response's gradient given its prompt, mean over prompts."""
        return sum(self.within_P) / len(self.within_P)

    @property
    def squared_mean(self) -> float:
        """|E g|^2, unbiased: may fall below 0 where the mean drowns in noise."""
        assert self.total_D is not None
        pairs = self.num_prompts * (self.num_prompts - 1)
        return (float(self.total_D.square().sum(dtype=torch.float64)) - self.squared_norms) / pairs

    def product_with(self, base: GradientMoments) -> float:
        """<E g, E g_base>, unbiased likewise."""
        assert self.total_D is not None
        assert base.total_D is not None
        pairs = self.num_prompts * (self.num_prompts - 1)
        return (float((self.total_D * base.total_D).sum(dtype=torch.float64)) - self.inner_products) / pairs

    @property
    def between(self) -> float:
        """Tr Cov of the prompts' own mean gradients, unbiased: what more samples of a prompt cannot lower."""
        noise = self.within / (2 * self.num_samples)
        return self.squared_norms / self.num_prompts - noise - self.squared_mean


def measure_gradients(
    prompts: Iterable[Callable[[], tuple[Mapping[Credit, Tensor], Mapping[Credit, Tensor]]]],
    base: Credit,
    *,
    num_samples: int,
) -> dict[Credit, GradientMoments]:
    """Gather the moments of every estimator over prompts.

    Args:
        prompts: For each prompt a function that returns, by estimator, the [D] mean gradients of both halves.
        base: The estimator that others are compared with.
        num_samples: Responses of each half.
    """
    moments: dict[Credit, GradientMoments] = {}
    for gradients_of in prompts:
        first, second = gradients_of()
        base_D = (first[base] + second[base]) / 2
        for credit in first:
            moments.setdefault(credit, GradientMoments(num_samples)).add(first[credit], second[credit], base_D)
    return moments
