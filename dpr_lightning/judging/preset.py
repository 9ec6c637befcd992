"""What a preset has to say: which games, which questions, how a verdict is read, written and counted."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from dpr_lightning.errors import UserError
from dpr_lightning.judging.chat import Reply, Request
from dpr_lightning.judging.games import BASELINE, MODEL, Failure, Game, Item, Outcome, Verdict
from dpr_lightning.judging.records import GradeRecord, PairRecord

Record: TypeAlias = PairRecord | GradeRecord
Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a preset's own definition."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a stored row does not say itself."""

    model: str
    """Name of the policy whose responses are judged."""
    baseline: str
    judge: str
    categories: Mapping[str, str] = field(default_factory=dict)
    """Category by id of the prompt, from the file of prompts."""
    chosen_baseline: str | None = None
    """The only baseline that is wanted, of files that hold pairs of many models; None takes all pairs."""


class Preset(ABC):
    """One way to judge, and the file format in which its judgments are published."""

    name: ClassVar[str]
    judge_model: ClassVar[str]
    """The judge that the preset's published numbers come from."""
    num_sides: ClassVar[int] = 2
    needs_answers_in_turn: ClassVar[int] = 1
    uses_references: ClassVar[bool] = False
    """Whether right answers are shown to the judge."""

    @abstractmethod
    def games(self, item: Item) -> list[Game]:
        """Return the questions about one prompt."""

    def settled(self, game: Game) -> Verdict | None:
        """Return the verdict of a game that needs no judge; None where one is asked."""
        return None

    @abstractmethod
    def request(self, game: Game) -> Request:
        """Return the question to a chat model."""

    @abstractmethod
    def parse(self, reply: Reply) -> Verdict:
        """Read a reply, strictly.

        Raises:
            NoVerdictError: It holds no verdict in the form that was asked for.
        """

    def max_completion_tokens(self, request: Request) -> int:
        """Return how many tokens a reply may have at most."""
        return int(request.decoding.get("max_tokens") or request.decoding.get("max_completion_tokens") or 0)

    @abstractmethod
    def rows(self, item: Item, games: Sequence[Game], outcomes: Sequence[Outcome], context: Context) -> list[Row]:
        """Return the judgments of one prompt in the format of files of this preset."""

    @abstractmethod
    def record(self, row: Row, context: Context, where: str) -> Record:
        """Read one row of such a file.

        Raises:
            UserError: It is none; the message begins with ``where``.
        """

    def records(self, row: Row, context: Context, where: str) -> list[Record]:
        """Return what one row says: of one model, of each of a pair, or nothing where it is of other pairs."""
        return [self.record(row, context, where)]

    @abstractmethod
    def figures(self, records: Sequence[Record], *, seed: int) -> list[Figure]:
        """Return the preset's own figures for one model; at least one record has a verdict."""


def both_orders(item: Item) -> list[Game]:
    """Return two games, with the baseline and with the model shown first."""
    return [Game(item=item, shown=(BASELINE, MODEL)), Game(item=item, shown=(MODEL, BASELINE))]


def fill(template: str, **values: str) -> str:
    """Put ``values`` at their ``{name}`` marks, in one pass: marks inside a value stay as they are."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)


def value_for_model(game: Game, verdict: Verdict) -> float:
    """Return a pair's verdict as the preference for the model."""
    return verdict.value if game.shown[0] == MODEL else 1 - verdict.value


def failure_fields(outcome: Outcome) -> dict[str, str]:
    """Return what a stored row says of a game without a verdict; nothing of one with."""
    return {"failure": outcome.kind, "detail": outcome.detail} if isinstance(outcome, Failure) else {}


def text_field(row: Row, name: str, where: str) -> str:
    """Return a column that must hold text.

    Raises:
        UserError: It does not.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' should be text, found {value!r:.40}; is the file of the chosen preset?")
    return value


def number_field(row: Row, name: str, where: str) -> float | None:
    """Return a column that must hold a number or nothing; NaN counts as nothing.

    Raises:
        UserError: It holds something else.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: '{name}' should be a number, found {value!r:.40}; is the file of the chosen preset?")
    return None if value != value else float(value)
