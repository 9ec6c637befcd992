"""Tidy tables of an experiment's finished runs, and the summary that people read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from dpr_lightning.analysis.experiment import TEACHER
from dpr_lightning.analysis.figures import Tables, mean_and_half
from dpr_lightning.analysis.measure import load_answers, token_forwards
from dpr_lightning.analysis.runner import Job
from dpr_lightning.evaluation.answers import Answers
from dpr_lightning.evaluation.statistics import paired_difference
from dpr_lightning.manifest import is_complete, read_manifest


def collect(jobs: Sequence[Job]) -> Tables:
    """Read every measurement of the finished jobs; those of unfinished ones are left out."""
    done = [job for job in jobs if is_complete(job.measured_dir)]
    teachers = {job.teacher_dir: job.measured_dir for job in done if job.task.name == TEACHER}
    results, positions, curves = [], [], []
    for job in done:
        manifest = read_manifest(job.measured_dir)
        key = {"run": job.task.name, "label": job.task.label, "seed": job.task.seed}
        baseline_dir = teachers.get(job.teacher_dir)
        baseline = None if baseline_dir is None else load_answers(baseline_dir / "answers.npz")
        results += _results(key, job, manifest, baseline)
        found = manifest["positions"]
        positions += [
            {**key, "position": position, **{name: values[position] for name, values in found.items()}}
            for position in range(len(found["count"]))
        ]
        curves += [{**key, **row} for row in read_curves(job.task.directory / "tensorboard")]
    columns = ["run", "label", "seed"]
    return Tables(
        results=pd.DataFrame(results, columns=None if results else columns),
        positions=pd.DataFrame(positions, columns=None if positions else columns),
        curves=pd.DataFrame(curves, columns=None if curves else columns),
    )


def _results(
    key: dict[str, Any], job: Job, manifest: dict[str, Any], baseline: dict[float, Answers] | None
) -> list[dict[str, Any]]:
    seconds = (datetime.fromisoformat(manifest["ended"]) - datetime.fromisoformat(manifest["started"])).total_seconds()
    of_run = {
        **job.task.values,
        "teacher_kl": manifest["teacher_kl"],
        "reward_sum": manifest["reward_sum"],
        "length_correlation": manifest["length_correlation"],
        "optimizer_steps": manifest["optimizer_steps"],
        "token_forwards": token_forwards(manifest),
        "train_seconds": seconds,
    }
    rows = []
    for temperature, answers in load_answers(job.measured_dir / "answers.npz").items():
        figures: dict[str, Any] = {
            "temperature": temperature,
            "accuracy": float(answers.is_correct_PS.mean()),
            "length": float(answers.num_tokens_PS.mean()),
            "truncated_share": float(answers.is_truncated_PS.mean()),
            "num_prompts": answers.is_correct_PS.shape[0],
            "num_samples": answers.is_correct_PS.shape[1],
        }
        if baseline is not None and temperature in baseline and job.task.name != TEACHER:
            difference_PS = answers.is_correct_PS.astype(int) - baseline[temperature].is_correct_PS.astype(int)
            # Sample by sample: a right answer where the teacher's is wrong wins, and ties count half.
            figures["win_rate"] = float((np.sign(difference_PS) + 1).mean() / 2)
            figures["accuracy_minus_sft"] = float(difference_PS.mean())
        rows.append({**key, **figures, **of_run})
    return rows or [{**key, **of_run}]


def read_curves(directory: Path) -> list[dict[str, float]]:
    """Return the figures of ``validate`` by optimizer step from a run's TensorBoard files, without ``val/``."""
    if not directory.is_dir():
        return []
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    by_step: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("val/"):
            for event in events.Scalars(tag):
                by_step.setdefault(event.step, {})[tag.removeprefix("val/")] = event.value
    return [{"step": step, **figures} for step, figures in sorted(by_step.items())]


def summarize(tables: Tables) -> pd.DataFrame:
    """Return one row per label: means over seeds, and paired differences to the teacher with 95% intervals.

    Accuracy columns are named by temperature. A difference is paired by seed (Student's t over seeds).
    """
    results = tables.results
    rows = []
    teacher = results[results["run"] == TEACHER]
    for label, found in results.groupby("label", sort=False):
        row: dict[str, Any] = {"method": label, "seeds": found["seed"].nunique()}
        for temperature, at in found.groupby("temperature") if "temperature" in found else ():
            mean, _ = mean_and_half(at["accuracy"])
            row[f"T={temperature:g}"] = f"{mean:.3f}"
            theirs = teacher[teacher["temperature"] == temperature]
            both = at.merge(theirs, on="seed", suffixes=("", "_sft"))
            if at["run"].iloc[0] == TEACHER or len(both) < 1:
                row[f"T={temperature:g} - SFT"] = ""
            elif len(both) < 2:
                row[f"T={temperature:g} - SFT"] = f"{both['accuracy'].iloc[0] - both['accuracy_sft'].iloc[0]:+.3f}"
            else:
                gap = paired_difference(both["accuracy"].to_numpy(), both["accuracy_sft"].to_numpy())
                ahead = int((both["accuracy"] > both["accuracy_sft"]).sum())
                row[f"T={temperature:g} - SFT"] = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] {ahead}/{gap.n}"
        once = found.drop_duplicates("seed")
        at_one = found if "temperature" not in found else found[found["temperature"] == found["temperature"].max()]
        if "length" in at_one:
            row["length"] = f"{at_one['length'].mean():.1f}"
        row["KL to SFT"] = f"{once['teacher_kl'].mean():.2f}"
        row["proxy"] = f"{once['reward_sum'].mean():+.2f}"
        row["steps"] = f"{once['optimizer_steps'].mean():.0f}"
        row["M forwards"] = f"{once['token_forwards'].mean() / 1e6:.2f}"
        row["seconds"] = f"{once['train_seconds'].mean():.0f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def to_markdown(table: pd.DataFrame) -> str:
    """Return a table as GitHub's markdown."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"
