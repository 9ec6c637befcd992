"""Linear layers on a CPU with weights in oneDNN's own layout, while a rollout lasts.

A decoding step multiplies a few rows by every weight. The BLAS that torch calls for it packs the weight anew each time,
which for few rows is most of its work; packed once, a step over 16 to 64 rows takes 0.4 to 0.8 of the time, and reading
prompts 0.8. It costs a second copy of these weights, for as long as the rollout lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dpr_lightning.functional.logprobs import LMHead

_SMALLEST = 2**16
"""Entries of a weight below which a call's own cost is more than what it saves."""


def _is_packable(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.dim() == 2 and weight.numel() >= _SMALLEST


def packed_bytes(model: nn.Module) -> int:
    """Return the size of the second copy that a rollout on a CPU makes of a causal language model's weights."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    return sum(weight.numel() * weight.element_size() for weight in weights if _is_packable(weight))


def _is_worth(weight: Tensor) -> bool:
    return (
        type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and _is_packable(weight)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def _pack(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return x -> x W^T + b for [..., I] inputs."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
    bias_O = None if bias_O is None else bias_O.detach()
    return partial(_multiply, packed, bias_O)


def _multiply(packed: Tensor, bias_O: Tensor | None, input_: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input_, packed, bias_O, "none", [], "")
    return product


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of a model that runs without gradient use packed weights; elsewhere nothing changes.

    The weights must not change inside.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_worth(module.weight)]
    try:
        for layer in layers:
            # On the instance, so that hooks and wrappers around it stay what they are.
            layer.forward = _pack(layer.weight, layer.bias)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def packed_head(head: LMHead) -> Callable[[Tensor], Tensor]:
    """Return [N, D] hidden states -> [N, V] logits of an output layer, by packed weights where these are worth it."""
    if not _is_worth(head.weight_VD):
        return head.logits
    multiply = _pack(head.weight_VD, None)
    return lambda hidden_ND: head.postprocess_logits(multiply(hidden_ND))
