"""The command line from end to end on a two-layer model: fit, validate, test, predict, resume, repeat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, pipeline

from dpr_lightning.application import command_line
from dpr_lightning.data.templates import TextTemplate
from dpr_lightning.data.tokenization import encode_prompt
from dpr_lightning.main import main
from dpr_lightning.manifest import read_json, read_manifest, verify

ROOT = Path(__file__).resolve().parents[2]
SFT_STEPS = 6
"""12 rows in batches of 4, two epochs."""
DPR_STEPS = 4
"""8 prompts in batches of 4, two epochs."""
NUM_TEST = 5


class Kill(Callback):
    """Ends the run after an optimizer step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@dataclass(frozen=True)
class Commands:
    """Arguments of both stages, and where they write."""

    root: Path
    model_dir: Path

    def sft(self, run_dir: str = "sft") -> list[str]:
        return [
            *self._files("sft"),
            f"--model.backbone.name_or_path={self.model_dir}",
            f"--run_dir={self.root / run_dir}",
            f"--data.demonstrations.source={self.root / 'train.jsonl'}",
            f"--data.demonstrations.validation_source={self.root / 'validation.jsonl'}",
            f"--data.demonstrations.test_source={self.root / 'test.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.subsample=null",
            "--data.global_batch_size=4",
            "--data.micro_batch_size=2",
            "--trainer.max_epochs=2",
            "--model.decoding.max_new_tokens=5",
            # Large enough that every step moves the weights visibly.
            "--model.optimizer.lr=1e-2",
        ]

    def dpr(self, run_dir: str = "dpr") -> list[str]:
        return [
            *self._files("dpr"),
            f"--model.teacher={self.root / 'sft'}",
            f"--run_dir={self.root / run_dir}",
            "--data.prompts_per_rollout=8",
            "--data.global_batch_size=4",
            "--data.micro_batch_size=2",
            "--data.sampling.max_new_tokens=6",
            "--trainer.max_epochs=2",
            "--model.decoding.max_new_tokens=5",
            "--model.optimizer.lr=1e-3",
        ]

    def _files(self, recipe: str) -> list[str]:
        overlay = self.root / "checkpoints.yaml"
        name = "dpr_lightning.callbacks.checkpoint.RunCheckpoint"
        callback = {"class_path": name, "init_args": {"every_n_train_steps": 2}}
        overlay.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
        files = ("base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")
        overlays = [argument for file in files for argument in ("-c", f"configs/{file}.yaml")]
        return [*overlays, "-c", str(overlay)]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Commands:
    commands = Commands(root=tmp_path_factory.mktemp("runs"), model_dir=tiny_model_dir)
    for first, split, num_rows in ((0, "train", 12), (100, "validation", 3), (200, "test", NUM_TEST)):
        rows = [{"prompt": f"{n} and {n}", "response": "ok " * (1 + n % 5)} for n in range(first, first + num_rows)]
        (commands.root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["fit", *commands.sft()])
    main(["fit", *commands.dpr()])
    return commands


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "final" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    expected = weights(one)
    found = weights(other)
    assert expected.keys() == found.keys()
    assert all(bool((expected[name] == found[name]).all()) for name in expected)


