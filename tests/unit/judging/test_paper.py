from __future__ import annotations

import json

import pytest

from dpr_lightning.judging.chat import NoVerdictError, Reply
from dpr_lightning.judging.games import BASELINE, MODEL, Failure, Item, Verdict
from dpr_lightning.judging.paper import PaperPreset
from dpr_lightning.judging.preset import Context
from dpr_lightning.judging.records import PairRecord

CONTEXT = Context(model="us", baseline="them", judge="j")
ITEM = Item(key="7", turns=("Say {answer_1}.",), answers=(("ours {answer_2}",), ("theirs",)), category="c")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good.\nVerdict: 1", 1.0),
        ("Verdict: 2\n\n", 0.0),
        ("a\n**Verdict: tie**", 0.5),
        ("verdict: TIE.", 0.5),
        ("Verdict: 2\nSo:\nVerdict: 2", 0.0),
    ],
)
def test_the_last_line_is_the_verdict(text: str, value: float) -> None:
    assert PaperPreset().parse(Reply(text=text)).value == value


@pytest.mark.parametrize(
    "text",
    [
        "Verdict: 1 or 2",
        "Verdict: 3",
        "Verdict: 1\nor so",
        "I would say Verdict: 1",
        "1",
        "Verdict: 1\nVerdict: 2",
        "Verdict: 1/2",
        "Verdict:",
        "   ",
    ],
)
def test_anything_else_is_no_verdict(text: str) -> None:
    with pytest.raises(NoVerdictError):
        PaperPreset().parse(Reply(text=text))


def test_both_orders_and_marks_in_answers_stay() -> None:
    preset = PaperPreset(max_tokens=9)
    first, second = preset.games(ITEM)
    assert (first.shown, second.shown) == ((BASELINE, MODEL), (MODEL, BASELINE))
    request = preset.request(second)
    text = request.messages[1]["content"]
    assert "<request>\nSay {answer_1}.\n</request>" in text
    assert text.index("ours {answer_2}") < text.index("theirs")
    assert dict(request.decoding) == {"temperature": 0, "max_tokens": 9}
    assert preset.max_completion_tokens(request) == 9
    # The judge is told nothing about who wrote what.
    assert "us" not in text.replace("ours", "").split()


def test_equal_answers_need_no_judge() -> None:
    preset = PaperPreset()
    same = Item(key="1", turns=("p",), answers=(("x",), ("x",)))
    assert [preset.settled(game) for game in preset.games(same)] == [
        Verdict(value=0.5, label="tie", text="the answers are equal")
    ] * 2
    assert preset.settled(preset.games(ITEM)[0]) is None


def test_rows_are_read_back_as_they_were_written() -> None:
    preset = PaperPreset()
    outcomes = [Verdict(value=1.0, label="1", text="t"), Failure(kind="refusal", detail="no")]
    (row,) = preset.rows(ITEM, preset.games(ITEM), outcomes, CONTEXT)
    record = preset.record(json.loads(json.dumps(row)), CONTEXT, "here")
    assert isinstance(record, PairRecord)
    # First shown was the baseline, and it won.
    assert [(game.value, game.first, game.failure) for game in record.games] == [
        (0.0, "baseline", None),
        (None, "model", "refusal"),
    ]
    assert (record.model_length, record.baseline_length, record.is_complete) == (15, 6, False)
