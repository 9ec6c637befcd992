"""The families of the embedded tasks: how a problem is drawn, worked in steps, and verified from its fields."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]
"""A problem as JSON values; the verifier needs nothing else."""

Value = int | bool | list[int] | list[str]
"""An intermediate or final result."""

Note = Callable[[Any], Any]
"""Called on every result as it is written down; returns what is written, so that slips can be put in."""

Worked = tuple[list[str], str]
"""The steps of a worked answer, and the text of the final answer."""

LETTERS = "abcdefghklmnoprstuvw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of problem."""

    draw: Callable[[random.Random], Fields]
    """Draws the fields of a problem."""
    key: Callable[[Fields], str]
    """Names the problem whatever its wording and the order of interchangeable numbers; decides its split."""
    work: Callable[[Fields, int, Note], Worked]
    """Writes the steps down in one of two phrasings (0 or 1), passing every result through ``note``."""
    solve: Callable[[Fields], Value]
    """The true result, computed from the fields alone and not by way of ``work``."""
    parse: Callable[[str], Value | None]
    """Reads a final answer; None where it is not of the family's kind."""


def _join(items: list[Any]) -> str:
    return " ".join(str(item) for item in items)


def _parse_int(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,6}", text) else None


def _parse_numbers(text: str) -> list[int] | None:
    return [int(item) for item in text.split(" ")] if re.fullmatch(r"\d{1,6}( \d{1,6})*", text) else None


def _parse_letters(text: str) -> list[str] | None:
    return text.split(" ") if re.fullmatch(r"[a-z]( [a-z])*", text) else None


def _parse_yes_no(text: str) -> bool | None:
    return {"yes": True, "no": False}.get(text)


def _parse_clock(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,2}):([0-5]\d)", text)
    return int(match[1]) * 60 + int(match[2]) if match and int(match[1]) < 24 else None


def _clock_text(hour: int, minute: int) -> str:
    return f"{hour}:{minute:02d}"


def _draw_sum(rng: random.Random) -> Fields:
    return {"a": rng.randint(2, 49), "b": rng.randint(2, 49), "c": rng.randint(2, 9)}


def _work_sum(fields: Fields, phrasing: int, note: Note) -> Worked:
    a, b, c = fields["a"], fields["b"], fields["c"]
    first = note(a + b)
    total = note(first + c)
    if phrasing == 0:
        return [f"{a} + {b} = {first}", f"{first} + {c} = {total}"], str(total)
    return [f"{a} and {b} make {first}", f"{first} and {c} make {total}"], str(total)


def _draw_items(rng: random.Random) -> Fields:
    return {"items": rng.sample(range(30), 4)}


def _work_sort(fields: Fields, phrasing: int, note: Note) -> Worked:
    ordered = note(sorted(fields["items"]))
    low, high = ordered[0], ordered[-1]
    steps = [f"{low} is smallest", f"{high} is largest"] if phrasing == 0 else [f"from {low} to {high}"]
    return steps, _join(ordered)


def _work_spread(fields: Fields, phrasing: int, note: Note) -> Worked:
    high, low = note(max(fields["items"])), note(min(fields["items"]))
    gap = note(abs(high - low))
    if phrasing == 0:
        return [f"{high} is largest", f"{low} is smallest", f"{high} - {low} = {gap}"], str(gap)
    return [f"from {low} to {high} is {gap}"], str(gap)


def _draw_letters(rng: random.Random) -> Fields:
    return {"items": rng.sample(LETTERS, rng.randint(4, 5))}


def _work_reverse(fields: Fields, phrasing: int, note: Note) -> Worked:
    backwards = note(fields["items"][::-1])
    steps = [f"the last is {backwards[0]}"] if phrasing == 0 else [f"from {backwards[0]} to {backwards[-1]}"]
    return steps, _join(backwards)


def _draw_compare(rng: random.Random) -> Fields:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return {"a": a, "b": b, "c": max(1, a * b + rng.randint(-12, 11))}


def _work_compare(fields: Fields, phrasing: int, note: Note) -> Worked:
    a, b, c = fields["a"], fields["b"], fields["c"]
    product = note(a * b)
    verdict = note(product > c)
    steps = [f"{a} * {b} = {product}"] if phrasing == 0 else [f"{a} times {b} is {product}"]
    return [*steps, f"{product} is more than {c}" if verdict else f"{product} is not more than {c}"], (
        "yes" if verdict else "no"
    )


def _draw_remainder(rng: random.Random) -> Fields:
    return {"a": rng.randint(10, 79), "b": rng.randint(3, 9)}


