"""Tables of rounds in Markdown: medians, ratios of the rounds with their spread, and targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.driver import Facts, Result

Figure = Callable[[Facts], float]
"""A figure of one round."""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a table."""

    title: str
    figure: Figure
    form: str = ".1f"


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio of ours to a peer's is meant to be."""

    peer: str
    bound: float
    at_most: bool = False
    """The ratio is of a cost, and ``bound`` is its most."""

    def said(self, ratio: float) -> str:
        """Return "reached" or "missed", with the target."""
        is_reached = ratio <= self.bound if self.at_most else ratio >= self.bound
        sign = "at most" if self.at_most else "at least"
        return f"{sign} {self.bound:g}: {'reached' if is_reached else '**missed**'}"


def rate(of: str, per: str) -> Figure:
    """Return the figure that divides one fact by another."""
    return lambda facts: facts[of] / facts[per]


def fact(name: str) -> Figure:
    """Return the figure that is one fact."""
    return lambda facts: facts[name]


COST = [
    Column("tokens", fact("tokens"), ".0f"),
    Column("wall s", fact("wall")),
    Column("CPU s", fact("cpu")),
    Column("tokens/s", rate("tokens", "wall"), ".0f"),
    Column("tokens/CPU s", rate("tokens", "cpu"), ".0f"),
    Column("peak GiB", fact("peak_gib"), ".2f"),
]
"""Columns of every workload that counts tokens."""


def table(results: Mapping[str, Result], columns: Sequence[Column]) -> list[str]:
    """Return medians of rounds, a row for each contender, and why some have none."""
    lines = [
        f"| | rounds | {' | '.join(column.title for column in columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    failures = []
    for name, result in results.items():
        if result.rounds:
            cells = [
                format(statistics.median(column.figure(facts) for facts in result.rounds), column.form)
                for column in columns
            ]
            lines.append(f"| {name} | {len(result.rounds)} | {' | '.join(cells)} |")
        if result.failure is not None:
            failures.append(f"{name} did not run to the end: {result.failure}")
    return [*lines, *(line for failure in failures for line in ("", failure))]


def ratios(
    results: Mapping[str, Result],
    figures: Sequence[tuple[str, Figure]],
    targets: Sequence[Target] = (),
    *,
    ours: str = "ours",
    form: str = ".2f",
) -> list[str]:
    """Return our figure over each peer's in the same round: median and range, and the targets beside them.

    Args:
        results: Of all contenders.
        figures: What is compared, with its title.
        targets: By peer; they are held against every figure.
        ours: The contender that is divided by the others.
        form: Of a ratio.
    """
    own = results[ours].rounds
    peers = {name: result.rounds for name, result in results.items() if name != ours and result.rounds}
    if not own or not peers:
        return ["", "No ratios: ours or every peer failed."]
    lines = ["", f"| {ours} / | {' | '.join(title for title, _ in figures)} |", "|---" * (len(figures) + 1) + "|"]
    for name, rounds in peers.items():
        cells = []
        for _, figure in figures:
            values = [figure(mine) / max(figure(theirs), 1e-9) for mine, theirs in zip(own, rounds, strict=False)]
            middle = statistics.median(values)
            said = [target.said(middle) for target in targets if target.peer == name]
            cells.append("; ".join([f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})", *said]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


SPEEDS: list[tuple[str, Figure]] = [
    ("tokens/s", rate("tokens", "wall")),
    ("tokens/CPU s", rate("tokens", "cpu")),
]
"""What is compared where tokens are counted."""


def best(results: Mapping[str, Result], *, among: Sequence[str]) -> str | None:
    """Return who of ``among`` has the highest median of tokens per CPU second."""
    found = {name: results[name].rounds for name in among if name in results and results[name].rounds}
    if not found:
        return None
    return max(found, key=lambda name: statistics.median(facts["tokens"] / facts["cpu"] for facts in found[name]))


def starts(results: Mapping[str, Result]) -> list[str]:
    """Return how long each contender took to load and warm up."""
    said = [f"{name} {result.start['uptime']:.0f}" for name, result in results.items() if result.start]
    return ["", f"Before the first round, imports, loading and warm-up, in seconds: {', '.join(said)}."]
