"""Starts one process for each contender and plays rounds in turn, the order alternating between rounds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

Facts = dict[str, float]
"""What a worker said of one round: ``wall`` and ``cpu`` in seconds, ``peak_gib``, and its own counts."""


class ContenderError(RuntimeError):
    """A worker ended by itself; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Who runs what."""

    name: str
    """As the tables have it."""
    function: str
    """Key of the workload's ``CONTENDERS``."""
    environment: str = "ours"
    """Key of ``Bench.pythons``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Added to the workload's."""


@dataclass(slots=True)
class Result:
    """What became of one contender."""

    start: Facts = field(default_factory=dict)
    """``uptime`` and ``cpu`` when warm-up was over."""
    rounds: list[Facts] = field(default_factory=list)
    failure: str | None = None
    """Why it has no rounds, or no more."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every workload is given."""

    pythons: dict[str, Path]
    """Interpreter of each environment."""
    work_dir: Path
    """Models, data, logs and runs."""
    rounds: int
    threads: int
    seed: int
    small: bool
    """A tenth of the work: does it run at all?"""


class Worker:
    """One contender's process."""

    def __init__(self, bench: Bench, workload: str, contender: Contender, settings: dict[str, Any]) -> None:
        folder = bench.work_dir / "workers" / f"{workload}-{contender.name}".replace(" ", "_").replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        settings_path = folder / "settings.json"
        settings_path.write_text(json.dumps(settings | contender.settings | {"folder": str(folder)}))
        python = bench.pythons[contender.environment]
        if not python.exists():
            raise ContenderError(f"its environment is not set up: {python} is missing")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.worker", workload, contender.function, settings_path],
                cwd=ROOT,
                env=worker_environment(bench.threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def listen(self) -> Facts:
        """Return the worker's next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            status = self.process.returncode
            if status < 0:
                raise ContenderError(f"killed by signal {-status}: out of memory, where it is 9")
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise ContenderError(f"exit status {status}: {said[-1][:300] if said else 'nothing said'}")
        facts: Facts = json.loads(line)
        return facts

    def play(self) -> Facts:
        """Run one round."""
        assert self.process.stdin is not None
        # If it is gone, listen() says why.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        return self.listen()

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment that all contenders get."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def play(
    bench: Bench,
    workload: str,
    contenders: Sequence[Contender],
    settings: dict[str, Any],
    *,
    rounds: int | None = None,
    parallel_startup: bool = False,
) -> dict[str, Result]:
    """Return every contender's rounds; one that fails is left out of later rounds and says why.

    Args:
        bench: Environments, folders and sizes.
        workload: Module of this package.
        contenders: Ours first.
        settings: What all of them are told.
        rounds: In place of the bench's own number.
        parallel_startup: Contenders load and warm up at the same time.
    """
    results = {contender.name: Result() for contender in contenders}
    workers: dict[str, Worker] = {}
    try:
        # All are warm before the first is measured.
        for batch in [contenders] if parallel_startup else [[contender] for contender in contenders]:
            for contender in batch:
                try:
                    workers[contender.name] = Worker(bench, workload, contender, settings)
                except ContenderError as failure:
                    _drop(contender.name, failure, workers, results)
            for contender in batch:
                if contender.name not in workers:
                    continue
                try:
                    results[contender.name].start = workers[contender.name].listen()
                except ContenderError as failure:
                    _drop(contender.name, failure, workers, results)
        for number in range(bench.rounds if rounds is None else rounds):
            for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
                try:
                    facts = workers[name].play()
                except ContenderError as failure:
                    _drop(name, failure, workers, results)
                    continue
                results[name].rounds.append(facts)
                print(
                    f"{time.strftime('%H:%M:%S')} {workload}, round {number + 1}, {name}: "
                    + ", ".join(f"{key} {value:.4g}" for key, value in facts.items()),
                    flush=True,
                )
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def _drop(name: str, failure: ContenderError, workers: dict[str, Worker], results: dict[str, Result]) -> None:
    results[name].failure = str(failure)
    workers.pop(name, None)
    print(f"{name} did not run: {failure}", flush=True)
