"""The parts of ``make gpu``, from what is worth most to what is worth least. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part; ``benchmarks.gpu.worker`` calls ``module.run(context)`` in a process of its own."""

    name: str
    """As ``--only`` and ``--skip`` take it."""
    title: str
    """Heading in the results."""
    module: str
    """Where ``run(context)`` is."""
    seconds: float
    """Time limit."""
    prepares: bool = False
    """``module.prepare(context)`` is called on spare cores from the start of the command."""


PARTS = (
    Part(name="tests", title="Tests on the device", module="benchmarks.gpu.device_tests", seconds=90),
    Part(name="training", title="SFT and DPR", module="benchmarks.gpu.training", seconds=150),
    Part(name="trl", title="The same work by TRL", module="benchmarks.gpu.trl_comparison", seconds=150),
    Part(name="sampling", title="Sampling", module="benchmarks.gpu.sampling", seconds=60),
    Part(name="logprobs", title="Token log-probabilities", module="benchmarks.gpu.logprobs", seconds=45),
    Part(
        name="plan", title="`plan` against measured memory", module="benchmarks.gpu.planning", seconds=45, prepares=True
    ),
    Part(
        name="smollm2",
        title="SmolLM2-135M on the embedded tasks",
        module="benchmarks.gpu.smollm2",
        seconds=90,
        prepares=True,
    ),
)
"""In the order in which they run."""
