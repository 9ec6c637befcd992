"""Masks from lengths, and sums and means that a masked-out inf or nan cannot reach."""

from __future__ import annotations

import torch
from torch import Tensor


def length_mask(length_B: Tensor, *, num_positions: int) -> Tensor:
    """Return [B, T] bool, True in the first ``length_B`` of ``num_positions`` columns."""
    return torch.arange(num_positions, device=length_B.device) < length_B[:, None]


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the scalar sum of ``x_BT`` where the mask is True; what lies elsewhere is inert, forward and backward."""
    return torch.where(mask_BT, x_BT, 0.0).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the scalar mean of ``x_BT`` where the mask is True.

    Raises:
        ValueError: The mask is False everywhere.
    """
    count = int(mask_BT.sum())
    if count == 0:
        raise ValueError("the mask is False everywhere, so there is no mean")
    return masked_sum(x_BT, mask_BT) / count
