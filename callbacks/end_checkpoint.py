"""A checkpoint of the very end of a run, whatever the interval of the others."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override


class EndCheckpoint(Callback):
    """Writes ``<run_dir>/checkpoints/last.ckpt`` when ``fit`` ends.

    Lightning's own ``save_last`` is as old as the last interval that was completed, so ``--ckpt_path last`` would
    evaluate weights from before the end.
    """

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or trainer.global_step == 0:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
