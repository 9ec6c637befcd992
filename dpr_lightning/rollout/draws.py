"""Draws one token for each state: by one uniform number of the row's own, so that no row depends on another."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dpr_lightning.errors import NonFiniteError
from dpr_lightning.types import SamplingConfig

_BLOCK = 256
_BELOW_ONE = 1.0 - 2.0**-52


def row_uniforms(seed: int, row: int, count: int) -> list[float]:
    """Return the ``count`` numbers in [0, 1) that row ``row`` of a rollout is drawn with.

    They follow from the two numbers alone: a response does not depend on which others are sampled beside it.
    """
    values: list[float] = np.random.default_rng([seed % 2**64, row]).random(count).tolist()
    return values


def draw(logits_NV: Tensor, uniform_N: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token for each row of logits, by inversion of the cumulative distribution.

    Sums of 256 probabilities are float32, sums of these float64: no token is too rare to be drawn, and one pass over
    the vocabulary is all that a draw needs.

    Args:
        logits_NV: [N, V] float32; may be overwritten.
        uniform_N: [N] float64 in [0, 1), on any device; not used at temperature 0.
        config: Temperature and truncation.

    Returns:
        [N] int64 ids, and [N] float32 log-probabilities under the distribution that they are drawn from: NaN where
        the logits have no distribution.
    """
    if config.temperature == 0:
        token_N = logits_NV.argmax(dim=-1)
        return token_N, _at(logits_NV, token_N) - logits_NV.logsumexp(dim=-1)
    if config.temperature != 1:
        logits_NV = logits_NV.div_(config.temperature)
    logits_NV = _truncate(logits_NV, top_p=config.top_p, top_k=config.top_k)
    weight_NV = logits_NV.sub_(logits_NV.amax(dim=-1, keepdim=True)).exp_()
    num_entries = weight_NV.shape[1]
    if num_entries % _BLOCK:
        weight_NV = torch.nn.functional.pad(weight_NV, (0, -num_entries % _BLOCK))
    weight_NSW = weight_NV.unflatten(1, (-1, _BLOCK))
    mass_NS = weight_NSW.sum(dim=-1).double().cumsum(dim=-1)
    total_N = mass_NS[:, -1]
    block_N, inside_N = _find(mass_NS, uniform_N.to(mass_NS.device) * total_N)
    weight_NW = weight_NSW[torch.arange(len(block_N), device=block_N.device), block_N]
    # The block's mass is a float32 sum, so what is left may lie a rounding beyond its end.
    column_N, _ = _find(weight_NW.double().cumsum(dim=-1), inside_N)
    logp_N = _at(weight_NW, column_N).double().log() - total_N.log()
    return block_N * _BLOCK + column_N, logp_N.float()


def finite(logp_N: Tensor) -> list[float]:
    """Return log-probabilities of drawn tokens as numbers, before anything is done with the tokens.

    Raises:
        NonFiniteError: Some are NaN.
    """
    logps: list[float] = logp_N.tolist()
    if any(map(math.isnan, logps)):
        raise NonFiniteError(
            "the policy's logits are not finite, so nothing can be drawn from it: its weights, or the precision in "
            "which it runs, have broken down"
        )
    return logps


def _find(sum_NS: Tensor, value_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return [N] the first entry of growing sums that is above each value, and [N] by how much it is above the last."""
    value_N = torch.minimum(value_N, sum_NS[:, -1] * _BELOW_ONE)
    index_N1 = torch.searchsorted(sum_NS, value_N[:, None], right=True)
    before_N1 = torch.where(index_N1 > 0, sum_NS.gather(1, (index_N1 - 1).clamp_(min=0)), 0.0)
    # No entry is above NaN.
    index_N1 = index_N1.clamp_(max=sum_NS.shape[1] - 1)
    return index_N1.squeeze(1), value_N - before_N1.squeeze(1)


def _at(values_NV: Tensor, index_N: Tensor) -> Tensor:
    return values_NV.gather(1, index_N[:, None]).squeeze(1)


def _truncate(logits_NV: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Set logits outside the top-k and the nucleus to minus infinity; the most likely token always stays."""
    if 0 < top_k < logits_NV.shape[-1]:
        threshold_N1 = logits_NV.topk(top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < threshold_N1, -torch.inf)
    if top_p < 1:
        sorted_NV, index_NV = logits_NV.sort(dim=-1, descending=True)
        prob_NV = sorted_NV.softmax(dim=-1)
        # A token goes when the mass before it already reaches top_p.
        is_outside_NV = prob_NV.cumsum(dim=-1) - prob_NV >= top_p
        is_outside_NV[:, 0] = False
        logits_NV = logits_NV.masked_fill(is_outside_NV.scatter(1, index_NV, is_outside_NV), -torch.inf)
    return logits_NV
