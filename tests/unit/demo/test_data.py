from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpr_lightning.demo.data import EmbeddedTasks
from dpr_lightning.demo.verifier import TaskVerifier


def made(directory: Path, seed: int, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    directory.mkdir()
    paths = EmbeddedTasks(num_validation=8, num_test=12, **settings)(directory, seed)
    return {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in paths.items()}


def test_the_seed_changes_demonstrations_and_no_held_out_task(tmp_path: Path) -> None:
    zero, again, one = (made(tmp_path / str(i), seed, num_demonstrations=40) for i, seed in enumerate((0, 0, 1)))
    assert zero == again
    assert zero["train"] != one["train"]
    assert zero["validation"] == one["validation"]
    assert zero["test"] == one["test"]
    assert {split: len(rows) for split, rows in zero.items()} == {"train": 40, "validation": 8, "test": 12}


def test_no_held_out_prompt_is_demonstrated(tmp_path: Path) -> None:
    rows = made(tmp_path / "rows", 0, num_demonstrations=400)
    prompts = {split: {row["prompt"] for row in found} for split, found in rows.items()}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]


def test_slips_are_in_demonstrations_only(tmp_path: Path) -> None:
    rows = made(tmp_path / "rows", 0, num_demonstrations=400, slip_share=0.25)
    verify = TaskVerifier()
    wrong = {split: sum(not verify(row, row["response"]) for row in found) for split, found in rows.items()}
    assert wrong["validation"] == wrong["test"] == 0
    # 100 expected; five standard deviations are 43.
    assert 57 < wrong["train"] < 143
    clean = made(tmp_path / "clean", 0, num_demonstrations=400, slip_share=0.0)["train"]
    assert all(verify(row, row["response"]) for row in clean)
