"""Choices between ways of doing the same: products of few rows, and AdamW. What ours took is in the package.

A rollout multiplies few rows by all weights of a model, and every weight comes from memory, so the layers here are
SmolLM2-135M's, enough of them that no cache holds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.gate import Gate

ROWS = (1, 4, 8, 16, 32, 64, 256)
_SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""Outputs and inputs of a block's layers: queries, keys, values, their output; gate, up and down."""
_TOGETHER = ((0, 1, 2), (3,), (4, 5), (6,))
"""Which of them have the same input."""


def products(gate: Gate, settings: dict[str, Any]) -> None:
    """Milliseconds for a million weights: torch's product, packed weights, transposed ones, and layers put together."""
    import torch

    num_blocks = settings["num_blocks"]
    blocks = [[torch.randn(*shape) for shape in _SHAPES] for _ in range(num_blocks)]
    num_weights = num_blocks * sum(outputs * inputs for outputs, inputs in _SHAPES)

    def pack(weight: Any) -> Any:
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def multiply(input_: Any, packed: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(input_, packed, None, "none", [], "")

    packed = [(pack(weight), weight.shape[1]) for block in blocks for weight in block]
    transposed = [weight.T.contiguous() for block in blocks for weight in block]
    together = []
    for block in blocks:
        for group in _TOGETHER:
            weight = torch.cat([block[number] for number in group])
            together.append((pack(weight), weight.shape[1]))
    plain = [weight for block in blocks for weight in block]

    def work(number: int) -> None:
        for rows in ROWS:
            inputs = {size: torch.randn(rows, size) for size in (576, 1536)}
            ways: dict[str, Callable[[], object]] = {
                "plain": lambda inputs=inputs: [inputs[weight.shape[1]] @ weight.T for weight in plain],
                "packed": lambda inputs=inputs: [multiply(inputs[size], weight) for weight, size in packed],
                "transposed": lambda inputs=inputs: [inputs[len(weight)] @ weight for weight in transposed],
                "together": lambda inputs=inputs: [multiply(inputs[size], weight) for weight, size in together],
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


def in_turns(ways: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Return the least CPU seconds of each; the first round warms up."""
    least = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, work in ways.items():
            start = time.process_time()
            work()
            if number:
                least[name] = min(least[name], time.process_time() - start)
    return least


CONTENDERS = {"products": products, "adamw": adamw}
