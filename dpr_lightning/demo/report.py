"""The demo's figures and how they are shown: one table for a seed, one for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpr_lightning.evaluation.answers import Answers
from dpr_lightning.evaluation.statistics import Estimate, bootstrap_interval, paired_difference, win_rate
from dpr_lightning.terminal import Table

Result = Mapping[str, Any]
"""What ``report.json`` holds for one seed."""

POLICIES = ("SFT", "SFT continued", "DPR")
"""In the order of the tables; JSON keeps none."""


def measure(
    answers: Mapping[str, Mapping[float, Answers]], *, baseline: str, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by policy and temperature, accuracy, win rate against ``baseline``, length and truncation.

    Intervals are 95%, by bootstrap over prompts. A win is a right answer where the baseline's is wrong; ties count
    half.
    """
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for name, by_temperature in answers.items():
        measured[name] = {}
        for temperature, ours in by_temperature.items():
            num_prompts, num_samples = ours.is_correct_PS.shape
            prompt_N = np.repeat(np.arange(num_prompts), num_samples)
            correct_N = ours.is_correct_PS.reshape(-1).astype(float)
            theirs_N = answers[baseline][temperature].is_correct_PS.reshape(-1).astype(float)
            interval = bootstrap_interval(correct_N, prompt_index=prompt_N, seed=seed)
            accuracy = Estimate(float(correct_N.mean()), interval.low, interval.high, num_prompts)
            wins = None if name == baseline else win_rate(correct_N, theirs_N, prompt_index=prompt_N, seed=seed)
            measured[name][f"{temperature:g}"] = {
                "accuracy": asdict(accuracy),
                "win_rate": None if wins is None else asdict(wins),
                "num_responses": int(correct_N.size),
                "mean_length": float(ours.num_tokens_PS.mean()),
                "truncated_share": float(ours.is_truncated_PS.mean()),
            }
    return measured


def print_ranking(ranking: Result, console: Console) -> None:
    """Say how well the dense reward at each alpha, and log pi_SFT, rank the teacher's own samples."""
    console.print(
        f"{ranking['num_prompts']} validation prompts x {ranking['num_samples']} samples of the teacher at temperature "
        f"1, {ranking['accuracy']:.3f} right. Of {ranking['num_pairs']} pairs of a right and a wrong answer to one "
        "prompt, the summed dense reward puts the right one first in this share (chance 0.5):"
    )
    for alpha, figures in ranking["dense"].items():
        console.print(
            f"  alpha {alpha:<5} {figures['share']:.3f}   correlation with length {figures['length_correlation']:+.2f}"
        )
    console.print(f"  log pi_SFT  {ranking['logp']:.3f}")


def print_report(result: Result, run_dir: Path, console: Console) -> None:
    """Print one seed's table, and where everything lies."""
    title = (
        f"{result['num_prompts']} {result['split']} prompts, {result['num_samples']} samples each above temperature "
        f"0, seed {result['seed']}; 95% intervals"
    )
    table = Table(title=title)
    for column in ("temperature", "policy", "accuracy", "win rate vs SFT", "n", "length", "truncated"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for temperature in sorted(result["policies"]["SFT"], key=float):
        for name in POLICIES:
            row = result["policies"][name][temperature]
            table.add_row(
                temperature,
                name,
                show(row["accuracy"]),
                show(row["win_rate"]) if row["win_rate"] else "",
                str(row["num_responses"]),
                f"{row['mean_length']:.1f}",
                f"{row['truncated_share']:.3f}",
            )
        table.add_section()
    console.print(table)
    compute = result["compute"]
    console.print(
        f"Compute: SFT {compute['sft_steps']} steps; DPR {compute['dpr_steps']} steps and its rollouts and scoring, "
        f"{compute['token_forwards'] / 1e6:.1f}M token forwards; SFT continued {compute['continued_steps']} steps for "
        f"the same. All in {result['seconds']:.0f} s."
    )
    console.print(f"TensorBoard:   tensorboard --logdir {run_dir}", soft_wrap=True)
    for name, what in (
        ("sft/final", "teacher"),
        ("sft/reference", "references"),
        ("dpr/final", "policy"),
        ("continued/final", "control"),
    ):
        console.print(f"{what + ':':<14} {run_dir / name}  (transformers directory)", soft_wrap=True)
    console.print(f"{'figures:':<14} {run_dir / 'report.json'}", soft_wrap=True)
    console.print(
        f"Talk to it:    python -c \"from transformers import pipeline; print(pipeline('text-generation', "
        f"'{run_dir / 'dpr/final'}')('sort 7 3 9 1.\\n', max_new_tokens=40))\"",
        soft_wrap=True,
        markup=False,
    )


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Return, by temperature, each policy's mean accuracy and DPR's paired differences over seeds (Student's t)."""
    by_temperature = {}
    for temperature in sorted(results[0]["policies"]["SFT"], key=float):
        accuracy = {
            name: [result["policies"][name][temperature]["accuracy"]["value"] for result in results]
            for name in POLICIES
        }
        differences = {
            f"DPR - {name}": {
                **asdict(paired_difference(accuracy["DPR"], accuracy[name])),
                "seeds_ahead": sum(a > b for a, b in zip(accuracy["DPR"], accuracy[name], strict=True)),
            }
            for name in POLICIES
            if name != "DPR"
        }
        win_rates = {
            name: [result["policies"][name][temperature]["win_rate"]["value"] for result in results]
            for name in POLICIES
            if name != "SFT"
        }
        by_temperature[temperature] = {"accuracy": accuracy, "differences": differences, "win_rate": win_rates}
    return {
        "seeds": [result["seed"] for result in results],
        "split": results[0]["split"],
        "num_prompts": results[0]["num_prompts"],
        "num_samples": results[0]["num_samples"],
        "ranking": [result["ranking"] for result in results],
        "temperatures": by_temperature,
    }


def print_summary(summary: Result, console: Console) -> None:
    """Print the table over seeds."""
    table = Table(title=f"{len(summary['seeds'])} seeds, {summary['num_prompts']} {summary['split']} prompts")
    for column in ("temperature", "figure", "by seed", "mean, 95% interval over seeds", "seeds ahead"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for temperature, figures in summary["temperatures"].items():
        for name, values in figures["accuracy"].items():
            table.add_row(temperature, f"accuracy, {name}", _row(values), f"{np.mean(values):.3f}", "")
        for name, values in figures["win_rate"].items():
            table.add_row(temperature, f"win rate, {name} vs SFT", _row(values), f"{np.mean(values):.3f}", "")
        for name, difference in figures["differences"].items():
            ahead = f"{difference['seeds_ahead']} of {difference['n']}"
            table.add_row(temperature, f"accuracy, {name}", "", show(difference, signed=True), ahead)
        table.add_section()
    console.print(table)


def show(estimate: Mapping[str, Any], *, signed: bool = False) -> str:
    """Return ``value [low, high]``."""
    form = "+.3f" if signed else ".3f"
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def _row(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
