"""SPIN and GSIL from the command line, on the teacher's own prompts and demonstrations; and that they learn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback, Trainer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpr_lightning.application import command_line
from dpr_lightning.main import main
from dpr_lightning.manifest import read_json, read_manifest, verify

NUM_ROWS = 32
METHODS = ("spin", "gsil")


def files(recipe: str) -> list[str]:
    names = ("base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")
    return [argument for name in names for argument in ("-c", f"configs/{name}.yaml")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short SFT run on small tasks from the embedded backbone."""
    root = tmp_path_factory.mktemp("pairs")
    for split, first, num_rows in (("train", 0, NUM_ROWS), ("validation", 100, 4)):
        # Answers that a sample hits now and then only.
        numbers = np.random.default_rng(first).integers(1000, size=num_rows).tolist()
        rows = [{"prompt": f"draw {first + i}.\n", "response": f"{number} it is"} for i, number in enumerate(numbers)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            "fit",
            *files("sft"),
            f"--run_dir={root / 'sft'}",
            f"--data.demonstrations.source={root / 'train.jsonl'}",
            f"--data.demonstrations.validation_source={root / 'validation.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.subsample=null",
            "--data.global_batch_size=8",
            "--data.micro_batch_size=8",
            "--trainer.max_epochs=4",
            "--model.optimizer.lr=1e-3",
        ]
    )
    return root


def arguments(root: Path, method: str, run_dir: str = "") -> list[str]:
    # Rates at which so small a model moves in so few steps.
    own = {
        "spin": [
            "--model.iteration_rates=[1, 0.5]",
            "--model.loss.beta=[0.1, 0.5]",
            "--trainer.max_epochs=2",
            "--data.passes_per_rollout=3",
        ],
        "gsil": ["--data.passes_per_rollout=4"],
    }
    return [
        *files(method),
        f"--model.teacher={root / 'sft'}",
        f"--run_dir={root / (run_dir or method)}",
        "--model.optimizer.lr=1e-4",
        "--data.global_batch_size=8",
        "--data.micro_batch_size=8",
        "--data.sampling.max_new_tokens=24",
        "--model.decoding.max_new_tokens=24",
        *own[method],
    ]


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Path]:
    for method in METHODS:
        main(["fit", *arguments(root, method)])
    return {method: root / method for method in METHODS}


