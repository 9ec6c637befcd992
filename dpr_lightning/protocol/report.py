"""An evaluation as a table in the terminal, as Markdown, and as a figure over temperatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from rich.console import Console

from dpr_lightning.terminal import Table

_COLUMNS = ("benchmark", "T", "figure", "policy", "teacher", "difference or win rate [95%]", "tokens", "cut off")


def table_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each line; lengths and shares of answers that were cut off are policy / teacher."""
    for found in result["benchmarks"].values():
        for row in found["rows"]:
            answers = row["answers"]
            tokens = " / ".join(f"{answers[side]['tokens']:.1f}" for side in ("policy", "teacher"))
            cut = " / ".join(f"{answers[side]['truncated_share']:.1%}" for side in ("policy", "teacher"))
            head, tail = (found["title"], f"{row['temperature']:g}"), (tokens, cut)
            for cells in _figures(row):
                yield (*head, *cells, *tail)


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    if "refused" in row:
        yield "score refused", "", "", "too many prompts without a verdict"
    for name, figure in row.get("figures", {}).items():
        policy, teacher = (f"{figure[side]['value']:.3f}" for side in ("policy", "teacher"))
        yield name, policy, teacher, _interval(figure["difference"], "+.3f")
    if "judge" in row:
        yield "win rate", "", "", _interval(row["judge"]["win_rate"], ".3f")
        for figure in row["judge"]["official"]:
            yield figure["name"], "", "", f"{figure['value']:.2f}"
    if "ratings" in row:
        ratings = row["ratings"]
        if ratings["num_questions"] == 0:
            yield "rating", "", "", "no question was rated for both"
            return
        policy, teacher = (f"{ratings[side]['value']:.2f}" for side in ("policy", "teacher"))
        yield f"rating of {ratings['num_questions']}", policy, teacher, _interval(ratings["difference"], "+.2f")


def _interval(estimate: Mapping[str, Any], form: str) -> str:
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{result['run']} against {result['teacher']}")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("benchmark", "figure") else "right")
    for cells in table_rows(result):
        table.add_row(*cells)
    console.print(table)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the table as Markdown, with where it comes from."""
    lines = [f"# {result['run']} against {result['teacher']}", ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(result)]
    limit = "" if result["limit"] is None else f", the first {result['limit']} prompts of each"
    lines += ["", f"Seed {result['seed']}{limit}; intervals are 95%, bootstrap over prompts. {result['created']}"]
    return "\n".join(lines) + "\n"


def draw_temperatures(found: Mapping[str, Any], path: Path) -> Path:
    """Draw one benchmark's win rate over the temperature (paper Figure 4b), and its figures where it has a metric."""
    rows = sorted((row for row in found["rows"] if "refused" not in row), key=lambda row: row["temperature"])
    canvas = Canvas(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(canvas)
    canvas.suptitle(f"{found['title']}: win rate against the teacher by temperature", fontsize=11)
    axes = canvas.subplots()
    points = [(row["temperature"], label, estimate) for row in rows for label, estimate in _win_rates(row)]
    for label in dict.fromkeys(label for _, label, _ in points):
        x, estimates = zip(*((at, estimate) for at, name, estimate in points if name == label), strict=True)
        y = [estimate["value"] for estimate in estimates]
        below = [estimate["value"] - estimate["low"] for estimate in estimates]
        above = [estimate["high"] - estimate["value"] for estimate in estimates]
        axes.errorbar(x, y, yerr=[below, above], marker="o", markersize=4, capsize=3, linewidth=1.4, label=label)
    axes.axhline(0.5, color="0.5", linewidth=0.8, linestyle="--")
    axes.set_xlabel("temperature")
    axes.set_ylabel("win rate, ties half")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        axes.legend(fontsize=8, frameon=False)
    canvas.savefig(path, dpi=110)
    return path


def _win_rates(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, figure in row.get("figures", {}).items():
        yield name, figure["win_rate"]
    if "judge" in row:
        yield "judge", row["judge"]["win_rate"]
