"""The result of a judging run: counts first, figures only where few enough prompts were lost; as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

from rich.console import Console

from dpr_lightning.judging.preset import Preset, Record
from dpr_lightning.judging.stored import REPEATED_JUDGMENT
from dpr_lightning.judging.summary import failures, lost_prompts, repeated_prompts, summarize
from dpr_lightning.terminal import Table


def judged_model(
    records: Sequence[Record],
    preset: Preset,
    *,
    lost: Mapping[str, int],
    repeated: Mapping[str, int],
    max_failed: float,
    seed: int,
    repeated_keys: Set[str] | None = None,
) -> dict[str, Any]:
    """Return counts and figures of one model; no figures where too many prompts were lost.

    Args:
        records: Its judgments.
        preset: Has the official figures.
        lost: Prompts that were never judged, by reason.
        repeated: Superfluous rows, by kind; the prompts of all but rows outside of them count against the limit.
        max_failed: Largest share of prompts that may be lost or repeated.
        seed: Of the intervals' resampling.
        repeated_keys: Prompts with superfluous rows besides those among ``records``; None takes each row of another
            kind than a repeated judgment for one prompt.
    """
    keys = {record.key for record in records}
    without_verdict = lost_prompts(records)
    num_prompts = len(keys) + sum(lost.values())
    all_lost = Counter(lost) + Counter({"without all verdicts": len(without_verdict)})
    # Prompts over prompts: one with two lost turns, or ten repeated rows, is one.
    faulty_keys = without_verdict | repeated_prompts(records) | ((repeated_keys or set()) & keys)
    faulty = sum(lost.values()) + len(faulty_keys)
    if repeated_keys is None:
        rows = sum(count for kind, count in repeated.items() if "outside" not in kind and kind != REPEATED_JUDGMENT)
        faulty = min(num_prompts, faulty + rows)
    share = faulty / num_prompts if num_prompts else 0.0
    counts = {
        "prompts": num_prompts,
        "with_all_verdicts": len(keys) - len(without_verdict),
        "lost": dict(all_lost),
        "repeated": dict(repeated),
        "failed_games": dict(failures(records)),
        "faulty_share": share,
    }
    name = records[0].model if records else ""
    refused = None
    if len(keys) == len(without_verdict):
        refused = f"none of {num_prompts} prompts has all its verdicts"
    if share > max_failed:
        refused = f"{faulty} of {num_prompts} prompts ({share:.1%}) are lost or repeated, and {max_failed:.1%} may be"
    if refused is not None:
        return {"model": name, "counts": counts, "refused": refused}
    return {**summarize(records, preset, seed=seed), "counts": counts, "refused": None}


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Print the tables of all models; the whole picture where there is one model."""
    models = result["models"]
    for model in models:
        _print_counts(model, console)
    scored = [model for model in models if model["refused"] is None]
    if not scored:
        return
    title = f"preset {result['preset']}, judge {result['judge']}"
    if scored[0]["official"]:
        console.print(_official(scored, title))
    if "win_rate" in scored[0]:
        console.print(_win_rates(scored, title))
    if len(scored) == 1 and scored[0].get("length"):
        console.print(_bins(scored[0]["length"]))
    if len(scored) == 1 and scored[0].get("categories"):
        table = Table("category", title="win rate by category", title_justify="left")
        _number_columns(table, "win rate", "prompts")
        for row in scored[0]["categories"]:
            table.add_row(row["category"], show(row), str(row["n"]))
        console.print(table)


def show(estimate: Mapping[str, Any] | None) -> str:
    """Return an estimate with its interval; empty for None."""
    return "" if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def show_figure(figure: Mapping[str, Any]) -> str:
    """Return one of a preset's figures, with its interval where it has one."""
    value = figure["value"]
    text = str(value) if isinstance(value, int) else f"{value:.2f}"
    return text if figure["low"] is None else f"{text} [{figure['low']:.2f}, {figure['high']:.2f}]"


def describe_counts(counts: Mapping[str, Any]) -> list[str]:
    """Return what was lost, in words."""
    lines = [f"{counts['with_all_verdicts']} of {counts['prompts']} prompts have all their verdicts"]
    for what, unit in (("lost", "prompts lost"), ("repeated", "rows"), ("failed_games", "games without verdict")):
        lines += [f"{count} {unit}: {reason}" for reason, count in sorted(counts[what].items()) if count]
    return lines


def _print_counts(model: Mapping[str, Any], console: Console) -> None:
    name = f"{model['model']}: " if model["model"] else ""
    for line in describe_counts(model["counts"]):
        console.print(name + line, markup=False, highlight=False)
    if model["refused"] is not None:
        console.print(f"{name}no score: {model['refused']}", markup=False, highlight=False)
    for warning in model.get("warnings", ()):
        console.print(f"{name}warning: {warning}", markup=False, highlight=False)


def _official(models: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=f"{title}: official figures", title_justify="left")
    if len(models) == 1:
        table.add_column("figure")
        _number_columns(table, "value")
        table.add_column("how")
        for figure in models[0]["official"]:
            table.add_row(figure["name"], show_figure(figure), figure["note"])
        return table
    table.add_column("model")
    names = list(dict.fromkeys(figure["name"] for model in models for figure in model["official"]))
    _number_columns(table, *names)
    for model in sorted(models, key=lambda found: -found["official"][0]["value"]):
        by_name = {figure["name"]: show_figure(figure) for figure in model["official"]}
        table.add_row(model["model"], *(by_name.get(name, "") for name in names))
    return table


def _win_rates(models: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table("model", "against", title=f"{title}; 95% over prompts", title_justify="left")
    units = {model["units"]["wins_ties_losses"] for model in models}
    whole = f"{units.pop() if len(units) == 1 else 'pairs'} won/tied/lost"
    _number_columns(table, "win rate over games", whole, "orders agree", "first shown", "characters", "prompts")
    for model in models:
        win, length = model["win_rate"], model["length"]
        table.add_row(
            model["model"],
            model["baseline"],
            show(win),
            f"{win['wins']}/{win['ties']}/{win['losses']}",
            show(model["order"]["consistency"]),
            show(model["order"]["first_shown"]),
            f"{length['model']:.0f}:{length['baseline']:.0f}" if length else "",
            str(win["n"]),
        )
    return table


def _bins(length: Mapping[str, Any]) -> Table:
    table = Table(title="win rate by how much longer the model's answer is", title_justify="left")
    _number_columns(table, "characters longer", "win rate", "prompts")
    for row in length["bins"]:
        table.add_row(f"{row['from']} to {row['to']}", show(row), str(row["n"]))
    return table


def _number_columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")
