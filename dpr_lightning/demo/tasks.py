"""Instruction tasks made from a seed: prompts of varied wording, worked demonstrations, and a verifier.

A problem's split is decided by a hash of the problem itself, whatever its wording, so no validation or test problem
can appear among the training prompts or in the pretraining corpus, for any seed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dpr_lightning.demo.families import FAMILIES, Fields, question_values
from dpr_lightning.demo.wording import ANSWER_MARK, JOINERS, QUESTIONS

Split = Literal["train", "validation", "test"]

Row = dict[str, Any]
"""``prompt``, ``response`` (a worked demonstration), ``family``, ``answer`` (its text) and ``fields``: all JSON."""

_MAX_DRAWS_PER_ROW = 1000


def split_of(family: str, fields: Fields) -> Split:
    """Return the split to which a problem belongs: 15 of 100 hash buckets for validation, 15 for test.

    Args:
        family: Name of the family.
        fields: The problem's fields.
    """
    # "sort" and "spread" ask about the same lists; the key leaves the family out so that they share a split.
    digest = hashlib.blake2b(FAMILIES[family].key(fields).encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 100
    return "test" if bucket < 15 else "validation" if bucket < 30 else "train"


def draw_problem(rng: random.Random, *, split: Split) -> tuple[str, Fields, str]:
    """Draw a family, a problem of one split, and a wording.

    Args:
        rng: Source of randomness.
        split: Split to which the problem has to belong.

    Returns:
        The family's name, the fields, and the prompt.
    """
    family = rng.choice(list(FAMILIES))
    fields = FAMILIES[family].draw(rng)
    while split_of(family, fields) != split:
        fields = FAMILIES[family].draw(rng)
    return family, fields, rng.choice(QUESTIONS[family]).format(**question_values(family, fields))


def work_out(family: str, fields: Fields, rng: random.Random, *, is_wrong: bool = False) -> tuple[str, str]:
    """Write the steps of an answer in a random phrasing.

    Args:
        family: Name of the family.
        fields: The problem's fields.
        rng: Source of randomness.
        is_wrong: Put one slip into the results, carried on to a false final answer.

    Returns:
        The text of the steps, and the text of the final answer.
    """
    phrasing, (opening, between) = rng.randrange(2), rng.choice(JOINERS)
    notes = _Notes(rng)
    steps, answer = FAMILIES[family].work(fields, phrasing, notes)
    num_results = notes.num_results
    while is_wrong:
        steps, answer = FAMILIES[family].work(fields, phrasing, _Notes(rng, slip_at=rng.randrange(num_results)))
        is_wrong = FAMILIES[family].parse(answer) == FAMILIES[family].solve(fields)
    return opening + between.join(steps), answer


class _Notes:
    """Writes results down as they are, except the one at ``slip_at``."""

    def __init__(self, rng: random.Random, *, slip_at: int | None = None) -> None:
        self.rng = rng
        self.slip_at = slip_at
        self.num_results = 0

    def __call__(self, value: Any) -> Any:
        self.num_results += 1
        return _slip(value, self.rng) if self.num_results - 1 == self.slip_at else value


def _slip(value: Any, rng: random.Random) -> Any:
    """Return a plausible wrong result in place of a right one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        at = rng.randrange(len(value) - 1)
        return [*value[:at], value[at + 1], value[at], *value[at + 2 :]]
    return abs(value + rng.choice((-10, -2, -1, 1, 2, 10)))


def make_rows(*, num_rows: int, seed: int, split: Split, slip_share: float = 0.0) -> list[Row]:
    """Make tasks with a worked demonstration each; no prompt appears twice.

    Args:
        num_rows: How many.
        seed: Decides problems, wording and phrasing; the same seed gives the same rows.
        split: Which problems.
        slip_share: Share of the demonstrations that contain a slip, in [0, 1]; ``answer`` stays the true one.

    Returns:
        The rows, families mixed.

    Raises:
        ValueError: If ``slip_share`` is out of range or the split does not hold so many prompts.
    """
    if not 0.0 <= slip_share <= 1.0:
        raise ValueError(f"slip_share must be in [0, 1], got {slip_share}")
    rng = random.Random(f"{split}-{seed}")
    rows: dict[str, Row] = {}
    for _ in range(num_rows * _MAX_DRAWS_PER_ROW):
        if len(rows) == num_rows:
            break
        family, fields, prompt = draw_problem(rng, split=split)
        if prompt in rows:
            continue
        _, answer = work_out(family, fields, rng)
        steps, written = work_out(family, fields, rng, is_wrong=rng.random() < slip_share)
        response = f"{steps}\n{ANSWER_MARK} {written}"
        rows[prompt] = {
            "prompt": prompt,
            "response": response,
            "family": family,
            "answer": answer,
            "fields": fields,
        }
    if len(rows) < num_rows:
        raise ValueError(f"the {split} split does not hold {num_rows} different prompts; ask for fewer")
    return list(rows.values())


def is_correct(row: Mapping[str, Any], response: str) -> bool:
    """Return whether a response's last line states the right result.

    The result is computed from ``row["fields"]`` and compared as a value, so the steps may be worded in any way.
    A response with two answer lines, or with anything after the answer, is wrong.

    Args:
        row: A row of ``make_rows``; only ``family`` and ``fields`` are read.
        response: The text after the prompt, without EOS.
    """
    family = FAMILIES[row["family"]]
    _, mark, answer = response.partition(ANSWER_MARK)
    return bool(mark) and family.parse(answer.strip()) == family.solve(row["fields"])


def write_jsonl(rows: Sequence[Row], path: Path) -> None:
    """Write rows as UTF-8 JSON lines.

    Args:
        rows: What to write.
        path: File to create or replace.
    """
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
