"""Checkpoints at intervals, and one of the very end."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` whose ``last.ckpt`` is of the last step when ``fit`` has ended.

    Lightning's own is as old as the last whole interval, so ``--ckpt_path last`` would evaluate weights from before
    the end.
    """

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The step is 0 where nothing was trained, and then there is nothing to keep.
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
