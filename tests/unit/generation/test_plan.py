from __future__ import annotations

import pytest

from dpr_lightning.data.entries import Entry
from dpr_lightning.errors import UserError
from dpr_lightning.generation.plan import MT_BENCH_TEMPERATURES, plan_blocks, temperatures_of


def entry(category: str | None) -> Entry:
    return Entry(where="line 3", id=None, turns=("a",), answers=(), category=category, model=None, row={})


def test_every_response_is_in_one_block() -> None:
    blocks = plan_blocks([5, 9, 7, 9, 1], [0.7] * 5, num_samples=3, block_size=4)
    tasks = [(task.entry, task.sample) for block in blocks for task in block.tasks]
    assert sorted(tasks) == [(entry, sample) for entry in range(5) for sample in range(3)]
    assert [len(block.tasks) for block in blocks] == [4, 4, 4, 3]
    # The longest first, in file order where lengths are equal.
    assert list(dict.fromkeys(entry for entry, _ in tasks)) == [1, 3, 2, 0, 4]


def test_a_block_has_one_temperature_and_the_likeliest_answer_is_drawn_once() -> None:
    blocks = plan_blocks([1, 2, 3, 4], [0.7, 0.0, 0.7, 0.0], num_samples=2, block_size=100)
    assert [(block.temperature, len(block.tasks)) for block in blocks] == [(0.0, 2), (0.7, 4)]


def test_temperatures_by_category() -> None:
    entries = [entry("math"), entry("writing")]
    assert temperatures_of(entries, 0.5, MT_BENCH_TEMPERATURES) == [0.0, 0.7]
    assert temperatures_of(entries, 0.5, None) == [0.5, 0.5]
    with pytest.raises(UserError, match=r"line 3: category 'tools' is none of writing"):
        temperatures_of([entry("tools")], 0.5, MT_BENCH_TEMPERATURES)
    with pytest.raises(UserError, match="category None"):
        temperatures_of([entry(None)], 0.5, MT_BENCH_TEMPERATURES)
