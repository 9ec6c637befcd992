"""Worked answers with one mistake put in, as small as the tokenizer allows.

One item of the text (a number; in the embedded tasks also a letter or a yes) is replaced by another of the same
length, so that neither the number of characters nor, wherever it can be had, the number of tokens gives it away. The
rest of the answer is kept as it is: steps that used the right number now contradict it, and cost the score too. That
makes the task harder than an answer that goes on consistently, and for every score alike.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.tokenization import encode_responses

Place = Literal["any", "last"]
"""Which item is corrupted: any, each equally likely, or the last, which is the result where an answer ends with it."""

_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
_MAX_ALTERNATIVES = 32
"""Replacements of one item that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A piece of a text that can be replaced by a mistake of the same length."""

    start: int
    stop: int
    alternatives: tuple[str, ...]
    """What may stand there instead, none equal to what does."""


FindItems = Callable[[str], list[Item]]
"""Finds the items of a response, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """A response with one mistake in it."""

    text: str
    response_ids: list[int]
    """Token ids without EOS."""
    is_corrupted: list[bool]
    """Which of them differ from the right response's."""
    is_same_length: bool
    """Whether the right response has as many tokens."""


def number_items(response: str) -> list[Item]:
    """Return the numbers of a text; an alternative changes one digit, and the first of several does not become 0."""
    return [
        Item(start=match.start(), stop=match.end(), alternatives=_one_digit_off(match[0]))
        for match in _NUMBER.finditer(response)
    ]


def _one_digit_off(number: str) -> tuple[str, ...]:
    is_leading = len(number) > 1 and number[1].isdigit()
    return tuple(
        number[:at] + digit + number[at + 1 :]
        for at, old in enumerate(number)
        if old.isdigit()
        for digit in "0123456789"
        if digit != old and not (at == 0 and digit == "0" and is_leading)
    )


def corrupt(
    response: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    find_items: FindItems = number_items,
    place: Place = "any",
    is_right: Callable[[str], bool] | None = None,
) -> Corruption | None:
    """Put one mistake into a right response.

    An item is drawn; of its alternatives, one of those that change the fewest tokens is drawn, those that keep the
    number of tokens before all others.

    Args:
        response: Its text.
        tokenizer: The policies'.
        rng: Source of randomness.
        find_items: Finds what can be replaced.
        place: Which item is.
        is_right: Alternatives that this still accepts are left out; None accepts none.

    Returns:
        None where nothing can be replaced.
    """
    items = [item for item in find_items(response) if item.alternatives]
    if not items:
        return None
    item = items[-1] if place == "last" else rng.choice(items)
    alternatives = list(item.alternatives)
    if len(alternatives) > _MAX_ALTERNATIVES:
        alternatives = rng.sample(alternatives, _MAX_ALTERNATIVES)
    texts = [response[: item.start] + alternative + response[item.stop :] for alternative in alternatives]
    if is_right is not None:
        texts = [text for text in texts if not is_right(text)]
    right_ids, *wrong_ids = encode_responses(tokenizer, [response, *texts])
    found = []
    for text, ids in zip(texts, wrong_ids, strict=True):
        is_corrupted = changed_tokens(right_ids, ids)
        is_same_length = len(ids) == len(right_ids)
        # Another text with equal ids would be no mistake to the model.
        if any(is_corrupted):
            corruption = Corruption(
                text=text, response_ids=ids, is_corrupted=is_corrupted, is_same_length=is_same_length
            )
            found.append(((not is_same_length, sum(is_corrupted)), corruption))
    if not found:
        return None
    smallest = min(size for size, _ in found)
    return rng.choice([corruption for size, corruption in found if size == smallest])


def changed_tokens(right_ids: Sequence[int], wrong_ids: Sequence[int]) -> list[bool]:
    """Return which of ``wrong_ids`` differ from the right ones.

    Of sequences of equal length, those at whose place another id stands. Of others, those between what both have in
    common at the beginning and at the end.
    """
    if len(right_ids) == len(wrong_ids):
        return [right != wrong for right, wrong in zip(right_ids, wrong_ids, strict=True)]
    shorter = min(len(right_ids), len(wrong_ids))
    start = next((i for i in range(shorter) if right_ids[i] != wrong_ids[i]), shorter)
    tail = next((i for i in range(shorter - start) if right_ids[-1 - i] != wrong_ids[-1 - i]), shorter - start)
    stop = len(wrong_ids) - tail
    return [start <= i < stop for i in range(len(wrong_ids))]
