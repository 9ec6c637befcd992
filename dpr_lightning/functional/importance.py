"""Truncated importance weights: samples of an engine whose probabilities are not quite the trainer's.

The engine computes in other kernels, perhaps in another type, and so draws from q where the trainer's forward says pi.
The published correction (https://fengyao.notion.site/off-policy-rl) weighs each token's loss by min(pi / q, C).
It corrects the choice of a token, neither the way to its state nor what follows. So the average gradient is exact for
responses of one token (C above every ratio); for longer ones only the product of all ratios of a response makes it so,
whose variance grows with the length, and the weight per token is an approximation to it, closer as q comes to pi. C
bounds the variance and adds bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """What each token's loss is multiplied by."""

    weight_BT: Tensor
    """[B, T] detached min(pi / q, C); 0 outside the response."""
    is_capped_BT: Tensor
    """[B, T] bool, True where pi / q is above C."""


@torch.no_grad()
def truncated_importance(logp_BT: Tensor, sampler_logp_BT: Tensor, mask_BT: Tensor, *, cap: float) -> ImportanceWeights:
    """Return min(pi / q, C) of each response token.

    Args:
        logp_BT: [B, T] log pi, the trainer's, of the policy as it sampled.
        sampler_logp_BT: [B, T] log q, the sampler's own, of the distribution that it drew from.
        mask_BT: [B, T] bool, True on response tokens.
        cap: C, at least 1.

    Raises:
        ValueError: ``cap`` is below 1.
    """
    if not cap >= 1.0:
        raise ValueError(f"the cap of importance weights must be at least 1, got {cap}")
    log_ratio_BT = torch.where(mask_BT, logp_BT - sampler_logp_BT, 0.0)
    weight_BT = log_ratio_BT.clamp(max=math.log(cap)).exp()
    return ImportanceWeights(
        weight_BT=torch.where(mask_BT, weight_BT, 0.0), is_capped_BT=mask_BT & (log_ratio_BT > math.log(cap))
    )
