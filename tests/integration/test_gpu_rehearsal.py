"""``make gpu`` on a CPU at toy sizes: every part runs, and says what it would say of a GPU."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_the_rehearsal_runs_every_part(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--seconds", "560"]
    command += ["--output", str(output), "--work_dir", str(tmp_path / "work")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    page = output.read_text()
    assert done.returncode == 0, page
    parts = ("tests", "training", "trl", "sampling", "logprobs", "plan", "smollm2")
    for part in parts:
        assert f"| {part} | ok |" in page
    short = done.stdout[done.stdout.index("results:") :]
    assert [line.split()[0] for line in short.splitlines() if line.split() and line.split()[0] in parts] == list(parts)
    # Of each part, what a reader looks for first.
    for found in (
        "passed | failures",
        "| SFT, 8B, LoRA |",
        "| SFT, 1B, all weights | last micro-batch of a step |",
        "| DPR, 8B, LoRA | a decode step |",
        "| TRL SFTTrainer |",
        "| TRL RLOOTrainer |",
        "| continuous batching |",
        "| TRL, chunked |",
        "planned / measured",
        "| DPR |",
    ):
        assert found in page, found
    # CPU seconds, as other tests run beside it.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
