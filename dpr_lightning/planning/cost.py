"""Steps, tokens and hours of a run: operations of the simulated phases on a device, one after another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dpr_lightning.planning.phases import PhaseName, Planner
from dpr_lightning.planning.settings import num_micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the run itself costs; the SFT of its teacher is not in it."""

    steps_per_epoch: int | None
    """Optimizer steps; None where the number of rows is unknown."""
    num_epochs: float | None
    num_steps: int | None
    tokens_per_step: float
    """Prompt and response tokens that one optimizer step trains on, over all devices."""
    seconds_per_step: dict[str, float]
    """By phase, an epoch's rollout and scoring divided by its optimizer steps."""
    flops_per_step: float
    """Of all devices, recomputation counted."""

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step with its share of rollout and scoring."""
        return sum(self.seconds_per_step.values())

    @property
    def epoch_seconds(self) -> float | None:
        """Seconds of one epoch."""
        return None if self.steps_per_epoch is None else self.step_seconds * self.steps_per_epoch

    @property
    def run_seconds(self) -> float | None:
        """Seconds of the whole run."""
        return None if self.num_steps is None else self.step_seconds * self.num_steps


def find_cost(planner: Planner) -> Cost:
    """Return what a run costs at its mean lengths; a batch of samples goes on to the longest response.

    Communication between devices, reading of data, validation and checkpoints are not counted.
    """
    run, sizes = planner.run, planner.sizes
    data: Any = run.data
    micro = num_micro_batches(run, data.micro_batch_size)
    prompt, response = max(1, round(sizes.mean_prompt)), max(1, round(sizes.mean_response))
    rows = planner.rows("training")
    training = planner.stages("training", rows, prompt, response)
    once = ("gradient norms", "optimizer")
    seconds = {"training": sum(stage.seconds * (1 if name in once else micro) for name, stage in training.items())}
    flops = sum(stage.flops for stage in training.values()) * micro * run.parallel.num_devices
    steps = _steps_per_epoch(planner)
    if run.is_on_policy and steps:
        mine = planner.num_samples / run.parallel.num_devices
        seconds["rollout"] = _rollout_seconds(planner, prompt) * math.ceil(mine / planner.rows("rollout")) / steps
        scored = planner.stages("scoring", planner.rows("scoring"), prompt, response)
        times = mine / planner.rows("scoring") / steps
        seconds["scoring"] = sum(stage.seconds for stage in scored.values()) * times
        flops += sum(stage.flops for stage in scored.values()) * times * run.parallel.num_devices
    return Cost(
        steps_per_epoch=steps,
        num_epochs=None if steps is None else _epochs(planner, steps),
        num_steps=None if steps is None else _num_steps(planner, steps),
        tokens_per_step=rows * micro * run.parallel.num_devices * (prompt + response),
        seconds_per_step=seconds,
        flops_per_step=flops,
    )


def _rollout_seconds(planner: Planner, prompt: int) -> float:
    """Return the seconds of one batch of samples: the prompts, and every token as the middle one."""
    tokens, name = planner.sizes.longest_response, _ROLLOUT
    stages = planner.stages(name, planner.rows(name), prompt, max(1, tokens // 2))
    reading = sum(stage.seconds for place, stage in stages.items() if place.startswith("rollout: prompts"))
    drawing = sum(stage.seconds for place, stage in stages.items() if place.startswith("rollout: last token"))
    return reading + tokens * drawing


_ROLLOUT: PhaseName = "rollout"


def _steps_per_epoch(planner: Planner) -> int | None:
    data: Any = planner.run.data
    if planner.run.is_on_policy:
        if hasattr(data, "passes_per_rollout"):
            known: int | None = data.num_prompts_wanted or planner.sizes.num_rows
            if known is None:
                return None
            return math.ceil(known * int(data.passes_per_rollout) / int(data.global_batch_size))
        return int(data.steps_per_epoch)
    if planner.sizes.num_rows is None:
        return None
    steps = planner.sizes.num_rows / int(data.global_batch_size)
    return max(1, math.floor(steps) if data.drop_last else math.ceil(steps))


def _num_steps(planner: Planner, steps_per_epoch: int) -> int | None:
    run = planner.run
    limits: list[int] = [run.max_steps] if run.max_steps is not None else []
    if run.max_epochs is not None:
        limits.append(run.max_epochs * steps_per_epoch)
    return min(limits, default=None)


def _epochs(planner: Planner, steps_per_epoch: int) -> float | None:
    steps = _num_steps(planner, steps_per_epoch)
    return None if steps is None else steps / steps_per_epoch
