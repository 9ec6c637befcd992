"""The trained weights as a directory that transformers, and everything built on it, loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from dpr_lightning.callbacks.ranks import refuse_together
from dpr_lightning.errors import UserError
from dpr_lightning.manifest import is_complete, is_of_run, recorded_run_id, refuse_taken, write_directory

if TYPE_CHECKING:
    from dpr_lightning.modules.base import CausalLMModule


class HFExport(Callback):
    """Writes ``<run_dir>/final`` when ``fit`` has reached its end: model, tokenizer, manifest.

    A run that failed or was interrupted writes nothing; a resumed one replaces what the run wrote before. A run that
    another callback stopped early writes, and its manifest's ``step`` is below its ``planned_steps``.

    Args:
        directory: Name of the directory inside the run's.
    """

    def __init__(self, directory: str = "final") -> None:
        super().__init__()
        if Path(directory).name != directory or directory in ("", "..", "checkpoints", "reference"):
            raise UserError(
                f"trainer.callbacks.HFExport.directory: found '{directory}'; give a name of its own inside the run's "
                "directory, such as 'final'"
            )
        self.directory = directory

    def path(self, trainer: Trainer) -> Path:
        """Return where the final weights lie."""
        return Path(trainer.default_root_dir) / self.directory

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a directory that is taken now, not when the run has ended."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Known only once a checkpoint has been restored. Without one it may be a run that was killed between this
            # export and its first checkpoint.
            is_resumed = trainer.ckpt_path is not None
            path, run_id = self.path(trainer), recorded_run_id(Path(trainer.default_root_dir))
            refuse_together(trainer, lambda: refuse_taken(path, exist_ok=is_resumed or is_of_run(path, run_id)))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An exception, Ctrl-C or SIGTERM leaves fit without coming by here.
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for a run that was killed between its last step and its export: resumed, it has nothing to train."""
        is_missing = not trainer.fast_dev_run and not is_complete(self.path(trainer))  # type: ignore[attr-defined]
        if trainer.strategy.broadcast(is_missing):
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("CausalLMModule", pl_module)
        path, step, planned_steps = self.path(trainer), trainer.global_step, module.planned_optimizer_steps()
        if step == 0:
            rank_zero_warn("No optimizer step was taken, so there is no final model to write")
            return
        if step < planned_steps:
            rank_zero_warn(f"The run was stopped at optimizer step {step} of {planned_steps} planned")
        manifest = {
            **module.model_manifest(),
            "kind": "final",
            "step": step,
            "planned_steps": planned_steps,
            "run_id": recorded_run_id(path.parent),
        }
        write_directory(path, module.save_pretrained, manifest, is_writer=trainer.is_global_zero, exist_ok=True)
        trainer.strategy.barrier("hf_export")
        rank_zero_info(f"Final model: {path}")
