"""Losses whose denominators are arguments, so that micro-batches and ranks add up to the whole optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from dpr_lightning.functional.kl import k2, k3
from dpr_lightning.functional.masking import masked_sum
from dpr_lightning.types import DPRBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss and what to log of it."""

    loss: Tensor
    """Scalar to differentiate: this micro-batch's share of the optimizer step's loss."""
    metrics: dict[str, Tensor]
    """Detached scalars, already divided by the optimizer step's counts: sum them over micro-batches and ranks."""


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def sft_loss(logp_BT: Tensor, mask_BT: Tensor, *, num_tokens: int) -> LossOutput:
    """Return minus the sum of response tokens' log-probabilities over ``num_tokens`` (ALGORITHM.md section 1).

    Args:
        logp_BT: [B, T] log-probabilities.
        mask_BT: [B, T] bool, True on response tokens, EOS included.
        num_tokens: Response tokens of the whole optimizer step.

    Raises:
        ValueError: ``num_tokens`` is below 1.
    """
    _check_count("num_tokens", num_tokens)
    loss = -masked_sum(logp_BT, mask_BT) / num_tokens
    return LossOutput(loss=loss, metrics={"train/loss": loss.detach()})


def reinforce_loss(logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, *, num_sequences: int) -> LossOutput:
    """Return -(1/B) sum_i sum_t log pi * G_t (paper Algorithm 1, to the letter).

    Args:
        logp_BT: [B, T] log-probabilities under the policy.
        advantage_BT: [B, T] detached returns or advantages.
        mask_BT: [B, T] bool, True on response tokens.
        num_sequences: Responses of the whole optimizer step.

    Raises:
        ValueError: ``advantage_BT`` carries gradients, or ``num_sequences`` is below 1.
    """
    _check_count("num_sequences", num_sequences)
    _check_detached(advantage_BT)
    # Masked before the product: behind it, the backward pass would still multiply its 0 by a masked nan.
    loss = -masked_sum(logp_BT * torch.where(mask_BT, advantage_BT, 0.0), mask_BT) / num_sequences
    return LossOutput(loss=loss, metrics={"policy/loss": loss.detach()})


def policy_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    num_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_limit: float = 20.0,
) -> LossOutput:
    """Return the token mean of -min(rho A, clip(rho, 1 - low, 1 + high) A) (ALGORITHM.md section 3, step 6).

    Args:
        logp_BT: [B, T] log-probabilities under the policy that is trained.
        old_logp_BT: [B, T] the same under the policy that sampled.
        advantage_BT: [B, T] detached advantages.
        mask_BT: [B, T] bool, True on response tokens.
        num_tokens: Response tokens of the whole optimizer step.
        clip_low: How far below 1 a ratio still counts, for negative advantages.
        clip_high: How far above 1, for positive ones.
        log_ratio_limit: log rho is clamped to plus and minus this before it is exponentiated.

    Raises:
        ValueError: A clip range is not positive, ``advantage_BT`` carries gradients, or ``num_tokens`` is below 1.
    """
    _check_count("num_tokens", num_tokens)
    _check_detached(advantage_BT)
    _check_clip_range(clip_low, clip_high)
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0)
    ratio_BT = log_ratio_BT.clamp(-log_ratio_limit, log_ratio_limit).exp()
    plain_BT = ratio_BT * advantage_BT
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage_BT
    loss = -masked_sum(torch.minimum(plain_BT, clipped_BT), mask_BT) / num_tokens
    with torch.no_grad():
        is_clipped_BT = clipped_BT < plain_BT
        shares = {
            "policy/clip_share": is_clipped_BT.to(loss.dtype),
            "policy/ratio_mean": ratio_BT,
            "policy/old_kl": k3(old_logp_BT, logp_BT),
        }
        metrics = {name: masked_sum(value_BT, mask_BT) / num_tokens for name, value_BT in shares.items()}
    return LossOutput(loss=loss, metrics={"policy/loss": loss.detach(), **metrics})


