"""``dpr-lightning plan``: what a run of ``fit`` needs, from its files and flags alone."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dpr_lightning.errors import UserError
from dpr_lightning.manifest import atomic_write_json, environment, now
from dpr_lightning.planning.advice import Advice, advise
from dpr_lightning.planning.cost import Cost, find_cost
from dpr_lightning.planning.devices import GPUS, Device, attached_gpu, this_cpu
from dpr_lightning.planning.phases import ORDER, Phase, PhaseName, Planner
from dpr_lightning.planning.settings import PlannedRun, read_run
from dpr_lightning.planning.sizes import Given, find_sizes
from dpr_lightning.terminal import Table, make_console

_GIB = 2**30
_EPILOG = (
    "All other arguments are those of fit, and mean the same. Exit status: 0 it fits, 1 it does not, 2 bad input. "
    "docs/plan.md says what is simulated and what is assumed."
)
_SETTING = {
    "sft": "data.micro_batch_size",
    "training": "data.micro_batch_size",
    "rollout": "data.sampling.batch_size",
    "scoring": "model.score_micro_batch_size",
}
"""What sets the rows of a phase's forward."""


def main(args: Sequence[str] | None = None) -> None:
    """Say what a run of fit needs on each device: memory, time, and whether it fits. No weights are read."""
    parser = argparse.ArgumentParser(
        prog="dpr-lightning plan", description=main.__doc__, epilog=_EPILOG, allow_abbrev=False, usage=_USAGE
    )
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    group = parser.add_argument_group("device; what is attached, or this machine's CPU, if left out")
    group.add_argument("--device", choices=sorted(GPUS), help="a GPU of the table, in place of the one attached")
    group.add_argument("--gpu_memory", type=float, help="GiB of one device")
    group.add_argument("--tflops", type=float, help="peak of matrix products of 16 bits")
    group.add_argument("--bandwidth", type=float, help="GB/s of its memory")
    group.add_argument("--efficiency", type=float, help="share of both that an operation reaches")
    group = parser.add_argument_group("data; from local files or the limits of the configuration if left out")
    group.add_argument("--num_rows", type=int, help="training rows")
    group.add_argument("--prompt_tokens", type=int, help="longest prompt")
    group.add_argument("--response_tokens", type=int, help="longest response")
    group.add_argument("--mean_prompt_tokens", type=float)
    group.add_argument("--mean_response_tokens", type=float)
    parsed, rest = parser.parse_known_args(args)
    _check(parsed)
    run = read_run(rest)
    console = make_console(132)
    if not plan(run, parsed, console):
        raise SystemExit(1)


_USAGE = "dpr-lightning plan -c FILE ... [--KEY VALUE ...] [--device NAME] [--gpu_memory GIB] [--out FILE]"


def _check(parsed: argparse.Namespace) -> None:
    for name, value in vars(parsed).items():
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"--{name}: found {value}; give more than 0")
    if parsed.efficiency is not None and parsed.efficiency > 1:
        raise UserError(f"--efficiency: found {parsed.efficiency}; give a share of at most 1")


def find_device(run: PlannedRun, parsed: argparse.Namespace) -> Device:
    """Return one device of a run: the one named, attached or assumed, with what the flags change of it."""
    if not run.is_cuda and parsed.device is None:
        device = this_cpu(run.parallel.devices_per_node)
    elif parsed.device is not None:
        device = GPUS[parsed.device]
    else:
        device = attached_gpu() or GPUS["H100-80"]
    changes = {
        "memory": parsed.gpu_memory,
        "half_tflops": parsed.tflops,
        "bandwidth": parsed.bandwidth,
        "efficiency": parsed.efficiency,
    }
    return dataclasses.replace(device, **{name: value for name, value in changes.items() if value is not None})


