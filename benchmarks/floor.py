"""The floor: what the arithmetic of a workload must cost on this machine, whoever writes it.

Operations are those of products with the model's weights, at the speed of a large product; bytes are the weights that
a decoding step reads and what the optimizer reads and writes, at the speed of one long read. Attention, norms and all
else are left out, so nobody can reach a floor.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.driver import Bench, Contender, Result, play
from benchmarks.gate import Gate
from benchmarks.timing import in_turns

_ADAMW_BYTES = 28
"""For each weight: itself, its gradient and two moments are read, all but the gradient are written."""


def machine(gate: Gate, settings: dict[str, Any]) -> None:
    """Operations a second of a product of two large matrices, and bytes a second of a read that no cache holds."""
    import torch

    square = torch.randn(2048, 2048)
    long = torch.randn(2**27)

    def work(number: int) -> None:
        # The least of some tries: a floor is of a machine that does nothing else.
        seconds = in_turns({"product": lambda: square @ square, "read": long.sum}, clock=time.perf_counter)
        gate.add(flops=2 * 2048**3 / seconds["product"], bandwidth=long.nbytes / seconds["read"])

    gate.serve(work)


CONTENDERS = {"machine": machine}


def count_forwards(gate: Gate) -> None:
    """Let every forward of ours add its tokens to the round, under what it is for."""
    import torch

    from dpr_lightning.models import ragged
    from dpr_lightning.rollout.slots import SlotCache

    forward = ragged.run

    def run(decoder: Any, input_ids_N: Any, position_N: Any, layout: Any) -> Any:
        kind = "sampled" if isinstance(layout, SlotCache) else "trained" if torch.is_grad_enabled() else "scored"
        gate.add(**{f"{kind}_tokens": len(input_ids_N), f"{kind}_forwards": 1})
        return forward(decoder, input_ids_N, position_N, layout)

    ragged.run = run


@dataclass(frozen=True, slots=True)
class Weights:
    """How many weights a model has."""

    blocks: int
    """In linear layers of its blocks: a token goes through all of them."""
    head: int
    """In the output layer: a token whose logits are wanted goes through it."""
    total: int

    @classmethod
    def of(cls, model: Path) -> Weights:
        """Count those of a directory."""
        from safetensors import safe_open

        sizes = {}
        with safe_open(model / "model.safetensors", framework="pt") as file:
            for name in file.keys():
                sizes[name] = tuple(file.get_slice(name).get_shape())
        counts = {name: math.prod(shape) for name, shape in sizes.items()}
        blocks = sum(count for name, count in counts.items() if ".layers." in name and len(sizes[name]) == 2)
        # Tied, the embedding is the output layer.
        head = counts.get("lm_head.weight", counts["model.embed_tokens.weight"])
        return cls(blocks, head, sum(counts.values()))


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a round."""

    name: str
    operations: float
    bytes: float
    measured: float
    """Seconds that ours took."""


def sampling(facts: dict[str, float], weights: Weights, measured: float, *, num_drawn: float) -> Part:
    """Return the part that draws ``num_drawn`` tokens: every forward reads all weights once."""
    operations = 2 * (weights.blocks * facts["sampled_tokens"] + weights.head * num_drawn)
    return Part("sampling", operations, facts["sampled_forwards"] * 4.0 * (weights.blocks + weights.head), measured)


def scoring(facts: dict[str, float], weights: Weights, measured: float, *, num_scored: float) -> Part:
    """Return the part of forwards without gradient that score ``num_scored`` tokens."""
    return Part("scoring", 2 * (weights.blocks * facts["scored_tokens"] + weights.head * num_scored), 0.0, measured)


def training(facts: dict[str, float], weights: Weights, measured: float, *, num_steps: int) -> Part:
    """Return the part of optimizer steps: three products for each weight and token, and AdamW."""
    operations = 6 * (weights.blocks * facts["trained_tokens"] + weights.head * facts["response_tokens"])
    return Part("training", operations, num_steps * _ADAMW_BYTES * weights.total, measured)


def section(bench: Bench, result: Result, parts_of: Callable[[dict[str, float]], list[Part]]) -> list[str]:
    """Return ours against the floor: medians of rounds, on a machine whose speed is measured now.

    Args:
        bench: Where the machine is measured.
        result: Ours.
        parts_of: The parts of one round.
    """
    if not result.rounds:
        return []
    found = play(bench, "floor", [Contender("machine", "machine")], {}, rounds=3)["machine"].rounds
    flops = max(facts["flops"] for facts in found)
    bandwidth = max(facts["bandwidth"] for facts in found)
    lines = [
        "",
        f"The floor, at {flops / 1e9:.0f} GFLOP/s (a product of 2048 x 2048 matrices) and {bandwidth / 1e9:.1f} GB/s",
        "(reading 512 MiB), both measured after the rounds:",
        "",
        "| part | GFLOP | GB | floor s | ours s | ours / floor |",
        "|---|---|---|---|---|---|",
    ]
    rounds = [parts_of(facts) for facts in result.rounds]
    for parts in zip(*rounds, strict=True):
        operations, size, measured = (
            statistics.median(getattr(part, name) for part in parts) for name in ("operations", "bytes", "measured")
        )
        # A decoding step reads while it multiplies; the optimizer begins when the products are done.
        busy = [operations / flops, size / bandwidth]
        least = max(busy) if parts[0].name == "sampling" else sum(busy)
        lines.append(
            f"| {parts[0].name} | {operations / 1e9:.0f} | {size / 1e9:.1f} | {least:.2f} | {measured:.2f} | "
            f"{measured / least:.2f} |"
        )
    return lines
