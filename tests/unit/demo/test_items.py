from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dpr_lightning.analysis.corruption import Place, corrupt
from dpr_lightning.demo.families import FAMILIES
from dpr_lightning.demo.items import task_items
from dpr_lightning.demo.tasks import is_correct, make_rows
from dpr_lightning.demo.wording import ANSWER_MARK, JOINERS


def right_answers(row: dict[str, Any]) -> set[str]:
    """Every right worked answer to a task: both phrasings, every way to string the steps together."""
    found = set()
    for phrasing in (0, 1):
        steps, answer = FAMILIES[row["family"]].work(row["fields"], phrasing, lambda value: value)
        found |= {f"{opening}{between.join(steps)}\n{ANSWER_MARK} {answer}" for opening, between in JOINERS}
    return found


@pytest.mark.parametrize("place", ["any", "last"])
def test_every_task_can_be_spoilt_by_one_mistake(tiny_tokenizer: PreTrainedTokenizerBase, place: Place) -> None:
    rows = make_rows(num_rows=120, seed=5, split="validation")
    assert {row["family"] for row in rows} == set(FAMILIES)
    for number, row in enumerate(rows):
        assert row["response"] in right_answers(row)
        corruption = corrupt(
            row["response"], tokenizer=tiny_tokenizer, rng=random.Random(number), find_items=task_items, place=place
        )
        assert corruption is not None
        assert corruption.text not in right_answers(row)
        # The verifier reads the last line only.
        if place == "last":
            assert not is_correct(row, corruption.text)


def test_items_of_a_task_without_numbers() -> None:
    items = task_items("from d to a\nanswer: d c b a")
    assert [("from d to a\nanswer: d c b a"[i.start : i.stop], i.alternatives) for i in items[:2]] == [
        ("d", ("a", "b", "c")),
        ("a", ("b", "c", "d")),
    ]
    assert len(items) == 6
    assert [item.alternatives for item in task_items("answer: yes")] == [("no",)]
