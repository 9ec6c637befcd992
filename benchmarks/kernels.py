"""Choices between ways of doing the same: products of few rows, and AdamW. What ours took is in the package.

A rollout multiplies few rows by all weights of a model, and every weight comes from memory, so the layers here are
SmolLM2-135M's, enough of them that no cache holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gate import Gate
from benchmarks.timing import in_turns

ROWS = (1, 4, 8, 16, 32, 64, 256)
_SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""Outputs and inputs of a block's layers: queries, keys, values, their output; gate, up and down."""
_TOGETHER = ((0, 1, 2), (3,), (4, 5), (6,))
"""Which of them have the same input."""


def products(gate: Gate, settings: dict[str, Any]) -> None:
    """Milliseconds for a million weights: torch's product, packed weights, transposed ones, and layers put together."""
    import torch

    from dpr_lightning.functional.logprobs import LMHead
    from dpr_lightning.rollout.packed import packed_head

    num_blocks = settings["num_blocks"]
    blocks = [[torch.randn(*shape) for shape in _SHAPES] for _ in range(num_blocks)]
    num_weights = num_blocks * sum(outputs * inputs for outputs, inputs in _SHAPES)

    def pack(weight: Any) -> Callable[[Any], Any]:
        return packed_head(LMHead(weight_VD=weight))

    plain = [weight for block in blocks for weight in block]
    packed = [(pack(weight), weight.shape[1]) for weight in plain]
    transposed = [weight.T.contiguous() for weight in plain]
    together = []
    for block in blocks:
        for group in _TOGETHER:
            weight = torch.cat([block[number] for number in group])
            together.append((pack(weight), weight.shape[1]))

    def work(number: int) -> None:
        for rows in ROWS:
            inputs = {size: torch.randn(rows, size) for size in (576, 1536)}
            ways: dict[str, Callable[[], object]] = {
                "plain": lambda inputs=inputs: [inputs[weight.shape[1]] @ weight.T for weight in plain],
                "packed": lambda inputs=inputs: [multiply(inputs[size]) for multiply, size in packed],
                "transposed": lambda inputs=inputs: [inputs[len(weight)] @ weight for weight in transposed],
                "together": lambda inputs=inputs: [multiply(inputs[size]) for multiply, size in together],
            }
            for name, seconds in in_turns(ways).items():
                gate.add(**{f"{name}_{rows}": seconds * 1e9 / num_weights})
        gate.add(
            packing=in_turns({"packing": lambda: [pack(weight) for weight in plain]})["packing"] * 1e9 / num_weights
        )

    gate.serve(work)


def adamw(gate: Gate, settings: dict[str, Any]) -> None:
    """Seconds of a step of ``torch.optim.AdamW``, one of its ways after the other."""
    import torch

    weights = [torch.randn(1536, 576, requires_grad=True) for _ in range(settings["num_weights"] // (1536 * 576))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)

    def work(number: int) -> None:
        for name, way in (("for-loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
            optimizer = torch.optim.AdamW(weights, lr=1e-9, **way)
            gate.add(**{name: in_turns({name: optimizer.step})[name]})

    gate.serve(work)


CONTENDERS = {"products": products, "adamw": adamw}
