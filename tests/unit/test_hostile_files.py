"""Broken records of runs, and names and files that no command can use: one line each, at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.main import main
from dpr_lightning.manifest import read_run_record, recorded_run_id
from dpr_lightning.run_directory import where_to_go_on

RECORD: dict[str, Any] = {"kind": "run", "run_id": "r", "status": "running", "data": {"splits": {}}}
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
LONG = ["x" * 300, "/tmp/" + "x" * 300, "a/" * 3000]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str) -> str:
        start = time.perf_counter()
        with pytest.raises(SystemExit, match="2"):
            main([*args])
        assert time.perf_counter() - start < 60, "the hub was waited for"
        lines = [line for line in capsys.readouterr().err.splitlines() if "dpr-lightning: error:" in line]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "is no valid YAML"),
        ("- a\n- b\n", "holds a list, not a mapping"),
        ("text", "holds a str, not a mapping"),
        ("a: \x00", "is no valid YAML"),
        ("[" * 50_000, "is no valid YAML"),
        (BOMB, "its aliases expand to more than"),
    ],
)
def test_a_broken_config_of_a_run(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run_dir: '.*config.yaml'") as error:
        where_to_go_on(tmp_path, {"seed_everything": 0})
    assert problem in str(error.value)


def test_a_config_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no valid YAML"):
        where_to_go_on(tmp_path, {})


@pytest.mark.parametrize(
    "change",
    [
        {"data": []},
        {"data": "x"},
        {"data": {"splits": []}},
        {"data": {"splits": {"train": 3}}},
        {"status": {"a": 1}},
        {"run_id": 5},
        {"optimizer_steps": "ten"},
        {"optimizer_steps": True},
        {"tokens": [1]},
        {"environment": "x"},
    ],
)
def test_a_run_record_of_other_types(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RECORD | change))
    key = next(iter(change))
    for read in (lambda: read_run_record(path), lambda: recorded_run_id(tmp_path)):
        with pytest.raises(UserError, match=rf"run.json': '{key}.*' is .*, which no run records"):
            read()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '"x"', "[" * 100_000, '{"a": ' * 100_000, "9" * 5000, "NaN"]
)
def test_a_run_record_that_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"run.json' (is not JSON|holds a)"):
        where_to_go_on(tmp_path, {})


def test_a_run_record_of_an_older_or_younger_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for record in ({}, {"status": "finished"}, RECORD | {"something": "new", "data": None}):
        path.write_text(json.dumps(record))
        assert read_run_record(path) == record


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "{a: " * 50_000, "- " * 50_000])
def test_a_configuration_that_would_never_end(text: str, tmp_path: Path, refusal: Any) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    assert "bomb.yaml' is no valid YAML" in refusal("fit", "-c", str(tmp_path / "bomb.yaml"))
    assert "bomb.yaml" in refusal("sweep", str(tmp_path / "bomb.yaml"))


SFT = ["fit", "-c", "configs/base.yaml", "-c", "configs/recipe/sft.yaml", "-c", "configs/backbone/tiny.yaml"]


@pytest.mark.parametrize("long", LONG)
@pytest.mark.parametrize(
    "args",
    [
        ["fit", "-c"],
        [*SFT, "--run_dir"],
        [*SFT, "--ckpt_path"],
        [*SFT, "--data.demonstrations.source"],
        [*SFT, "--model.backbone.name_or_path"],
        ["generate", "--prompts", "p", "--out", "o.jsonl", "--model"],
        ["judge", "--from_judgments"],
        ["judge", "--baseline", "b", "--responses"],
        ["evaluate", "--benchmarks", "b.yaml", "--out", "e"],
        ["diagnose", "--teacher"],
        ["sweep"],
        ["plan", "-c"],
    ],
)
def test_names_past_the_limit_of_file_systems(
    args: list[str], long: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_text('{"prompt": "a"}\n')
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 20)
    if args[0] == "fit" and "source" not in args[-1] and len(args) > 2:
        args = ["fit", "--data.demonstrations.source", "d.jsonl", *args[1:]]
    assert len(refusal(*args, long)) < 8000
