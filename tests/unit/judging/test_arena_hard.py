from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.judging.arena_hard import ArenaHard2Preset, ArenaHardPreset
from dpr_lightning.judging.chat import NoVerdictError, Reply
from dpr_lightning.judging.games import Item
from dpr_lightning.judging.preset import Context
from dpr_lightning.judging.records import PairRecord

CONTEXT = Context(model="us", baseline="gpt-4-0314", judge="j", categories={"q3": "math"})


def row(key: str, *scores: str | None, **more: Any) -> dict[str, Any]:
    games = [None if score == "null game" else {"score": score, "judgment": "text"} for score in scores]
    return {"question_id": key, "model": "us", "games": games, **more}


def figures(preset: ArenaHardPreset, rows: list[dict[str, Any]]) -> dict[str, float]:
    records = [preset.record(found, CONTEXT, "here") for found in rows]
    return {figure.name: figure.value for figure in preset.figures(records, seed=0)}


ROWS = [
    row("q1", "A>>B", "A>B"),  # game 1: a strong loss, 3 x 0; game 2, where the model is A: 1 x 1
    row("q2", "B>A", "B>>A"),  # 1 x 1; 3 x 0
    row("q3", "A=B", "A>>B"),  # 1 x 0.5; 3 x 1
    row("q4", None, "A>B"),  # nothing; 1 x 1
    row("q5", "B<<A", "A<B"),  # labels that v0.1 does not know; v2: 3 x 0; 1 x 0
]


def test_weights_and_games_by_hand() -> None:
    # v0.1: (1 + 1 + 0.5 + 3 + 1) / (4 + 4 + 4 + 1)
    found = figures(ArenaHardPreset(), ROWS)
    assert found["win_rate"] == pytest.approx(100 * 6.5 / 13)
    assert found["n_battles"] == 13
    assert found["rating"] == pytest.approx(1000)
    # v2: q4 is left out whole, q5 counts: (1 + 1 + 3.5) / (4 + 4 + 4 + 4)
    found = figures(ArenaHard2Preset(), ROWS)
    assert found["win_rate"] == pytest.approx(100 * 5.5 / 16)
    assert found["rating"] == pytest.approx(1000 + 400 * math.log10(5.5 / 10.5))


def test_bradley_terry_of_all_models_is_one_share_each() -> None:
    """Against the maximum of the joint likelihood, found by Newton's method over all models at once."""
    generator = np.random.default_rng(0)
    labels = ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
    rows = {
        model: [row(f"q{n}", *generator.choice(labels, 2, p=weights)) for n in range(60)]
        for model, weights in {"x": [0.3, 0.3, 0.2, 0.1, 0.1], "y": [0.1, 0.1, 0.1, 0.3, 0.4]}.items()
    }
    preset = ArenaHardPreset()
    design, outcomes = [], []
    for number, model in enumerate(rows):
        for found in rows[model]:
            record = preset.record(found, CONTEXT, "here")
            assert isinstance(record, PairRecord)
            for game in record.games:
                for _ in range(game.weight):
                    design.append([number == 0, number == 1])
                    outcomes.append(game.value)
    features, outcome = np.array(design, dtype=float), np.array(outcomes, dtype=float)
    strength = np.zeros(2)
    for _ in range(50):
        share = 1 / (1 + np.exp(-features @ strength))
        hessian = features.T @ (features * (share * (1 - share))[:, None])
        strength += np.linalg.solve(hessian, features.T @ (outcome - share))
    expected = 100 / (1 + np.exp(-strength))
    assert [figures(preset, rows[model])["win_rate"] for model in rows] == pytest.approx(list(expected))


