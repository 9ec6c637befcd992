from __future__ import annotations

import re
from typing import Any

import pytest

from dpr_lightning.judging.page import render_page
from dpr_lightning.judging.paper import PaperPreset
from dpr_lightning.judging.records import GameRecord, PairRecord
from dpr_lightning.judging.report import judged_model
from dpr_lightning.judging.summary import summarize


def pair(key: str, baseline_first: float | None, model_first: float | None, **more: Any) -> PairRecord:
    """Values are preferences for the model."""
    games = tuple(
        GameRecord(value=value, first=first, failure=None if value is not None else "no verdict")
        for value, first in ((baseline_first, "baseline"), (model_first, "model"))
    )
    return PairRecord(key=key, model="us", baseline="them", games=games, **more)


def summary(records: list[PairRecord]) -> dict[str, Any]:
    return summarize(records, PaperPreset(), seed=0)


def test_prompts_are_the_unit() -> None:
    # Scores 1, 0.5 (the judge took the first answer), 0.5 (the second), 0, 0.75; the last lacks a game.
    records = [
        pair("a", 1, 1),
        pair("b", 0, 1),
        pair("c", 1, 0),
        pair("d", 0, 0),
        pair("e", 0.5, 1),
        pair("f", 1, None),
    ]
    found = summary(records)
    assert found["win_rate"] | {"low": 0, "high": 0} == {
        "value": pytest.approx(2.75 / 5),
        "low": 0,
        "high": 0,
        "n": 5,
        "wins": 2,
        "ties": 2,
        "losses": 1,
    }
    assert found["win_rate"]["low"] < 0.55 < found["win_rate"]["high"]
    # a and d agree; e is a tie in one order.
    assert found["order"]["consistency"]["value"] == pytest.approx(2 / 5)
    # For the first shown: a (0 + 1) / 2, b 1, c 0, d 1 / 2, e (0.5 + 1) / 2.
    assert found["order"]["first_shown"]["value"] == pytest.approx((0.5 + 1 + 0 + 0.5 + 0.75) / 5)


def test_length_bins_hold_equally_many_prompts() -> None:
    # The model wins exactly where it is longer.
    records = [
        pair(str(n), float(n >= 20), float(n >= 20), model_length=100 + n, baseline_length=120, category="xy"[n % 2])
        for n in range(40)
    ]
    found = summary(records)
    bins = found["length"]["bins"]
    assert [(row["from"], row["to"], row["value"], row["n"]) for row in bins] == [
        (-20, -11, 0.0, 10),
        (-10, -1, 0.0, 10),
        (0, 9, 1.0, 10),
        (10, 19, 1.0, 10),
    ]
    assert (found["length"]["model"], found["length"]["baseline"]) == (119.5, 120.0)
    assert [(row["category"], row["value"], row["n"]) for row in found["categories"]] == [
        ("x", 0.5, 20),
        ("y", 0.5, 20),
    ]
    assert summary([pair("a", 1, 1)])["length"] is None


def test_a_score_is_refused_above_the_share() -> None:
    records = [pair(str(n), 1, 1) for n in range(97)] + [pair("x", 1, None), pair("y", None, None)]
    settings: dict[str, Any] = {"lost": {"missing in baseline": 1}, "max_failed": 0.03, "seed": 0}
    found = judged_model(records, PaperPreset(), repeated={}, **settings)
    assert found["refused"] is None
    assert found["counts"] == {
        "prompts": 100,
        "with_all_verdicts": 97,
        "lost": {"missing in baseline": 1, "without all verdicts": 2},
        "repeated": {},
        "failed_games": {"no verdict": 3},
        "faulty_share": 0.03,
    }
    repeated = {"repeated row in responses": 1, "row of responses outside of the prompts": 50}
    found = judged_model(records, PaperPreset(), repeated=repeated, **settings)
    assert found["refused"] == "4 of 100 prompts (4.0%) are lost or repeated, and 3.0% may be"
    assert "win_rate" not in found
    only_failures = [pair("x", None, None)]
    found = judged_model(only_failures, PaperPreset(), lost={}, repeated={}, max_failed=1.0, seed=0)
    assert found["refused"] is not None


def test_the_page_escapes_and_loads_nothing() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>{{ 7 * 7 }}"
    game = GameRecord(value=1.0, first="model", label=evil, text=evil)
    record = PairRecord(
        key=evil,
        model=evil,
        baseline=evil,
        games=(game, game),
        prompt=evil,
        category=evil,
        model_length=1,
        baseline_length=2,
    )
    other = PairRecord(key="2", model=evil, baseline=evil, games=(game, game), category="c")
    model = judged_model([record, other], PaperPreset(), lost={evil: 0}, repeated={}, max_failed=1.0, seed=0)
    page = render_page({"preset": "paper", "judge": evil, "models": [model]}, [record, other])
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "49" not in re.sub(r"\d+\.\d+|width[^;]*;", "", page.split("</style>")[1])
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
