"""IFEval's checks on rows whose verdict can be seen by eye, and the whole file of prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation import instructions as module
from dpr_lightning.evaluation.ifeval import IFEval
from dpr_lightning.evaluation.instructions import check_instructions, checkers, loose_versions

pytestmark = pytest.mark.skipif(importlib.util.find_spec("if_verifiable") is None, reason="the extra ifeval is absent")
PROMPTS = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ifeval" / "input_data.jsonl"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    checkers.cache_clear()
    monkeypatch.setenv("DPR_LIGHTNING_CACHE", str(tmp_path_factory.mktemp("cache")))


def row(*instructions: tuple[str, dict[str, Any]], prompt: str = "Do it.") -> dict[str, Any]:
    return {
        "row": 7,
        "prompt": prompt,
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [settings for _, settings in instructions],
    }


ORACLE: list[tuple[str, dict[str, Any], str, str]] = [
    ("punctuation:no_comma", {}, "one two", "one, two"),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A dog saw a cat.", "A dog saw a bird."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", "A cat."),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "at least"}, "ha ha Ha", "ha ha"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "jaZz", "z"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "#a #b", "#a b c"),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "less than"}, "no!", "no!!"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Mr. Ames left at 5 p.m. yesterday. He came back.",
        "He left. He came back. He slept.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n\n***\n\ntwo", "one\n\ntwo"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [city]", "[name] of city"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yes.\nP.S. No.", "Yes."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
    ("detectable_format:title", {}, "<<My title>>\ntext", "My title\ntext"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a is 1"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a b* and *c*", "*a b* and c"),
    ("startend:end_checker", {"end_phrase": "That is all."}, "So it is. That is all.", "That is all. So it is."),
    ("startend:quotation", {}, '"quoted"', "not quoted"),
    ("change_case:english_lowercase", {}, "this is all in small letters", "This is not."),
    ("change_case:english_capital", {}, "THIS IS ALL IN CAPITAL LETTERS", "This is not."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "We SHOUT it LOUD now.",
        "We SHOUT it now.",
    ),
    ("language:response_language", {"language": "de"}, "Das ist ein ganz normaler Satz.", "This is a plain sentence."),
    ("combination:two_responses", {}, "first answer\n******\nsecond answer", "first answer"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi! Say hi."),
]


@pytest.mark.parametrize(("name", "settings", "right", "wrong"), ORACLE)
def test_each_type_of_instruction_tells_right_from_wrong(
    name: str, settings: dict[str, Any], right: str, wrong: str
) -> None:
    assert check_instructions(row((name, settings)), right) == ([True], [True])
    assert check_instructions(row((name, settings)), wrong)[0] == [False]


def test_loosely_the_first_and_last_line_and_asterisks_may_be_left_out() -> None:
    one = row(("startend:quotation", {}))
    for response in ('Sure:\n"quoted"', '"quoted"\nBye.', 'Sure:\n"quoted"\nBye.', '**"quoted"**', 'A:\n*"quoted"*'):
        assert check_instructions(one, response) == ([False], [True]), response
    assert check_instructions(one, 'Sure.\nHere:\n"quoted"') == ([False], [False])


def test_the_loose_versions_are_eight() -> None:
    assert loose_versions("*a*\nb\nc") == ["*a*\nb\nc", "b\nc", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_an_empty_response_follows_nothing() -> None:
    one = row(("punctuation:no_comma", {}), ("keywords:forbidden_words", {"forbidden_words": ["cat"]}))
    assert check_instructions(one, " \n") == ([False, False], [False, False])


def test_the_same_response_has_the_same_verdict_every_time() -> None:
    one = row(("language:response_language", {"language": "en"}))
    text = "la la ok no taxi hotel radio"
    assert len({check_instructions(one, text)[0][0] for _ in range(20)}) == 1


def test_settings_of_other_instructions_are_null_in_parquet_and_do_not_matter() -> None:
    name = "length_constraints:number_words"
    settings = {"num_words": 2, "relation": "at least", "keywords": None, "letter": None}
    one = row((name, settings))
    as_text = one | {"kwargs": json.dumps(one["kwargs"]), "instruction_id_list": json.dumps([name])}
    for given in (one, as_text):
        assert check_instructions(given, "one two") == ([True], [True])


def test_the_four_figures() -> None:
    metric = IFEval()
    rows = [
        row(("punctuation:no_comma", {}), ("startend:quotation", {})),
        row(("punctuation:no_comma", {}), ("punctuation:no_comma", {}), ("startend:quotation", {})),
    ]
    # The first follows one of two strictly, both loosely; the second all three.
    metric.update(rows, ['Sure:\n"yes"', '"yes"'], [False, True])
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {
            "ifeval/prompt_strict": 1 / 2,
            "ifeval/prompt_loose": 1.0,
            "ifeval/instruction_strict": 4 / 5,
            "ifeval/instruction_loose": 1.0,
        }
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instruction_id_list": None}, "row 7: column 'instruction_id_list' holds no list"),
        ({"kwargs": "{"}, "row 7: column 'kwargs' holds no list"),
        ({"kwargs": [{}, {}]}, "1 instructions but 2 kwargs"),
        ({"instruction_id_list": ["startend:rhyme"]}, "instruction 'startend:rhyme' is unknown"),
        ({"kwargs": [{"words": 3}]}, "do not fit instruction 'punctuation:no_comma'"),
    ],
)
def test_a_row_without_readable_instructions_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_instructions(row(("punctuation:no_comma", {})) | changes, "text")


@pytest.mark.parametrize(
    ("missing", "words"), [("if_verifiable", r"dpr-lightning\[ifeval\]"), ("punkt.data.english", "punkt_tab")]
)
def test_what_is_not_installed_is_said_at_once(monkeypatch: pytest.MonkeyPatch, missing: str, words: str) -> None:
    import nltk  # type: ignore[import-untyped]

    real = module.importlib.import_module

    def import_module(name: str) -> Any:
        if name.startswith(missing):
            raise ImportError(f"No module named '{name}'")
        return real(name)

    monkeypatch.setattr(module.importlib, "import_module", import_module)
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=words):
        IFEval()
    checkers.cache_clear()


@pytest.mark.shared_data
@pytest.mark.skipif(not PROMPTS.is_file(), reason="the developers' shared data are not here")
def test_all_541_prompts_are_scored_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr(nltk.data, "path", [])
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    metric, again = IFEval(), IFEval()
    for found in (metric, again):
        # A response that repeats the prompt.
        found.update(rows, [one["prompt"] for one in rows], [False] * len(rows))
    assert metric.counts_F2[:, 1].tolist() == [541, 541, 834, 834]
    assert torch.equal(metric.counts_F2, again.counts_F2)
    no_comma = [one for one in rows if "punctuation:no_comma" in one["instruction_id_list"]]
    strict = [check_instructions(one, one["prompt"])[0] for one in no_comma]
    followed = [
        flags[one["instruction_id_list"].index("punctuation:no_comma")]
        for one, flags in zip(no_comma, strict, strict=True)
    ]
    assert followed == ["," not in one["prompt"] for one in no_comma]
