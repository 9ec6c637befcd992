"""Checkpoints at intervals, the last few of them, and one of the very end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from dpr_lightning.checkpoints import checkpoints_in, clear_leftovers
from dpr_lightning.errors import UserError


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` that keeps the newest ``keep``, and has one of the last step when ``fit`` ends.

    Its files are named ``step=<optimizer steps>.ckpt``, and ``last.ckpt`` is a link to the newest. A checkpoint is of a
    whole optimizer step: gradients of micro-batches since then would be in none. With a ``monitor`` it is Lightning's
    own, which keeps the best by that figure.

    Args:
        dirpath: Where they lie; None is ``<run_dir>/checkpoints``.
        every_n_train_steps: Optimizer steps between two.
        keep: How many stay, without a ``monitor``. Two survive a damaged one.
        monitor: See ``ModelCheckpoint``, like what follows.
        kwargs: Further settings.
    """

    def __init__(
        self,
        dirpath: Any = None,
        every_n_train_steps: int | None = None,
        keep: int = 2,
        monitor: str | None = None,
        **kwargs: Any,
    ) -> None:
        if keep < 1:
            raise UserError(f"trainer.callbacks.RunCheckpoint.keep: found {keep}; give a whole number of at least 1")
        if monitor is None:
            if kwargs.get("filename") is not None:
                raise UserError(
                    "trainer.callbacks.RunCheckpoint.filename: without a monitor checkpoints are named by their step; "
                    "leave it out"
                )
            save_last = "link" if kwargs.get("save_last") is None else kwargs["save_last"]
            own = {"filename": "{step}", "save_top_k": -1, "save_last": save_last, "enable_version_counter": False}
            kwargs = kwargs | own
        super().__init__(dirpath, monitor=monitor, every_n_train_steps=every_n_train_steps, **kwargs)
        self.keep = keep

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run stands at the step of its checkpoint until the next optimizer step: nothing new to keep.
        self._last_global_step_saved = trainer.global_step
        if trainer.is_global_zero and self.dirpath is not None:
            clear_leftovers(Path(self.dirpath))

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero and self.monitor is None and self.dirpath is not None:
            for old in checkpoints_in(Path(self.dirpath))[self.keep :]:
                trainer.strategy.checkpoint_io.remove_checkpoint(old)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The step is 0 where nothing was trained, and then there is nothing to keep.
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None:
                self._save_none_monitor_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
