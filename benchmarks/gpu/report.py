"""The results of ``make gpu`` as Markdown, and the summary table. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.runner import Outcome


def format_cell(value: Any) -> str:
    """Return a cell's text: four significant digits, no exponent for what can be read without one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        if value == 0 or 1e-3 <= abs(value) < 1000:
            return f"{value:.4g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return rows as a Markdown table; columns are all their keys, in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(format_cell(row.get(column)) for column in columns)} |" for row in rows]


def section(outcome: Outcome) -> list[str]:
    """Return one part's section."""
    lines = [f"## {outcome.part.title}", "", f"`{outcome.part.name}`: {outcome.status}, {outcome.seconds:.0f} s."]
    tables: dict[str, list[dict[str, Any]]] = {}
    for record in outcome.records:
        if "table" in record:
            tables.setdefault(record["table"], []).append(record["row"])
    for title, rows in tables.items():
        lines += ["", f"**{title}**", "", *markdown_table(rows)]
    for record in outcome.records:
        if "note" in record:
            lines += ["", record["note"]]
        if "text" in record:
            lines += ["", f"**{record['title']}**", "", "```", record["text"].rstrip(), "```"]
        if "failure" in record:
            lines += ["", f"**Failed: {record['failure']}**", "", "```", record["traceback"].rstrip(), "```"]
    if outcome.log_tail:
        lines += ["", "**End of the log**", "", "```", outcome.log_tail, "```"]
    return [*lines, ""]


def summary_table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row for each part: its status and its most important figures."""
    return [
        {"part": outcome.part.name, "status": outcome.status, "s": round(outcome.seconds), "result": outcome.headline}
        for outcome in outcomes
    ]


def page(heading: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Return the whole results file: heading, summary table, sections of the parts that ran."""
    lines = [*heading, "", *markdown_table(summary_table(outcomes)), ""]
    for outcome in outcomes:
        if outcome.status != "not run":
            lines += section(outcome)
    return "\n".join(lines)
