"""Writes down what a run is: merged configuration and manifest, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from dpr_lightning.manifest import atomic_write_json, environment, now, read_json
from dpr_lightning.modules.base import CausalLMModule


class RunRecorder(SaveConfigCallback):
    """Writes ``config.yaml`` and ``run.json`` into the run's directory when ``fit`` starts, and how it ended.

    A resumed run keeps every earlier configuration as ``config.1.yaml``, ``config.2.yaml`` and so on. The checkpoint
    that it resumed from is not part of its configuration: ``config.yaml`` alone repeats the run from the start.

    Args:
        args: See ``SaveConfigCallback``.
        command: The command line, for the record.
        kwargs: See ``SaveConfigCallback``.
    """

    def __init__(self, *args: Any, command: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command = command

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        run_dir = Path(trainer.default_root_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "config.yaml"
        config = self.config.clone()
        config.ckpt_path = None
        text = self.parser.dump(config, skip_none=False)
        if path.exists() and path.read_text() != text:
            number = len(list(run_dir.glob("config.*.yaml"))) + 1
            path.rename(run_dir / f"config.{number}.yaml")
        path.write_text(text)
        describe = getattr(trainer.datamodule, "data_manifest", None)  # type: ignore[attr-defined]
        atomic_write_json(
            run_dir / "run.json",
            {
                "kind": "run",
                "status": "running",
                "started": now(),
                "command": self.command,
                "module": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
                "environment": environment(),
                "world_size": trainer.world_size,
                "seed": self.config.get("seed_everything"),
                "data": describe() if describe is not None else None,
            },
        )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopped = [getattr(callback, "stop_reason", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        reason = "; ".join(found for found in stopped if found)
        self._record_end(trainer, "interrupted" if trainer.interrupted else "finished", reason)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._record_end(trainer, "failed", f"{type(exception).__name__}: {exception}")

    def _record_end(self, trainer: Trainer, status: str, reason: str) -> None:
        path = Path(trainer.default_root_dir) / "run.json"
        counts: dict[str, Any] = {}
        if status != "failed" and isinstance(trainer.lightning_module, CausalLMModule):
            counts = {"tokens": trainer.lightning_module.total_token_counts()}
        if not trainer.is_global_zero or not path.exists() or trainer.state.fn != "fit":
            return
        record = read_json(path)
        record |= {"status": status, "reason": reason, "ended": now(), "optimizer_steps": trainer.global_step, **counts}
        atomic_write_json(path, record)
