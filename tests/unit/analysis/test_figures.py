from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpr_lightning.analysis.figures import CurveFigure, Figure, LineFigure, PositionFigure, Tables, mean_and_half
from dpr_lightning.analysis.results import summarize, to_markdown
from dpr_lightning.errors import UserError


@pytest.fixture
def tables() -> Tables:
    rows, positions, curves = [], [], []
    for run, shift in (("SFT", 0.0), ("DPR", 0.1)):
        for seed in range(3):
            key = {"run": run, "label": run, "seed": seed}
            rows += [
                {
                    **key,
                    "temperature": temperature,
                    "accuracy": 0.5 + shift - temperature / 10 + seed / 100 + (seed == 2) * shift / 10,
                    "win_rate": np.nan if run == "SFT" else 0.55,
                    "length": 10.0 + seed,
                    "teacher_kl": 2 * shift,
                    "reward_sum": 1 + shift,
                    "optimizer_steps": 40,
                    "token_forwards": 2_000_000,
                    "train_seconds": 30.0,
                }
                for temperature in (0.0, 0.7)
            ]
            positions += [{**key, "position": t, "count": 100, "kl": 0.1 * t, "reward": shift} for t in range(4)]
            curves += [
                {**key, "step": step, "teacher_kl": step / 10, "accuracy": 0.5, "reward_sum": 1.0} for step in (8, 16)
            ]
    return Tables(results=pd.DataFrame(rows), positions=pd.DataFrame(positions), curves=pd.DataFrame(curves))


FIGURES = [
    LineFigure("line", "a", x="temperature", temperature=None, level=0.5, y="accuracy"),
    LineFigure("line", "a", x="length", by_label=True, runs=["DPR"]),
    PositionFigure("position", "b", runs=["SFT", "DPR"]),
    CurveFigure("curve", "c", x="step"),
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: type(figure).__name__)
def test_the_same_tables_give_the_same_file(figure: Figure, tables: Tables, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = figure.save(tables, tmp_path / name)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert path.name == f"{figure.name}.png"
    assert path.stat().st_size > 5000
    assert len(digests) == 1


def test_a_line_holds_means_and_student_intervals(tables: Tables) -> None:
    canvas = LineFigure("line", "a", x="temperature", temperature=None, y="accuracy").draw(tables)
    (axes,) = canvas.axes
    drawn = {container.get_label(): container for container in axes.containers}
    mean = tables.results[tables.results["run"] == "DPR"].groupby("temperature")["accuracy"].mean()
    assert list(drawn["DPR"][0].get_ydata()) == pytest.approx(list(mean))
    assert set(drawn) == {"SFT", "DPR"}


def test_mean_and_half_is_students(tables: Tables) -> None:
    # t(0.975, 2) = 4.3027; the standard deviation of 1, 2, 3 is 1.
    mean, half = mean_and_half([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / np.sqrt(3), abs=1e-4)
    assert mean_and_half([4.0]) == (4.0, 0.0)


def test_what_is_not_there_is_named(tables: Tables) -> None:
    with pytest.raises(UserError, match="no results for GSIL; the experiment has SFT, DPR"):
        PositionFigure("p", "t", runs=["GSIL"]).draw(tables)
    with pytest.raises(UserError, match="no column 'gamma' in the results; there are run, label"):
        LineFigure("p", "t", x="gamma").draw(tables)


def test_summary_pairs_by_seed(tables: Tables) -> None:
    summary = summarize(tables).set_index("method")
    assert list(summary.index) == ["SFT", "DPR"]
    assert summary.loc["SFT", "T=0.7 - SFT"] == ""
    # The differences are 0.1, 0.1 and 0.11: mean 0.1033, deviation 0.00577, half 4.3027 x 0.00577 / sqrt 3 = 0.0143.
    assert summary.loc["DPR", "T=0.7 - SFT"] == "+0.103 [+0.089, +0.118] 3/3"
    assert summary.loc["DPR", "KL to SFT"] == "0.20"
    assert summary.loc["DPR", "M forwards"] == "2.00"
    lines = to_markdown(summarize(tables)).splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)
