"""What is judged and what a judge says: items, games, verdicts, and the judge's interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

MODEL, BASELINE = 0, 1
"""Sides of a comparison: the responses that are asked about, and those they are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One prompt with the answers to it."""

    key: str
    """The id or the prompt by which the rows were matched."""
    turns: tuple[str, ...]
    """What the user says, turn by turn."""
    answers: tuple[tuple[str, ...], ...]
    """For each side (:data:`MODEL`, then :data:`BASELINE` where there is one) its answer to every turn."""
    category: str | None = None
    references: tuple[str, ...] = ()
    """Right answers by turn; empty where there are none."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The prompt's source row, for verifiers and for identifiers of published formats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """One question to the judge."""

    item: Item
    shown: tuple[int, ...]
    """Sides in the order in which the judge sees them."""
    turn: int = 0
    """Which turn is judged, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge found."""

    value: float
    """For a pair the preference for the answer shown first, 0 to 1; for a single answer its rating."""
    label: str
    """The verdict in the judge's own form, such as ``A>>B``."""
    text: str = ""
    """All that the judge wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A game without a verdict."""

    kind: str
    """Short name under which such failures are counted."""
    detail: str
    """What came instead, for people; free of secrets."""


Outcome: TypeAlias = Verdict | Failure


class Judge(Protocol):
    """A model behind an API, or a program."""

    @property
    def name(self) -> str:
        """Who judges, for the report."""

    def judge(self, games: Sequence[Game], *, on_progress: Callable[[int], object] | None = None) -> list[Outcome]:
        """Return the outcome of every game, in the order of ``games``; what fails is a :class:`Failure`.

        Args:
            games: What to ask.
            on_progress: Called with the number of games decided since the last call.
        """