def test_intervals_hold_the_value_and_prompts_are_their_unit() -> None:
    preset = ArenaHardPreset()
    # Each prompt gives strong verdicts for one side in both games: 6 battles a prompt, all alike.
    rows = [row(f"q{n}", *(("B>>A", "A>>B") if n % 2 else ("A>>B", "B>>A"))) for n in range(40)]
    found = {figure.name: figure for figure in preset.figures([preset.record(r, CONTEXT, "h") for r in rows], seed=0)}
    over_prompts, over_battles = found["win_rate"], found["win_rate_over_battles"]
    assert over_prompts.low is not None
    assert over_battles.low is not None
    assert over_prompts.low < 40 < over_battles.low < 50
    # The standard deviation over prompts is 50 / sqrt(40) = 7.9: 95% are 15.5 to either side.
    assert over_prompts.low == pytest.approx(50 - 15.5, abs=2)


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("so [[A>>B]]", "A>>B", "A>>B"),
        ("[[A>B]] ... [[A>B]]", "A>B", "A>B"),
        ("[[A>B]] no, [[B>A]]", None, "B>A"),
        ("[a=b]", None, "A=B"),
        ("[[a>b]]", None, "A>B"),
        ("[[A<<B]]", None, "A<<B"),
        ("[[]] A>B", None, None),
        ("[[A>>>B]]", None, None),
    ],
)
def test_verdicts_of_both_versions(text: str, first: str | None, second: str | None) -> None:
    for preset, label in ((ArenaHardPreset(), first), (ArenaHard2Preset(), second)):
        if label is None:
            with pytest.raises(NoVerdictError):
                preset.parse(Reply(text=text))
        else:
            assert preset.parse(Reply(text=text)).label == label


def test_the_baseline_is_a_in_the_first_game() -> None:
    template = "{question_1}|{answer_1}|{answer_2}|{QUESTION}|{ANSWER_A}|{ANSWER_B}"
    preset = ArenaHardPreset(system="S", template=template)
    item = Item(key="q", turns=("do",), answers=(("ours",), ("theirs",)))
    first, second = preset.games(item)
    assert preset.request(first).messages == (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "do|theirs|ours|do|theirs|ours"},
    )
    assert preset.request(second).messages[1]["content"] == "do|ours|theirs|do|ours|theirs"
    outcomes = [preset.parse(Reply(text="[[A>>B]]")), preset.parse(Reply(text="[[A>B]]"))]
    (written,) = preset.rows(item, [first, second], outcomes, CONTEXT)
    record = preset.record(written, CONTEXT, "here")
    assert isinstance(record, PairRecord)
    assert [(game.value, game.weight, game.first) for game in record.games] == [(0.0, 3, "baseline"), (1.0, 1, "model")]
    assert record.model_length == 4


def test_v2_gives_each_category_its_own_figure() -> None:
    rows = [row(f"c{n}", "B>>A", "A>>B", category="coding") for n in range(3)]
    rows += [row("w", "A>B", "A>B", category="writing"), row("x", "A>B", None, category="lost")]
    found = figures(ArenaHard2Preset(), rows)
    # 18 of 18 battles, 1 of 2, and 19 of 20 together.
    assert (found["category coding"], found["category writing"], found["win_rate"]) == (100, 50, pytest.approx(95))
    assert "category lost" not in found
    assert "rating" not in figures(ArenaHard2Preset(), rows[:3])


def test_published_shapes_of_games() -> None:
    preset = ArenaHard2Preset()
    new = {"uid": "u", "category": "coding", "model": "m", "baseline": "b"}
    games = [{"score": "B>A", "judgment": {"answer": "why"}, "prompt": []}, None]
    record = preset.record({**new, "games": games}, CONTEXT, "here")
    assert isinstance(record, PairRecord)
    assert (record.key, record.category, record.baseline) == ("u", "coding", "b")
    assert (record.games[0].text, record.games[0].value) == ("why", 1.0)
    assert (record.games[1].value, record.games[1].failure) == (None, "no verdict")
    assert preset.record(row("q3", "A=B", "A=B"), CONTEXT, "h").category == "math"
    for bad in ({**new, "games": []}, {"games": games}, {**new, "games": ["A>B"]}, {**new}):
        with pytest.raises(UserError, match="here: "):
            preset.record(bad, CONTEXT, "here")