def value_loss(
    value_BT: Tensor,
    old_value_BT: Tensor,
    return_BT: Tensor,
    mask_BT: Tensor,
    *,
    num_tokens: int,
    clip: float = 0.2,
) -> LossOutput:
    """Return the token mean of 0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2).

    Args:
        value_BT: [B, T] values of the critic that is trained.
        old_value_BT: [B, T] detached values of the critic as it was when the rollouts were scored.
        return_BT: [B, T] detached returns.
        mask_BT: [B, T] bool, True on response tokens.
        num_tokens: Response tokens of the whole optimizer step.
        clip: How far from its old one a value may move and still come closer to the return; infinity sets no limit.

    Raises:
        ValueError: ``clip`` is not positive, a target carries gradients, or ``num_tokens`` is below 1.
    """
    _check_count("num_tokens", num_tokens)
    if not clip > 0.0:
        raise ValueError(f"clip must be above 0, got {clip}")
    if return_BT.requires_grad or old_value_BT.requires_grad:
        raise ValueError("return_BT and old_value_BT must be detached: they are the critic's targets")
    value_BT, old_value_BT, return_BT = (
        torch.where(mask_BT, values_BT, 0.0) for values_BT in (value_BT, old_value_BT, return_BT)
    )
    plain_BT = (value_BT - return_BT).square()
    clipped_BT = (value_BT.clamp(old_value_BT - clip, old_value_BT + clip) - return_BT).square()
    loss = 0.5 * masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT) / num_tokens
    clip_share = masked_sum((clipped_BT > plain_BT).to(loss.dtype), mask_BT) / num_tokens
    return LossOutput(loss=loss, metrics={"value/loss": loss.detach(), "value/clip_share": clip_share})


def _check_detached(advantage_BT: Tensor) -> None:
    if advantage_BT.requires_grad:
        raise ValueError("advantage_BT must be detached: REINFORCE differentiates log-probabilities only")


def _check_clip_range(clip_low: float, clip_high: float) -> None:
    if not (0.0 < clip_low < 1.0 and clip_high > 0.0):
        raise ValueError(f"need 0 < clip_low < 1 and clip_high > 0, got {clip_low} and {clip_high}")


class PolicyLoss(ABC):
    """A loss over one micro-batch of scored rollouts."""

    @abstractmethod
    def __call__(self, logp_BT: Tensor, batch: DPRBatch) -> LossOutput:
        """Return the micro-batch's share of the optimizer step's loss."""


class ClippedPolicyLoss(PolicyLoss):
    """The clipped ratio, token mean over the optimizer step, with an optional KL term towards the teacher.

    Args:
        clip_low: How far below 1 a ratio still counts.
        clip_high: How far above 1.
        kl_coefficient: Weight of the token mean of the KL estimate, with gradient; 0 leaves it out.
        kl_estimator: k2 (its gradient is the KL's in expectation) or k3.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coefficient: float = 0.0,
        kl_estimator: Literal["k2", "k3"] = "k2",
    ) -> None:
        _check_clip_range(clip_low, clip_high)
        if not kl_coefficient >= 0.0:
            raise ValueError(f"kl_coefficient must be 0 or more, got {kl_coefficient}")
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.kl_coefficient = kl_coefficient
        self.kl_estimator = {"k2": k2, "k3": k3}[kl_estimator]

    @override
    def __call__(self, logp_BT: Tensor, batch: DPRBatch) -> LossOutput:
        mask_BT = batch.response_mask_BT
        out = policy_loss(
            logp_BT,
            batch.old_logp_BT,
            batch.advantage_BT,
            mask_BT,
            num_tokens=batch.num_tokens,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        if self.kl_coefficient == 0.0:
            return out
        kl_BT = self.kl_estimator(torch.where(mask_BT, logp_BT, 0.0), torch.where(mask_BT, batch.teacher_logp_BT, 0.0))
        kl = masked_sum(kl_BT, mask_BT) / batch.num_tokens
        loss = out.loss + self.kl_coefficient * kl
        return LossOutput(
            loss=loss, metrics={**out.metrics, "policy/loss": loss.detach(), "policy/kl_term": kl.detach()}
        )


class ReinforceLoss(PolicyLoss):
    """REINFORCE without ratio or clip, averaged over responses: the paper's Algorithm 1 to the letter."""

    @override
    def __call__(self, logp_BT: Tensor, batch: DPRBatch) -> LossOutput:
        return reinforce_loss(logp_BT, batch.advantage_BT, batch.response_mask_BT, num_sequences=batch.num_sequences)
