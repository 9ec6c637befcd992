"""Plots of an experiment's tidy tables, by matplotlib; each kind is a class that YAML names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.statistics import student_t_quantile

_LABELS = {
    "accuracy": "accuracy",
    "win_rate": "win rate against SFT",
    "teacher_kl": "KL to SFT (nats per response)",
    "reward_sum": "proxy reward (nats per response)",
    "length": "response length (tokens)",
    "temperature": "evaluation temperature",
    "position": "response position",
    "kl": "KL to SFT (nats per token)",
    "reward": "proxy reward (nats per token)",
    "step": "optimizer step",
}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What figures are drawn from; one row each for the keys named."""

    results: pd.DataFrame
    """By run, seed and temperature."""
    positions: pd.DataFrame
    """By run, seed and response position."""
    curves: pd.DataFrame
    """By run, seed and optimizer step: figures of ``validate`` during training."""


class Figure(ABC):
    """One plot.

    Args:
        name: File name without its ending.
        title: Heading.
        runs: Names or labels of the runs shown, in this order; None shows all.
    """

    def __init__(self, name: str, title: str, runs: list[str] | None = None) -> None:
        self.name = name
        self.title = title
        self.runs = runs

    @abstractmethod
    def draw(self, tables: Tables) -> Canvas:
        """Return the plot.

        Raises:
            UserError: The tables hold nothing to draw.
        """

    def save(self, tables: Tables, directory: Path) -> Path:
        """Write the plot as PNG, without a time in it: the same tables give the same file."""
        path = directory / f"{self.name}.png"
        self.draw(tables).savefig(path, dpi=110, metadata={"Software": None})
        return path

    def select(self, table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Return the rows of each run that is shown, with its label."""
        labels = list(dict.fromkeys(table["label"]))
        if self.runs is not None:
            by_name = {run: list(dict.fromkeys(table.loc[table["run"] == run, "label"])) for run in self.runs}
            labels = [label for run in self.runs for label in (by_name[run] or [run])]
        found = [(label, table[table["label"] == label]) for label in labels]
        empty = [label for label, rows in found if rows.empty]
        if empty or not found:
            raise UserError(
                f"figures.{self.name}.runs: no results for {', '.join(empty) or 'any run'}; the experiment has "
                f"{', '.join(dict.fromkeys(table['label'])) or 'none'}"
            )
        return found


class LineFigure(Figure):
    """Mean over seeds of a figure over a setting, with 95% Student's t intervals.

    Args:
        name: File name without its ending.
        title: Heading.
        x: Column of the results: a key of the grid, or ``temperature``.
        y: Column of the results.
        temperature: Evaluation temperature that is shown; None keeps all (with ``x: temperature``).
        by_label: True draws a line for each variant, False one for each method over its variants.
        level: A level to mark by a horizontal line, such as 0.5 for win rates; None marks none.
        runs: See ``Figure``.
    """

    def __init__(
        self,
        name: str,
        title: str,
        x: str,
        y: str = "win_rate",
        temperature: float | None = 0.7,
        by_label: bool = False,
        level: float | None = None,
        runs: list[str] | None = None,
    ) -> None:
        super().__init__(name, title, runs)
        self.x = x
        self.y = y
        self.temperature = temperature
        self.by_label = by_label
        self.level = level

    @override
    def draw(self, tables: Tables) -> Canvas:
        results = tables.results
        for column in (self.x, self.y):
            if column not in results:
                raise UserError(
                    f"figures.{self.name}: no column '{column}' in the results; there are {', '.join(results.columns)}"
                )
        if self.temperature is not None:
            results = results[np.isclose(results["temperature"], self.temperature)]
        lines = self.select(results)
        if not self.by_label:
            chosen = pd.concat([rows for _, rows in lines])
            lines = [(str(run), rows) for run, rows in chosen.groupby("run", sort=False)]
        canvas, (axes,) = _canvas(self.title)
        for label, rows in lines:
            shown = rows.dropna(subset=[self.x, self.y])
            if shown.empty:
                continue
            points = [(value, *mean_and_half(group[self.y])) for value, group in shown.groupby(self.x)]
            x, mean, half = (list(column) for column in zip(*points, strict=True))
            axes.errorbar(x, mean, yerr=half, marker="o", markersize=4, capsize=3, linewidth=1.4, label=label)
        if self.level is not None:
            axes.axhline(self.level, color="0.5", linewidth=0.8, linestyle="--")
        _finish(axes, self.x, self.y)
        return canvas


class PositionFigure(Figure):
    """KL to the teacher and proxy reward by response position, mean over seeds (paper Figure 4a).

    Args:
        name: File name without its ending.
        title: Heading.
        runs: See ``Figure``.
        min_count: Positions that fewer samples of a seed reach, on average, are left out.
    """

    def __init__(self, name: str, title: str, runs: list[str] | None = None, min_count: int = 50) -> None:
        super().__init__(name, title, runs)
        self.min_count = min_count

    @override
    def draw(self, tables: Tables) -> Canvas:
        canvas, panels = _canvas(self.title, num_panels=2)
        for label, rows in self.select(tables.positions):
            mean = rows.groupby("position")[["count", "kl", "reward"]].mean()
            mean = mean[mean["count"] >= self.min_count]
            for axes, column in zip(panels, ("kl", "reward"), strict=True):
                axes.plot(mean.index, mean[column], marker=".", linewidth=1.4, label=label)
        for axes, column in zip(panels, ("kl", "reward"), strict=True):
            _finish(axes, "position", column)
        return canvas


class CurveFigure(Figure):
    """The way of a run: true accuracy and proxy reward of held-out prompts against the KL to the teacher.

    Each thin line is a seed. Where the proxy goes on rising and accuracy falls, the reward is over-optimised.

    Args:
        name: File name without its ending.
        title: Heading.
        runs: See ``Figure``.
        x: ``teacher_kl`` or ``step``.
    """

    def __init__(self, name: str, title: str, runs: list[str] | None = None, x: str = "teacher_kl") -> None:
        super().__init__(name, title, runs)
        self.x = x

    @override
    def draw(self, tables: Tables) -> Canvas:
        canvas, panels = _canvas(self.title, num_panels=2)
        for number, (label, rows) in enumerate(self.select(tables.curves)):
            for axes, column in zip(panels, ("accuracy", "reward_sum"), strict=True):
                for order, (_, seed_rows) in enumerate(rows.groupby("seed")):
                    way = seed_rows.sort_values("step")
                    axes.plot(
                        way[self.x],
                        way[column],
                        color=f"C{number % 10}",
                        marker=".",
                        linewidth=1.0,
                        alpha=0.75,
                        label=label if order == 0 else None,
                    )
        for axes, column in zip(panels, ("accuracy", "reward_sum"), strict=True):
            _finish(axes, self.x, column)
        return canvas


def mean_and_half(values: Sequence[float] | pd.Series[Any], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its Student's t interval; 0 with a single seed."""
    value_S = np.asarray(values, dtype=np.float64)
    if len(value_S) < 2:
        return float(value_S.mean()), 0.0
    scale = value_S.std(ddof=1) / np.sqrt(len(value_S))
    return float(value_S.mean()), float(student_t_quantile(confidence, len(value_S) - 1) * scale)


def _canvas(title: str, *, num_panels: int = 1) -> tuple[Canvas, list[Axes]]:
    canvas = Canvas(figsize=(6.4 if num_panels == 1 else 10.4, 4.2), layout="constrained")
    canvas.suptitle(title, fontsize=11)
    return canvas, list(np.ravel(canvas.subplots(1, num_panels)))


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(_LABELS.get(x, x.split()[0].rpartition(".")[2]))
    axes.set_ylabel(_LABELS.get(y, y))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
