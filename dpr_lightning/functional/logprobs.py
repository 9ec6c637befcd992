"""Token log-probabilities from hidden states, without ever holding a [N, V] tensor.

Shapes: N response tokens, V vocabulary entries, D hidden units. Logits are made in tiles of some tokens by some
entries, so that memory beside the result is a constant whatever N and V are. The gradient is the closed form
d logp / d logits = onehot(target) - softmax(logits), exact to rounding. Everything after the matrix product is
float32 (float64 for float64 input): bfloat16 log-probabilities are too coarse for ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_TILE = 2**22
"""Logits of a tile: 16 MiB in float32 lie in a CPU's cache, and keep a GPU busy."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class LMHead:
    """A linear output layer and what its family does to the logits after it."""

    weight_VD: Tensor
    """[V, D], in the type of the hidden states."""
    bias_V: Tensor | None = None
    """[V], in any type: it is added in float32."""
    logit_softcap: float | None = None
    """Logits x become c * tanh(x / c)."""
    logit_scale: float = 1.0
    """Logits are multiplied by this, before the softcap."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return [N, V] logits: float32, or float64 for float64 input."""
        return self.postprocess_logits(hidden_ND @ self.weight_VD.T)

    def postprocess_logits(self, product_NV: Tensor) -> Tensor:
        """Return [N, V] logits of products with the weight: float32 or float64, bias added, as the family has them."""
        logits_NV = product_NV.to(_wide(product_NV.dtype))
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V.to(logits_NV.dtype)
        if self.logit_scale != 1.0:
            logits_NV = logits_NV * self.logit_scale
        if self.logit_softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.logit_softcap) * self.logit_softcap
        return logits_NV

    def slope(self, logits: Tensor) -> Tensor:
        """Return what the softcap multiplies gradients by, at logits after it: d (c tanh(x / c)) / dx."""
        assert self.logit_softcap is not None
        return 1.0 - (logits / self.logit_softcap).square_()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What one policy says of N tokens."""

    logp_N: Tensor
    """[N] float32 log-probability of each token; the only differentiable field."""
    logsumexp_N: Tensor
    """[N] float32 logsumexp of the logits, V(s) of the soft Q-function (paper Prop. 1)."""
    entropy_N: Tensor | None
    """[N] float32 entropy of the whole distribution in nats, if it was asked for."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How [N, V] logits are cut: a tile is made, used and forgotten while it lies in the processor's cache."""

    num_tokens: int
    num_entries: int

    @classmethod
    def of(cls, hidden_ND: Tensor, chunk_size: int) -> _Tiles:
        num_tokens = max(1, min(chunk_size, hidden_ND.shape[0]))
        return cls(num_tokens, max(1, _TILE // num_tokens))

    def of_tokens(self, hidden_ND: Tensor) -> Iterator[slice]:
        return (slice(start, start + self.num_tokens) for start in range(0, hidden_ND.shape[0], self.num_tokens))

    def of_entries(self, head: LMHead) -> Iterator[tuple[int, LMHead]]:
        """Yield the output layer's parts, each with the id of its first entry."""
        for start in range(0, head.weight_VD.shape[0], self.num_entries):
            part = slice(start, start + self.num_entries)
            bias_V = None if head.bias_V is None else head.bias_V[part]
            yield start, replace(head, weight_VD=head.weight_VD[part], bias_V=bias_V)


def _find(target_C: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Return [C] whether each target lies in the tile that begins at ``first``, and [C, 1] its column there."""
    column_C = target_C - first
    return (column_C >= 0) & (column_C < size), column_C.clamp(0, size - 1)[:, None]


class _TiledLogprobs(torch.autograd.Function):
    """Log-probabilities by an online logsumexp over tiles of the vocabulary.

    Where only the hidden states want a gradient, d logp / d hidden is made on the way, in the manner of flash
    attention: sum_v exp(x_v - max) W_v is rescaled whenever the maximum moves. The backward pass is then one product
    with the incoming gradient. Where the output layer is trained too, tiles are made again in the backward pass.
    """

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
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = LMHead(weight_VD=weight_VD, bias_V=bias_V, logit_softcap=logit_softcap, logit_scale=logit_scale)
        needs_hidden, *needs_head = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        is_fused = needs_hidden and not any(needs_head)
        tiles = _Tiles.of(hidden_ND, chunk_size)
        wide = _wide(hidden_ND.dtype)
        logp_N = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
        logsumexp_N = torch.empty_like(logp_N)
        entropy_N = torch.empty_like(logp_N) if with_entropy else logp_N.new_empty(0)
        slope_ND = torch.empty_like(hidden_ND) if is_fused else None
        for part in tiles.of_tokens(hidden_ND):
            hidden_CD, target_C = hidden_ND[part], target_N[part]
            max_C = torch.full_like(logp_N[part], -math.inf)
            mass_C, target_logit_C, energy_C = (torch.zeros_like(max_C) for _ in range(3))
            mean_CD = torch.zeros_like(hidden_CD, dtype=wide) if is_fused else None
            slope_C = torch.ones_like(max_C)
            for first, tile in tiles.of_entries(head):
                logits_CW = tile.logits(hidden_CD)
                is_here_C, column_C1 = _find(target_C, first, logits_CW.shape[1])
                here_C = logits_CW.gather(1, column_C1).squeeze(1)
                target_logit_C = torch.where(is_here_C, here_C, target_logit_C)
                new_max_C = torch.maximum(max_C, logits_CW.amax(dim=1))
                decay_C = (max_C - new_max_C).exp_()
                max_C = new_max_C
                if not with_entropy and mean_CD is None:
                    mass_C = mass_C.mul_(decay_C).add_(logits_CW.sub_(max_C[:, None]).exp_().sum(dim=1))
                    continue
                share_CW = (logits_CW - max_C[:, None]).exp_()
                mass_C = mass_C.mul_(decay_C).add_(share_CW.sum(dim=1))
                if with_entropy:
                    energy_C = energy_C.mul_(decay_C).add_(torch.linalg.vecdot(share_CW, logits_CW))
                if mean_CD is not None:
                    if head.logit_softcap is not None:
                        share_CW.mul_(head.slope(logits_CW))
                        slope_C = torch.where(is_here_C, head.slope(here_C), slope_C)
                    mean_CD.mul_(decay_C[:, None])
                    _add_product(mean_CD, share_CW.to(weight_VD.dtype), tile.weight_VD)
            logsumexp_N[part] = max_C + mass_C.log()
            logp_N[part] = target_logit_C - logsumexp_N[part]
            if with_entropy:
                # H = logsumexp - E[logits]
                entropy_N[part] = logsumexp_N[part] - energy_C / mass_C
            if mean_CD is not None and slope_ND is not None:
                # d logp / d logits = onehot - softmax
                chosen_CD = weight_VD[target_C] * slope_C[:, None]
                slope_ND[part] = (chosen_CD - mean_CD / mass_C[:, None]) * logit_scale
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        elif with_gradient:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, logsumexp_N)
        ctx.is_fused = is_fused
        ctx.settings = (logit_softcap, logit_scale, tiles)
        ctx.mark_non_differentiable(logsumexp_N, entropy_N)
        return logp_N, logsumexp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("token_logprobs has no second derivative: call backward without create_graph")
        if ctx.is_fused:
            (slope_ND,) = ctx.saved_tensors
            return (slope_ND * grad_N[:, None]).to(slope_ND.dtype), *[None] * 8
        hidden_ND, weight_VD, bias_V, target_N, logsumexp_N = ctx.saved_tensors
        logit_softcap, logit_scale, tiles = ctx.settings
        head = LMHead(weight_VD=weight_VD, bias_V=bias_V, logit_softcap=logit_softcap, logit_scale=logit_scale)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = _wide(hidden_ND.dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=wide) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        for first, tile in tiles.of_entries(head):
            entries = slice(first, first + tiles.num_entries)
            for part in tiles.of_tokens(hidden_ND):
                logits_CW = tile.logits(hidden_ND[part])
                slope_CW = head.slope(logits_CW) if head.logit_softcap is not None else None
                is_here_C, column_C1 = _find(target_N[part], first, logits_CW.shape[1])
                # d logp / d logits = onehot - softmax
                grad_logits_CW = logits_CW.sub_(logsumexp_N[part, None]).exp_().mul_(-grad_N[part, None])
                grad_logits_CW.scatter_add_(1, column_C1, torch.where(is_here_C, grad_N[part], 0.0)[:, None])
                if slope_CW is not None:
                    grad_logits_CW.mul_(slope_CW)
                if head.logit_scale != 1.0:
                    grad_logits_CW.mul_(head.logit_scale)
                if grad_bias_V is not None:
                    grad_bias_V[entries] += grad_logits_CW.sum(dim=0)
                narrow_CW = grad_logits_CW.to(weight_VD.dtype)
                if grad_hidden_ND is not None:
                    _add_product(grad_hidden_ND[part], narrow_CW, tile.weight_VD)
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD[entries], narrow_CW.T, hidden_ND[part])
        return (
            None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype),
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *[None] * 6,
        )


def _add_product(sum_: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``sum_`` in place, in the type of ``sum_``."""
    if sum_.dtype == left.dtype:
        sum_.addmm_(left, right)
    else:
        sum_ += left @ right


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
        chunk_size: Tokens of one tile at most; the more there are, the fewer vocabulary entries it has.
        with_entropy: Also return the entropy of each distribution.

    Raises:
        ValueError: ``chunk_size`` is below 1 or the shapes do not agree.
    """
    _check_chunk_size(chunk_size)
    if hidden_ND.dim() != 2 or target_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"need hidden [N, D] and target [N], got {tuple(hidden_ND.shape)} and {tuple(target_N.shape)}")
    logp_N, logsumexp_N, entropy_N = _TiledLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head.weight_VD,
        head.bias_V,
        target_N,
        head.logit_softcap,
        head.logit_scale,
        chunk_size,
        with_entropy,
        torch.is_grad_enabled(),
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
