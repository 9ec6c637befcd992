"""What can be wrong in a worked answer to an embedded task: a number, a letter of a list, or a yes."""

from __future__ import annotations

import re

from dpr_lightning.analysis.corruption import Item, number_items

_LETTER = re.compile(r"(?<![a-z])[a-z](?![a-z])")
_VERDICT = re.compile(r"\b(?:yes|no)\b")
_OTHER = {"yes": "no", "no": "yes"}


def task_items(response: str) -> list[Item]:
    """Return the items of a response in order.

    A letter's alternatives are the other letters of the same response, so that none is foreign to the problem.
    """
    letters = sorted({match[0] for match in _LETTER.finditer(response)})
    items = number_items(response)
    for match in _LETTER.finditer(response):
        others = tuple(letter for letter in letters if letter != match[0])
        items.append(Item(start=match.start(), stop=match.end(), alternatives=others))
    for match in _VERDICT.finditer(response):
        items.append(Item(start=match.start(), stop=match.end(), alternatives=(_OTHER[match[0]],)))
    return sorted(items, key=lambda item: item.start)
