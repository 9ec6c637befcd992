"""Checkpoints at intervals, the last few of them, and one of the very end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from dpr_lightning.checkpoints import checkpoints_in, clear_leftovers, step_of
from dpr_lightning.data.loader import running_epoch
from dpr_lightning.errors import UserError
from dpr_lightning.modules.resume import settle_place


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` that keeps the newest ``keep``, and has one of the last step when ``fit`` ends.

    Its files are named ``step=<optimizer steps>.ckpt``, and ``last.ckpt`` is a link to the newest. It writes between
    two optimizer steps, or when an epoch has ended: everything that belongs to the steps before is then done and
    logged, validation included, and a run that resumes does and logs exactly what is left. (Lightning's own writes
    before a step is logged, and leaves out what follows an epoch's last one.) With a ``monitor`` it is Lightning's own,
    which keeps the best by that figure.

    Args:
        dirpath: Where they lie; None is ``<run_dir>/checkpoints``.
        every_n_train_steps: Optimizer steps between two.
        keep: How many stay, without a ``monitor``. Two survive a damaged one.
        monitor: See ``ModelCheckpoint``, like what follows.
        kwargs: Further settings.
    """

    def __init__(
        self,
        dirpath: str | None = None,
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
        self._is_settled = False
        """Whether the checkpoint that is being written is one of this class's own."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run stands at the step of its checkpoint until the next optimizer step: nothing new to keep.
        self._last_global_step_saved = trainer.global_step
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop.batch_progress.current.ready == 0:
            # With max_steps Lightning takes even a run that resumes between two epochs for one that is inside the next.
            epoch_loop.restarting = False
        if trainer.is_global_zero and self.dirpath is not None:
            clear_leftovers(Path(self.dirpath))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Before an epoch's first batch the step before has been kept at the end of the last epoch.
        if self.monitor is None and batch_idx > 0 and batch_idx % trainer.accumulate_grad_batches == 0:
            self._save_if(trainer, self._is_step_due(trainer) or self._is_time_due(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.monitor is not None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            super().on_validation_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            super().on_train_epoch_end(trainer, pl_module)
            return
        every_n_epochs = self.every_n_epochs or 0
        is_epoch_due = every_n_epochs > 0 and (trainer.current_epoch + 1) % every_n_epochs == 0
        # The last one before the export of what has been trained, which may take long.
        is_due = is_epoch_due or self._is_step_due(trainer) or _is_at_end(trainer)
        self._save_if(trainer, is_due or self._is_time_due(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None:
            self._save_if(trainer, True)
        elif self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_settled:
            settle_place(checkpoint)

    def _is_step_due(self, trainer: Trainer) -> bool:
        return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0

    def _is_time_due(self, trainer: Trainer) -> bool:
        if self._train_time_interval is None or self._last_time_checked is None:
            return False
        seconds = time.monotonic() - self._last_time_checked
        # Ranks have clocks of their own.
        return bool(trainer.strategy.broadcast(seconds >= self._train_time_interval.total_seconds()))

    def _save_if(self, trainer: Trainer, is_due: bool) -> None:
        # The step is 0 where nothing was trained, and then there is nothing to keep.
        if not is_due or self._should_skip_saving_checkpoint(trainer):
            return
        self._last_time_checked = time.monotonic()
        for logger in trainer.loggers:
            # What a resumed run will not log again must not be lost with this process.
            logger.save()
        self._is_settled = True
        try:
            candidates = self._monitor_candidates(trainer)
            self._save_none_monitor_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        finally:
            self._is_settled = False

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero and self.monitor is None and self.dirpath is not None:
            # Those of later steps belong to a run that was abandoned: this one resumed from before them.
            found = checkpoints_in(Path(self.dirpath))
            kept = [path for path in found if step_of(path) <= trainer.global_step][: self.keep]
            for old in set(found) - set(kept):
                trainer.strategy.checkpoint_io.remove_checkpoint(old)


def _is_at_end(trainer: Trainer) -> bool:
    """Return whether ``fit`` ends with the epoch that has just been trained."""
    # The epoch has been counted.
    is_last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= running_epoch(trainer)
    return trainer.should_stop or is_last_epoch or 0 <= trainer.max_steps <= trainer.global_step
