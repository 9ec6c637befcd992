"""What the tests of a device share: sizes of runs, and how far a result is from the exact one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

CONFIGS = Path(__file__).parents[2] / "configs"
SFT = ("--data.global_batch_size=8", "--data.micro_batch_size=4", "--model.optimizer.lr=1e-3")
"""Four optimizer steps of two micro-batches each."""
ROLLOUTS = (
    "--data.prompts_per_rollout=16",
    "--data.global_batch_size=8",
    "--data.micro_batch_size=4",
    "--data.sampling.max_new_tokens=12",
    "--data.sampling.batch_size=8",
    "--model.optimizer.lr=1e-4",
    "--trainer.max_epochs=2",
    "--trainer.limit_val_batches=0",
)
"""Two rollouts of two optimizer steps each; half of a rollout at a time."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of the exact value."""
    exact = exact.double().cpu()
    return float((found.double().cpu() - exact).norm() / exact.norm())
