from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from dpr_lightning.errors import UserError
from dpr_lightning.judging.alpaca_eval import AlpacaEval1Preset, AlpacaEval2Preset
from dpr_lightning.judging.chat import NoVerdictError, Reply
from dpr_lightning.judging.games import BASELINE, MODEL, Item, Verdict
from dpr_lightning.judging.length_control import LengthControl
from dpr_lightning.judging.preset import Context
from dpr_lightning.judging.records import PairRecord
from dpr_lightning.judging.templates import alpaca_eval_template

CONTEXT = Context(model="us", baseline="them", judge="j")


def row(preference: float | None, **more: Any) -> dict[str, Any]:
    return {"instruction": "i", "output_1": "ab", "output_2": "abcd", "preference": preference, **more}


def read(rows: list[dict[str, Any]]) -> list[PairRecord]:
    records = [AlpacaEval2Preset().record(found, CONTEXT, "here") for found in rows]
    assert all(isinstance(record, PairRecord) for record in records)
    return [record for record in records if isinstance(record, PairRecord)]


def test_published_preferences_by_hand() -> None:
    # 0 is an old draw; null and 2.5 are left out. Preferences for the model: 1, 0.25, 0.5, 0.5, 0.
    records = read([row(value) for value in (2, 1.25, 0, 1.5, 1, None, 2.5)])
    figures = {figure.name: figure.value for figure in AlpacaEval2Preset().figures(records, seed=0)}
    # Mean 2.25 / 5; squared deviations .3025 + .04 + 2 * .0025 + .2025 = .55, so the error is sqrt(.55 / 4 / 5).
    assert figures.pop("standard_error") == pytest.approx(100 * math.sqrt(0.55 / 20))
    assert figures.pop("win_rate") == pytest.approx(45.0)
    # One win, two draws, two losses.
    assert figures == {"discrete_win_rate": 40.0, "n_wins": 1, "n_wins_base": 2, "n_draws": 2, "n_total": 5}
    assert [record.games[0].failure for record in records][-2:] == ["no verdict", "no preference"]
    assert (records[0].model_length, records[0].baseline_length) == (4, 2)


def test_nan_is_no_preference_and_text_is_refused() -> None:
    assert read([row(math.nan)])[0].games[0].failure == "no verdict"
    with pytest.raises(UserError, match="here: 'preference' should be a number, found 'm'"):
        read([row(None) | {"preference": "m"}])
    with pytest.raises(UserError, match="here: 'instruction' should be text"):
        AlpacaEval2Preset().record({"preference": 1.0}, CONTEXT, "here")


def test_who_was_shown_first_is_found_in_the_raw_completion() -> None:
    # P(m) = 0.75: the answer shown first is preferred by 0.75.
    tops = [{"token": "m", "logprob": math.log(0.6)}, {"token": "M", "logprob": math.log(0.2)}]
    raw = {"logprobs": {"content": [{"top_logprobs": tops}]}}
    records = read([row(value, raw_completion=raw) for value in (1.75, 1.25, 1.9)] + [row(1.75)])
    assert [record.games[0].first for record in records] == ["model", "baseline", "unknown", "unknown"]


def test_the_order_is_drawn_as_upstream_draws_it() -> None:
    for n in range(20):
        item = Item(key=str(n), turns=(f"do {n}",), answers=(("a",), ("b",)))
        (game,) = AlpacaEval2Preset().games(item)
        is_switched = random.Random(f"is_switched_outputsdo {n}0").choices([False, True], k=1)[0]
        assert game.shown == ((MODEL, BASELINE) if is_switched else (BASELINE, MODEL))


@pytest.mark.parametrize(
    ("logprobs", "value"),
    [({"m": math.log(0.3), "M": math.log(0.1)}, 0.75), ({"m": -3.0}, 1.0), ({"M": -900.0, "x": -0.1}, 0.0)],
)
def test_first_token_probabilities(logprobs: Mapping[str, float], value: float) -> None:
    assert AlpacaEval2Preset().parse(Reply(text="m", first_token_logprobs=logprobs)).value == pytest.approx(value)


def test_no_m_is_no_verdict() -> None:
    for logprobs in ({"The": -0.1}, {}, None):
        with pytest.raises(NoVerdictError):
            AlpacaEval2Preset().parse(Reply(text="The", first_token_logprobs=logprobs))


def test_ranking_of_the_first_version() -> None:
    def ranks(first: object) -> Reply:
        return Reply(text=f"[{{'model': 'model_1', 'rank': {first}}}, {{'model': 'model_2', 'rank': 1}}]")

    assert AlpacaEval1Preset().parse(ranks(1)) == Verdict(value=1.0, label="model_1 ranks 1", text=ranks(1).text)
    assert AlpacaEval1Preset().parse(ranks(2)).value == 0.0
    for bad in (ranks(3), ranks("True"), Reply(text="model_1"), Reply(text="[{}]"), Reply(text="__import__('os')")):
        with pytest.raises(NoVerdictError):
            AlpacaEval1Preset().parse(bad)


def gamed_file(path: Path) -> Path:
    """Two gamed baselines on 200 instructions of spread difficulty."""
    generator = np.random.default_rng(1)
    parts = []
    for shift in (-1.0, 1.0):
        length = generator.normal(shift, 0.7, 200)
        share = 1 / (1 + np.exp(1.5 * np.tanh(length) + generator.normal(0, 0.5, 200)))
        parts.append({"preference": share, "index": range(200), "std_delta_len": length})
    gamed = pd.concat([pd.DataFrame(part) for part in parts])
    gamed["instruction_difficulty"] = np.tile(np.linspace(-2, 2, 200), 2)
    gamed["not_gamed_baseline"] = False
    gamed.to_csv(path, index=False)
    return path


