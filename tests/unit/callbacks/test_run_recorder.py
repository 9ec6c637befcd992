from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from dpr_lightning.callbacks.run_recorder import RunRecorder
from dpr_lightning.manifest import read_json


class AtStart(Callback):
    """Keeps what the run's record says when training starts."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self.record = read_json(Path(trainer.default_root_dir) / "run.json")


def recorder(*args: str) -> RunRecorder:
    parser = LightningArgumentParser()
    parser.add_argument("--ckpt_path", type=str | None)
    parser.add_argument("--seed_everything", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.5)
    return RunRecorder(parser, parser.parse_args(list(args)), save_to_log_dir=False, command="dpr-lightning fit")


def test_says_what_the_run_is_before_the_first_step_and_how_it_ended(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any
) -> None:
    start = AtStart()
    trainer_in(tmp_path / "run", recorder("--rate=0.25"), start, max_epochs=2).fit(toy(), datamodule=toy_data(3))
    assert start.record["status"] == "running"
    assert (start.record["kind"], start.record["command"], start.record["seed"]) == ("run", "dpr-lightning fit", 3)
    assert start.record["module"].endswith(".ToyModule")
    assert (start.record["world_size"], start.record["data"]) == (1, None)
    end = read_json(tmp_path / "run" / "run.json")
    # 3 batches in each of 2 epochs.
    assert (end["status"], end["reason"], end["optimizer_steps"]) == ("finished", "", 6)
    assert end["started"] == start.record["started"] <= end["ended"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rate"] == 0.25


def test_a_failed_run_says_why_and_where(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        trainer_in(tmp_path, recorder(), kill_at(2), max_epochs=1).fit(toy(), datamodule=toy_data(3))
    record = read_json(tmp_path / "run.json")
    assert (record["status"], record["reason"], record["optimizer_steps"]) == ("failed", "RuntimeError: killed", 2)


def test_every_earlier_configuration_is_kept_once(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    for args in (["--rate=1"], ["--rate=1", "--ckpt_path=last"], ["--rate=2"], ["--rate=3"]):
        trainer_in(tmp_path, recorder(*args), max_epochs=1).fit(toy(), datamodule=toy_data(1))
    configs = {path.name: yaml.safe_load(path.read_text()) for path in tmp_path.glob("config*.yaml")}
    # The second run differs by its checkpoint only, which is not part of the configuration.
    assert {name: config["rate"] for name, config in configs.items()} == {
        "config.1.yaml": 1.0,
        "config.2.yaml": 2.0,
        "config.yaml": 3.0,
    }
    assert all(config["ckpt_path"] is None for config in configs.values())


def test_other_subcommands_leave_the_record_alone(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    class Data(toy_data):  # type: ignore[misc]
        def test_dataloader(self) -> Any:
            return self.train_dataloader()

    class Module(toy):  # type: ignore[misc]
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer_in(tmp_path, recorder("--rate=1"), max_epochs=1).fit(Module(), datamodule=Data(1))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    trainer_in(tmp_path, recorder("--rate=2")).test(Module(), datamodule=Data(1))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before
