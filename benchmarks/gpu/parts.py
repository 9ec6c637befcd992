"""The parts of ``make gpu``, in order of importance. Standard library only."""

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
    """``module.prepare(context)`` runs on spare cores from the start of the command."""
    is_timed: bool = True
    """Its times are results, so nothing else may run meanwhile."""


_MODULES = "benchmarks.gpu"

PARTS = (
    Part(name="tests", title="Tests on the device", module=f"{_MODULES}.device_tests", seconds=90, is_timed=False),
    Part(name="training", title="SFT and DPR", module=f"{_MODULES}.training", seconds=150),
    Part(name="trl", title="The same work by TRL", module=f"{_MODULES}.trl_comparison", seconds=150),
    Part(name="sampling", title="Sampling", module=f"{_MODULES}.sampling", seconds=75),
    Part(name="logprobs", title="Token log-probabilities", module=f"{_MODULES}.logprobs", seconds=60),
    Part(name="plan", title="`plan` against measured memory", module=f"{_MODULES}.planning", seconds=45, prepares=True),
    Part(
        name="smollm2",
        title="SmolLM2-135M on the embedded tasks",
        module=f"{_MODULES}.smollm2",
        seconds=100,
        prepares=True,
    ),
)
"""In the order in which they run."""
