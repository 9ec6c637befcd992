from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from dpr_lightning.callbacks import throughput
from dpr_lightning.callbacks.throughput import Throughput, peak_memory_bytes


def logged(run_dir: Path, key: str) -> list[tuple[int, float]]:
    header, *lines = (run_dir / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    return [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]


@pytest.fixture
def half_second_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by half a second whenever it is read."""
    ticks = itertools.count()

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return next(ticks) / 2

    monkeypatch.setattr(throughput, "time", Clock)


@pytest.mark.usefixtures("half_second_clock")
@pytest.mark.parametrize(("accumulate", "num_steps", "num_tokens"), [(1, 2, 9), (2, 1, 18)])
def test_costs_of_a_step(
    accumulate: int,
    num_steps: int,
    num_tokens: int,
    tmp_path: Path,
    toy: Any,
    toy_rollouts: Any,
    trainer_in: Any,
    experience_of: Any,
) -> None:
    # Two micro-batches of 3 + 6 = 9 tokens, 4 of them sampled; rollout took 2 s and scoring 1 s.
    experience = experience_of(["ab", "abc"], ["x", "yzz"], [0.0, 1.0], seconds={"rollout": 2.0, "score": 1.0})
    trainer = trainer_in(
        tmp_path,
        Throughput(),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=CSVLogger(tmp_path, name="", version=""),
    )
    trainer.fit(toy(), datamodule=toy_rollouts([experience]))
    steps = range(num_steps)
    # The clock is read twice a step: at its start and at its end.
    assert logged(tmp_path, "time/train") == [(step, 0.5) for step in steps]
    assert logged(tmp_path, "time/rollout") == [(step, 2.0 / num_steps) for step in steps]
    assert logged(tmp_path, "time/score") == [(step, 1.0 / num_steps) for step in steps]
    assert logged(tmp_path, "perf/rollout_tokens_per_second") == [(step, 2.0) for step in steps]
    assert logged(tmp_path, "perf/train_tokens_per_second") == [(step, num_tokens / 0.5) for step in steps]
    assert [step for step, _ in logged(tmp_path, "perf/peak_memory_gib")] == list(steps)


def test_fine_tuning_has_no_rollout_costs(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    trainer = trainer_in(
        tmp_path,
        Throughput(),
        max_epochs=1,
        accumulate_grad_batches=3,
        logger=CSVLogger(tmp_path, name="", version=""),
    )
    trainer.fit(toy(), datamodule=toy_data(7))
    # Micro-batches 1-3, 4-6 and 7 alone.
    assert [step for step, _ in logged(tmp_path, "time/train")] == [0, 1, 2]
    assert logged(tmp_path, "time/rollout") == []
    assert logged(tmp_path, "perf/train_tokens_per_second") == []


def test_peak_memory_is_the_high_water_mark_of_the_process() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux' /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_bytes(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)
