from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger

from dpr_lightning.callbacks.checkpoint import RunCheckpoint
from dpr_lightning.checkpoints import VerifiedCheckpointIO
from dpr_lightning.errors import CheckpointError


@pytest.mark.parametrize("interval", [2, 3, 50])
def test_last_checkpoint_is_of_the_last_step(tmp_path: Path, interval: int) -> None:
    callback = RunCheckpoint(tmp_path / "checkpoints", every_n_train_steps=interval, save_last=True)
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=3,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    assert [path.name for path in (tmp_path / "checkpoints").glob("last*")] == ["last.ckpt"]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in trainer.model.state_dict().items())


class Diary(DummyLogger):
    """Writes down, in order, what a run does and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))


class Hooks(Callback):
    """Tells the diary of epochs, micro-batches and validations."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        self.diary.lines.append(f"epoch {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.diary.lines.append(f"end of epoch {trainer.current_epoch}")

    def on_validation_start(self, *args: Any) -> None:
        self.diary.lines.append("validation")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.diary.lines.append(("batch", batch_idx, float(batch)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bounds", [{"max_epochs": 3}, {"max_steps": 9, "max_epochs": 3}], ids=["epochs", "steps"])
@pytest.mark.parametrize("validates", [{"limit_val_batches": 0}, {}, {"val_check_interval": 2}], ids=str)
def test_a_resumed_run_does_and_logs_what_is_left_and_no_more(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Callable[..., Trainer], bounds: Any, validates: Any
) -> None:
    class Module(toy):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/weight", self.weight.detach())

    class Data(toy_data):  # type: ignore[misc]
        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(1))  # type: ignore[arg-type]

    def run(name: str, ckpt_path: Path | None = None) -> tuple[list[Any], float]:
        diary = Diary()
        saving = RunCheckpoint(tmp_path / name, every_n_train_steps=1, keep=20)
        settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        trainer = trainer_in(tmp_path, Hooks(diary), saving, logger=diary, **settings, **bounds, **validates)
        module = Module()
        # Eight micro-batches, four optimizer steps, an epoch.
        trainer.fit(module, datamodule=Data(8), ckpt_path=ckpt_path)
        return diary.lines, float(module.weight)

    whole, weight = run("whole")
    assert len({step for step, _ in (line for line in whole if isinstance(line, tuple) and len(line) == 2)}) >= 9
    for step in range(1, 9):
        lines, found = run(f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert lines == whole[len(whole) - len(lines) :], step
        assert lines[0] == (f"epoch {step // 4}" if step % 4 == 0 else ("batch", 2 * (step % 4), 2.0 * (step % 4) + 1))
        assert found == weight


def test_the_newest_stay_and_later_ones_of_an_abandoned_run_go(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Callable[..., Trainer]
) -> None:
    def run(**settings: Any) -> set[str]:
        saving = RunCheckpoint(tmp_path, every_n_train_steps=1, keep=3)
        trainer = trainer_in(tmp_path / "run", saving, enable_checkpointing=True, **settings)
        trainer.fit(toy(), datamodule=toy_data(4), ckpt_path=tmp_path / "step=5.ckpt" if resumes else None)
        assert (tmp_path / "last.ckpt").resolve().name == f"step={trainer.global_step}.ckpt"
        return {path.name for path in tmp_path.glob("step=*")}

    resumes = False
    assert run(max_steps=7) == {"step=5.ckpt", "step=6.ckpt", "step=7.ckpt"}
    resumes = True
    assert run(max_steps=6) == {"step=5.ckpt", "step=6.ckpt"}


CONTENT: dict[str, Any] = {"weight": torch.ones(3), "lr_schedulers": []}


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = VerifiedCheckpointIO()
    files.save_checkpoint(CONTENT, tmp_path / "step=1.ckpt")

    def full(value: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step=2.ckpt' could not be written .*No space left.* GiB are free"):
        files.save_checkpoint(CONTENT, tmp_path / "step=2.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert files.load_checkpoint(tmp_path)["weight"].tolist() == [1.0, 1.0, 1.0]
