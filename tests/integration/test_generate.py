"""``generate`` from end to end: files of every shape, several turns, a run that is killed, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpr_lightning.data.entries import read_entries
from dpr_lightning.data.templates import TextTemplate
from dpr_lightning.data.tokenization import encode_prompts
from dpr_lightning.generation import command
from dpr_lightning.main import main

SHARED = Path(__file__).parents[3] / "shared" / "data"
PROMPTS = [
    {"prompt": text, "answer": str(number), "category": "math" if number % 2 else "writing"}
    for number, text in enumerate(
        ["one", "a much longer question than the others", "two words", "", "x", "\u6570 \U0001f600"]
    )
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def generate(frozen_dirs: tuple[str, str], tmp_path: Path) -> Callable[..., Path]:
    source = write(tmp_path / "prompts.jsonl", PROMPTS)

    def run(*more: str, out: str = "out.jsonl", prompts: Path = source) -> Path:
        arguments = ["--model", frozen_dirs[0], "--prompts", str(prompts), "--out", str(tmp_path / out)]
        main(["generate", *arguments, "--max_new_tokens", "6", "--batch_size", "1", *more])
        return tmp_path / out

    return run


def test_rows_say_what_was_asked_and_how_it_was_drawn(
    generate: Callable[..., Path], frozen_dirs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = generate("--temperature", "1.0", "--seed", "3", "--name", "mine")
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(6))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    assert [row["source"] for row in rows] == PROMPTS
    for row in rows:
        assert row["output"] == row["response"]
        assert row["instruction"] == row["prompt"]
        assert (row["generator"], row["sample"]) == ("mine", 0)
        assert row["decoding"] == {
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6, "batch_size": 1, "seed": 3,
        }  # fmt: skip
        assert 1 <= row["num_tokens"] <= 6
    assert len({row["model_fingerprint"] for row in rows}) == 1
    record = json.loads((out.parent / "out.jsonl.manifest.json").read_text())
    assert record["truncated"] == sum(row["is_truncated"] for row in rows)
    assert record["tokens"] == sum(row["num_tokens"] for row in rows)
    assert f"{record['truncated']} cut off at 6 tokens" in capsys.readouterr().out
    assert not (out.parent / "out.jsonl.parts").exists()


@torch.no_grad()
def test_the_likeliest_answer_is_transformers_own_whatever_the_batch(
    generate: Callable[..., Path], frozen_dirs: tuple[str, str]
) -> None:
    rows = rows_of(generate("--temperature", "0"))
    batched = rows_of(generate("--temperature", "0", "--batch_size", "4", out="batched.jsonl"))
    assert [row["response"] for row in rows] == [row["response"] for row in batched]
    tokenizer = AutoTokenizer.from_pretrained(frozen_dirs[0])
    model = AutoModelForCausalLM.from_pretrained(frozen_dirs[0]).eval()
    messages = [[{"role": "user", "content": row["prompt"]}] for row in PROMPTS]
    for ids, row in zip(encode_prompts(tokenizer, TextTemplate(), messages), rows, strict=True):
        found = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0, len(ids) :]
        assert tokenizer.decode(found, skip_special_tokens=True) == row["response"]
        assert row["is_truncated"] == (int(found[-1]) != tokenizer.eos_token_id)


def test_later_turns_see_the_earlier_answers(
    generate: Callable[..., Path], frozen_dirs: tuple[str, str], tmp_path: Path
) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
        {"question_id": 82, "category": "math", "turns": ["alone"]},
    ]
    out = generate("--temperature", "0", prompts=write(tmp_path / "turns.jsonl", rows))
    first, alone = rows_of(out)
    assert (first["id"], first["prompt"], alone["prompt"]) == ("81", ["first", "second"], "alone")
    assert isinstance(alone["response"], str)
    tokenizer = AutoTokenizer.from_pretrained(frozen_dirs[0])
    model = AutoModelForCausalLM.from_pretrained(frozen_dirs[0]).eval()
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": first["response"][0]},
        {"role": "user", "content": "second"},
    ]
    ids = encode_prompts(tokenizer, TextTemplate(), [messages])[0]
    found = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0, len(ids) :]
    assert tokenizer.decode(found, skip_special_tokens=True) == first["response"][1]
    # Judges read it as it is.
    entries = read_entries(str(out), key="--responses", with_answers=True)
    assert [entry.answers for entry in entries] == [tuple(first["response"]), (alone["response"],)]
    assert [entry.turns for entry in entries] == [("first", "second"), ("alone",)]


def test_seeds_and_samples(generate: Callable[..., Path]) -> None:
    settings = ["--temperature", "1", "--num_samples", "2"]
    zero, again, one = (
        rows_of(generate(*settings, "--seed", seed, out=f"{name}.jsonl"))
        for name, seed in (("zero", "0"), ("again", "0"), ("one", "1"))
    )
    assert zero == again
    assert [row["response"] for row in zero] != [row["response"] for row in one]
    assert [(row["row"], row["sample"]) for row in zero] == [(row, sample) for row in range(6) for sample in range(2)]
    assert any(zero[i]["response"] != zero[i + 1]["response"] for i in range(0, 12, 2))


def test_categories_have_their_own_temperature(generate: Callable[..., Path]) -> None:
    rows = rows_of(generate("--category_temperatures", "mt_bench"))
    assert {(row["category"], row["decoding"]["temperature"]) for row in rows} == {("math", 0.0), ("writing", 0.7)}


def test_a_complete_file_is_left_alone_and_another_setting_refused(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = generate().read_bytes()
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights loaded"))
    assert generate().read_bytes() == before
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        generate("--seed", "1")
    assert "was begun with other input: seed (was 0, is 1)" in capsys.readouterr().err


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    generate: Callable[..., Path], frozen_dirs: tuple[str, str], tmp_path: Path
) -> None:
    prompts = write(tmp_path / "many.jsonl", [{"prompt": f"question {n}"} for n in range(60)])
    settings = ["--temperature", "1", "--max_new_tokens", "40"]
    whole = generate(*settings, out="whole.jsonl", prompts=prompts)
    killed = tmp_path / "killed.jsonl"
    arguments = ["--model", frozen_dirs[0], "--prompts", str(prompts), "--out", str(killed), "--batch_size", "1"]
    code = f"from dpr_lightning.main import main; main({['generate', *arguments, *settings]!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    parts = tmp_path / "killed.jsonl.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("block-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(parts.glob("block-*")))
    assert 2 <= done < 15, "the process was killed too early or too late: the test shows nothing"
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("block-*")}
    seen: list[dict[str, int]] = []
    ordered = command._ordered

    def look(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        seen.append({path.name: path.stat().st_mtime_ns for path in parts.glob("block-*")})
        return ordered(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_ordered", look)
        generate(*settings, out="killed.jsonl", prompts=prompts)
    assert kept.items() <= seen[0].items()
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "-1"], "temperature must be 0"),
        (["--limit", "0"], "--limit: found 0"),
        (["--num_samples", "0"], "--num_samples: found 0"),
        (["--category_temperatures", "[1]"], "--category_temperatures: found '[1]'"),
        (["--model", "nowhere/at/all"], "there is no such directory"),
        (["--prompts", "absent.jsonl"], "--prompts: no file absent.jsonl"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used here"),
        (["--chat"], "has no chat template"),
        (["--out", "answers.txt"], "--out: found 'answers.txt'"),
    ],
)
def test_mistakes_are_told_before_weights_load(
    more: list[str],
    message: str,
    generate: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights loaded"))
    with pytest.raises(SystemExit, match="2"):
        generate(*more)
    assert message in capsys.readouterr().err


def test_a_json_file_is_one_array_of_the_same_rows(generate: Callable[..., Path]) -> None:
    lines, array = generate(), generate(out="out.json")
    assert json.loads(array.read_text()) == rows_of(lines)
    assert len(read_entries(str(array), key="--responses", with_answers=True)) == 6


def test_prompts_that_the_model_has_no_positions_for_are_counted(
    generate: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The model has 256 positions.
    rows = [{"prompt": "word " * 300}, {"prompt": "short"}]
    out = generate(prompts=write(tmp_path / "long.jsonl", rows))
    assert "1 of 2 prompts and their longest answers are beyond the positions" in capsys.readouterr().out
    assert json.loads(out.with_name("out.jsonl.manifest.json").read_text())["prompts_beyond_positions"] == 1
    assert len(rows_of(out)) == 2


def test_a_row_without_a_prompt_is_named(
    generate: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate(prompts=write(tmp_path / "bad.jsonl", [{"prompt": "good"}, {"text": "bad"}]))
    assert "bad.jsonl line 2: no prompt; needs one of the columns prompt" in capsys.readouterr().err


def test_a_file_of_another_program_is_not_replaced(
    generate: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="2"):
        generate()
    assert "was not written by generate" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not there")
@pytest.mark.parametrize(
    ("file", "num_prompts"),
    [
        ("alpaca_eval/instructions.json", 805),
        ("arena_hard_v0.1/question.jsonl", 500),
        ("arena_hard_v0.1/question_newformat.jsonl", 500),
        ("mt_bench/question.jsonl", 80),
        ("lima/test_300.jsonl", 300),
        ("ifeval/input_data.jsonl", 541),
        ("gsm8k/train.jsonl", 7473),
    ],
)
def test_files_of_the_benchmarks_are_understood(generate: Callable[..., Path], file: str, num_prompts: int) -> None:
    assert len(read_entries(str(SHARED / file), key="--prompts", with_answers=False)) == num_prompts
    rows = rows_of(generate("--limit", "2", prompts=SHARED / file))
    assert len(rows) == 2
    assert all(isinstance(row["response"], list) == file.startswith("mt_bench") for row in rows)
