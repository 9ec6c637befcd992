"""``sweep`` from end to end on the embedded backbone, at a size that takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import pytest
import yaml

from dpr_lightning.analysis import runner
from dpr_lightning.analysis.experiment import plan, read_experiment
from dpr_lightning.main import main
from dpr_lightning.manifest import read_json

BASE = ["backbone/tiny", "hardware/cpu"]


def configs(recipe: str, *overlays: Any) -> list[str]:
    return [f"configs/{name}.yaml" for name in (f"recipe/{recipe}", *BASE)] + [str(path) for path in overlays]


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """SFT, DPR with two discounts, and continued SFT for the same compute; two seeds."""
    short = tmp_path / "short.yaml"
    callbacks = [{"class_path": f"dpr_lightning.callbacks.{name}"} for name in ("hf_export.HFExport",)]
    short.write_text(yaml.safe_dump({"trainer": {"enable_checkpointing": False, "callbacks": callbacks}}))
    settings = {"data.global_batch_size": 8, "data.micro_batch_size": 8, "model.optimizer.init_args.lr": 1e-4}
    sft = {"data.demonstrations.source": "{train}", "data.demonstrations.preset": "prompt_response", **settings}
    sft |= {"data.demonstrations.validation_source": "{validation}", "data.demonstrations.subsample": None}
    snapshot = "dpr_lightning.callbacks.reference_snapshot.ReferenceSnapshot"
    dpr = {
        "model.teacher": "{teacher}",
        "trainer.max_epochs": 2,
        "trainer.check_val_every_n_epoch": 1,
        "data.prompts_per_rollout": 8,
        "data.sampling.max_new_tokens": 12,
        "model.decoding.max_new_tokens": 12,
        "model.verifier": "dpr_lightning.demo.verifier.TaskVerifier",
        **settings,
    }
    path = tmp_path / "small.yaml"
    document = {
        "title": "Small",
        "seeds": [0, 1],
        "base": ["configs/base.yaml"],
        "prepare": {
            "class_path": "dpr_lightning.demo.data.EmbeddedTasks",
            "init_args": {"num_demonstrations": 32, "num_validation": 4, "num_test": 6},
        },
        "teacher": {
            "configs": configs("sft", short),
            "settings": {**sft, "trainer.callbacks": [*callbacks, {"class_path": snapshot}]},
        },
        "runs": {
            "DPR": {
                "configs": configs("dpr", short),
                "settings": dpr,
                "grid": {"model.returns.init_args.gamma": [0.9, 1.0]},
            },
            "continued": {
                "configs": configs("sft", short),
                "settings": {**sft, "trainer.max_epochs": -1, "model.backbone.name_or_path": "{teacher}/final"},
                "same_compute_as": "DPR",
            },
        },
        "evaluation": {
            "prompts": "{test}",
            "verifier": "dpr_lightning.demo.verifier.TaskVerifier",
            "temperatures": [0.0, 1.0],
            "num_samples": 2,
            "max_new_tokens": 12,
            "batch_size": 16,
        },
        "figures": [
            {
                "class_path": "dpr_lightning.analysis.figures.LineFigure",
                "init_args": {"name": "gamma", "title": "g", "x": "model.returns.init_args.gamma", "temperature": 1.0},
            }
        ],
    }
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def sweep(path: Path, root: Path, *more: str) -> None:
    main(["sweep", str(path), "--run_dir", str(root), *more])


def tables(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "small").iterdir())}


def test_runs_measures_and_goes_on(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    sweep(experiment, root, "--dry_run")
    printed = capsys.readouterr().out
    assert printed.count("dpr-lightning fit") == 8
    assert not root.exists()

    sweep(experiment, root)
    printed = capsys.readouterr().out
    assert "Trainer.fit" not in printed
    results = pd.read_csv(root / "small" / "results.csv")
    # Four variants (SFT, two of DPR, continued) x two seeds x two temperatures.
    assert len(results) == 16
    assert list(results["label"].unique()) == ["SFT", "DPR (gamma 0.9)", "DPR (gamma 1)", "continued"]
    teacher = results[results["run"] == "SFT"]
    assert (teacher["teacher_kl"] == 0.0).all()
    assert teacher["win_rate"].isna().all()
    others = results[results["run"] != "SFT"]
    assert (others["teacher_kl"] > 0.0).all()
    np.testing.assert_allclose(others["win_rate"], 0.5 + others["accuracy_minus_sft"] / 2, atol=1e-6)
    assert set(results.loc[results["temperature"] == 0.0, "num_samples"]) == {1}
    # Continued SFT gets the compute of the first variant, to within one of its steps.
    per_seed = results.drop_duplicates(["label", "seed"]).set_index(["label", "seed"])["token_forwards"]
    steps = results.drop_duplicates(["label", "seed"]).set_index(["label", "seed"])["optimizer_steps"]
    for seed in (0, 1):
        one_step = per_seed["SFT", seed] / steps["SFT", seed]
        assert abs(per_seed["continued", seed] - per_seed["DPR (gamma 0.9)", seed]) < 3 * one_step
    curves = pd.read_csv(root / "small" / "curves.csv")
    assert len(curves[curves["run"] == "DPR"]) == 2 * 2 * 2
    assert curves.loc[curves["run"] == "DPR", "accuracy"].between(0, 1).all()
    positions = pd.read_csv(root / "small" / "positions.csv")
    assert (positions[positions["position"] == 0]["count"] == 6).all()
    assert (root / "small" / "gamma.png").stat().st_size > 5000

    # Nothing is left to do, and the files stay as they are.
    before = tables(root)
    sweep(experiment, root)
    assert capsys.readouterr().out.count("done before") == 8
    assert tables(root) == before

    # One run that is gone is repeated, and comes out the same but for its wall time.
    task = plan(read_experiment(experiment), root)["runs"][0]
    shutil.rmtree(task.directory)
    for measured in task.directory.parent.glob(f"{task.directory.name}-measured-*"):
        shutil.rmtree(measured)
    sweep(experiment, root)
    assert capsys.readouterr().out.count("done before") == 7
    again = pd.read_csv(root / "small" / "results.csv")
    pd.testing.assert_frame_equal(again.drop(columns="train_seconds"), results.drop(columns="train_seconds"))


def test_a_failed_run_is_told_and_repeated(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    measure = runner.measure
    broken = plan(read_experiment(experiment), root, seeds=[0])["runs"][1].directory

    def fail(run_dir: Path, *rest: Any) -> Any:
        if run_dir == broken:
            raise RuntimeError("no space left")
        return measure(run_dir, *rest)

    monkeypatch.setattr(runner, "measure", fail)
    with pytest.raises(SystemExit, match="2"):
        sweep(experiment, root, "--seeds", "0")
    captured = capsys.readouterr()
    assert "1 of 4 runs failed; the same command runs them again" in captured.err
    assert "no space left" in captured.err
    # The others are there, and the log has the whole story.
    assert len(pd.read_csv(root / "small" / "results.csv")) == 2 * 3
    assert "Traceback" in (broken.parent / f"{broken.name}.log").read_text()
    started = read_json(broken / "run.json")["started"]
    monkeypatch.setattr(runner, "measure", measure)
    sweep(experiment, root, "--seeds", "0")
    # It was trained already, and is not trained again.
    assert read_json(broken / "run.json")["started"] == started
    assert len(pd.read_csv(root / "small" / "results.csv")) == 2 * 4


def test_an_unfinished_run_without_checkpoints_begins_anew(experiment: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    teacher = plan(read_experiment(experiment), root, seeds=[0])["teacher"][0].directory
    (teacher / "tensorboard").mkdir(parents=True)
    (teacher / "config.yaml").write_text("left: over")
    (teacher / "run.json").write_text('{"status": "running"}')
    sweep(experiment, root, "--seeds", "0")
    assert read_json(teacher / "run.json")["status"] == "finished"


@pytest.mark.multiprocess
def test_workers_give_the_same_results(experiment: Path, tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        sweep(experiment, tmp_path / name, "--seeds", "0", "--workers", workers)
    one, two = (
        pd.read_csv(tmp_path / name / "small" / "results.csv").drop(columns="train_seconds") for name in ("one", "two")
    )
    pd.testing.assert_frame_equal(one, two)


def test_mistakes_are_told_before_anything_runs(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml.safe_load(experiment.read_text())
    for change, message in (
        ({"evaluation": {**document["evaluation"], "prompts": "{absent}"}}, "evaluation.prompts: found '{absent}'"),
        ({"title": None}, "title"),
    ):
        experiment.write_text(yaml.safe_dump({**document, **change}))
        with pytest.raises(SystemExit, match="2"):
            sweep(experiment, tmp_path / "runs", "--dry_run")
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sweep(tmp_path / "absent.yaml", tmp_path / "runs")
    assert "no file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sweep(experiment, tmp_path / "runs", "--workers", "0")
    assert "--workers: found 0" in capsys.readouterr().err


def test_two_sweeps_do_not_share_a_directory(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    with filelock.FileLock(root / ".lock"):
        with pytest.raises(SystemExit, match="2"):
            sweep(experiment, root)
        assert f"another sweep is running in '{root}'" in capsys.readouterr().err
        sweep(experiment, root, "--dry_run")
    assert [path.name for path in root.iterdir()] in ([".lock"], [])
