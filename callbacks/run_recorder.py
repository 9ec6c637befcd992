"""Writes down what a run is: merged configuration and manifest, before the first step."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from dpr_lightning.callbacks.ranks import refuse_together
from dpr_lightning.errors import UserError
from dpr_lightning.manifest import (
    atomic_write_json,
    atomic_write_text,
    clear_leftovers,
    environment,
    now,
    read_json,
    read_run_record,
    recorded_run_id,
)
from dpr_lightning.modules.base import CausalLMModule


class RunRecorder(SaveConfigCallback):
    """Writes ``config.yaml`` and ``run.json`` into the run's directory when ``fit`` starts, and how it ended.

    A run keeps its ``run_id`` however often it is resumed or begun again. A resumed run keeps every earlier
    configuration as ``config.1.yaml``, ``config.2.yaml`` and so on. The checkpoint that it resumed from is not part of
    its configuration: ``config.yaml`` alone repeats the run from the start.

    Args:
        args: See ``SaveConfigCallback``.
        command: The command line, for the record.
        goes_on: Whether the run goes on with the very command that began it, and so needs the very data.
        kwargs: See ``SaveConfigCallback``.
    """

    def __init__(self, *args: Any, command: str, goes_on: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command = command
        self.goes_on = goes_on

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.goes_on:
            refuse_together(trainer, lambda: self._check_data(trainer))
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        run_dir = Path(trainer.default_root_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        clear_leftovers(run_dir)
        clear_leftovers(run_dir / "reference")
        path = run_dir / "config.yaml"
        config = self.config.clone()
        config.ckpt_path = None
        text = self.parser.dump(config, skip_none=False)
        if path.exists() and path.read_text() != text:
            number = len(list(run_dir.glob("config.*.yaml"))) + 1
            # Written twice and not renamed: there is a configuration at every moment.
            atomic_write_text(run_dir / f"config.{number}.yaml", path.read_text())
        atomic_write_text(path, text)
        atomic_write_json(
            run_dir / "run.json",
            {
                "kind": "run",
                "run_id": recorded_run_id(run_dir) or uuid.uuid4().hex,
                "status": "running",
                "started": now(),
                "command": self.command,
                "module": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
                "environment": environment(),
                "world_size": trainer.world_size,
                "seed": self.config.get("seed_everything"),
                "data": _describe_data(trainer),
            },
        )

    def _check_data(self, trainer: Trainer) -> None:
        record = Path(trainer.default_root_dir) / "run.json"
        before = (read_run_record(record) if record.exists() else {}).get("data") or {}
        now = _describe_data(trainer) or {}
        for split, found in now.get("splits", {}).items():
            if found["fingerprint"] != (before.get("splits") or {}).get(split, found).get("fingerprint"):
                raise UserError(
                    f"data.demonstrations: the {split} rows are not those that this run was begun with; put them back, "
                    "choose another --run_dir, or continue with the new ones by --ckpt_path last"
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


def _describe_data(trainer: Trainer) -> dict[str, Any] | None:
    describe = getattr(trainer.datamodule, "data_manifest", None)  # type: ignore[attr-defined]
    return None if describe is None else describe()