def curves(run_dir: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# SPIN: 32 pairs three times, then 64 three times, in steps of 8. GSIL: 32 pairs four times.
@pytest.mark.parametrize(("method", "num_steps", "num_epochs"), [("spin", 12 + 24, 2), ("gsil", 16, 1)])
def test_a_run_leaves_what_every_run_leaves(
    method: str, num_steps: int, num_epochs: int, runs: dict[str, Path], root: Path
) -> None:
    record = read_json(runs[method] / "run.json")
    assert (record["status"], record["optimizer_steps"]) == ("finished", num_steps)
    assert record["module"] == "dpr_lightning.modules.pairs.PairModule"
    assert record["data"]["splits"]["train"]["kept"] == NUM_ROWS
    # The very ids that SFT was trained on.
    sft = read_json(root / "sft" / "run.json")
    assert record["data"]["splits"]["train"]["fingerprint"] == sft["data"]["splits"]["train"]["fingerprint"]
    assert record["data"]["prompts_per_rollout"] == NUM_ROWS
    tokens = record["tokens"]
    assert min(tokens.values()) > 0
    # Samples and demonstrations of 32 pairs are scored, and trained on four times (GSIL) or three times (SPIN). In its
    # second iteration SPIN scores each demonstration once and trains on it beside two samples.
    if method == "gsil":
        assert tokens["trained"] == 4 * tokens["scored"]
    else:
        assert 3 * tokens["scored"] < tokens["trained"] < 4 * tokens["scored"]
    verify(runs[method] / "final")
    final = read_manifest(runs[method] / "final")
    assert (final["step"], final["planned_steps"]) == (num_steps, num_steps)
    assert final["initial_weights"] == str(root / "sft" / "final")
    logged = curves(runs[method])
    for tag in ("policy/loss", "pairs/margin", "policy/grad_norm", "time/rollout", "time/score", "time/train"):
        assert len(logged[tag]) == num_steps, tag
    for tag in ("val/teacher_kl", "val/length", "policy/teacher_kl", "response/length_mean", "response/length_ratio"):
        assert len(logged[tag]) == num_epochs, tag
    assert logged["policy/teacher_kl"][0] == 0.0


@pytest.mark.parametrize(
    # In seven tries of SPIN and GSIL the loss of the last pass lay 0.06 to 0.1 and 0.01 below the start.
    ("method", "start", "num_steps", "fall"),
    [("spin", math.log(2), 12, 0.04), ("gsil", 4 + 2 * math.log1p(math.exp(-2)) - 2, 16, 0.004)],
)
def test_the_loss_falls_and_the_margin_rises(
    method: str, start: float, num_steps: int, fall: float, runs: dict[str, Path]
) -> None:
    logged = curves(runs[method])
    tags = ("policy/loss", "pairs/margin", "pairs/accuracy", "pairs/demonstration_log_ratio", "pairs/sample_log_ratio")
    # The first step has the policy that sampled: log-ratios of 0. The last pass over the first iteration's pairs has
    # each of them once.
    first = {tag: logged[tag][0] for tag in tags}
    last = {tag: sum(logged[tag][num_steps - 4 : num_steps]) / 4 for tag in tags}
    assert first["policy/loss"] == pytest.approx(start, abs=1e-3)
    assert first["pairs/margin"] == pytest.approx(0.0, abs=1e-3)
    assert last["policy/loss"] < start - fall
    assert last["pairs/margin"] > 1.0
    assert last["pairs/accuracy"] > 0.6
    assert last["pairs/sample_log_ratio"] < last["pairs/demonstration_log_ratio"]
    if method == "spin":
        # pi_1 is the reference of the second iteration, so the margin begins at 0 again.
        assert logged["pairs/margin"][num_steps] == pytest.approx(0.0, abs=1e-3)


class Kill(Callback):
    """Raises after an optimizer step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def test_a_killed_run_resumes_to_the_same_weights(runs: dict[str, Path], root: Path) -> None:
    overlay = root / "checkpoints.yaml"
    checkpoint = {"save_last": True, "every_n_train_steps": 4}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    args = [*files("spin"), "-c", str(overlay), *arguments(root, "spin", "resumed")[len(files("spin")) :]]
    # Inside the second iteration, which has the samples of the first beside its own.
    with pytest.raises(RuntimeError, match="killed"):
        main(["fit", *args, f"--trainer.callbacks+={__name__}.Kill", "--trainer.callbacks.step=18"])
    main(["fit", *args, "--ckpt_path=last"])
    assert torch.equal(weights(root / "resumed"), weights(runs["spin"]))
    assert read_json(root / "resumed" / "run.json")["tokens"] == read_json(runs["spin"] / "run.json")["tokens"]


def weights(directory: Path) -> torch.Tensor:
    return load_file(directory / "final" / "model.safetensors")["model.embed_tokens.weight"]


@pytest.mark.parametrize(("method", "subcommand"), [("spin", "validate"), ("gsil", "predict")])
def test_other_subcommands_know_the_run(method: str, subcommand: str, runs: dict[str, Path], root: Path) -> None:
    cli = command_line([subcommand, *arguments(root, method), "--ckpt_path=last"])
    if subcommand == "validate":
        assert {"val/teacher_kl", "val/length"} <= set(cli.trainer.callback_metrics)
    else:
        rows = [json.loads(line) for line in (runs[method] / "predictions.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [f"draw {n}.\n" for n in range(100, 104)]


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as status:
        main(["fit", *args])
    assert status.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--trainer.max_epochs=3"],
            "model.iteration_rates: found 2 values, but trainer.max_epochs plans 3 iterations",
        ),
        (["--model.loss.beta=[0.1, -1]"], "beta must be above 0"),
        (["--data.samples_per_prompt=2"], "data.samples_per_prompt: there is no such key"),
        (["--data.class_path=dpr_lightning.data.rollout_datamodule.RolloutDataModule"], "data.class_path"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    changes: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal([*arguments(root, "spin", "refused"), *changes], capsys)
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_an_unfinished_teacher_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = root / "unfinished"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "config.yaml").write_text("")
    said = refusal([*arguments(root, "gsil", "refused"), f"--model.teacher={unfinished}"], capsys)
    assert "holds a run without a finished 'final/' directory" in said
