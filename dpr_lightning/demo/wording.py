"""The words of the embedded tasks: how a problem is asked, and how a worked answer is phrased.

Data only. The numbers come from ``families.py``; a template's braces name the fields of its family.
"""

from __future__ import annotations

from collections.abc import Mapping

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "sum": (
        "add {a}, {b} and {c}.",
        "what is {a} + {b} + {c}?",
        "find the sum of {a}, {b} and {c}.",
        "a box has {a} red, {b} blue and {c} green pens. how many in total?",
        "give the total of {a}, {b} and {c}.",
    ),
    "sort": (
        "sort {items}.",
        "put {items} in order, smallest first.",
        "write {items} from small to large.",
        "what is {items} in rising order?",
    ),
    "spread": (
        "how far is the largest from the smallest in {items}?",
        "find the range of {items}.",
        "in {items}, take the smallest from the largest.",
        "give the largest minus the smallest of {items}.",
    ),
    "reverse": (
        "reverse {items}.",
        "write {items} from back to front.",
        "what is {items} in reverse order?",
        "read {items} from the end.",
    ),
    "compare": (
        "is {a} * {b} more than {c}?",
        "a row has {a} pens. do {b} such rows have more than {c}?",
        "which holds: is {a} times {b} more than {c}, yes or no?",
        "find out if {a} * {b} is more than {c}.",
    ),
    "remainder": (
        "what is left if {a} is shared by {b}?",
        "find {a} mod {b}.",
        "give the remainder of {a} by {b}.",
        "put {a} pens in rows of {b}. how many are left?",
    ),
    "clock": (
        "it is {start}. what time is it in {minutes} minutes?",
        "add {minutes} minutes to {start}.",
        "a walk of {minutes} minutes starts at {start}. find the time at the end.",
        "give the time {minutes} minutes after {start}.",
    ),
    "shop": (
        "a pen is {price} coins. you take {count} and pay {paid}. what is left?",
        "take {count} pens of {price} coins each from {paid} coins.",
        "you have {paid} coins and take {count} pens at {price} each. how many coins are left?",
        "find the coins left of {paid} after {count} pens at {price}.",
    ),
}
"""Ways to ask a problem, by family."""

JOINERS: tuple[tuple[str, str], ...] = (
    ("", ", "),
    ("first ", ", then "),
    ("we see ", " and "),
)
"""How the steps of a worked answer are strung together: what opens the first, what stands between two."""

ANSWER_MARK = "answer:"
"""Opens the last line of a demonstration."""

OTHER_MARKS: tuple[str, ...] = ("so it is", "result", "we find")
"""Openings of the last line that only the pretraining corpus uses."""
