"""Runs parts as processes with time limits, and keeps every record that a part wrote. Standard library only."""

from __future__ import annotations

import contextlib
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
    """Result of one part."""

    part: Part
    status: str = "not run"
    """``ok``, ``failed``, ``out of time``, ``interrupted``, ``skipped: why`` or ``not run``."""
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    log_tail: str = ""
    """End of its log, if it was stopped or failed without a traceback of its own."""

    @property
    def headline(self) -> str:
        """The part's most important figures."""
        return "; ".join(record["headline"] for record in self.records if "headline" in record)

    @property
    def has_failed(self) -> bool:
        """Whether the part ran and something in it failed."""
        return self.status in ("failed", "out of time")


def worker_environment(site: Path | None) -> dict[str, str]:
    """Return the environment of every part: this checkout and the installed wheels on the path, no network."""
    paths = [*([str(site)] if site is not None else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
    defaults = {
        # One thread a process is faster than several that wait for each other.
        "OMP_NUM_THREADS": "1",
        # Contenders that share the device free memory in pieces of any size.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    return (
        defaults
        | dict(os.environ)
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )


class PartProcess:
    """The process of one part.

    Args:
        part: What to run.
        settings: See :class:`benchmarks.gpu.worker.Context`.
        environment: Environment of the process.
        work_dir: Folder of its settings and its log.
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
        function = "prepare" if prepare else "run"
        self.part = part
        self.log = work_dir / f"{part.name}-{function}.log"
        path = work_dir / f"{part.name}-{function}.json"
        path.write_text(json.dumps(settings | {"parent": os.getpid()}), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.gpu.worker", part.module, function, str(path)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # A process group of its own: whatever the part starts ends with it.
                start_new_session=True,
            )

    def wait(self, seconds: float, on_record: Callable[[Record], None]) -> str:
        """Pass records on until the process ends or ``seconds`` have passed; return the part's status."""
        deadline = time.monotonic() + seconds
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read_into, args=(lines,), daemon=True).start()
        skipped, has_failed = "", False
        try:
            while line := lines.get(timeout=max(0.0, deadline - time.monotonic())):
                record = _parse(line)
                skipped = record.get("skipped", skipped)
                has_failed = has_failed or "failure" in record
                on_record(record)
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            return "out of time"
        finally:
            self._kill_group()
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
        """End the process and all that it started, if it still runs."""
        if self.process.poll() is None:
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log_tail(self) -> str:
        """Return the end of the log."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(line[:300] for line in lines[-_TAIL_LINES:])


def _parse(line: str) -> Record:
    try:
        record: Record = json.loads(line)
    except ValueError:
        # A process that was killed may leave half a line.
        return {"failure": "a record", "traceback": f"not JSON: {line[:200]!r}"}
    return record
