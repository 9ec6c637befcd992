"""One contender of one workload: ``python -m benchmarks.worker WORKLOAD CONTENDER SETTINGS.json``.

The modules of workloads import their libraries inside the contenders' functions: each runs in its own environment.
"""

from __future__ import annotations

import importlib
import sys

from benchmarks import gate


def main() -> None:
    """Run until the driver says stop."""
    workload, contender, path = sys.argv[1:4]
    settings = gate.settings_of(path)
    gate.current = gate.Gate(
        rounds_of=settings.get("rounds_of", 1),
        warm_up=settings.get("warm_up", 1),
        is_cuda=settings.get("device") == "cuda",
    )
    # A library may read the arguments.
    sys.argv[1:] = []
    importlib.import_module(f"benchmarks.{workload}").CONTENDERS[contender](gate.current, settings)


if __name__ == "__main__":
    main()