def plan(run: PlannedRun, parsed: argparse.Namespace, console: Console) -> bool:
    """Print the plan of a run, write it where asked, and return whether the run fits."""
    device = find_device(run, parsed)
    sizes = find_sizes(
        run,
        Given(
            num_rows=parsed.num_rows,
            longest_prompt=parsed.prompt_tokens,
            longest_response=parsed.response_tokens,
            mean_prompt=parsed.mean_prompt_tokens,
            mean_response=parsed.mean_response_tokens,
        ),
    )
    planner = Planner(run, sizes, device)
    found = {name: planner.plan(name) for name in planner.phases}
    largest = {name: planner.largest_rows(name) for name in planner.phases}
    micro = _largest_micro_batch(planner, largest["training"])
    cost = find_cost(planner)
    fits = all(phase.peak <= device.usable for name, phase in found.items() if name != "sft")
    advices = [] if fits else advise(planner)
    assumptions = [*_assumptions(run, device, parsed), *run.assumptions, *sizes.notes]
    _print(console, planner, found, largest, micro, cost, advices, assumptions)
    if parsed.out is not None:
        report = _report(planner, found, largest, micro, cost, advices, assumptions, fits)
        atomic_write_json(parsed.out, report)
    return fits


def _largest_micro_batch(planner: Planner, rows: int) -> int:
    """Return the largest ``data.micro_batch_size`` of at most ``rows`` sequences that divides the optimizer step."""
    data: Any = planner.run.data
    per_device = data.global_batch_size // planner.run.parallel.num_devices
    per_unit = planner.rows("training") // int(data.micro_batch_size)
    sizes = [size for size in range(1, rows // per_unit + 1) if per_device % size == 0]
    return max(sizes, default=0)


def _assumptions(run: PlannedRun, device: Device, parsed: argparse.Namespace) -> list[str]:
    source = "assumed" if run.is_cuda and parsed.device is None and not torch.cuda.is_available() else "taken"
    lines = [
        f"device {device.name} ({source}): {device.memory:.1f} GiB, of which {device.reserve:.1f} are not for tensors "
        f"and {device.fragmentation:.0%} of the rest is lost between them",
        f"speed: {device.half_tflops:.4g} TFLOP/s at 16 bits, {device.single_tflops:.4g} at 32, "
        f"{device.bandwidth:.4g} GB/s, of which operations reach {device.efficiency:.0%}; "
        f"{device.launch_seconds * 1e6:.0f} us to start one",
        f"the model's shapes are from {run.architecture}",
    ]
    if run.parallel.num_devices > 1:
        lines.append("communication between devices takes no time")
    if run.parallel.strategy == "sharded":
        lines.append(
            "sharded: weights, gradients and optimizer states evenly; two blocks and what is in none are whole"
        )
    return lines


def _print(
    console: Console,
    planner: Planner,
    found: dict[PhaseName, Phase],
    largest: dict[PhaseName, int],
    micro: int,
    cost: Cost,
    advices: list[Advice],
    assumptions: list[str],
) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    run, device, model = planner.run, planner.device, planner.model
    parallel = run.parallel
    say(
        f"{type(run.module).__name__} of {model.class_name}: {model.num_parameters / 1e6:,.1f}M parameters, "
        f"{model.num_trained / 1e6:,.1f}M trained; {run.policies.precision}; {parallel.num_devices} "
        f"{'x ' + device.name if run.is_cuda else 'process(es)'} ({parallel.strategy})"
    )
    table = Table(title="GiB on one device, at the longest batch")
    table.add_column("part")
    for name in found:
        table.add_column(_title(run, name), justify="right")
    for part in ORDER:
        if any(part in phase.parts for phase in found.values()):
            values = [phase.parts.get(part) for phase in found.values()]
            table.add_row(part, *("" if value is None else f"{value / _GIB:.2f}" for value in values))
    table.add_section()
    table.add_row("peak", *(f"{phase.peak / _GIB:.2f}" for phase in found.values()))
    table.add_row("where", *(phase.stage.removeprefix("rollout: ") for phase in found.values()))
    table.add_row("sequences of a forward", *(str(phase.rows) for phase in found.values()))
    more = {name: rows == planner.searched_rows(name) < planner.most_rows(name) for name, rows in largest.items()}
    table.add_row("most that fit", *(f"{rows} or more" if more[name] else str(rows) for name, rows in largest.items()))
    table.add_row("usable", *(f"{device.usable / _GIB:.2f}" for _ in found))
    console.print(table)
    if run.is_cuda and parallel.strategy != "sharded":
        say(
            f"host: {planner.host_bytes() / _GIB:.1f} GiB on each node while its {parallel.devices_per_node} "
            "process(es) load"
        )
    say(f"largest data.micro_batch_size that fits and divides data.global_batch_size: {micro}")
    _print_cost(say, run, cost)
    for line in assumptions:
        say(f"  {line}")
    worst = max((phase for name, phase in found.items() if name != "sft"), key=lambda phase: phase.peak)
    if worst.peak <= device.usable:
        say(f"fits: {worst.peak / _GIB:.1f} of {device.usable / _GIB:.1f} GiB")
        return
    say(
        f"does not fit: {_title(run, worst.name)} needs {worst.peak / _GIB:.1f} GiB of {device.usable / _GIB:.1f}, "
        f"most of it {_most(worst)}; try:"
    )
    for advice in advices:
        verdict = "fits" if advice.fits else "not enough"
        say(f"  {advice.change}: {advice.peak / _GIB:.1f} GiB, {verdict}")


def _print_cost(say: Any, run: PlannedRun, cost: Cost) -> None:
    step = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in cost.seconds_per_step.items())
    say(
        f"an optimizer step: {cost.tokens_per_step:,.0f} tokens, {cost.flops_per_step:.3g} FLOPs, about "
        f"{cost.step_seconds:.3g} s ({step})"
    )
    if cost.steps_per_epoch is None or cost.epoch_seconds is None:
        say("an epoch: unknown, as the number of training rows is; give --num_rows")
        return
    line = f"an epoch: {cost.steps_per_epoch} optimizer steps, about {_duration(cost.epoch_seconds)}"
    if cost.run_seconds is not None and cost.num_steps is not None:
        line += f"; the run: {cost.num_steps:,} steps, about {_duration(cost.run_seconds)}"
    say(line)


def _title(run: PlannedRun, name: PhaseName) -> str:
    if name == "sft":
        return "SFT of its teacher"
    method = type(run.module).__name__.removesuffix("Module")
    return f"{method} training" if name == "training" else name


def _most(phase: Phase) -> str:
    return " and ".join(sorted(phase.parts, key=lambda part: -phase.parts[part])[:2])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _report(
    planner: Planner,
    found: dict[PhaseName, Phase],
    largest: dict[PhaseName, int],
    micro: int,
    cost: Cost,
    advices: list[Advice],
    assumptions: list[str],
    fits: bool,
) -> dict[str, Any]:
    run = planner.run
    phases = {
        name: {
            "peak_bytes": round(phase.peak),
            "stage": phase.stage,
            "rows": phase.rows,
            "largest_rows": largest[name],
            "rows_set_by": _SETTING[name],
            "parts_bytes": {part: round(value) for part, value in phase.parts.items()},
        }
        for name, phase in found.items()
    }
    return {
        "kind": "plan",
        "fits": fits,
        "module": type(run.module).__name__,
        "model": dataclasses.asdict(planner.model),
        "parallel": dataclasses.asdict(run.parallel),
        "precision": run.policies.precision,
        "device": {**dataclasses.asdict(planner.device), "usable_bytes": round(planner.device.usable)},
        "sizes": dataclasses.asdict(planner.sizes),
        "phases": phases,
        "host_bytes": round(planner.host_bytes()),
        "largest_micro_batch_size": micro,
        "cost": {
            **dataclasses.asdict(cost),
            "step_seconds": cost.step_seconds,
            "epoch_seconds": cost.epoch_seconds,
            "run_seconds": cost.run_seconds,
        },
        "advice": [dataclasses.asdict(advice) for advice in advices],
        "assumptions": assumptions,
        "created": now(),
        "environment": environment(),
    }
