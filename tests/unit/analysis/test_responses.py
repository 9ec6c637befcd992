from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dpr_lightning.analysis.frozen import FrozenPolicies, find_policies
from dpr_lightning.analysis.responses import (
    add_data_arguments,
    check_counts,
    data_config,
    make_verifier,
    read_judged,
    read_responses,
    recorded_demonstrations,
    worked_answers,
)
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.verifiers import ExactMatch


@pytest.fixture(scope="module")
def policies(frozen_dirs: tuple[str, str]) -> FrozenPolicies:
    return find_policies(frozen_dirs[0], reference=frozen_dirs[1])


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def write(path: Path, rows: list[dict[str, Any]]) -> DemonstrationConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DemonstrationConfig(source=str(path))


def test_prompts_are_drawn_with_all_their_responses(tmp_path: Path, policies: FrozenPolicies, console: Console) -> None:
    rows = [{"prompt": f"p{n % 5}", "response": f"answer {n}"} for n in range(15)]
    config = write(tmp_path / "rows.jsonl", rows)
    responses = read_responses(config, policies, num_prompts=3, seed=1, console=console)
    assert len(responses) == 9
    by_prompt: dict[int, set[str]] = {}
    for index, row in zip(responses.prompt_index_N.tolist(), responses.rows, strict=True):
        by_prompt.setdefault(index, set()).add(row["prompt"])
    assert sorted(by_prompt) == [0, 1, 2]
    assert all(len(prompts) == 1 for prompts in by_prompt.values())
    assert [responses.rows[i]["row"] for i in responses.first_of_each_prompt()] == sorted(
        min(row["row"] for row in responses.rows if row["prompt"] == prompt)
        for prompt in {row["prompt"] for row in responses.rows}
    )
    again = read_responses(config, policies, num_prompts=3, seed=1, console=console)
    assert again.response_ids == responses.response_ids
    everything = read_responses(config, policies, num_prompts=99, seed=1, console=console)
    assert len(everything) == 15
    assert printed(console) == ""


