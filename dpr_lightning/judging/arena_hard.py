"""Arena-Hard as lmarena/arena-hard-auto counts it: five verdicts, both games, strong verdicts three times.

All battles of a model are against one baseline, so the Bradley-Terry maximum-likelihood fit of the whole leaderboard
falls apart into one share for each model: its weighted wins, ties half, over its weighted games. That share is the
published win rate, and 1000 + 400 log10(p / (1 - p)) the rating with the baseline at 1000.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.reasoning import final_answer
from dpr_lightning.evaluation.statistics import ratio_interval
from dpr_lightning.judging.chat import NoVerdictError, Reply, Request
from dpr_lightning.judging.games import BASELINE, MODEL, Game, Item, Outcome, Verdict
from dpr_lightning.judging.preset import (
    Context,
    Figure,
    Preset,
    Record,
    Row,
    both_orders,
    failure_fields,
    fill,
)
from dpr_lightning.judging.records import First, GameRecord, PairRecord

_STRONG = 3
"""How often a strong verdict counts."""
_FOR_A = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
_MIRRORED = {"B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A", "B<A": "A>B", "B<<A": "A>>B"}
_NUM_ROUNDS = 100
"""Bootstrap samples upstream."""
_RATING_OF_BASELINE, _RATING_SCALE = 1000.0, 400.0
_SHOWN: tuple[First, First] = ("baseline", "model")
"""Who is A in the first and in the second game."""


class ArenaHardPreset(Preset):
    """Arena-Hard v0.1: a reply with one and the same ``[[verdict]]`` counts; a game without one is left out.

    Upstream asks a judge without a verdict to go on, once; here it counts as a failure, and the next run asks anew.

    Args:
        system: The judge's system prompt.
        template: The user's part, with ``{question_1}``, ``{answer_1}`` and ``{answer_2}``, or, as newer
            configurations name them, ``{QUESTION}``, ``{ANSWER_A}`` and ``{ANSWER_B}``.
        max_tokens: Longest reply of the judge.
    """

    name = "arena_hard"
    judge_model = "gpt-4-1106-preview"
    _quantiles: ClassVar[tuple[float, float]] = (0.025, 0.975)
    _patterns: ClassVar[tuple[re.Pattern[str], ...]] = (re.compile(r"\[\[([AB<>=]+)\]\]"),)
    _mirrored: ClassVar[Mapping[str, str]] = {}
    """Further verdicts, by what they mean; v0.1 counts none."""

    def __init__(self, *, system: str = "", template: str = "", max_tokens: int = 4096) -> None:
        self.system = system
        self.template = template
        self.decoding = {"temperature": 0, "max_tokens": max_tokens}

    @override
    def games(self, item: Item) -> list[Game]:
        return both_orders(item)

    @override
    def request(self, game: Game) -> Request:
        question = game.item.turns[0]
        a, b = (game.item.answers[side][0] for side in game.shown)
        user = fill(
            self.template,
            question_1=question,
            answer_1=a,
            answer_2=b,
            QUESTION=question,
            ANSWER_A=a,
            ANSWER_B=b,
        )
        return Request(
            messages=({"role": "system", "content": self.system}, {"role": "user", "content": user}),
            decoding=self.decoding,
        )

    @override
    def parse(self, reply: Reply) -> Verdict:
        answer = final_answer(reply.text)
        label = self._label(answer.text, takes_last=answer.has_reasoning)
        plain = self._mirrored.get(label, label)
        if plain not in _FOR_A:
            raise NoVerdictError(f"[[{label}]] is none of the five verdicts")
        return Verdict(value=_FOR_A[plain], label=label, text=reply.text)

    def _label(self, text: str, *, takes_last: bool) -> str:
        found = [label for label in self._patterns[0].findall(text) if label]
        if not found or (len(set(found)) > 1 and not takes_last):
            raise NoVerdictError("several verdicts" if found else "no [[verdict]]")
        return str(found[-1])

    @override
    def rows(self, item: Item, games: Sequence[Game], outcomes: Sequence[Outcome], context: Context) -> list[Row]:
        played = [
            {
                "score": outcome.label if isinstance(outcome, Verdict) else None,
                "judgment": outcome.text if isinstance(outcome, Verdict) else "",
                **failure_fields(outcome),
            }
            for outcome in outcomes
        ]
        return [
            {
                "question_id": item.key,
                "uid": item.key,
                "prompt": item.turns[0],
                "category": item.category,
                "judge": context.judge,
                "model": context.model,
                "baseline": context.baseline,
                "model_length": len(item.answers[MODEL][0]),
                "baseline_length": len(item.answers[BASELINE][0]),
                "games": played,
            }
        ]

    @override
    def record(self, row: Row, context: Context, where: str) -> Record:
        key, games = row.get("uid") or row.get("question_id"), row.get("games")
        if key is None or not isinstance(games, list) or not 1 <= len(games) <= 2:
            raise UserError(
                f"{where}: needs 'question_id' or 'uid', and one or two 'games'; is the file of preset {self.name}?"
            )
        return PairRecord(
            key=str(key),
            prompt=row.get("prompt") or "",
            category=row.get("category") or context.categories.get(str(key)),
            model=row.get("model") or context.model,
            baseline=row.get("baseline") or context.baseline,
            games=tuple(self._read_game(*place, where) for place in zip(games, _SHOWN, strict=False)),
            model_length=row.get("model_length"),
            baseline_length=row.get("baseline_length"),
        )

    def _read_game(self, game: object, first: First, where: str) -> GameRecord:
        if game is None:
            return GameRecord(value=None, first=first, failure="no verdict")
        if not isinstance(game, dict):
            raise UserError(
                f"{where}: a game should be an object or null, found {game!r:.40}; is it an Arena-Hard file?"
            )
        label, judgment = game.get("score"), game.get("judgment")
        text = judgment.get("answer") if isinstance(judgment, dict) else judgment
        shown = text if isinstance(text, str) else ""
        plain = self._mirrored.get(label, label) if isinstance(label, str) else None
        if plain not in _FOR_A:
            failure = game.get("failure") or "no verdict"
            return GameRecord(value=None, first=first, failure=failure, text=shown or game.get("detail") or "")
        for_a = _FOR_A[plain]
        return GameRecord(
            value=for_a if first == "model" else 1 - for_a,
            first=first,
            label=label,
            text=shown,
            weight=_STRONG if ">>" in plain else 1,
        )

    @override
    def figures(self, records: Sequence[Record], *, seed: int) -> list[Figure]:
        pairs = [record for record in records if isinstance(record, PairRecord)]
        counted = [
            [(game.value, game.weight) for game in record.games if game.value is not None]
            for record in pairs
            if self._counts(record)
        ]
        counted = [games for games in counted if games]
        wins_P = np.array([sum(value * weight for value, weight in games) for games in counted])
        weight_P = np.array([sum(weight for _, weight in games) for games in counted])
        share = float(wins_P.sum() / weight_P.sum())
        battle_N = np.array([value for games in counted for value, weight in games for _ in range(weight)])
        rounds = np.random.default_rng(seed).choice(battle_N, (_NUM_ROUNDS, len(battle_N))).mean(axis=1)
        low, high = np.quantile(rounds, self._quantiles)
        interval = ratio_interval(wins_P, weight_P, seed=seed)
        span = f"{self._quantiles[0]:.1%} to {self._quantiles[1]:.1%}"
        return [
            Figure(
                name="win_rate",
                value=100 * share,
                low=100 * interval.low,
                high=100 * interval.high,
                note="Bradley-Terry, strong verdicts threefold; 95% over prompts",
            ),
            Figure(
                name="win_rate_over_battles",
                value=100 * share,
                low=100 * float(low),
                high=100 * float(high),
                note=f"upstream's bootstrap: {_NUM_ROUNDS} resamples of battles, {span}",
            ),
            Figure(name="n_battles", value=len(battle_N)),
            *_rating(share),
        ]

    def _counts(self, record: PairRecord) -> bool:
        return True


class ArenaHard2Preset(ArenaHardPreset):
    """Arena-Hard v2.0: the last verdict counts, single brackets too; a prompt without both verdicts is left out."""

    name = "arena_hard_2"
    judge_model = "gpt-4.1"
    _quantiles = (0.05, 0.95)
    _mirrored = _MIRRORED
    _patterns = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))

    @override
    def _label(self, text: str, *, takes_last: bool) -> str:
        for pattern in self._patterns:
            found = [label for label in pattern.findall(text.upper()) if label]
            if found:
                return str(found[-1])
        raise NoVerdictError("no [[verdict]]")

    @override
    def _counts(self, record: PairRecord) -> bool:
        return record.is_complete

    @override
    def figures(self, records: Sequence[Record], *, seed: int) -> list[Figure]:
        """Return the figures over all prompts, and the win rate in each category: their baselines may differ."""
        found = super().figures(records, seed=seed)
        complete = [record for record in records if isinstance(record, PairRecord) and record.is_complete]
        categories = sorted({record.category for record in complete if record.category is not None})
        if len(categories) > 1:
            for category in categories:
                of_category = [record for record in complete if record.category == category]
                win_rate = super().figures(of_category, seed=seed)[0]
                found.append(dataclasses.replace(win_rate, name=f"category {category}", note=""))
        return found


def _rating(share: float) -> list[Figure]:
    if share in (0.0, 1.0):
        return []  # infinite
    rating = _RATING_OF_BASELINE + _RATING_SCALE * math.log10(share / (1 - share))
    return [Figure(name="rating", value=rating, note=f"the baseline has {_RATING_OF_BASELINE:.0f}")]
