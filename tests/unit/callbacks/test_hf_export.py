from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from safetensors.torch import load_file

from dpr_lightning.callbacks.hf_export import HFExport
from dpr_lightning.errors import UserError
from dpr_lightning.manifest import is_complete, read_manifest, verify


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


class InterruptAt(StopAt):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def final_weight(run_dir: Path) -> float:
    return float(load_file(run_dir / "final" / "model.safetensors")["weight"])


def test_writes_the_weights_of_the_last_step(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    trainer_in(tmp_path, HFExport(), max_epochs=2).fit(toy(), datamodule=toy_data(4))
    # Twice 1 + 2 + 3 + 4.
    assert final_weight(tmp_path) == -20.0
    manifest = read_manifest(tmp_path / "final")
    assert [manifest[key] for key in ("kind", "step", "planned_steps", "tokenizer_fingerprint")] == [
        "final",
        8,
        8,
        "toy",
    ]
    verify(tmp_path / "final")


def test_a_failed_run_writes_nothing_and_its_resumption_does(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        trainer_in(tmp_path, HFExport(), kill_at(3), checkpoint_every=2, max_epochs=1).fit(
            toy(), datamodule=toy_data(4)
        )
    assert not (tmp_path / "final").exists()
    trainer_in(tmp_path, HFExport(), max_epochs=1).fit(
        toy(), datamodule=toy_data(4), ckpt_path=str(tmp_path / "checkpoints" / "epoch=0-step=2.ckpt")
    )
    assert final_weight(tmp_path) == -10.0


def test_an_interrupted_run_writes_nothing(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning turns SIGINT off for good when it sees Ctrl-C.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit):
        trainer_in(tmp_path, HFExport(), InterruptAt(3), max_epochs=1).fit(toy(), datamodule=toy_data(4))
    assert not (tmp_path / "final").exists()


def test_a_run_killed_before_its_export_makes_up_for_it(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any
) -> None:
    trainer_in(tmp_path, checkpoint_every=4, max_epochs=1).fit(toy(), datamodule=toy_data(4))
    module = toy()
    trainer_in(tmp_path, HFExport(), max_epochs=1).fit(
        module, datamodule=toy_data(4), ckpt_path=str(tmp_path / "checkpoints" / "epoch=0-step=4.ckpt")
    )
    assert module.seen == []
    assert final_weight(tmp_path) == -10.0


def test_a_run_stopped_early_says_so(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    with pytest.warns(UserWarning, match="stopped at optimizer step 2 of 4 planned"):
        trainer_in(tmp_path, HFExport(), StopAt(2), max_epochs=1, min_epochs=0).fit(toy(), datamodule=toy_data(4))
    manifest = read_manifest(tmp_path / "final")
    assert (manifest["step"], manifest["planned_steps"]) == (2, 4)
    assert final_weight(tmp_path) == -3.0


def test_a_finished_model_is_not_overwritten_by_another_run(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any
) -> None:
    trainer_in(tmp_path, HFExport(), checkpoint_every=4, max_epochs=1).fit(toy(), datamodule=toy_data(4))
    module = toy()
    with pytest.raises(UserError, match="already there and complete"):
        trainer_in(tmp_path, HFExport(), max_epochs=1).fit(module, datamodule=toy_data(4))
    assert module.seen == []
    # Going on with the same run replaces it.
    trainer_in(tmp_path, HFExport(), max_epochs=2).fit(
        toy(), datamodule=toy_data(4), ckpt_path=str(tmp_path / "checkpoints" / "epoch=0-step=4.ckpt")
    )
    assert final_weight(tmp_path) == -20.0


def test_files_of_others_are_refused_at_the_start(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no finished run wrote it"):
        trainer_in(tmp_path, HFExport(), max_epochs=1).fit(toy(), datamodule=toy_data(4))


@pytest.mark.parametrize("directory", ["", "..", "a/b", "/tmp", "reference"])
def test_a_directory_outside_the_run_is_refused(directory: str) -> None:
    with pytest.raises(UserError, match=r"HFExport\.directory"):
        HFExport(directory)


def test_a_debugging_run_writes_nothing(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    trainer_in(tmp_path, HFExport(), fast_dev_run=True).fit(toy(), datamodule=toy_data(4))
    assert not is_complete(tmp_path / "final")
