"""Runs an experiment's tasks: trained, measured, and skipped where that was done before."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import joblib

from dpr_lightning.analysis.experiment import EvaluationSpec, Task, command
from dpr_lightning.analysis.measure import measure, save_answers, steps_for, token_forwards
from dpr_lightning.data.preparation import DataPreparation
from dpr_lightning.manifest import environment, is_complete, read_manifest, read_run_record, write_directory


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task with all that a worker process needs."""

    task: Task
    teacher_dir: Path
    """The seed's SFT run: the task's own directory where the task is SFT."""
    variables: dict[str, str]
    """What ``{name}`` in settings stands for."""
    evaluation: EvaluationSpec
    """With its variables filled in."""
    measured_dir: Path
    """Where the measurement is written."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    job: Job
    was_done: bool
    """True where nothing was left to do."""
    seconds: float
    error: str | None
    """What went wrong, in one line."""


def run_all(jobs: Sequence[Job], *, num_workers: int) -> Iterator[Outcome]:
    """Run jobs that do not depend on each other, each in a process of its own, and yield outcomes as they come.

    Args:
        jobs: What to run.
        num_workers: Processes at a time; each uses one thread where there are several.
    """
    if num_workers == 1:
        yield from map(run_job, jobs)
        return
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(n_jobs=num_workers, return_as="generator_unordered")
        yield from parallel(joblib.delayed(run_job)(job) for job in jobs)


def run_job(job: Job) -> Outcome:
    """Train and measure, or whichever is not done; what fails is told in the outcome and never raised."""
    start = time.perf_counter()
    was_done = is_complete(job.measured_dir)
    error = None
    if not was_done:
        directory = job.task.directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Beside the run's directory: an unfinished one may have to be deleted.
        log = directory.parent / f"{directory.name}.log"
        try:
            with _output_to(log):
                try:
                    _train(job)
                    _measure(job)
                except Exception:
                    traceback.print_exc()
                    raise
        except Exception as raised:
            error = f"{' '.join(str(raised).split()) or type(raised).__name__} (whole output: {log})"
    return Outcome(job=job, was_done=was_done, seconds=time.perf_counter() - start, error=error)


def prepare(preparation: DataPreparation | None, directory: Path, seed: int) -> dict[str, str]:
    """Make a seed's data, unless it is there; return its files by variable."""
    if preparation is None:
        return {}
    if not is_complete(directory):
        files: dict[str, str] = {}

        def write(partial: Path) -> None:
            found = preparation(partial, seed)
            files.update({name: str(path.relative_to(partial)) for name, path in found.items()})

        write_directory(directory, write, {"kind": "data", "seed": seed, "files": files})
    return {name: str(directory / file) for name, file in read_manifest(directory)["files"].items()}


def _train(job: Job) -> None:
    from dpr_lightning.application import command_line
    from dpr_lightning.checkpoints import resumable_in
    from dpr_lightning.run_directory import CHECKPOINTS

    directory = job.task.directory
    record = directory / "run.json"
    if record.exists() and read_run_record(record).get("status") == "finished" and is_complete(directory / "final"):
        return
    arguments = command(job.task, job.variables)
    if job.task.same_compute_as is not None:
        forwards = token_forwards(read_run_record(job.task.same_compute_as / "run.json"))
        arguments.append(f"--trainer.max_steps={steps_for(forwards, read_run_record(job.teacher_dir / 'run.json'))}")
    if directory.exists() and not resumable_in(directory / CHECKPOINTS):
        # What a killed run left before its first checkpoint; its name tells its settings.
        shutil.rmtree(directory)
    command_line(arguments)
    status = read_run_record(record).get("status")
    if status != "finished":
        raise RuntimeError(f"the run ended as '{status}'")


def _measure(job: Job) -> None:
    start = time.perf_counter()
    measured = measure(job.task.directory, job.teacher_dir, job.evaluation)
    run = read_run_record(job.task.directory / "run.json")
    write_directory(
        job.measured_dir,
        lambda partial: save_answers(partial / "answers.npz", measured.answers),
        {
            "kind": "measurement",
            "name": job.task.name,
            "seed": job.task.seed,
            "values": job.task.values,
            "evaluation": {
                field.name: getattr(job.evaluation, field.name)
                for field in dataclasses.fields(job.evaluation)
                if field.name != "verifier"
            },
            "teacher_kl": measured.teacher_kl,
            "reward_sum": measured.reward_sum,
            "length_correlation": measured.length_correlation,
            "positions": measured.positions,
            "tokens": run["tokens"],
            "optimizer_steps": run["optimizer_steps"],
            "started": run["started"],
            "ended": run["ended"],
            "measure_seconds": time.perf_counter() - start,
            "environment": environment(),
        },
    )


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send everything that this process prints, loggers that hold the old streams included, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    with path.open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            yield
        finally:
            for descriptor, old in zip((1, 2), saved, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
