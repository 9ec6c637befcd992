"""Keeps what ``predict`` answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class PredictionWriter(BasePredictionWriter):
    """Writes the answers of ``predict`` to ``<run_dir>/predictions.jsonl``, one JSON object a line.

    With several ranks each writes ``predictions.rank<N>.jsonl``; rows carry their number in the source file.

    Args:
        filename: Name of the file in the run's directory; it is replaced.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename

    def path(self, trainer: Trainer) -> Path:
        """Return where this rank writes."""
        path = Path(trainer.default_root_dir) / self.filename
        return path if trainer.world_size == 1 else path.with_suffix(f".rank{trainer.global_rank}{path.suffix}")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path(trainer).parent.mkdir(parents=True, exist_ok=True)
        self.path(trainer).write_text("")

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self.path(trainer).open("a") as file:
            for row in prediction:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"Predictions: {self.path(trainer)}")
