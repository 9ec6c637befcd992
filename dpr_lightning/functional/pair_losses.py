"""Losses over pairs of a demonstration and a sample: SPIN, and the five of GSIL (ALGORITHM.md section 5).

Shapes: P pairs. A log-ratio is log pi - log pi_k of a whole response, summed over its tokens, in nats: pi is the
policy that is trained, pi_k the one that drew the samples, which is the start and the reference of the iteration.
Sources: arXiv 2401.01335 (SPIN), arXiv 2410.10093 (GSIL).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from dpr_lightning.functional.losses import LossOutput


def spin(demonstration_P: Tensor, sample_P: Tensor, *, beta: float) -> Tensor:
    """Return [P]: -log sigmoid(beta * (log-ratio of the demonstration - log-ratio of the sample))."""
    return -logsigmoid(beta * (demonstration_P - sample_P))


def bernoulli(f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
    """Return [P]: -log sigmoid(f+) - log sigmoid(-f-), logistic regression between the two kinds."""
    return -logsigmoid(f_demonstration_P) - logsigmoid(-f_sample_P)


def brier(f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
    """Return [P]: (sigmoid(f+) - 1)^2 + sigmoid(f-)^2."""
    # 1 - sigmoid(f) is sigmoid(-f), which keeps its digits where f is large.
    return torch.sigmoid(-f_demonstration_P).square() + torch.sigmoid(f_sample_P).square()


def hinge(f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
    """Return [P]: max(0, 1 - f+) + max(0, 1 + f-)."""
    return torch.relu(1.0 - f_demonstration_P) + torch.relu(1.0 + f_sample_P)


def kliep(f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
    """Return [P]: -f+ + e^(f-)."""
    return -f_demonstration_P + f_sample_P.exp()


def lsif(f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
    """Return [P]: -e^(f+) + e^(2 f-) / 2."""
    return -f_demonstration_P.exp() + 0.5 * (2.0 * f_sample_P).exp()


class PairLoss(ABC):
    """A loss over pairs, averaged over those of the optimizer step."""

    @property
    def num_iterations(self) -> int | None:
        """Iterations that the loss has settings for; None where they are the same in all."""
        return None

    @abstractmethod
    def of_pairs(self, demonstration_P: Tensor, sample_P: Tensor, *, iteration: int) -> Tensor:
        """Return [P], the loss of each pair.

        Args:
            demonstration_P: [P] log-ratios of the demonstrations.
            sample_P: [P] log-ratios of the samples of the same prompts.
            iteration: k, from 0.
        """

    def __call__(self, demonstration_P: Tensor, sample_P: Tensor, *, num_pairs: int, iteration: int = 0) -> LossOutput:
        """Return the micro-batch's share of the optimizer step's loss, and of what to log.

        ``pairs/margin`` is the mean of the demonstration's log-ratio less the sample's, in nats per pair;
        ``pairs/accuracy`` the share of pairs in which it is positive; the two log-ratios are logged as means too.

        Args:
            demonstration_P: [P] log-ratios of the demonstrations.
            sample_P: [P] log-ratios of the samples of the same prompts.
            num_pairs: Pairs of the whole optimizer step: every micro-batch of every rank.
            iteration: k, from 0.

        Raises:
            ValueError: ``num_pairs`` is below 1, or the two do not have one shape [P].
        """
        if num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
        if demonstration_P.shape != sample_P.shape or demonstration_P.dim() != 1:
            raise ValueError(
                f"log-ratios must both be [P], got {tuple(demonstration_P.shape)} and {tuple(sample_P.shape)}"
            )
        loss = self.of_pairs(demonstration_P, sample_P, iteration=iteration).sum() / num_pairs
        margin_P = (demonstration_P - sample_P).detach()
        sums = {
            "pairs/margin": margin_P,
            "pairs/accuracy": (margin_P > 0.0).to(margin_P.dtype),
            "pairs/demonstration_log_ratio": demonstration_P.detach(),
            "pairs/sample_log_ratio": sample_P.detach(),
        }
        means = {name: values_P.sum() / num_pairs for name, values_P in sums.items()}
        return LossOutput(loss=loss, metrics={"policy/loss": loss.detach(), **means})


class SPINLoss(PairLoss):
    """Self-play fine-tuning: the demonstration is to gain more over pi_k than the sample.

    Args:
        beta: Weight of the difference of log-ratios: one number, or one for each iteration.
    """

    def __init__(self, beta: float | list[float] = 0.1) -> None:
        betas = beta if isinstance(beta, list) else [beta]
        if not betas or not all(value > 0.0 for value in betas):
            raise ValueError(f"beta must be above 0, or a list of such numbers, got {beta}")
        self.beta = beta

    @property
    @override
    def num_iterations(self) -> int | None:
        return len(self.beta) if isinstance(self.beta, list) else None

    @override
    def of_pairs(self, demonstration_P: Tensor, sample_P: Tensor, *, iteration: int) -> Tensor:
        beta = self.beta[iteration] if isinstance(self.beta, list) else self.beta
        return spin(demonstration_P, sample_P, beta=beta)


class GSILLoss(PairLoss):
    """Generalized self-imitation: f = scale * log-ratio + shift is to tell demonstrations (f+) from samples (f-).

    Args:
        scale: a, the weight of the log-ratio.
        shift: b, f where the policy has not moved.
    """

    def __init__(self, scale: float = 0.01, shift: float = 2.0) -> None:
        if not scale > 0.0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.scale = scale
        self.shift = shift

    @abstractmethod
    def of_scores(self, f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
        """Return [P], the loss of each pair, from f+ and f-."""

    @override
    def of_pairs(self, demonstration_P: Tensor, sample_P: Tensor, *, iteration: int) -> Tensor:
        return self.of_scores(self.scale * demonstration_P + self.shift, self.scale * sample_P + self.shift)


class BernoulliGSILLoss(GSILLoss):
    """Logistic regression, the paper's default: -log sigmoid(f+) - log sigmoid(-f-)."""

    @override
    def of_scores(self, f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
        return bernoulli(f_demonstration_P, f_sample_P)


class BrierGSILLoss(GSILLoss):
    """The Brier score: (sigmoid(f+) - 1)^2 + sigmoid(f-)^2."""

    @override
    def of_scores(self, f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
        return brier(f_demonstration_P, f_sample_P)


class HingeGSILLoss(GSILLoss):
    """The hinge: max(0, 1 - f+) + max(0, 1 + f-)."""

    @override
    def of_scores(self, f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
        return hinge(f_demonstration_P, f_sample_P)


class KLIEPGSILLoss(GSILLoss):
    """Kullback-Leibler importance estimation: -f+ + e^(f-)."""

    @override
    def of_scores(self, f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
        return kliep(f_demonstration_P, f_sample_P)


class LSIFGSILLoss(GSILLoss):
    """Least-squares importance fitting: -e^(f+) + e^(2 f-) / 2."""

    @override
    def of_scores(self, f_demonstration_P: Tensor, f_sample_P: Tensor) -> Tensor:
        return lsif(f_demonstration_P, f_sample_P)
