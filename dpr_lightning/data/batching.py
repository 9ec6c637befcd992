"""Deals rows to optimizer steps, micro-batches and ranks.

SFT deals demonstrations; DPR deals each rank's own rollouts (``world_size=1``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpr_lightning.errors import UserError

PADDING_ROW = -1


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """Which rows make up one micro-batch of one rank."""

    rows: list[int]
    """Row numbers; ``PADDING_ROW`` (-1) is a row without response tokens that keeps every rank in step."""
    num_tokens: int
    """Response tokens of the whole optimizer step: every micro-batch of every rank."""
    num_sequences: int
    """Rows of the whole optimizer step, padding rows not counted."""


def accumulation(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many micro-batches each rank accumulates for one optimizer step.

    Raises:
        UserError: The sizes do not divide; the message names the nearest that do.
    """
    for key, value in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise UserError(f"data.{key}: found {value}; give a whole number of at least 1")
    unit = micro_batch_size * world_size
    if global_batch_size % unit == 0:
        return global_batch_size // unit
    below = global_batch_size // unit * unit
    sizes = " or ".join(str(size) for size in (below, below + unit) if size > 0)
    micro = [size for size in range(1, global_batch_size + 1) if global_batch_size % (size * world_size) == 0]
    nearest = min(micro, key=lambda size: abs(size - micro_batch_size), default=None)
    advice = f"set data.global_batch_size to {sizes}"
    if nearest is not None:
        advice += f", or data.micro_batch_size to {nearest}"
    raise UserError(
        f"data.global_batch_size: {global_batch_size} is no multiple of data.micro_batch_size {micro_batch_size} x "
        f"{world_size} data-parallel ranks = {unit}; {advice}"
    )


def plan_micro_batches(
    order: Sequence[int],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int = 1,
    rank: int = 0,
    drop_last: bool = False,
    prompts: Sequence[int] | None = None,
) -> list[MicroBatchPlan]:
    """Return the micro-batches of ``rank`` for one pass over ``order``, longest first within each optimizer step.

    Consecutive groups of ``global_batch_size`` of ``order`` are the optimizer steps. Within a step rows are sorted by
    length and dealt so that a micro-batch holds rows of like length, and so do the ranks' m-th micro-batches: little
    padding, and no rank waits for another. Samples of one prompt in a step stay side by side. A last, incomplete step
    is filled up with padding rows to a whole number of micro-batches for each rank, spread evenly.

    Args:
        order: Row numbers, each once.
        total_lengths: By row number, tokens of prompt and response together.
        response_lengths: By row number, tokens of the response.
        global_batch_size: Rows of one optimizer step over all ranks.
        micro_batch_size: Rows of one forward on one rank.
        world_size: Data-parallel ranks.
        rank: This data-parallel rank.
        drop_last: Leave an incomplete last step out.
        prompts: By row number, which prompt it answers; None is a prompt for each row.

    Raises:
        UserError: See :func:`accumulation`.
    """
    accumulation(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size)
    plans: list[MicroBatchPlan] = []
    for start in range(0, len(order), global_batch_size):
        step_rows = [int(row) for row in order[start : start + global_batch_size]]
        if drop_last and len(step_rows) < global_batch_size:
            break
        num_tokens = sum(int(response_lengths[row]) for row in step_rows)
        by_length = _by_length(step_rows, total_lengths, prompts)
        for rows in _deal(by_length, micro_batch_size, world_size)[rank::world_size]:
            plans.append(MicroBatchPlan(rows, num_tokens, len(step_rows)))
    return plans


def _by_length(step_rows: list[int], total_lengths: Sequence[int], prompts: Sequence[int] | None) -> list[int]:
    """Return the rows of a step longest first; those of one prompt stand where its longest does."""
    if prompts is None:
        return sorted(step_rows, key=lambda row: -int(total_lengths[row]))
    longest: dict[int, int] = {}
    for row in step_rows:
        prompt, length = int(prompts[row]), int(total_lengths[row])
        # Prompts keep the order in which they come first, as rows of one length do.
        longest[prompt] = max(length, longest.get(prompt, 0))
    place = {prompt: number for number, prompt in enumerate(longest)}
    return sorted(
        step_rows,
        key=lambda row: (-longest[int(prompts[row])], place[int(prompts[row])], -int(total_lengths[row])),
    )


def _deal(by_length: list[int], micro_batch_size: int, world_size: int) -> list[list[int]]:
    """Return the step's micro-batches of all ranks, rank fastest; all hold ``micro_batch_size`` rows."""
    num_rounds = -(-len(by_length) // (micro_batch_size * world_size))
    num_micro_batches = num_rounds * world_size
    base, extra = divmod(len(by_length), num_micro_batches)
    micro_batches = []
    start = 0
    for index in range(num_micro_batches):
        stop = start + base + (index < extra)
        rows = by_length[start:stop]
        micro_batches.append(rows + [PADDING_ROW] * (micro_batch_size - len(rows)))
        start = stop
    return micro_batches
