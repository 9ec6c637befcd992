"""Runs parts as processes with time limits, and keeps every record that a part wrote. Standard library only."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Part

ROOT = Path(__file__).resolve().parents[2]

Record = dict[str, Any]
"""One line of a part's output; see :class:`benchmarks.gpu.worker.Context`."""

_TAIL_LINES = 40
"""Lines of a failed part's log that go into the results."""


@dataclass(slots=True)
class Outcome:
    """What became of one part."""

    part: Part
    status: str = "not run"
    """``ok``, ``failed``, ``out of time``, ``skipped: why`` or ``not run``."""
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    log_tail: str = ""
    """End of its log, if it ended by itself with an error."""

    @property
    def headline(self) -> str:
        """The part's most important figures."""
        return "; ".join(record["headline"] for record in self.records if "headline" in record)

    @property
    def has_failed(self) -> bool:
        """Whether the part ran and something in it failed."""
        return self.status in ("failed", "out of time")


def worker_environment(site: Path | None) -> dict[str, str]:
    """Return the environment of every part: this checkout and the wheels that were brought, and no network."""
    paths = [*([str(site)] if site is not None else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Parts that follow each other, and contenders that share the device, find unfragmented memory.
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }


class PartProcess:
    """The process of one part.

    Args:
        part: What to run.
        settings: See :class:`benchmarks.gpu.worker.Context`.
        environment: Of the process.
        work_dir: Where its settings and its log go.
        prepare: Run the part's preparation instead, at low priority.
    """

    def __init__(
        self,
        part: Part,
        settings: dict[str, Any],
        environment: dict[str, str],
        work_dir: Path,
        *,
        prepare: bool = False,
    ) -> None:
        stem = f"{part.name}-prepare" if prepare else part.name
        self.part = part
        self.log = work_dir / f"{stem}.log"
        path = work_dir / f"{stem}.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.worker",
            part.module,
            "prepare" if prepare else "run",
            str(path),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # A group of its own, so that whatever the part starts ends with it.
                start_new_session=True,
            )

    def wait(self, seconds: float, on_record: Callable[[Record], None]) -> str:
        """Hand on records until the process ends or ``seconds`` have passed; return the part's status."""
        deadline = time.monotonic() + seconds
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read_into, args=(lines,), daemon=True).start()
        skipped, has_failed = "", False
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                return "out of time"
            if not line:
                break
            record: Record = json.loads(line)
            skipped = record.get("skipped", skipped)
            has_failed = has_failed or "failure" in record
            on_record(record)
        try:
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            self.stop()
        if code != 0 or has_failed:
            return "failed"
        return f"skipped: {skipped}" if skipped else "ok"

    def _read_into(self, lines: queue.Queue[str]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.put(line)
        # End of the output.
        lines.put("")

    def stop(self) -> None:
        """End the process and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def log_tail(self) -> str:
        """Return the end of the log."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(line[:300] for line in lines[-_TAIL_LINES:])