def judged_rows() -> list[dict[str, Any]]:
    """The judge's preference is 1 / (1 + exp(1.5 tanh(z) - 0.4)), z the baseline's excess length, scaled."""
    generator = np.random.default_rng(2)
    excess = np.round(generator.normal(-300, 400, 200)).astype(int)
    share = 1 / (1 + np.exp(1.5 * np.tanh(excess / excess.std(ddof=1)) - 0.4))
    return [
        {
            "instruction": f"do {n}",
            "output_1": "x" * (2000 + max(excess[n], 0)),
            "output_2": "x" * (2000 - min(excess[n], 0)),
            "generator_1": "them",
            "generator_2": "us",
            "annotator": "j",
            "preference": float(1 + share[n]),
        }
        for n in range(200)
    ]


def test_length_control_finds_what_would_be_at_equal_lengths(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    control = LengthControl(gamed_file(tmp_path / "df_gamed.csv"))
    figures = {
        figure.name: figure.value
        for figure in AlpacaEval2Preset(length_control=control).figures(read(judged_rows()), seed=0)
    }
    # At equal lengths the preference is 1 / (1 + exp(-0.4)) = 0.5987, and the model is longer: the raw rate is higher.
    assert figures["win_rate"] > 65
    # The tolerance is for the penalty and for the gamed baselines that are fitted along.
    assert figures["length_controlled_winrate"] == pytest.approx(59.87, abs=1.5)
    shuffled = judged_rows()[::-1]
    control = LengthControl(tmp_path / "df_gamed.csv", order=[f"do {n}" for n in range(200)])
    again = {figure.name: figure.value for figure in control.figures(read(shuffled))}
    # The folds of the cross-validation go by the order of the rows, so only nearly.
    assert again["length_controlled_winrate"] == pytest.approx(figures["length_controlled_winrate"], abs=0.5)
    with pytest.raises(UserError, match="1 of 201 judged instructions are not in it, such as 'do 0'"):
        LengthControl(tmp_path / "df_gamed.csv").figures(read([*judged_rows(), judged_rows()[0]]))


def test_length_control_wants_upstreams_file(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "x.csv"
    path.write_text("preference,index\n1,2\n")
    with pytest.raises(UserError, match="has no column std_delta_len, instruction_difficulty, not_gamed_baseline"):
        LengthControl(path)
    with pytest.raises(UserError, match="cannot be read"):
        LengthControl(tmp_path / "none.csv")


def upstream() -> Path:
    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or spec.origin is None:
        pytest.skip("alpaca-eval is not installed")
    return Path(spec.origin).parent


@pytest.mark.parametrize("preset", [AlpacaEval1Preset, AlpacaEval2Preset])
def test_decoding_and_template_are_those_of_the_package(
    preset: type[AlpacaEval1Preset] | type[AlpacaEval2Preset],
) -> None:
    configs = upstream() / "evaluators_configs"
    name = {"alpaca_eval_1": "alpaca_eval_gpt4", "alpaca_eval_2": "weighted_alpaca_eval_gpt4_turbo"}[preset.name]
    config = yaml.safe_load((configs / name / "configs.yaml").read_text())[name]
    decoding = dict(config["completions_kwargs"])
    assert decoding.pop("model_name") == preset.judge_model
    # top_p is its client's default.
    assert {**decoding, "top_p": 1.0} == preset.decoding
    assert config["prompt_template"] == preset.template_file
    template = alpaca_eval_template(None, preset.template_file)
    assert [message["role"] for message in template] == ["system", "user"]
    whole = (configs / preset.template_file).read_text()
    for message in template:
        assert message["content"] in whole
    item = Item(key="1", turns=("{output_2}",), answers=(("ours",), ("theirs",)))
    (game,) = preset(template=template).games(item)
    text = preset(template=template).request(game).messages[1]["content"]
    shown = [("ours", "theirs")[side] for side in game.shown]
    expected = template[1]["content"].replace("{output_1}", shown[0]).replace("{output_2}", shown[1])
    assert text == expected.replace("{instruction}", "{output_2}")


def test_a_template_must_have_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("<|im_start|>user\n{instruction}\n<|im_end|>")
    with pytest.raises(UserError, match=r"lacks \{output_1\}, \{output_2\}"):
        alpaca_eval_template(path, "x")


def test_live_rows_are_upstreams_format() -> None:
    preset = AlpacaEval2Preset()
    item = Item(key="3", turns=("do 1",), answers=(("ours",), ("theirs",)), category="koala")
    (game,) = preset.games(item)
    (written,) = preset.rows(item, [game], [Verdict(value=0.9, label="m", text="m")], CONTEXT)
    model_first = game.shown[0] == MODEL
    assert written["preference"] == pytest.approx(1.9 if model_first else 1.1)
    assert {key: written[key] for key in ("output_1", "output_2", "generator_1", "generator_2", "dataset")} == {
        "output_1": "theirs",
        "output_2": "ours",
        "generator_1": "them",
        "generator_2": "us",
        "dataset": "koala",
    }
    (record,) = read([json.loads(json.dumps(written))])
    assert record.games[0].first == ("model" if model_first else "baseline")
