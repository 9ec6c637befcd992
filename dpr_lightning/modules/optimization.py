"""Optimizer settings: how far a schedule can move weights, and what a run that resumes was told anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

FEW_STEPS = 20
"""Optimizer steps of a whole run below which little is learned at published learning rates."""

Settings = dict[str, Any]
"""Settings of one parameter group: ``initial_lr``, betas, weight decay and so on."""


def group_settings(optimizer: Optimizer) -> list[Settings]:
    """Return what was configured of each parameter group; the running learning rate follows from the schedule."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def few_steps_warning(schedule: LambdaLR, num_steps: int, *, global_batch_size: Any, max_epochs: Any) -> str | None:
    """Return a warning where a run has too few optimizer steps to learn much; None where it has enough."""
    if num_steps >= FEW_STEPS:
        return None
    total = schedule.base_lrs[0] * sum(schedule.lr_lambdas[0](step) for step in range(num_steps))
    return (
        f"only {num_steps} optimizer steps are planned, and their learning rates sum to {total:.2g}: under Adam no "
        "weight moves much further than that, so little will be learned. Lower data.global_batch_size (now "
        f"{global_batch_size}), raise trainer.max_epochs (now {max_epochs}) or raise model.optimizer.lr (now "
        f"{schedule.base_lrs[0]:g})"
    )


def apply_settings(
    optimizers: Iterable[Optimizer], schedules: Iterable[LambdaLR], configured: Sequence[Settings]
) -> list[str]:
    """Put configured settings in place of those that a checkpoint restored; return what changed, as text.

    Where nothing differs nothing is touched, so that a run resumes bit for bit.

    Args:
        optimizers: With their state restored.
        schedules: Of their learning rates, restored; moments and the number of steps taken stay.
        configured: Settings of every parameter group, in order, as :func:`group_settings` read them before.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    changes: dict[str, None] = {}
    for group, wanted in zip(groups, configured, strict=True):
        for name, value in wanted.items():
            if group.get(name) != value:
                changes[f"{'lr' if name == 'initial_lr' else name} {value} (was {group.get(name)})"] = None
                group[name] = value
    if changes:
        for schedule in schedules:
            for number, group in enumerate(schedule.optimizer.param_groups):
                schedule.base_lrs[number] = group["initial_lr"]
                group["lr"] = group["initial_lr"] * schedule.lr_lambdas[number](schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
    return list(changes)
