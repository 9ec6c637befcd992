from __future__ import annotations

from typing import Any

import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.judging.chat import NoVerdictError, Reply
from dpr_lightning.judging.mt_bench import MTBenchPreset
from dpr_lightning.judging.preset import Context
from dpr_lightning.judging.records import GradeRecord

CONTEXT = Context(model="us", baseline="", judge="j", categories={"500": "own"})


def row(question_id: int, turn: int, score: float, **more: Any) -> dict[str, Any]:
    return {"question_id": question_id, "model": "us", "turn": turn, "score": score, "judgment": "", **more}


def test_scores_by_hand() -> None:
    preset = MTBenchPreset()
    rows = [row(81, 1, 8), row(81, 2, 6), row(82, 1, 9), row(82, 2, -1), row(111, 1, 3.5), row(500, 1, 10)]
    records = [preset.record(found, CONTEXT, "here") for found in rows]
    found = {figure.name: figure.value for figure in preset.figures(records, seed=0)}
    assert found == {
        "score": (8 + 6 + 9 + 3.5 + 10) / 5,
        "first_turn": (8 + 9 + 3.5 + 10) / 4,
        "second_turn": 6.0,
        "category writing": (8 + 6 + 9) / 3,
        "category math": 3.5,
        "category own": 10.0,
    }
    assert isinstance(records[3], GradeRecord)
    assert (records[3].rating, records[3].failure) == (None, "no verdict")


def test_categories_are_ten_questions_each() -> None:
    preset = MTBenchPreset()
    ends = {81: "writing", 90: "writing", 91: "roleplay", 101: "reasoning", 111: "math", 121: "coding"}
    ends |= {131: "extraction", 141: "stem", 151: "humanities", 160: "humanities", 161: None, 80: None}
    assert {key: preset.record(row(key, 1, 5), CONTEXT, "here").category for key in ends} == ends


@pytest.mark.parametrize(
    ("text", "rating"),
    [("Rating: [[5]]", 5.0), ("[[9.5]] and [[2]]", 9.5), ("[3] of ten", 3.0), ("[1] said: [[10]]", 10.0)],
)
def test_double_brackets_come_first(text: str, rating: float) -> None:
    assert MTBenchPreset().parse(Reply(text=text)).value == rating


@pytest.mark.parametrize("text", ["Rating: 5", "[[five]]", "[[11]]", "[[0]]", "[[-3]]", ""])
def test_anything_else_is_no_rating(text: str) -> None:
    with pytest.raises(NoVerdictError):
        MTBenchPreset().parse(Reply(text=text))


@pytest.mark.parametrize("bad", [{"question_id": 81, "turn": 3, "score": 1}, {"turn": 1, "score": 2}, {}])
def test_other_rows_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"here: needs 'question_id', 'score', and 'turn' 1 or 2"):
        MTBenchPreset().record(bad, CONTEXT, "here")