def _work_remainder(fields: Fields, phrasing: int, note: Note) -> Worked:
    a, b = fields["a"], fields["b"]
    product = note(a - a % b)
    left = note(abs(a - product))
    if phrasing == 0:
        return [f"{product} is {a // b} * {b}", f"{a} - {product} = {left}"], str(left)
    return [f"{a} is {product} and {left}"], str(left)


def _draw_clock(rng: random.Random) -> Fields:
    return {"hour": rng.randint(1, 10), "minute": 5 * rng.randint(0, 11), "minutes": rng.randint(10, 59)}


def _work_clock(fields: Fields, phrasing: int, note: Note) -> Worked:
    hour, minute, minutes = fields["hour"], fields["minute"], fields["minutes"]
    total = note(minute + minutes)
    steps = [f"{minute} + {minutes} = {total}"] if phrasing == 0 else [f"{minute} and {minutes} make {total}"]
    if total < 60:
        return steps, _clock_text(hour, total)
    rest = note(total - 60)
    steps.append(f"{total} - 60 = {rest}" if phrasing == 0 else f"{total} is 60 and {rest}")
    return steps, _clock_text(hour + rest // 60 + 1, rest % 60)


def _draw_shop(rng: random.Random) -> Fields:
    price, count = rng.randint(2, 9), rng.randint(2, 9)
    return {"price": price, "count": count, "paid": price * count + rng.randint(1, 19)}


def _work_shop(fields: Fields, phrasing: int, note: Note) -> Worked:
    price, count, paid = fields["price"], fields["count"], fields["paid"]
    cost = note(price * count)
    left = note(abs(paid - cost))
    if phrasing == 0:
        return [f"{count} * {price} = {cost}", f"{paid} - {cost} = {left}"], str(left)
    return [f"{count} pens are {cost}", f"{paid} is {cost} and {left}"], str(left)


def _sorted_items_key(fields: Fields) -> str:
    return _join(sorted(fields["items"]))


FAMILIES: Mapping[str, Family] = {
    "sum": Family(
        draw=_draw_sum,
        key=lambda fields: _join(sorted([fields["a"], fields["b"], fields["c"]])),
        work=_work_sum,
        solve=lambda fields: int(fields["a"] + fields["b"] + fields["c"]),
        parse=_parse_int,
    ),
    "sort": Family(
        draw=_draw_items,
        key=_sorted_items_key,
        work=_work_sort,
        solve=lambda fields: sorted(fields["items"]),
        parse=_parse_numbers,
    ),
    "spread": Family(
        draw=_draw_items,
        key=_sorted_items_key,
        work=_work_spread,
        solve=lambda fields: int(max(fields["items"]) - min(fields["items"])),
        parse=_parse_int,
    ),
    "reverse": Family(
        draw=_draw_letters,
        key=lambda fields: _join(fields["items"]),
        work=_work_reverse,
        solve=lambda fields: list(reversed(fields["items"])),
        parse=_parse_letters,
    ),
    "compare": Family(
        draw=_draw_compare,
        key=lambda fields: _join([*sorted([fields["a"], fields["b"]]), fields["c"]]),
        work=_work_compare,
        solve=lambda fields: bool(fields["a"] * fields["b"] > fields["c"]),
        parse=_parse_yes_no,
    ),
    "remainder": Family(
        draw=_draw_remainder,
        key=lambda fields: _join([fields["a"], fields["b"]]),
        work=_work_remainder,
        solve=lambda fields: int(fields["a"] % fields["b"]),
        parse=_parse_int,
    ),
    "clock": Family(
        draw=_draw_clock,
        key=lambda fields: _join([fields["hour"], fields["minute"], fields["minutes"]]),
        work=_work_clock,
        solve=lambda fields: int(fields["hour"] * 60 + fields["minute"] + fields["minutes"]),
        parse=_parse_clock,
    ),
    "shop": Family(
        draw=_draw_shop,
        key=lambda fields: _join([*sorted([fields["price"], fields["count"]]), fields["paid"]]),
        work=_work_shop,
        solve=lambda fields: int(fields["paid"] - fields["price"] * fields["count"]),
        parse=_parse_int,
    ),
}
"""Every family, by name."""


def question_values(family: str, fields: Fields) -> dict[str, str]:
    """Return the words that fill a family's question templates.

    Args:
        family: Name of the family.
        fields: The problem's fields.
    """
    values = {name: _join(value) if isinstance(value, list) else str(value) for name, value in fields.items()}
    if family == "clock":
        values["start"] = _clock_text(fields["hour"], fields["minute"])
    return values