def test_chosen_and_rejected(tmp_path: Path, policies: FrozenPolicies, console: Console) -> None:
    rows = [{"prompt": f"p{n // 2}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["rejected"] = " "
    config = write(tmp_path / "pairs.jsonl", rows)
    judged = read_judged(config, policies, num_prompts=100, seed=0, console=console)
    assert judged is not None
    assert judged.quality_N is None
    assert (len(judged.pairs), judged.pairs.num_prompts) == (38, 20)
    responses = judged.responses
    for better, worse, prompt in zip(judged.pairs.better_M, judged.pairs.worse_M, judged.pairs.prompt_M, strict=True):
        # Both of one row, and never the chosen one of a row against the rejected one of another.
        assert responses.rows[better]["row"] == responses.rows[worse]["row"]
        assert policies.tokenizer.decode(responses.response_ids[better][:-1]).startswith("good")
        assert policies.tokenizer.decode(responses.response_ids[worse][:-1]).startswith("bad")
        assert responses.prompt_index_N[better] == responses.prompt_index_N[worse] == prompt
    assert "1 pairs dropped: one of their responses cannot be used" in printed(console)
    assert "1 pairs dropped: both responses are the same" in printed(console)
    assert [responses.rows[i]["response"] for i in worked_answers(responses, judged)][:2] == ["good 0", "good 2"]


def test_verdicts_of_several_responses(tmp_path: Path, policies: FrozenPolicies, console: Console) -> None:
    verdicts: list[Any] = [True, False, "false", 1, 0, "True"]
    rows = [{"prompt": f"p{n // 3}", "response": f"r{n}", "is_correct": v} for n, v in enumerate(verdicts)]
    judged = read_judged(write(tmp_path / "rows.jsonl", rows), policies, num_prompts=9, seed=0, console=console)
    assert judged is not None
    assert judged.quality_N is not None
    assert judged.quality_N.tolist() == [1, 0, 0, 1, 0, 1]
    found = set(zip(judged.pairs.better_M.tolist(), judged.pairs.worse_M.tolist(), strict=True))
    assert found == {(0, 1), (0, 2), (3, 4), (5, 4)}
    assert worked_answers(judged.responses, judged) == [0, 3]


def test_scores_rank_every_pair_that_differs(tmp_path: Path, policies: FrozenPolicies, console: Console) -> None:
    rows = [{"prompt": "p", "response": f"r{n}", "score": s} for n, s in enumerate([2, 7.5, 2, "-1"])]
    judged = read_judged(write(tmp_path / "rows.jsonl", rows), policies, num_prompts=9, seed=0, console=console)
    assert judged is not None
    found = set(zip(judged.pairs.better_M.tolist(), judged.pairs.worse_M.tolist(), strict=True))
    assert found == {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}
    assert worked_answers(judged.responses, judged) == [1]


def test_source_without_judgements(tmp_path: Path, policies: FrozenPolicies, console: Console) -> None:
    config = write(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}])
    assert read_judged(config, policies, num_prompts=9, seed=0, console=console) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "response": "r", "score": "high"}], "row 1: column 'score' holds 'high'; write a finite"),
        ([{"prompt": "p", "response": "r", "score": float("nan")}], "row 1: column 'score' holds nan"),
        ([{"prompt": "p", "response": "r", "is_correct": 2}], "row 1: column 'is_correct' holds 2; write true or"),
        ([{"prompt": "p", "response": "r", "is_correct": None}], "row 1: column 'is_correct' holds None"),
        ([{"prompt": "p", "response": "r", "score": 1}], "no prompt of .* has two responses whose score differs"),
        (
            [{"prompt": "p", "response": "r", "score": 1, "is_correct": 1}],
            "has the columns is_correct, score; keep one",
        ),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "holds no usable pair"),
        ([{"prompt": "p", "chosen": ["a"], "rejected": "b"}], "column 'chosen' holds list"),
        ([{"question": "p", "chosen": "a", "rejected": "b"}], "--data.columns: no column 'prompt'"),
    ],
)
def test_unusable_judgements_are_refused(
    tmp_path: Path, policies: FrozenPolicies, console: Console, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_judged(write(tmp_path / "rows.jsonl", rows), policies, num_prompts=9, seed=0, console=console)


def test_unknown_prompts_of_another_trainers_teacher(policies: FrozenPolicies) -> None:
    with pytest.raises(UserError, match="--data: the teacher is no run"):
        recorded_demonstrations(policies)


def test_verifier_by_its_class_path() -> None:
    verifier = make_verifier("dpr_lightning.evaluation.ExactMatch", {"column": "answer"})
    assert isinstance(verifier, ExactMatch)
    assert verifier.column == "answer"
    assert make_verifier(None, {}) is None


@pytest.mark.parametrize(
    ("class_path", "settings", "message"),
    [
        ("dpr_lightning.evaluation.Nothing", {}, "no class 'dpr_lightning.evaluation.Nothing'"),
        ("ExactMatch", {}, "give its whole class path"),
        ("no.such.module.X", {}, "no class"),
        ("pathlib.Path", {}, "'pathlib.Path' is no Verifier"),
        ("dpr_lightning.evaluation.Verifier", {}, "--verifier_args: .*abstract"),
        ("dpr_lightning.evaluation.ExactMatch", {"colum": "x"}, "--verifier_args: .*colum"),
        (None, {"column": "x"}, "found settings, but no --verifier"),
    ],
)
def test_bad_verifiers_are_refused(class_path: str | None, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_verifier(class_path, settings)


def arguments(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    return parser.parse_args(args)


def test_arguments_become_a_configuration() -> None:
    parsed = arguments("--preset", "gsm8k", "--columns", "response=solution", "--max_response_tokens", "9")
    config = data_config(parsed, "x.jsonl")
    assert (config.source, config.preset, config.columns) == ("x.jsonl", "gsm8k", {"response": "solution"})
    assert config.max_response_tokens == 9


@pytest.mark.parametrize("text", ["response", "=x", "response="])
def test_malformed_columns_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--columns: found '{text}'"):
        data_config(arguments("--columns", text), "x.jsonl")


@pytest.mark.parametrize(
    ("args", "message"), [(["--num_prompts", "0"], "num_prompts: found 0"), (["--seed", "-1"], "seed")]
)
def test_counts_below_one_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_counts(arguments(*args), "num_prompts")
