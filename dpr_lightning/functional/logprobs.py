"""Token log-probabilities from hidden states, without ever holding a [N, V] tensor.

Shapes: N response tokens, V vocabulary entries, D hidden units. Logits are made in chunks of tokens in the forward
pass and made again in the backward pass, so that memory is O(chunk * V) whatever N is. The gradient is the closed form
d logp / d logits = onehot(target) - softmax(logits), exact to rounding. Everything after the matrix product is
float32 (float64 for float64 input): bfloat16 log-probabilities are too coarse for ratios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class LMHead:
    """A linear output layer and what its family does to the logits after it."""

    weight_VD: Tensor
    """[V, D], in the type of the hidden states."""
    bias_V: Tensor | None = None
    """[V], in the same type."""
    logit_softcap: float | None = None
    """Logits x become c * tanh(x / c)."""
    logit_scale: float = 1.0
    """Logits are multiplied by this, before the softcap."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return [N, V] logits: float32, or float64 for float64 input."""
        logits_NV = hidden_ND @ self.weight_VD.T
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V
        logits_NV = logits_NV.to(_wide(logits_NV.dtype))
        if self.logit_scale != 1.0:
            logits_NV = logits_NV * self.logit_scale
        if self.logit_softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.logit_softcap) * self.logit_softcap
        return logits_NV


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What one policy says of N tokens."""

    logp_N: Tensor
    """[N] float32 log-probability of each token; the only differentiable field."""
    logsumexp_N: Tensor
    """[N] float32 logsumexp of the logits, V(s) of the soft Q-function (paper Prop. 1)."""
    entropy_N: Tensor | None
    """[N] float32 entropy of the whole distribution in nats, if it was asked for."""


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        logit_softcap: float | None,
        logit_scale: float,
        chunk_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = LMHead(weight_VD=weight_VD, bias_V=bias_V, logit_softcap=logit_softcap, logit_scale=logit_scale)
        num_tokens = hidden_ND.shape[0]
        logp_N = torch.empty(num_tokens, dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
        logsumexp_N = torch.empty_like(logp_N)
        entropy_N = torch.empty_like(logp_N) if with_entropy else logp_N.new_empty(0)
        for start in range(0, num_tokens, chunk_size):
            part = slice(start, start + chunk_size)
            logits_CV = head.logits(hidden_ND[part])
            logsumexp_C = logits_CV.logsumexp(dim=-1)
            logsumexp_N[part] = logsumexp_C
            logp_N[part] = logits_CV.gather(1, target_N[part, None]).squeeze(1) - logsumexp_C
            if with_entropy:
                # H = logsumexp - E[logits]
                prob_CV = (logits_CV - logsumexp_C[:, None]).exp_()
                entropy_N[part] = logsumexp_C - torch.linalg.vecdot(prob_CV, logits_CV)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, logsumexp_N)
        ctx.settings = (logit_softcap, logit_scale, chunk_size)
        ctx.mark_non_differentiable(logsumexp_N, entropy_N)
        return logp_N, logsumexp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_N, logsumexp_N = ctx.saved_tensors
        logit_softcap, logit_scale, chunk_size = ctx.settings
        head = LMHead(weight_VD=weight_VD, bias_V=bias_V, logit_softcap=logit_softcap, logit_scale=logit_scale)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = _wide(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        for start in range(0, hidden_ND.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            logits_CV = head.logits(hidden_ND[part])
            grad_C = grad_N[part]
            # d logp / d logits = onehot - softmax
            grad_logits_CV = (logits_CV - logsumexp_N[part, None]).exp_().mul_(-grad_C[:, None])
            grad_logits_CV.scatter_add_(1, target_N[part, None], grad_C[:, None])
            if logit_softcap is not None:
                # d (c tanh(x / c)) / dx = 1 - (capped / c)^2
                grad_logits_CV.mul_(1.0 - (logits_CV / logit_softcap).square_())
            if logit_scale != 1.0:
                grad_logits_CV.mul_(logit_scale)
            if grad_bias_V is not None:
                grad_bias_V += grad_logits_CV.sum(dim=0)
            narrow_CV = grad_logits_CV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = narrow_CV @ weight_VD
            if grad_weight_VD is not None:
                if wide == weight_VD.dtype:
                    grad_weight_VD.addmm_(narrow_CV.T, hidden_ND[part])
                else:
                    grad_weight_VD += narrow_CV.T @ hidden_ND[part]
        return (
            grad_hidden_ND,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *[None] * 5,
        )


def _check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def token_logprobs(
    hidden_ND: Tensor, head: LMHead, target_N: Tensor, *, chunk_size: int = 1024, with_entropy: bool = False
) -> TokenLogprobs:
    """Return log softmax(head(hidden))[target] of N tokens; differentiable in hidden states, weight and bias.

    Args:
        hidden_ND: [N, D] last hidden states, any floating type; N may be 0.
        head: Output layer, in the same type.
        target_N: [N] int64 ids.
        chunk_size: Tokens whose [chunk, V] logits exist at one time.
        with_entropy: Also return the entropy of each distribution.

    Raises:
        ValueError: ``chunk_size`` is below 1 or the shapes do not agree.
    """
    _check_chunk_size(chunk_size)
    if hidden_ND.dim() != 2 or target_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"need hidden [N, D] and target [N], got {tuple(hidden_ND.shape)} and {tuple(target_N.shape)}")
    logp_N, logsumexp_N, entropy_N = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head.weight_VD,
        head.bias_V,
        target_N,
        head.logit_softcap,
        head.logit_scale,
        chunk_size,
        with_entropy,
    )
    return TokenLogprobs(logp_N=logp_N, logsumexp_N=logsumexp_N, entropy_N=entropy_N if with_entropy else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateExpectations:
    """Expectations over the acting policy's whole distribution at each of N states, in nats."""

    log_ratio_N: Tensor
    """[N] float32, E[clamp(log pi_SFT(a) - log pi_ref(a))] for a drawn from pi_old."""
    teacher_kl_N: Tensor
    """[N] float32, KL(pi_old || pi_SFT)."""


