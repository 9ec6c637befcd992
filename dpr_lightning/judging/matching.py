"""Rows of several files brought together by id or by prompt; whatever does not fit is counted by its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dpr_lightning.data.entries import Entry
from dpr_lightning.errors import UserError
from dpr_lightning.judging.games import Item

Match = Literal["auto", "id", "prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """Items that are fit to be judged, and what became of the others."""

    items: tuple[Item, ...]
    num_prompts: int
    """Distinct prompts in all files."""
    by: str
    """``id`` or ``prompt``."""
    lost: Counter[str]
    """Prompts that cannot be judged, by reason."""
    repeated: Counter[str]
    """Rows that say again, word for word, what an earlier one said, and rows outside of the file of prompts."""
    repeated_keys: frozenset[str]
    """Prompts that have rows of the first kind, by the key of their item."""


def match(
    sides: Sequence[Sequence[Entry]],
    *,
    names: Sequence[str],
    prompts: Sequence[Entry] | None = None,
    references: Sequence[Entry] | None = None,
    by: Match = "auto",
    num_turns: int = 1,
) -> Matched:
    """Bring the answers to each prompt together, in the order of the prompts (of the first side where none are given).

    Args:
        sides: Files of answers.
        names: What to call each side in the counts.
        prompts: All prompts that should have been answered, with their categories; None takes those of the sides.
        references: Right answers, matched by id.
        by: Column that must agree; ``auto`` takes the prompt where every row has one, else the id.
        num_turns: Turns of an item that are judged; more are cut off, fewer are lost.

    Raises:
        UserError: The rows have neither ids nor prompts in common.
    """
    files = [*sides, prompts] if prompts is not None else list(sides)
    chosen = _choose(files, by)
    key_of: Callable[[Entry], str] = (lambda row: str(row.prompt)) if chosen == "prompt" else (lambda row: str(row.id))
    lost: Counter[str] = Counter()
    repeated: Counter[str] = Counter()
    tables, contradictory = [], []
    again: set[str] = set()
    for entries, name in zip(files, [*names, "prompts"][: len(files)], strict=True):
        table, bad = _table(entries, key_of, name, repeated, again)
        tables.append(table)
        contradictory.append(bad)
    asked = tables[-1] if prompts is not None else {key: table[key] for table in reversed(tables) for key in table}
    order = list(asked) if prompts is not None else list(dict.fromkeys(key for table in tables for key in table))
    if not any(all(key in table for table in tables) for key in order):
        raise UserError(
            f"--responses: no row of one file has the same {chosen} as a row of the others; give files of the same "
            "prompts, or choose --match"
        )
    for table, name in zip(tables[: len(sides)], names, strict=True):
        outside = sum(key not in asked for key in table)
        if outside:
            repeated[f"row of {name} outside of the prompts"] += outside
    right = {entry.id: entry.answers for entry in references or ()}
    ids = {key: next((t[key].id for t in reversed(tables) if key in t and t[key].id is not None), key) for key in order}
    # An id is the better name, where it names one prompt only.
    name_of = ids if len(set(ids.values())) == len(ids) else {key: key for key in order}
    items = []
    for key in order:
        rows = [table.get(key) for table in tables]
        reason = _problem(key, rows, [*names, "prompts"], contradictory, num_turns)
        if reason is not None:
            lost[reason] += 1
            continue
        found = [row for row in rows if row is not None]
        turns = next(row.turns for row in reversed(found) if row.turns)
        items.append(
            Item(
                key=str(name_of[key]),
                turns=turns[:num_turns],
                answers=tuple(row.answers[:num_turns] for row in found[: len(sides)]),
                category=next((row.category for row in reversed(found) if row.category is not None), None),
                references=right.get(next((row.id for row in reversed(found) if row.id is not None), None), ()),
                # Only the file of prompts: a verifier must not take an answer for the demonstration.
                row={**found[-1].row, "prompt": turns[0]} if prompts is not None else {},
            )
        )
    return Matched(
        items=tuple(items),
        num_prompts=len(order),
        by=chosen,
        lost=lost,
        repeated=repeated,
        repeated_keys=frozenset(str(name_of[key]) for key in again if key in name_of),
    )


def _choose(files: Sequence[Sequence[Entry]], by: Match) -> Literal["id", "prompt"]:
    has_prompts = all(entry.prompt is not None for entries in files for entry in entries)
    has_ids = all(entry.id is not None for entries in files for entry in entries)
    if by == "prompt" and not has_prompts:
        lacking = next(entry for entries in files for entry in entries if entry.prompt is None)
        raise UserError(f"{lacking.where}: no prompt to match by; give --match id")
    if by == "id" and not has_ids:
        lacking = next(entry for entries in files for entry in entries if entry.id is None)
        raise UserError(f"{lacking.where}: no id to match by; give --match prompt")
    if not has_prompts and not has_ids:
        raise UserError("--match: neither ids nor prompts are in every row of all files; add one of them")
    return "prompt" if by == "prompt" or (by == "auto" and has_prompts) else "id"


def _table(
    entries: Sequence[Entry], key_of: Callable[[Entry], str], name: str, repeated: Counter[str], again: set[str]
) -> tuple[dict[str, Entry], set[str]]:
    """Return the first row of each key, and the keys whose rows contradict each other."""
    table: dict[str, Entry] = {}
    contradictory = set()
    for entry in entries:
        earlier = table.setdefault(key_of(entry), entry)
        if earlier is not entry:
            is_same = earlier.answers == entry.answers and earlier.turns == entry.turns
            repeated[f"repeated row in {name}"] += is_same
            if is_same:
                again.add(key_of(entry))
            else:
                contradictory.add(key_of(entry))
    return table, contradictory


def _problem(
    key: str, rows: Sequence[Entry | None], names: Sequence[str], contradictory: Sequence[set[str]], num_turns: int
) -> str | None:
    """Return why a prompt cannot be judged; None where it can."""
    for row, name, bad in zip(rows, names, contradictory, strict=False):
        if row is None:
            return f"missing in {name}"
        if key in bad:
            return f"different rows in {name}"
        if name != "prompts" and len(row.answers) < num_turns:
            return f"no response in {name}"
    turns = {row.turns[:num_turns] for row in rows if row is not None and row.turns}
    if not turns or len(next(iter(turns))) < num_turns:
        return "no prompt" if not turns else "too few turns"
    return "different prompts under one id" if len(turns) > 1 else None
