"""Which prompts are answered together: a function of the file and the settings, so that a killed run can go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpr_lightning.data.entries import Entry
from dpr_lightning.errors import UserError

MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Temperature of each category in FastChat's ``gen_model_answer`` (arXiv 2306.05685)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One response that is to be drawn."""

    entry: int
    """Place of its prompt in the file."""
    sample: int
    """0 for the first response to it, 1 for the second, and so on."""


@dataclass(frozen=True, slots=True)
class Block:
    """Responses that are drawn together and written to disk together."""

    tasks: tuple[Task, ...]
    temperature: float


def temperatures_of(
    entries: Sequence[Entry], temperature: float, by_category: Mapping[str, float] | None
) -> list[float]:
    """Return the temperature at which each prompt is answered.

    Args:
        entries: The prompts.
        temperature: That of all.
        by_category: That of each category instead.

    Raises:
        UserError: A prompt has no category, or one without a temperature.
    """
    if by_category is None:
        return [temperature] * len(entries)
    for entry in entries:
        if entry.category not in by_category:
            raise UserError(
                f"--category_temperatures: {entry.where}: category {entry.category!r} is none of "
                f"{', '.join(by_category)}; give it a temperature"
            )
    return [by_category[str(entry.category)] for entry in entries]


def plan_blocks(
    lengths: Sequence[int], temperatures: Sequence[float], *, num_samples: int, block_size: int
) -> list[Block]:
    """Deal all responses to blocks: prompts of like length together, the longest first, one temperature a block.

    At temperature 0 a prompt is answered once, whatever ``num_samples``: all its answers would be the same.

    Args:
        lengths: Tokens of each prompt.
        temperatures: Temperature of each prompt.
        num_samples: Responses to each prompt.
        block_size: Most responses of one block.
    """
    blocks = []
    for temperature in sorted(set(temperatures)):
        chosen = [index for index, found in enumerate(temperatures) if found == temperature]
        # The longest first: what does not fit into memory shows at once.
        chosen.sort(key=lambda index: -lengths[index])
        repeats = num_samples if temperature > 0 else 1
        tasks = [Task(entry, sample) for entry in chosen for sample in range(repeats)]
        blocks += [
            Block(tuple(tasks[start : start + block_size]), temperature) for start in range(0, len(tasks), block_size)
        ]
    return blocks
