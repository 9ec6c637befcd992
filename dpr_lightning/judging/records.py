"""Judgments as the statistics see them, whoever judged and whichever file they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

First = Literal["model", "baseline", "unknown"]
"""Whose answer the judge saw first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GameRecord:
    """One judgment of a pair."""

    value: float | None
    """Preference for the model, 0 to 1; None where the judge gave no verdict."""
    first: First
    label: str | None = None
    text: str = ""
    failure: str | None = None
    """Why there is no verdict."""
    weight: int = 1
    """How often a preset counts it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """All judgments of one prompt."""

    key: str
    model: str
    baseline: str
    games: tuple[GameRecord, ...]
    turn: int = 1
    prompt: str = ""
    category: str | None = None
    model_length: int | None = None
    """Characters of the model's answer; None where the file does not tell."""
    baseline_length: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every game has a verdict."""
        return bool(self.games) and all(game.value is not None for game in self.games)

    @property
    def score(self) -> float:
        """Mean preference for the model over the games, each counted once."""
        values = [game.value for game in self.games if game.value is not None]
        return sum(values) / len(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradeRecord:
    """One rating of a single answer."""

    key: str
    model: str
    turn: int
    """From 1."""
    rating: float | None
    """None where the judge gave none."""
    category: str | None = None
    prompt: str = ""
    text: str = ""
    failure: str | None = None
