"""``dpr-lightning plan`` on the runs of the part ``training``, against the memory that these took."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case, arguments, cases, write_inputs
from benchmarks.gpu.training import PEAKS
from benchmarks.gpu.worker import Context


def prepare(context: Context) -> None:
    """Plan every run, on as many cores as can be spared."""
    folder = context.scratch_dir / "plan"
    wanted = [case for case in _planned(context) if not _report_of(context, case).exists()]
    for case in wanted:
        write_inputs(context, case, folder)
    jobs = [(arguments(context, case, folder), case, _report_of(context, case)) for case in wanted]
    # Children initialise CUDA, which they could not after a fork from a process that had.
    num_processes = max(1, min(len(jobs), (os.cpu_count() or 1) // 2))
    if num_processes == 1:
        for job in jobs:
            _plan(*job)
        return
    import dpr_lightning.planning.command  # noqa: F401  once, before the fork

    with ProcessPoolExecutor(num_processes, mp_context=get_context("fork")) as pool:
        for future in [pool.submit(_plan, *job) for job in jobs]:
            future.result()


def _planned(context: Context) -> list[Case]:
    """Return the runs that are planned: all of them, or in a rehearsal one of each kind, as each takes seconds."""
    return cases(context)[-2:] if context.rehearse else cases(context)


def _report_of(context: Context, case: Case) -> Path:
    return context.scratch_dir / f"plan-{case.stem}.json"


def _plan(args: list[str], case: Case, out: Path) -> None:
    from dpr_lightning.planning.command import main

    partial = out.with_suffix(".partial")
    lengths = [f"--prompt_tokens={case.prompt_tokens}", f"--response_tokens={case.response_tokens}"]
    try:
        main([*args, *lengths, f"--out={partial}"])
    except SystemExit as error:
        # 1: the run does not fit, which the report says too.
        if error.code != 1:
            raise
    partial.replace(out)


def run(context: Context) -> None:
    """Compare planned with measured peaks, phase by phase."""
    peaks_file = context.scratch_dir / PEAKS
    if not peaks_file.exists():
        context.skip("no measured peaks: run the part 'training' in the same command")
        return
    peaks: dict[str, dict[str, int]] = json.loads(peaks_file.read_text(encoding="utf-8"))
    with context.step("plan"):
        prepare(context)
    ratios: list[float] = []
    for case in _planned(context):
        if case.stem not in peaks or not _report_of(context, case).exists():
            context.note(f"{case.name}: not measured, or not planned.")
            continue
        report: dict[str, Any] = json.loads(_report_of(context, case).read_text(encoding="utf-8"))
        for phase, measured in peaks[case.stem].items():
            planned = report["phases"][phase]["peak_bytes"]
            ratio = planned / measured
            ratios.append(ratio)
            context.row(
                "Peak memory of tensors",
                **{"run": case.name, "phase": phase, "planned GiB": planned / 2**30, "measured GiB": measured / 2**30},
                **{"planned / measured": ratio, "planned to fit": report["fits"]},
            )
    if ratios:
        context.headline(f"planned / measured {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} phases")
