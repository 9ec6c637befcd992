"""The worker's end of the pipe: it waits for each round and answers with one JSON line.

Nothing but these lines leaves a worker by its standard output; whatever libraries print goes to its log.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_GIB = 2**30


class Gate:
    """Stops a contender between rounds and measures each.

    Args:
        rounds_of: Pieces of work (optimizer steps, iterations) in one round.
        warm_up: Pieces of work before the first round, which are not measured.
        is_cuda: The work is done by a CUDA device, and its memory is what counts.
    """

    def __init__(self, *, rounds_of: int = 1, warm_up: int = 1, is_cuda: bool = False) -> None:
        self.rounds_of = rounds_of
        self.warm_up = warm_up
        self.is_cuda = is_cuda
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._num_pieces = -warm_up
        self._counts: dict[str, float] = {}
        self._start = (0.0, 0.0)

    def add(self, **counts: float) -> None:
        """Add to the figures of the running round, such as its tokens."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def piece_done(self) -> None:
        """End one piece of work; between rounds this blocks until the next is asked for, and exits when none is."""
        if self.is_cuda:
            _cuda().synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        self._num_pieces += 1
        if self._num_pieces == self.rounds_of:
            peak = _cuda().max_memory_allocated() if self.is_cuda else peak_bytes()
            self._say(wall=wall - self._start[0], cpu=cpu - self._start[1], peak_gib=peak / _GIB)
            self._wait()
        elif self._num_pieces == 0:
            self._is_ready()

    def serve(self, work: Callable[[int], None]) -> None:
        """Do ``work(number)`` for each piece, warm-up first; returns never."""
        if self.warm_up == 0:
            self._is_ready()
        number = 0
        while True:
            work(number)
            number += 1
            self.piece_done()

    def _is_ready(self) -> None:
        self._say(cpu=time.process_time(), uptime=uptime())
        self._wait()

    def _wait(self) -> None:
        # What allocators keep would stand in the memory of those whose turn it is.
        ctypes.CDLL(None).malloc_trim(0)
        if self.is_cuda:
            _cuda().empty_cache()
        if not sys.stdin.readline().startswith("round"):
            # Trainers cannot be left from inside in a better way; nothing of theirs is wanted.
            os._exit(0)
        self._num_pieces = 0
        self._counts = {}
        self._start = (time.perf_counter(), time.process_time())

    def _say(self, **facts: float) -> None:
        self._out.write(json.dumps(facts | self._counts) + "\n")
        self._out.flush()


def _cuda() -> Any:
    import torch

    return torch.cuda


current: Gate | None = None
"""The process's gate, for callbacks that a trainer makes by itself."""


def running() -> Gate:
    """Return the process's gate."""
    assert current is not None, "no benchmark is running in this process"
    return current


def peak_bytes() -> int:
    """Return the most memory that was ever resident in this process; not what getrusage has, its parent's too."""
    return resident("VmHWM")


def resident(name: str) -> int:
    """Return bytes of a line of /proc/self/status: ``VmRSS`` resident now, ``VmHWM`` at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def uptime() -> float:
    """Return seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def settings_of(path: str) -> dict[str, Any]:
    """Return a worker's settings."""
    settings: dict[str, Any] = json.loads(Path(path).read_text())
    return settings
