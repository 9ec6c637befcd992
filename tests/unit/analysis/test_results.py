"""Tables of an experiment's runs against figures worked out by hand, and curves against what TensorBoard was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

from dpr_lightning.analysis.experiment import TEACHER, EvaluationSpec, Task
from dpr_lightning.analysis.figures import Tables
from dpr_lightning.analysis.measure import save_answers
from dpr_lightning.analysis.results import collect, read_curves, summarize, to_markdown
from dpr_lightning.analysis.runner import Job
from dpr_lightning.demo.verifier import TaskVerifier
from dpr_lightning.evaluation.answers import Answers
from dpr_lightning.manifest import write_directory

TOKENS = {"trained": 10, "rolled_out": 4, "scored": 8}


def answers(correct: list[list[int]]) -> Answers:
    is_correct_PS = np.array(correct, dtype=np.bool_)
    return Answers(
        is_correct_PS=is_correct_PS,
        num_tokens_PS=np.full(is_correct_PS.shape, 5),
        is_truncated_PS=np.zeros_like(is_correct_PS),
    )


def job(root: Path, name: str, seed: int, correct: dict[float, list[list[int]]] | None, **values: Any) -> Job:
    """One run, measured unless ``correct`` is None: its verdicts by temperature."""
    task = Task(name=name, seed=seed, values=values, configs=[], settings={}, directory=root / f"{name}{values}_{seed}")
    evaluation = EvaluationSpec(prompts="", verifier=TaskVerifier())
    measured = root / f"{task.directory.name}-measured"
    if correct is not None:
        manifest = {
            "kind": "measurement",
            "teacher_kl": 0.5,
            "reward_sum": 1.25,
            "length_correlation": 0.125,
            "positions": {"count": [2.0, 1.0], "kl": [0.1, 0.2], "reward": [0.3, -0.4]},
            "tokens": TOKENS,
            "optimizer_steps": 7,
            "started": "2026-01-01T00:00:00+00:00",
            "ended": "2026-01-01T00:01:30+00:00",
        }

        def write(partial: Path) -> None:
            save_answers(partial / "answers.npz", {at: answers(found) for at, found in correct.items()})

        write_directory(measured, write, manifest)
    return Job(
        task=task,
        teacher_dir=root / f"{TEACHER}{{}}_{seed}",
        variables={},
        evaluation=evaluation,
        measured_dir=measured,
    )


def test_a_run_is_compared_with_its_own_seeds_teacher_sample_by_sample(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, TEACHER, 0, {1.0: [[1, 0], [0, 0]]}),
        job(tmp_path, TEACHER, 1, {1.0: [[1, 1], [1, 1]]}),
        job(tmp_path, "DPR", 0, {1.0: [[1, 1], [0, 1]]}, gamma=0.9),
    ]
    tables = collect(jobs)
    (found,) = tables.results[tables.results["run"] == "DPR"].to_dict("records")
    assert found["accuracy"] == 0.75
    assert found["accuracy_minus_sft"] == 0.5
    # Two samples win and two tie.
    assert found["win_rate"] == 0.75
    assert (found["gamma"], found["seed"], found["label"]) == (0.9, 0, "DPR (gamma 0.9)")
    assert (found["num_prompts"], found["num_samples"], found["length"]) == (2, 2, 5.0)
    # One for each token sampled or scored, three for each that was trained on.
    assert found["token_forwards"] == 4 + 8 + 3 * 10
    assert found["train_seconds"] == 90.0
    assert tables.results[tables.results["run"] == TEACHER]["win_rate"].isna().all()


def test_runs_without_a_measurement_are_left_out(tmp_path: Path) -> None:
    tables = collect([job(tmp_path, TEACHER, 0, {0.0: [[1]]}), job(tmp_path, "DPR", 0, None)])
    assert list(tables.results["run"]) == [TEACHER]
    nothing = collect([job(tmp_path, "SR", 0, None)])
    assert nothing.results.empty
    assert list(nothing.positions.columns) == ["run", "label", "seed"]


def test_positions_keep_their_order_and_figures(tmp_path: Path) -> None:
    positions = collect([job(tmp_path, TEACHER, 0, {0.0: [[1]]})]).positions
    assert positions[["position", "count", "kl", "reward"]].to_dict("list") == {
        "position": [0, 1],
        "count": [2.0, 1.0],
        "kl": [0.1, 0.2],
        "reward": [0.3, -0.4],
    }


def test_curves_are_what_validation_logged_by_step(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, accuracy in ((4, 0.5), (8, 0.25)):
            writer.add_scalar("val/response/accuracy", accuracy, step)
        writer.add_scalar("val/loss", 2.0, 8)
        writer.add_scalar("policy/kl", 9.0, 8)
    assert read_curves(tmp_path) == [
        {"step": 4, "response/accuracy": 0.5},
        {"step": 8, "response/accuracy": 0.25, "loss": 2.0},
    ]
    assert read_curves(tmp_path / "absent") == []


def table_of(accuracy: dict[str, list[float]]) -> Tables:
    rows = [
        {
            "run": run,
            "label": run,
            "seed": seed,
            "temperature": 1.0,
            "accuracy": value,
            "length": 5.0,
            "teacher_kl": 0.5,
            "reward_sum": 1.0,
            "optimizer_steps": 7,
            "token_forwards": 2_500_000,
            "train_seconds": 60.0,
        }
        for run, values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    return Tables(results=pd.DataFrame(rows), positions=pd.DataFrame(), curves=pd.DataFrame())


def test_differences_are_paired_by_seed_with_students_interval() -> None:
    summary = summarize(table_of({TEACHER: [0.5, 0.6, 0.7], "DPR": [0.6, 0.6, 0.9]}))
    dpr = summary.set_index("method").loc["DPR"]
    # Differences 0.1, 0, 0.2: mean 0.1, standard deviation 0.1; t of 2 degrees is 4.303.
    half = 4.302653 * 0.1 / 3**0.5
    assert dpr["T=1 - SFT"] == f"+0.100 [{0.1 - half:+.3f}, {0.1 + half:+.3f}] 2/3"
    assert dpr["T=1"] == "0.700"
    assert dpr["M forwards"] == "2.50"
    assert summary.set_index("method").loc[TEACHER]["T=1 - SFT"] == ""


def test_one_seed_gives_a_difference_without_an_interval() -> None:
    summary = summarize(table_of({TEACHER: [0.5], "DPR": [0.75]}))
    assert summary.set_index("method").loc["DPR"]["T=1 - SFT"] == "+0.250"


def test_a_table_in_markdown() -> None:
    table = pd.DataFrame({"method": ["a", "b"], "x": [1, 2]})
    assert to_markdown(table) == "| method | x |\n|---|---|\n| a | 1 |\n| b | 2 |\n"


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_seeds_are_counted(seeds: list[int]) -> None:
    summary = summarize(table_of({TEACHER: [0.5] * len(seeds)}))
    assert summary["seeds"].tolist() == [len(seeds)]
