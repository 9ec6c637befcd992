from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch.utils.data import DataLoader

from dpr_lightning.callbacks.prediction_writer import PredictionWriter


class Answers(LightningModule):
    """Answers each number with a row that says it."""

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> list[dict[str, Any]]:
        return [{"row": int(number), "response": f'é "{number}"\n| x'} for number in batch]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def predict(run_dir: Path, trainer_in: Any, num_rows: int, *, callback: PredictionWriter) -> None:
    loader = DataLoader(torch.arange(num_rows), batch_size=2)  # type: ignore[arg-type]
    trainer_in(run_dir, callback).predict(Answers(), loader, return_predictions=False)


def test_one_line_per_row_in_order(tmp_path: Path, trainer_in: Any) -> None:
    predict(tmp_path / "new", trainer_in, 5, callback=PredictionWriter())
    rows = read(tmp_path / "new" / "predictions.jsonl")
    assert rows == [{"row": number, "response": f'é "{number}"\n| x'} for number in range(5)]


def test_a_second_prediction_replaces_the_first(tmp_path: Path, trainer_in: Any) -> None:
    for num_rows in (5, 2):
        predict(tmp_path, trainer_in, num_rows, callback=PredictionWriter("answers.jsonl"))
    assert [row["row"] for row in read(tmp_path / "answers.jsonl")] == [0, 1]


@pytest.mark.parametrize(
    ("world_size", "rank", "name"),
    [(1, 0, "predictions.jsonl"), (2, 0, "predictions.rank0.jsonl"), (2, 1, "predictions.rank1.jsonl")],
)
def test_each_rank_has_a_file_of_its_own(world_size: int, rank: int, name: str, tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(default_root_dir=str(tmp_path), world_size=world_size, global_rank=rank)
    assert PredictionWriter().path(trainer) == tmp_path / name
