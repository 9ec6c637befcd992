"""The half-training reference pi_ref, kept while SFT goes by (ALGORITHM.md section 1)."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from dpr_lightning.callbacks.ranks import refuse_together
from dpr_lightning.errors import UserError
from dpr_lightning.manifest import is_complete, read_manifest, refuse_taken, write_directory

if TYPE_CHECKING:
    from dpr_lightning.modules.base import CausalLMModule

_KEY = "trainer.callbacks.ReferenceSnapshot.alphas"


def snapshot_steps(alphas: Sequence[float], num_planned: int) -> dict[int, float]:
    """Return the optimizer steps at which snapshots are taken, each with its alpha.

    Args:
        alphas: Shares of the run, between 0 and 1.
        num_planned: Optimizer steps of the whole run.

    Raises:
        UserError: A share falls on step 0, or two on the same step.
    """
    steps: dict[int, float] = {}
    for alpha in alphas:
        # The decimal that the user wrote: in binary 0.29 * 100 is 28.999999999999996.
        step = math.floor(Fraction(str(alpha)) * num_planned)
        if step < 1:
            raise UserError(
                f"{_KEY}: {alpha} of {num_planned} planned optimizer steps is step 0, the untrained model; train "
                "longer, lower data.global_batch_size or raise alpha"
            )
        if step in steps:
            raise UserError(
                f"{_KEY}: {steps[step]} and {alpha} both fall on step {step} of {num_planned} planned optimizer steps; "
                "keep one of them"
            )
        steps[step] = alpha
    return steps


class ReferenceSnapshot(Callback):
    """Writes the weights as they are after optimizer step floor(alpha * N) of the planned N.

    N is known before the first step, or the run is refused. Each snapshot is a transformers directory with a manifest
    at ``<run_dir>/reference/alpha_<alpha>``, complete or absent. A run that resumes before a snapshot's step takes it
    again when it comes by: the reference then lies on the path that led to the final weights, even where a GPU does
    not repeat the killed run's rounding. One that resumes after the step needs the snapshot to be there.

    Args:
        alphas: Where to take snapshots, as shares of the run between 0 and 1.
    """

    def __init__(self, alphas: float | list[float] = 0.5) -> None:
        super().__init__()
        self.alphas = list(alphas) if isinstance(alphas, list | tuple) else [alphas]
        if not self.alphas:
            raise UserError(f"{_KEY}: found an empty list; give at least one share, or leave the callback out")
        for alpha in self.alphas:
            if not 0.0 < alpha < 1.0:
                raise UserError(f"{_KEY}: found {alpha}; give shares of the run between 0 and 1, both excluded")
        self.steps: dict[int, float] = {}
        """Optimizer steps at which snapshots are taken, each with its alpha; empty before ``setup``."""
        self.num_planned = 0
        self.run_id: str | None = None

    def path(self, trainer: Trainer, alpha: float) -> Path:
        """Return where the snapshot at ``alpha`` lies."""
        return Path(trainer.default_root_dir) / "reference" / f"alpha_{alpha:g}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before any weight is loaded, a run that cannot be sure to pass the steps."""
        self.steps = {}
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                f"trainer.max_time: a run bounded by time may not reach its planned optimizer steps, and {_KEY} counts "
                "on them; bound it by trainer.max_epochs or trainer.max_steps"
            )
        self.num_planned = cast("CausalLMModule", pl_module).planned_optimizer_steps()
        self.steps = snapshot_steps(self.alphas, self.num_planned)
        refuse_together(trainer, lambda: self._check_names(trainer))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what is known only now: another N than Lightning will run, and snapshots that a resumed run lacks."""
        if not self.steps:
            return
        num_real = trainer.estimated_stepping_batches
        if num_real != self.num_planned:
            raise UserError(
                f"{_KEY}: {self.num_planned} optimizer steps are planned, but Lightning will take {num_real}; leave "
                "trainer.limit_train_batches, trainer.overfit_batches and gradient accumulation schedules out"
            )
        self.run_id = trainer.strategy.broadcast(self.run_id or uuid.uuid4().hex)
        refuse_together(trainer, lambda: self._check_resumed(trainer))
        # A checkpoint at the very step holds the very weights.
        is_missing = trainer.strategy.broadcast(
            any(not is_complete(self.path(trainer, alpha)) for step, alpha in self.steps.items() if step == trainer.global_step)
        )
        if is_missing:
            self._take(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_before = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With accumulation most micro-batches end without a step.
        if trainer.global_step in self.steps and trainer.global_step != self._step_before:
            self._take(trainer, pl_module)
