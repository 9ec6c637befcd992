from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dpr_lightning.callbacks.progress import Progress
from dpr_lightning.errors import UserError


def test_a_log_file_gets_a_few_lines(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_in(
        tmp_path, Progress(num_lines=4), max_epochs=2, accumulate_grad_batches=2, enable_progress_bar=True
    )
    trainer.fit(toy(), datamodule=toy_data(20))
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    # N = 20: a line each 5 steps.
    assert [line.split(",")[0] for line in lines] == [
        "step 5/20 (25%)",
        "step 10/20 (50%)",
        "step 15/20 (75%)",
        "step 20/20 (100%)",
    ]
    assert all(re.search(r", \d\d:\d\d gone, \d\d:\d\d left, loss -?[\d.]+", line) for line in lines)
    assert "\r" not in output


def test_a_resumed_run_goes_on_counting(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        trainer_in(tmp_path, kill_at(7), checkpoint_every=6, max_epochs=1).fit(toy(), datamodule=toy_data(10))
    trainer_in(tmp_path, Progress(num_lines=2), max_epochs=1, enable_progress_bar=True).fit(
        toy(), datamodule=toy_data(10), ckpt_path=str(tmp_path / "checkpoints" / "epoch=0-step=6.ckpt")
    )
    lines = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines == ["step 8/10 (80%)", "step 10/10 (100%)"]


def test_a_terminal_gets_one_bar_over_the_whole_run(
    tmp_path: Path,
    toy: Any,
    toy_data: Any,
    trainer_in: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress()
    trainer_in(tmp_path, progress, max_epochs=3, accumulate_grad_batches=2, enable_progress_bar=True).fit(
        toy(), datamodule=toy_data(4)
    )
    assert (progress.train_progress_bar.n, progress.train_progress_bar.total) == (6, 6)
    output = capsys.readouterr().out
    assert "Epoch 2: 100%" in output
    assert "6/6" in output
    assert "step 6/6 (" not in output


def test_a_rollout_has_a_bar_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Progress().rollout_bar(4, "Rollout 7") as advance:
        advance(1)
        advance(3)
    assert "Rollout 7" in capsys.readouterr().out


def test_a_rollout_is_silent_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress().rollout_bar(4) as advance:
        advance(4)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_negative_number_of_lines_is_refused() -> None:
    with pytest.raises(UserError, match=r"Progress\.num_lines: found -1"):
        Progress(num_lines=-1)
