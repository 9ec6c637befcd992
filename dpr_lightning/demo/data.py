"""The embedded tasks as files: demonstrations for training, and held-out tasks."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from dpr_lightning.data.preparation import DataPreparation
from dpr_lightning.demo.tasks import make_rows, write_jsonl


class EmbeddedTasks(DataPreparation):
    """Demonstrations that depend on the seed; validation and test tasks that do not.

    Args:
        num_demonstrations: Rows of ``train``.
        slip_share: Share of the demonstrations with a wrong result, as people's have: imitation alone has a ceiling
            there.
        num_validation: Rows of ``validation``.
        num_test: Rows of ``test``.
    """

    def __init__(
        self, num_demonstrations: int = 5120, slip_share: float = 0.15, num_validation: int = 200, num_test: int = 500
    ) -> None:
        self.num_demonstrations = num_demonstrations
        self.slip_share = slip_share
        self.num_held_out = {"validation": num_validation, "test": num_test}

    @override
    def __call__(self, directory: Path, seed: int) -> dict[str, Path]:
        paths = {split: directory / f"{split}.jsonl" for split in ("train", "validation", "test")}
        rows = make_rows(num_rows=self.num_demonstrations, seed=seed, split="train", slip_share=self.slip_share)
        write_jsonl(rows, paths["train"])
        for split in ("validation", "test"):
            rows = make_rows(num_rows=self.num_held_out[split], seed=0, split=split)
            write_jsonl(rows, paths[split])
        return paths
