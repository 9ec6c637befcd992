"""What a report says of repeated and lost judgments, of its units, and of a judge that goes by an answer's place."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from dpr_lightning.judging.mt_bench import MTBenchPreset
from dpr_lightning.judging.page import render_page
from dpr_lightning.judging.paper import PaperPreset
from dpr_lightning.judging.records import GameRecord, GradeRecord, PairRecord
from dpr_lightning.judging.report import judged_model, print_result
from dpr_lightning.judging.stored import repeated
from dpr_lightning.judging.summary import summarize


def pair(key: object, baseline_first: float, model_first: float, **more: Any) -> PairRecord:
    """Values are preferences for the model."""
    games = (GameRecord(value=baseline_first, first="baseline"), GameRecord(value=model_first, first="model"))
    return PairRecord(key=str(key), model="us", baseline="them", games=games, **more)


def grade(key: int, turn: int, rating: float | None = 5.0) -> GradeRecord:
    return GradeRecord(key=str(key), model="us", turn=turn, rating=rating)


def judged(records: list[Any], preset: Any, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"lost": {}, "max_failed": 0.02, "seed": 0, "repeated": repeated(records), **more}
    return judged_model(records, preset, **settings)


def shown(model: dict[str, Any]) -> tuple[str, str]:
    """Return what the terminal and the page say."""
    result = {"preset": "p", "judge": "j", "models": [model]}
    console = Console(file=io.StringIO(), width=300)
    print_result(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), render_page(result, [])


def test_a_prompt_counts_once_however_often_its_turns_are_repeated() -> None:
    two_turns = [grade(key, turn) for key in range(80) for turn in (1, 2)]
    # Every row twice, and one more: 161 superfluous rows of 80 prompts.
    records = [*two_turns, *two_turns, grade(0, 1)]
    found = judged(records, MTBenchPreset())
    assert found["refused"] == "80 of 80 prompts (100.0%) are lost or repeated, and 2.0% may be"
    assert found["counts"]["repeated"] == {"repeated judgment": 161}
    assert judged(records, MTBenchPreset(), max_failed=1.0)["refused"] is None


def test_lost_and_repeated_turns_of_one_prompt_are_one_prompt() -> None:
    records = [grade(key, turn) for key in range(100) for turn in (1, 2)]
    # 0 lost both ratings, 1 is repeated, 2 has no second turn at all, 3 is lost and repeated.
    records[0], records[1] = grade(0, 1, None), grade(0, 2, None)
    records += [grade(1, 1), grade(3, 1, None)]
    del records[5]
    found = judged(records, MTBenchPreset(), lost={"missing in the judgments": 1}, max_failed=0.5)
    # With the missing one 5 of 101.
    assert found["counts"]["faulty_share"] == pytest.approx(5 / 101)
    assert found["counts"]["with_all_verdicts"] == 97


def test_rows_that_the_files_repeat_count_by_prompt() -> None:
    records = [pair(n, 1, 1) for n in range(50)]
    rows = {"repeated row in responses": 30}
    found = judged(records, PaperPreset(), repeated=rows, repeated_keys={"7"})
    assert (found["counts"]["faulty_share"], found["refused"]) == (0.02, None)


def test_every_game_lost_is_said_as_such() -> None:
    found = judged([grade(1, 1, None)], MTBenchPreset(), max_failed=1.0)
    assert found["refused"] == "none of 1 prompts has all its verdicts"


def test_both_units_are_named() -> None:
    # Games: 3 of 4 won on each prompt of two turns, as wholes 2 turns won and 2 tied.
    records = [pair(n, 1, float(turn == 1), turn=turn) for n in range(2) for turn in (1, 2)]
    found = summarize(records, PaperPreset(), seed=0)
    assert found["units"] == {"win_rate": "mean preference over games", "wins_ties_losses": "turns"}
    terminal, page = shown(judged(records, PaperPreset(), max_failed=1.0))
    assert "win rate over games" in terminal
    assert "turns won/tied/lost" in terminal
    assert "turns won, tied, lost as a whole" in page
    one_turn = summarize([pair(n, 1, 0) for n in range(3)], PaperPreset(), seed=0)
    assert one_turn["units"]["wins_ties_losses"] == "prompts"


def test_a_judge_that_goes_by_the_place_is_warned_of_everywhere() -> None:
    # 30 of 100 pairs agree; of the others the second answer wins 68, the first 2: (30 / 2 + 2) / 100 = 0.17.
    records = [pair(n, n % 2, n % 2) for n in range(30)]
    records += [pair(n, 1, 0) for n in range(30, 98)] + [pair(n, 0, 1) for n in range(98, 100)]
    found = judged(records, PaperPreset())
    agree, place = found["warnings"]
    assert agree.startswith("both orders agree in 30.0% of the pairs, less than 60%")
    assert place.startswith("the judge prefers the answer shown second: the preference for the first is 0.170 [")
    terminal, page = shown(found)
    for warning in found["warnings"]:
        assert f"us: warning: {warning}" in terminal
        assert f"Warning: {warning}" in page
    assert "less than 60%" in json.dumps(found)


@pytest.mark.parametrize("num_first", [0, 1])
def test_a_judge_that_goes_by_the_answer_is_not_warned_of(num_first: int) -> None:
    records = [pair(n, n % 2, n % 2) for n in range(200)] + [pair(f"x{n}", 0, 1) for n in range(num_first)]
    assert summarize(records, PaperPreset(), seed=0)["warnings"] == []
    # A few prompts in full agreement: their interval is wide because they are few.
    assert summarize([pair(n, 1, 1) for n in range(3)], PaperPreset(), seed=0)["warnings"] == []


def test_order_warnings_are_also_given_where_each_pair_is_shown_once() -> None:
    def once(n: int, value: float) -> PairRecord:
        # The model is first on even prompts; the judge names the first answer.
        game = GameRecord(value=value, first="baseline" if n % 2 else "model")
        return PairRecord(key=str(n), model="us", baseline="them", games=(game,))

    found = summarize([once(n, float(n % 2 == 0)) for n in range(50)], PaperPreset(), seed=0)
    assert found["order"]["consistency"] is None
    assert [text[:44] for text in found["warnings"]] == ["the judge prefers the answer shown first: th"]