def steps_by_tag(run_dir: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(("stage", "num_steps"), [("sft", SFT_STEPS), ("dpr", DPR_STEPS)])
def test_run_directory_says_what_the_run_was(commands: Commands, stage: str, num_steps: int) -> None:
    run_dir = commands.root / stage
    record = read_json(run_dir / "run.json")
    assert (record["kind"], record["status"], record["optimizer_steps"]) == ("run", "finished", num_steps)
    assert record["command"].startswith("dpr-lightning fit -c configs/base.yaml")
    assert record["seed"] == 0
    assert record["world_size"] == 1
    assert {"python", "torch", "lightning", "transformers", "dpr-lightning"} <= set(record["environment"])
    assert set(record["data"]["splits"]) == {"train", "validation", "test"} - ({"test"} if stage == "sft" else set())
    assert record["tokens"]["trained"] > 0
    assert (record["tokens"]["rolled_out"] > 0) == (stage == "dpr")
    final = read_manifest(run_dir / "final")
    verify(run_dir / "final")
    assert (final["kind"], final["step"], final["planned_steps"]) == ("final", num_steps, num_steps)
    assert final["data"]["template"]["type"] == "text"
    assert (run_dir / "checkpoints" / "last.ckpt").is_file()
    assert (run_dir / "config.yaml").is_file()


def test_exports_answer_elsewhere_as_they_were_trained(commands: Commands) -> None:
    for directory in (commands.root / "sft" / "final", commands.root / "dpr" / "final"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        messages = [{"role": "user", "content": "1 and 1"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(tokenizer, TextTemplate(), messages)
        generation = GenerationConfig.from_pretrained(directory)
        assert generation.eos_token_id == tokenizer.eos_token_id
        assert generation.pad_token_id is not None
        assert (generation.temperature, generation.top_p, generation.repetition_penalty) == (None,) * 3
        answer = pipeline("text-generation", str(directory))(messages, max_new_tokens=8, do_sample=False)
        assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_reference_lies_at_half(commands: Commands) -> None:
    reference = commands.root / "sft" / "reference" / "alpha_0.5"
    manifest = read_manifest(reference)
    verify(reference)
    assert (manifest["kind"], manifest["alpha"], manifest["step"]) == ("reference", 0.5, SFT_STEPS // 2)


def test_sft_logs_against_optimizer_steps(commands: Commands) -> None:
    steps = steps_by_tag(commands.root / "sft")
    each = list(range(SFT_STEPS))
    for tag in ("train/loss", "policy/grad_norm", "policy/learning_rate", "time/train", "perf/train_tokens_per_second"):
        assert steps[tag] == each, tag
    assert len(steps["val/loss"]) == 2


def test_dpr_logs_every_group_against_optimizer_steps(commands: Commands) -> None:
    steps = steps_by_tag(commands.root / "dpr")
    each = list(range(DPR_STEPS))
    for tag in ("policy/loss", "policy/grad_norm", "time/train", "time/rollout", "time/score"):
        assert steps[tag] == each, tag
    groups = {tag.partition("/")[0] for tag in steps}
    assert {"reward", "logp", "return", "policy", "response", "rollout", "time", "perf", "val"} <= groups
    # One rollout batch is two optimizer steps: its figures stand at the steps that made the policy of them.
    assert set(steps["reward/len_corr"]) <= set(each)


@pytest.mark.parametrize("stage", ["sft", "dpr"])
@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_held_out_rows_are_evaluated(commands: Commands, stage: str, subcommand: str) -> None:
    args = getattr(commands, stage)()
    cli = command_line([subcommand, *args, "--ckpt_path=last"])
    prefix = {"validate": "val", "test": "test"}[subcommand]
    key = {"sft": "loss", "dpr": "reward_sum"}[stage]
    assert f"{prefix}/{key}" in cli.trainer.callback_metrics


@pytest.mark.parametrize("stage", ["sft", "dpr"])
def test_predict_answers_the_test_rows(commands: Commands, stage: str) -> None:
    main(["predict", *getattr(commands, stage)(), "--ckpt_path=last"])
    path = commands.root / stage / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(1, NUM_TEST + 1))
    assert [row["prompt"] for row in rows] == [f"{n} and {n}" for n in range(200, 200 + NUM_TEST)]
    for row in rows:
        assert isinstance(row["response"], str)
        assert 1 <= row["num_tokens"] <= 5
        assert row["is_truncated"] in (True, False)


def test_killed_run_resumes_to_the_same_weights(commands: Commands) -> None:
    args = commands.sft("resumed")
    with pytest.raises(RuntimeError, match="killed"):
        main(["fit", *args, f"--trainer.callbacks+={__name__}.Kill", "--trainer.callbacks.step=3"])
    run_dir = commands.root / "resumed"
    assert read_json(run_dir / "run.json")["status"] == "failed"
    assert not (run_dir / "final").exists()
    main(["fit", *args])
    assert_same_weights(commands.root / "sft", run_dir)
    assert read_json(run_dir / "run.json")["status"] == "finished"
    # The configuration that was killed is kept beside the one that finished.
    assert (run_dir / "config.1.yaml").is_file()
    assert steps_by_tag(run_dir)["train/loss"][-1] == SFT_STEPS - 1


@pytest.mark.parametrize("stage", ["sft", "dpr"])
def test_config_alone_repeats_the_run_elsewhere(
    commands: Commands, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = commands.root / stage
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    monkeypatch.chdir(tmp_path)
    main(["fit", "-c", str(run_dir / "config.yaml"), "--run_dir=again"])
    assert_same_weights(run_dir, tmp_path / "again")
    assert (tmp_path / "again" / "checkpoints" / "last.ckpt").is_file()
    assert list((tmp_path / "again" / "tensorboard").glob("events*"))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_packaged_configs_and_backbone_are_found_from_anywhere(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [arg for arg in commands.sft("tiny") if not arg.startswith("--model.backbone")]
    main(["fit", *args, "--trainer.max_steps=2"])
    assert read_manifest(commands.root / "tiny" / "final")["initial_weights"] == "dpr_lightning/demo/backbone"


@pytest.mark.parametrize("program", ["checkout", "script"])
def test_help_of_the_program(program: str, tmp_path: Path) -> None:
    command = {
        "checkout": [sys.executable, str(ROOT / "cli.py")],
        "script": [str(Path(sys.executable).parent / "dpr-lightning")],
    }[program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "demo train and compare" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("command", "expected"), [("fit", "--run_dir"), ("predict", "--run_dir"), ("demo", "--seeds")])
def test_help_of_a_command(command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    assert expected in capsys.readouterr().out


def test_output_is_quiet(commands: Commands, tmp_path: Path) -> None:
    """Only what concerns this run: no advertisement, no warning about a library's own use of another, no idle bar."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    args = [*commands.sft(str(tmp_path / "quiet")), "--data.demonstrations.validation_source=null"]
    command = [sys.executable, str(ROOT / "cli.py"), "fit", *args, "--trainer.max_epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    for noise in ("litlogger", "LeafSpec", "model shards", "Loading weights", "across ranks is zero", "workers"):
        assert noise not in said
    assert "Warning" not in said
    assert "Final model:" in said
