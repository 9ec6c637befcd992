"""Parts of ``make gpu`` that fail in every way that a part can."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any


class Slow:
    """Writes a row, starts a process of its own, and never ends."""

    @staticmethod
    def run(context: Any) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        sys.stderr.write("still at work\n")
        sys.stderr.flush()
        context.row("Pids", part=os.getpid(), child=child.pid)
        time.sleep(600)


def run(context: Any) -> None:
    """Do what the seed says."""
    kinds = [_ok, Slow.run, _crash, _fails_in_a_step, _skips]
    kinds[context.seed](context)


def _ok(context: Any) -> None:
    print("what libraries print is no record")
    context.row("Table", name="one", value=1.5)
    context.headline("all is well")


def _crash(context: Any) -> None:
    context.row("Table", name="before")
    sys.stderr.write("a library's last words\n")
    sys.stderr.flush()
    os._exit(3)


def _fails_in_a_step(context: Any) -> None:
    with context.step("first"):
        raise ValueError("no luck")
    with context.step("second"):
        raise SystemExit(2)
    context.row("Table", name="after")


def _skips(context: Any) -> None:
    context.skip("nothing to do")