@torch.no_grad()
def state_expectations(
    old: tuple[Tensor, LMHead],
    teacher: tuple[Tensor, LMHead],
    *references: tuple[Tensor, LMHead],
    low: float = -math.inf,
    high: float = math.inf,
    chunk_size: int = 1024,
) -> StateExpectations:
    """Return the exact expectation of the dense reward, and of log pi_old - log pi_SFT, at each of N states.

    Args:
        old: Hidden states [N, D] and output layer of the policy that acts.
        teacher: The same of pi_SFT at the same states; D may differ, V may not.
        references: The same of pi_ref; of several, the mean log-probability counts.
        low: The log-ratio is raised to this where it lies below.
        high: And lowered to this where it lies above.
        chunk_size: States whose [chunk, V] logits exist at one time, once for each policy.

    Raises:
        ValueError: ``chunk_size`` is below 1, or there is no reference.
    """
    _check_chunk_size(chunk_size)
    if not references:
        raise ValueError("need at least one reference")
    hidden_ND = old[0]
    log_ratio_N = torch.empty(hidden_ND.shape[0], dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
    teacher_kl_N = torch.empty_like(log_ratio_N)
    for start in range(0, hidden_ND.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        old_logp_CV, teacher_logp_CV, reference_logp_CV, *others = (
            head.logits(states_ND[part]).log_softmax(dim=-1) for states_ND, head in (old, teacher, *references)
        )
        for other_CV in others:
            reference_logp_CV += other_CV
        if others:
            reference_logp_CV /= len(references)
        old_prob_CV = old_logp_CV.exp()
        ratio_CV = (teacher_logp_CV - reference_logp_CV).clamp_(low, high)
        log_ratio_N[part] = torch.linalg.vecdot(old_prob_CV, ratio_CV)
        teacher_kl_N[part] = torch.linalg.vecdot(old_prob_CV, old_logp_CV.sub_(teacher_logp_CV))
    return StateExpectations(log_ratio_N=log_ratio_N, teacher_kl_N=teacher_kl_N)
