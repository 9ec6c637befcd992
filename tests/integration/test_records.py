"""Rows as users have them, through every command: read alike everywhere, and refused by file and row before weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

import dpr_lightning.models.policies
from dpr_lightning.data.entries import read_entries
from dpr_lightning.generation import command
from dpr_lightning.main import main
from dpr_lightning.manifest import write_directory

GOOD = [{"prompt": f"What is {n} plus 1 ?", "response": str(n + 1)} for n in range(8)]
LINES = {
    "half a surrogate pair": '{"prompt": "a \\ud83d b", "response": "c"}',
    "JSON nested more than 200 deep": '{"prompt": "a", "response": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a whole number of thousands of digits": '{"prompt": "a", "response": "b", "x": ' + "9" * 5000 + "}",
}


def overlays(recipe: str, model: Path, run_dir: Path) -> list[str]:
    files = ("base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")
    merged = [argument for file in files for argument in ("-c", f"configs/{file}.yaml")]
    return [*merged, f"--model.backbone.name_or_path={model}", f"--run_dir={run_dir}"]


@pytest.fixture
def commands(
    tmp_path: Path, tiny_model_dir: Path, frozen_dirs: tuple[str, str]
) -> Callable[[str], dict[str, list[str]]]:
    """Every command that reads rows, on a file."""
    teacher, reference = frozen_dirs
    policies = ["--teacher", teacher, "--reference", reference]
    run = tmp_path / "run" / "final"
    write_directory(
        run, lambda path: shutil.copytree(teacher, path, dirs_exist_ok=True), {"initial_weights": reference}
    )

    def make(source: str) -> dict[str, list[str]]:
        data = [f"--data.demonstrations.{name}" for name in (f"source={source}", "subsample=null")]
        data.append("--data.demonstrations.preset=prompt_response")
        pair = [f"--model.teacher={teacher}", f"--model.reference={reference}"]
        benchmark = tmp_path / "mine.yaml"
        benchmark.write_text(yaml.safe_dump({"title": "Mine", "prompts": source, "judge": "paper"}))
        sizes = ["--data.prompts_per_rollout=8", "--data.global_batch_size=8", "--data.micro_batch_size=4"]
        return {
            "sft": ["fit", *overlays("sft", tiny_model_dir, tmp_path / "sft"), *data],
            "dpr": ["fit", *overlays("dpr", tiny_model_dir, tmp_path / "dpr"), *data, *pair, *sizes],
            "generate": ["generate", "--model", teacher, "--prompts", source, "--out", str(tmp_path / "o.jsonl")],
            "evaluate": ["evaluate", str(run.parent), "--benchmarks", str(benchmark)],
            "score": ["score", *policies, "--data", source, "--out", str(tmp_path / "scores")],
            "diagnose": ["diagnose", *policies, "--data", source],
            "credit": ["credit", *policies, "--data", source],
        }

    return make


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    for module in (dpr_lightning.models.policies, command):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("weights loaded"))

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpr-lightning: error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize("reason", LINES)
def test_a_row_that_nothing_can_hold_is_named_by_every_command(
    reason: str, commands: Any, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD) + LINES[reason] + "\n")
    for name, arguments in commands(str(path)).items():
        if name == "score" and "surrogate" in reason:
            continue  # counts the row and scores the others; see test_score.py
        message = refused(arguments)
        assert reason in message, name
        assert f"{path} line 9" in message, name


def test_a_binary_column_is_named_by_every_command(
    commands: Any, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"prompt": [b"a", b"b"], "response": ["c", "d"]}).to_parquet(path)
    for name, arguments in commands(str(path)).items():
        assert f"{path} row 1: column 'prompt' holds bytes" in refused(arguments), name


def test_system_text_and_roles_reach_the_model(frozen_dirs: tuple[str, str], tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is it ?"},
        {"system": "Answer as a pirate .", "prompt": "What is it ?"},
        {
            "prompt": [
                {"role": "system", "content": "Answer as a pirate ."},
                {"role": "user", "content": "What is it ?"},
            ]
        },
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
    ]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--temperature", "0", "--max_new_tokens", "12"]
    main(["generate", "--model", frozen_dirs[0], "--prompts", str(path), "--out", str(out), *settings])
    plain, system, messages, chat, ends_early = (json.loads(line) for line in out.read_text().splitlines())
    assert system["response"] == messages["response"] != plain["response"]
    assert (system["prompt"], system["system"]) == ("What is it ?", "Answer as a pirate .")
    assert chat["prompt"] == rows[3]["prompt"]
    assert isinstance(chat["response"], str)
    assert ends_early["prompt"] == "a"
    entries = read_entries(str(out), key="--responses", with_answers=True)
    assert [entry.turns for entry in entries] == [("What is it ?",)] * 3 + [("c",), ("a",)]


def test_rows_keep_their_system_text_whatever_their_order(tiny_model_dir: Path, tmp_path: Path) -> None:
    late = [{**row, "system": "Answer as a pirate ."} for row in GOOD]
    manifests = {}
    for name, rows in (("late", GOOD * 20 + late), ("early", late + GOOD * 20)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = [
            f"--data.demonstrations.{key}" for key in (f"source={path}", "subsample=null", "preset=prompt_response")
        ]
        sizes = ["--data.global_batch_size=56", "--data.micro_batch_size=56", "--trainer.max_epochs=1"]
        main(["fit", *overlays("sft", tiny_model_dir, tmp_path / name), *more, *sizes])
        manifests[name] = json.loads((tmp_path / name / "final" / "manifest.json").read_text())["data"]["splits"][
            "train"
        ]
    # Of the 160 plain rows 8 are distinct; a row that lost its system text would repeat one of them.
    assert [found["repeated_prompts"] for found in manifests.values()] == [8 * 20 - 8] * 2
    assert [found["kept"] for found in manifests.values()] == [168, 168]
