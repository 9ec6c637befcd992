"""The half-training reference pi_ref, kept while SFT goes by (ALGORITHM.md section 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.manifest import is_complete, read_manifest, write_directory
from dpr_lightning.modules.base import CausalLMModule

_KEY = "trainer.callbacks.ReferenceSnapshot.alphas"


class ReferenceSnapshot(Callback):
    """Writes the weights as they are after optimizer step floor(alpha * N) of the planned N.

    N is known before the first step, or the run is refused. Each snapshot is a transformers directory with a manifest
    at ``<run_dir>/reference/alpha_<alpha>``, complete or absent. A resumed run writes what it has not passed yet and
    keeps what it has.

    Args:
        alphas: Where to take snapshots, as shares of the run between 0 and 1.
    """

    def __init__(self, alphas: float | list[float] = 0.5) -> None:
        super().__init__()
        self.alphas: Sequence[float] = [alphas] if isinstance(alphas, int | float) else list(alphas)
        if not self.alphas:
            raise UserError(f"{_KEY}: found an empty list; give at least one share, or leave the callback out")
        for alpha in self.alphas:
            if not 0.0 < alpha < 1.0:
                raise UserError(f"{_KEY}: found {alpha}; give shares of the run between 0 and 1, both excluded")
        self.steps: dict[int, float] = {}
        """Which optimizer step is taken for which alpha; known from ``on_fit_start`` on."""
        self.num_planned = 0

    def path(self, trainer: Trainer, alpha: float) -> Path:
        """Return where the snapshot at ``alpha`` lies."""
        return Path(trainer.default_root_dir) / "reference" / f"alpha_{alpha:g}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Trainer turns max_time into this callback and keeps nothing else of it.
        if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                f"trainer.max_time: with it the number of optimizer steps is unknown, and {_KEY} needs it; "
                "bound the run by trainer.max_epochs or trainer.max_steps"
            )
        assert isinstance(pl_module, CausalLMModule)
        self.num_planned = pl_module.planned_optimizer_steps()
        self.steps = {}
        for alpha in self.alphas:
            step = math.floor(alpha * self.num_planned)
            if step < 1:
                raise UserError(
                    f"{_KEY}: {alpha} of {self.num_planned} planned optimizer steps is step 0, which is the untrained "
                    "model; train longer, lower data.global_batch_size or raise alpha"
                )
            if step in self.steps:
                raise UserError(
                    f"{_KEY}: {self.steps[step]} and {alpha} both fall on step {step} of {self.num_planned}; keep one"
                )
            self.steps[step] = alpha

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to go on where a resumed run has passed a step whose snapshot is gone, or planned another N."""
        for step, alpha in self.steps.items():
            path = self.path(trainer, alpha)
            if not is_complete(path):
                if trainer.global_step >= step:
                    raise UserError(
                        f"'{path}' is missing, and this run is already at step {trainer.global_step} of "
                        f"{self.num_planned}, past step {step} where it is taken; resume from a checkpoint before "
                        f"step {step}, or start again in another --run_dir"
                    )
                continue
            found = read_manifest(path)
            if (found["step"], found["planned_steps"]) != (step, self.num_planned):
                raise UserError(
                    f"'{path}' was taken at step {found['step']} of {found['planned_steps']}, but this run would take "
                    f"it at step {step} of {self.num_planned}; delete it or use another --run_dir"
                )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step not in self.steps:
            return
        assert isinstance(pl_module, CausalLMModule)
        alpha = self.steps.pop(step)
        path = self.path(trainer, alpha)
        if is_complete(path):
            # A run that resumed before this step: these very weights are there already.
            rank_zero_info(f"Reference at step {step} is kept: {path}")
            return
        manifest = {
            "kind": "reference",
            "alpha": alpha,
            "step": step,
            "planned_steps": self.num_planned,
            **pl_module.model_manifest(),
        }
        if trainer.is_global_zero:
            write_directory(path, pl_module.save_pretrained, manifest)
            rank_zero_info(f"Reference taken at step {step} of {self.num_planned}: {path}")
        trainer.strategy.barrier("reference_snapshot")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for step, alpha in self.steps.items():
            if trainer.global_step < step:
                rank_zero_warn(
                    f"The run ended at step {trainer.global_step} of {self.num_planned}, before step {step}: there is "
                    f"no reference at alpha {alpha:g}"
                )
