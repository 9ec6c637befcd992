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
from dpr_lightning.manifest import (
    is_complete,
    is_of_run,
    read_manifest,
    recorded_run_id,
    refuse_taken,
    write_directory,
)

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
        self.pending: dict[int, float] = {}
        """Optimizer steps whose snapshot is still to be taken, each with its alpha."""
        self.num_planned = 0
        self.run_id: str | None = None
        """Tells this run's snapshots from those of another; kept in checkpoints."""

    def path(self, trainer: Trainer, alpha: float) -> Path:
        """Return where the snapshot at ``alpha`` lies."""
        return Path(trainer.default_root_dir) / "reference" / f"alpha_{alpha:g}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before any weight is loaded, a run that cannot be sure to pass the steps."""
        self.pending = {}
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                f"trainer.max_time: a run bounded by time may not reach its planned optimizer steps, and {_KEY} counts "
                "on them; bound it by trainer.max_epochs or trainer.max_steps"
            )
        module = cast("CausalLMModule", pl_module)
        self.num_planned = module.planned_optimizer_steps()
        self.pending = snapshot_steps(self.alphas, self.num_planned)
        if 1 in self.pending and module.first_learning_rate(self.num_planned) == 0.0:
            raise UserError(
                f"{_KEY}: {self.pending[1]} of {self.num_planned} planned optimizer steps is step 1, the untrained "
                "model, as warm-up begins at a learning rate of 0; train longer, lower data.global_batch_size or raise "
                "alpha"
            )
        names = {self.path(trainer, alpha) for alpha in self.alphas}
        if len(names) < len(self.alphas):
            raise UserError(f"{_KEY}: {self.alphas} agree in their first six digits, which name their directories")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what is known only now: another N than Lightning will run, and directories that do not fit the run."""
        if not self.pending:
            return
        num_real = trainer.estimated_stepping_batches
        if num_real != self.num_planned:
            raise UserError(
                f"{_KEY}: {self.num_planned} optimizer steps are planned, but Lightning will take {num_real}; leave "
                "trainer.limit_train_batches, trainer.overfit_batches and accumulation schedules out"
            )
        recorded = recorded_run_id(Path(trainer.default_root_dir))
        self.run_id = trainer.strategy.broadcast(self.run_id or recorded or uuid.uuid4().hex)
        refuse_together(trainer, lambda: self._check_directories(trainer))
        now = trainer.global_step
        is_due = now in self.pending and not is_complete(self.path(trainer, self.pending[now]))
        if trainer.strategy.broadcast(is_due):
            # The checkpoint that this run resumed from lies at the very step.
            self._take(trainer, pl_module)
        self.pending = {step: alpha for step, alpha in self.pending.items() if step > now}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation a step's number stands still over several batches: the first one after it counts.
        if trainer.global_step in self.pending:
            self._take(trainer, pl_module)
            del self.pending[trainer.global_step]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for step, alpha in self.pending.items():
            if trainer.global_step < step:
                rank_zero_warn(
                    f"The run ended at optimizer step {trainer.global_step} of {self.num_planned} planned, before step "
                    f"{step}: there is no reference at alpha {alpha:g}. The same command goes on to reach it"
                )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run_id = state_dict["run_id"]

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("CausalLMModule", pl_module)
        step, alpha = trainer.global_step, self.pending[trainer.global_step]
        manifest = {
            **module.model_manifest(),
            "kind": "reference",
            "alpha": alpha,
            "step": step,
            "planned_steps": self.num_planned,
            "run_id": self.run_id,
        }
        path = self.path(trainer, alpha)
        write_directory(path, module.save_snapshot, manifest, is_writer=trainer.is_global_zero, exist_ok=True)
        trainer.strategy.barrier("reference_snapshot")
        rank_zero_info(f"Reference taken at optimizer step {step} of {self.num_planned}: {path}")

    def _check_directories(self, trainer: Trainer) -> None:
        for step, alpha in self.pending.items():
            path = self.path(trainer, alpha)
            refuse_taken(path, exist_ok=trainer.ckpt_path is not None or is_of_run(path, self.run_id))
            if is_complete(path):
                found = read_manifest(path)
                expected = {"run_id": self.run_id, "step": step, "planned_steps": self.num_planned}
                differing = [
                    f"{key} {found.get(key)}, not {expected[key]}"
                    for key in expected
                    if found.get(key) != expected[key]
                ]
                if differing:
                    raise UserError(
                        f"'{path}' is not the snapshot that this run takes ({'; '.join(differing)}); delete it to take "
                        "it anew from a checkpoint before its step, or use another run directory"
                    )
            elif step < trainer.global_step:
                raise UserError(
                    f"'{path}' is missing, but the run resumes at optimizer step {trainer.global_step}, past step "
                    f"{step} where it was taken; put it back, or resume from a checkpoint at or before step {step}"
                )
