"""Metrics of responses: shares worked out by hand, over batches, ranks and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.ifeval import IFEval, loose_forms
from dpr_lightning.evaluation.metrics import VerifierAccuracy, grade_rows
from dpr_lightning.evaluation.verifiers import FinalNumber

SHARED = Path(__file__).parents[4] / "shared" / "data"


def instruction(*instructions: tuple[str, dict[str, Any]], prompt: str = "Say something.") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [arguments for _, arguments in instructions],
    }


def shares(metric: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def test_accuracy_is_the_share_of_right_and_finished_responses() -> None:
    metric = VerifierAccuracy(FinalNumber("answer"))
    rows = [{"answer": "#### 7"}, {"answer": "#### 8"}, {"answer": "#### 9"}]
    metric.update(rows[:2], ["it is 7", "it is 7"], [False, False])
    metric.update(rows[2:], ["it is 9"], [True])
    assert shares(metric) == {"accuracy": pytest.approx(1 / 3)}
    metric.reset()
    assert shares(metric) == {"accuracy": 0.0}


def test_ranks_are_added_before_shares_are_taken() -> None:
    metrics = [VerifierAccuracy(FinalNumber("answer")) for _ in range(2)]
    row = {"answer": "1"}
    metrics[0].update([row], ["1"], [False])
    metrics[1].update([row] * 3, ["2"] * 3, [False] * 3)
    # What torchmetrics does with the states of two processes.
    metrics[0].counts_F2 = metrics[0]._reductions["counts_F2"](torch.stack([metric.counts_F2 for metric in metrics]))
    assert shares(metrics[0]) == {"accuracy": 0.25}


def test_a_prompts_responses_are_resampled_together() -> None:
    metric = VerifierAccuracy(FinalNumber("answer"))
    rows, responses = [{"answer": "1"}] * 8, ["1", "1", "1", "1", "2", "2", "2", "2"]
    together = grade_rows(metric, rows, responses, [False] * 8, [0, 0, 0, 0, 1, 1, 1, 1])["accuracy"]
    apart = grade_rows(metric, rows, responses, [False] * 8, list(range(8)))["accuracy"]
    assert together.value == apart.value == 0.5
    assert (together.n, apart.n) == (2, 8)
    # Of two prompts a quarter of the resamples is all right, a quarter all wrong.
    assert (together.low, together.high) == (0.0, 1.0)
    assert apart.low > 0.0


def test_every_instruction_is_counted_and_a_prompt_needs_them_all() -> None:
    row = instruction(
        ("punctuation:no_comma", {}),
        ("keywords:existence", {"keywords": ["apple", "pear"]}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 5}),
    )
    metric = IFEval()
    metric.update([row], ["apple and pear are fine fruits"], [False])
    assert set(shares(metric).values()) == {1.0}
    metric.update([row], ["apple, pear"], [False])
    assert shares(metric) == {
        "ifeval/prompt_strict": 0.5,
        "ifeval/prompt_loose": 0.5,
        "ifeval/instruction_strict": pytest.approx(4 / 6),
        "ifeval/instruction_loose": pytest.approx(4 / 6),
    }


@pytest.mark.parametrize(
    ("name", "arguments", "response", "strict", "loose"),
    [
        ("startend:end_checker", {"end_phrase": "the end"}, "This is the end", True, True),
        # The last line is left out loosely.
        ("startend:end_checker", {"end_phrase": "the end"}, "This is the end\nHope it helps!", False, True),
        # And so are asterisks.
        ("startend:end_checker", {"end_phrase": "the end"}, "This is **the end**", False, True),
        ("punctuation:no_comma", {}, "Sure, here:\nno comma\n", False, True),
        ("punctuation:no_comma", {}, "a, b", False, False),
        ("change_case:english_lowercase", {}, "all of this is written in small letters", True, True),
        ("detectable_format:json_format", {}, '{"a": 1}', True, True),
        ("detectable_format:json_format", {}, "{a: 1}", False, False),
        # Arguments of a table that are null are as if absent.
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least", "x": None}, "a a", True, True),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "Say it\nand more", True, True),
        ("punctuation:no_comma", {}, "", False, False),
    ],
)  # fmt: skip
def test_strict_and_loose(name: str, arguments: dict[str, Any], response: str, strict: bool, loose: bool) -> None:
    metric = IFEval()
    metric.update([instruction((name, arguments))], [response], [False])
    assert shares(metric) == {
        "ifeval/prompt_strict": strict,
        "ifeval/prompt_loose": loose,
        "ifeval/instruction_strict": strict,
        "ifeval/instruction_loose": loose,
    }


def test_loose_forms_are_the_papers_eight() -> None:
    assert loose_forms("*a*\nb\n*c*") == [
        "*a*\nb\n*c*", "b\n*c*", "*a*\nb", "b",
        "a\nb\nc", "b\nc", "a\nb", "b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "row": 4}, "row 4: IFEval needs the columns instruction_id_list and kwargs"),
        (instruction(("keywords:nothing", {})) | {"key": 9}, "row 9: IFEval has no instruction 'keywords:nothing'"),
        ({**instruction(("punctuation:no_comma", {})), "kwargs": []}, "as long as each other"),
    ],
)
def test_rows_that_are_none_of_ifeval_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        IFEval().update([row], ["text"], [False])


def test_a_missing_sentence_tokenizer_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk  # type: ignore[import-untyped]
    from if_verifiable.ifeval import instructions_util  # type: ignore[import-untyped]

    monkeypatch.setattr(nltk.data, "path", [])
    instructions_util._get_sentence_tokenizer.cache_clear()
    row = instruction(("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}))
    with pytest.warns(UserWarning, match="64 of its 541 prompts count sentences"):
        metric = IFEval()
    with pytest.raises(UserError, match=r"'length_constraints:number_sentences': NLTK.* punkt_tab"):
        metric.update([row], ["One sentence."], [False])


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not there")
def test_all_prompts_of_ifeval_can_be_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(SHARED / "ifeval" / "nltk_data")])
    rows = [json.loads(line) for line in (SHARED / "ifeval" / "input_data.jsonl").read_text().splitlines()]
    metric, again = IFEval(), IFEval()
    for found in (metric, again):
        found.update(rows, [row["prompt"] for row in rows], [False] * len(rows))
    assert metric.counts_F2[:, 1].tolist() == [541, 541, 834, 834]
    # Repeating the prompt follows some instructions, loosely more; and the same ones every time.
    assert torch.equal(metric.counts_F2, again.counts_F2)
    assert 0 < metric.counts_F2[0, 0] <= metric.counts_F2[1, 0] < 541
    found = grade_rows(metric, rows, [row["prompt"] for row in rows], [False] * 541, range(541))
    assert found["ifeval/prompt_strict"].value == float(metric.counts_F2[0, 0]) / 541
