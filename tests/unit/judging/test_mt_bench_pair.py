from __future__ import annotations

from typing import Any

import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.judging.chat import NoVerdictError, Reply
from dpr_lightning.judging.games import Failure, Item, Outcome
from dpr_lightning.judging.mt_bench_pair import MTBenchPairPreset
from dpr_lightning.judging.preset import Context
from dpr_lightning.judging.records import PairRecord
from dpr_lightning.judging.summary import summarize

CONTEXT = Context(model="us", baseline="them", judge="j", chosen_baseline="them")
ITEM = Item(key="81", turns=("q1", "q2"), answers=(("u1", "u2"), ("t1", "t2")), category="writing")
NAMES = ("pair-v2", "pair-v2-multi-turn")
TEMPLATES = {
    "pair-v2": {"system_prompt": "s", "prompt_template": "{question}|{answer_a}|{answer_b}"},
    "pair-v2-multi-turn": {
        "system_prompt": "s",
        "prompt_template": "{question_1}|{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
    },
}


def row(question_id: int, g1: str, g2: str, **more: Any) -> dict[str, Any]:
    named = {"question_id": question_id, "turn": 1, "model_1": "us", "model_2": "them"}
    return {**named, "g1_winner": g1, "g2_winner": g2, **more}


def read(rows: list[dict[str, Any]], context: Context = CONTEXT) -> list[PairRecord]:
    found = [record for given in rows for record in MTBenchPairPreset().records(given, context, "here")]
    return [record for record in found if isinstance(record, PairRecord)]


def test_a_turn_is_won_where_both_games_agree() -> None:
    rows = [
        row(81, "model_1", "model_1"),
        row(82, "model_1", "model_2"),
        row(83, "tie", "model_1"),
        row(84, "model_1", "tie"),
        row(85, "model_2", "model_2"),
        row(86, "model_1", "model_1"),
        row(87, "error", "model_1"),
    ]
    # Two wins, three ties, one loss; the error is left out.
    figures = {figure.name: figure.value for figure in MTBenchPairPreset().figures(read(rows), seed=0)}
    assert figures == {
        "win": 2,
        "loss": 1,
        "tie": 3,
        "win_rate": pytest.approx(2 / 6),
        "loss_rate": pytest.approx(1 / 6),
        "win_rate_adjusted": pytest.approx(3.5 / 6),
    }


def test_the_chosen_baseline_may_stand_on_either_side() -> None:
    turned = row(81, "model_2", "model_2", model_1="them", model_2="us")
    others = row(82, "tie", "tie", model_1="a", model_2="b")
    (record,) = read([turned, others])
    assert (record.model, record.baseline, record.score) == ("us", "them", 1.0)
    # Model 1, here the baseline, was shown first in the first game.
    assert [game.first for game in record.games] == ["baseline", "model"]
    every = read([turned, others], Context(model="", baseline="", judge="j"))
    assert [(found.model, found.score) for found in every] == [("them", 0.0), ("us", 1.0), ("a", 0.5), ("b", 0.5)]


def test_both_turns_of_a_question_are_one_prompt() -> None:
    rows = [row(n, "model_1", "model_1", turn=turn) for n in (81, 82) for turn in (1, 2)]
    rows.append(row(83, "model_2", "model_2"))
    win = summarize(read(rows), MTBenchPairPreset(), seed=0)["win_rate"]
    assert (win["n"], win["value"], win["wins"], win["losses"]) == (3, pytest.approx(2 / 3), 4, 1)


def test_what_is_written_reads_back() -> None:
    preset = MTBenchPairPreset(templates=TEMPLATES)
    games = preset.games(ITEM)
    assert [preset.request(game).messages[1]["content"] for game in games] == [
        "q1|u1|t1",
        "q1|t1|u1",
        "q1|q2|u1|u2|t1|t2",
        "q1|q2|t1|t2|u1|u2",
    ]
    replies = ["[[A]] it is", "[[B]]", "so: [[C]]"]
    outcomes: list[Outcome] = [preset.parse(Reply(text=text)) for text in replies]
    outcomes.append(Failure(kind="refusal", detail="no"))
    rows = preset.rows(ITEM, games, outcomes, CONTEXT)
    # The model is A in the first game and B in the second.
    assert [(found["g1_winner"], found["g2_winner"]) for found in rows] == [("model_1", "model_1"), ("tie", "error")]
    first, second = read([dict(found) for found in rows])
    assert (first.score, first.model_length, first.category) == (1.0, 2, "writing")
    assert [game.failure for game in second.games] == [None, "refusal"]


def test_no_bracketed_letter_is_no_verdict_and_other_rows_are_refused() -> None:
    for text in ("A is better", "[A]", ""):
        with pytest.raises(NoVerdictError):
            MTBenchPairPreset().parse(Reply(text=text))
    for bad in (row(81, "A", "tie"), row(81, "tie", "tie", turn=3), row(81, "tie", "tie", model_1=None)):
        with pytest.raises(UserError, match="here: needs 'question_id', 'model_1'"):
            MTBenchPairPreset().record(bad, CONTEXT, "here")
