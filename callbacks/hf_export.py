"""The trained weights as a directory that transformers, and everything built on it, loads."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from dpr_lightning.manifest import write_directory
from dpr_lightning.modules.base import CausalLMModule


class HFExport(Callback):
    """Writes ``<run_dir>/final`` when ``fit`` has reached its end: model, tokenizer, manifest.

    A run that was interrupted has no final weights and writes nothing.

    Args:
        directory: Name of the directory in the run's.
    """

    def __init__(self, directory: str = "final") -> None:
        super().__init__()
        self.directory = directory

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        if trainer.interrupted or trainer.received_sigterm:
            rank_zero_warn("The run was interrupted: no final model is written; continue it with --ckpt_path last")
            return
        assert isinstance(pl_module, CausalLMModule)
        path = Path(trainer.default_root_dir) / self.directory
        manifest = {
            "kind": "final",
            "step": trainer.global_step,
            "planned_steps": pl_module.planned_optimizer_steps(),
            **pl_module.model_manifest(),
        }
        if trainer.is_global_zero:
            write_directory(path, pl_module.save_pretrained, manifest)
            rank_zero_info(f"Final model: {path}")
        trainer.strategy.barrier("hf_export")
