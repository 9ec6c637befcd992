"""``dpr-lightning sweep``: an experiment's runs, skipped where complete, as tidy tables, a summary and figures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from dpr_lightning.analysis.experiment import Experiment, Task, command, data_directory, plan, read_experiment
from dpr_lightning.analysis.results import collect, summarize, to_markdown
from dpr_lightning.analysis.runner import Job, prepare, run_all
from dpr_lightning.errors import UserError
from dpr_lightning.main import packaged_configs
from dpr_lightning.terminal import Table, headline, make_console


def main(args: Sequence[str] | None = None) -> None:
    """Run experiments. Runs are shared between them and skipped where complete, so a killed sweep goes on."""
    parser = argparse.ArgumentParser(prog="dpr-lightning sweep", description=main.__doc__)
    parser.add_argument("experiments", nargs="+", metavar="FILE", help="such as configs/experiments/table1.yaml")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/experiments"), help="where everything is written")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each in one thread if more than 1")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run none")
    parsed = parser.parse_args(args)
    if parsed.workers < 1:
        raise UserError(f"--workers: found {parsed.workers}; give a whole number of at least 1")
    paths = [Path(path) for path in packaged_configs(parsed.experiments)]
    # All are read first: a mistake in the last one is told before the first has run for an hour.
    experiments = [read_experiment(path) for path in paths]
    console = make_console(200)
    with contextlib.nullcontext() if parsed.dry_run else _alone_in(parsed.run_dir):
        for path, experiment in zip(paths, experiments, strict=True):
            sweep(
                experiment,
                path.stem,
                parsed.run_dir,
                console=console,
                workers=parsed.workers,
                seeds=parsed.seeds,
                dry_run=parsed.dry_run,
            )


def sweep(
    experiment: Experiment,
    name: str,
    root: Path,
    *,
    console: Console,
    workers: int = 1,
    seeds: Sequence[int] | None = None,
    dry_run: bool = False,
) -> None:
    """Run one experiment and write its tables and figures to ``root / name``.

    Raises:
        UserError: Some runs failed; the tables and figures hold all others.
    """
    waves = plan(experiment, root, seeds=seeds)
    all_jobs: list[Job] = []
    failed: dict[Path, str] = {}
    console.rule(headline(f"{experiment.title}: {sum(map(len, waves.values()))} runs"))
    for tasks in waves.values():
        jobs = [_job(experiment, task, waves["teacher"], root, write=not dry_run) for task in tasks]
        all_jobs += jobs
        if dry_run:
            for job in jobs:
                print("dpr-lightning", shlex.join(command(job.task, job.variables)))
            continue
        # What stands on a failed run cannot be run.
        ready = [job for job in jobs if not {job.teacher_dir, job.task.same_compute_as} & set(failed)]
        failed |= {
            job.task.directory: f"{job.task.label}, seed {job.task.seed}: the run it stands on failed"
            for job in jobs
            if job not in ready
        }
        for outcome in run_all(ready, num_workers=workers):
            task = outcome.job.task
            how = "done before" if outcome.was_done else f"{outcome.seconds:.0f} s"
            if outcome.error is not None:
                failed[task.directory] = f"{task.label}, seed {task.seed}: {outcome.error}"
                how = f"failed: {outcome.error}"
            console.print(f"{task.label}, seed {task.seed}: {how}", highlight=False)
    if dry_run:
        return
    _write(experiment, name, all_jobs, root / name, console)
    if failed:
        # Runs mostly fail for one reason: the first in full, the others as it was printed.
        raise UserError(
            f"{name}: {len(failed)} of {len(all_jobs)} runs failed; the same command runs them again. The first was "
            f"{next(iter(failed.values()))}"
        )


@contextlib.contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    """Keep other sweeps out of ``root``: two would train the same run into one directory.

    Raises:
        UserError: One is there.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(root / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(
            f"--run_dir: another sweep is running in '{root}'; wait for it, or choose another directory"
        ) from None


def _job(experiment: Experiment, task: Task, teachers: Sequence[Task], root: Path, *, write: bool) -> Job:
    (teacher,) = (found for found in teachers if found.seed == task.seed)
    directory = data_directory(experiment, root, task.seed)
    files = (
        prepare(experiment.prepare, directory, task.seed)
        if write
        else {name: str(directory / f"{name}") for name in ("train", "validation", "test")}
    )
    variables = {"seed": str(task.seed), "teacher": str(teacher.directory), **files}
    try:
        prompts = experiment.evaluation.prompts.format(**variables)
    except KeyError as error:
        raise UserError(
            f"evaluation.prompts: found '{experiment.evaluation.prompts}', whose variable {error} is not known; known "
            f"are {', '.join(sorted(variables))}"
        ) from error
    evaluation = dataclasses.replace(experiment.evaluation, prompts=prompts)
    settings: dict[str, Any] = {**vars(evaluation), "verifier": type(evaluation.verifier).__qualname__}
    settings.pop("prompts")
    described = json.dumps([experiment.evaluation.prompts, settings], sort_keys=True)
    fingerprint = hashlib.sha256(described.encode()).hexdigest()[:10]
    return Job(
        task=task,
        teacher_dir=teacher.directory,
        variables=variables,
        evaluation=evaluation,
        measured_dir=task.directory.parent / f"{task.directory.name}-measured-{fingerprint}",
    )


def _write(experiment: Experiment, name: str, jobs: Sequence[Job], out: Path, console: Console) -> None:
    """Write ``results.csv``, ``positions.csv``, ``curves.csv``, ``summary.md`` and the figures."""
    tables = collect(jobs)
    if tables.results.empty:
        return
    out.mkdir(parents=True, exist_ok=True)
    for stem in ("results", "positions", "curves"):
        getattr(tables, stem).to_csv(out / f"{stem}.csv", index=False, float_format="%.6g")
    summary = summarize(tables)
    (out / "summary.md").write_text(to_markdown(summary))
    shown = Table(title=f"{experiment.title}: accuracy by temperature, paired differences to SFT with 95% intervals")
    for column in summary.columns:
        shown.add_column(column, justify="left" if column == "method" else "right")
    for row in summary.itertuples(index=False):
        shown.add_row(*map(str, row))
    console.print(shown)
    for figure in experiment.figures:
        try:
            console.print(f"figure: {figure.save(tables, out)}", highlight=False)
        except UserError as error:
            console.print(f"figure {figure.name} left out: {error}", highlight=False)
    console.print(f"tables: {out}", highlight=False)
