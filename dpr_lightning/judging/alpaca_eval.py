"""AlpacaEval 1 and 2 as the ``alpaca-eval`` package defines them (version 0.6.6, tatsu-lab/alpaca_eval).

``output_1`` is the baseline's, ``output_2`` the model's answer, and ``preference`` runs from 1 (the baseline is
better) to 2 (the model is). Each pair is judged once, in an order drawn by Python's generator seeded with
``is_switched_outputs``, the instruction and the annotator's seed 0. Equal answers are 1.5 without a question.

The package's code does not import beside a current setuptools (it wants ``pkg_resources``), so only its template
files are read, where it is installed.
"""

from __future__ import annotations

import ast
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from dpr_lightning.evaluation.reasoning import final_answer
from dpr_lightning.judging.chat import NoVerdictError, Reply, Request
from dpr_lightning.judging.games import BASELINE, MODEL, Game, Item, Outcome, Verdict
from dpr_lightning.judging.length_control import LengthControl
from dpr_lightning.judging.preset import (
    Context,
    Figure,
    Preset,
    Record,
    Row,
    failure_fields,
    fill,
    number_field,
    text_field,
    value_for_model,
)
from dpr_lightning.judging.records import First, GameRecord, PairRecord

_SEED = 0
_ROUNDING = 1e-6
"""Stored preferences have ten decimals."""


class AlpacaEvalPreset(Preset):
    """What both versions share; figures are in percent as upstream's.

    Args:
        template: Messages with ``{instruction}``, ``{output_1}`` and ``{output_2}``.
        length_control: Computes the length-controlled win rate; None leaves it out.
    """

    decoding: ClassVar[Mapping[str, Any]]
    template_file: ClassVar[str]
    """Below the package's ``evaluators_configs``."""

    def __init__(
        self, *, template: Sequence[Mapping[str, str]] = (), length_control: LengthControl | None = None
    ) -> None:
        self.template = tuple(template)
        self.length_control = length_control

    @override
    def games(self, item: Item) -> list[Game]:
        generator = random.Random(f"is_switched_outputs{item.turns[0]}{_SEED}")
        is_switched = generator.choices([False, True], k=1)[0]
        return [Game(item=item, shown=(MODEL, BASELINE) if is_switched else (BASELINE, MODEL))]

    @override
    def settled(self, game: Game) -> Verdict | None:
        model, baseline = game.item.answers
        return Verdict(value=0.5, label="1.5", text="the answers are equal") if model == baseline else None

    @override
    def request(self, game: Game) -> Request:
        first, second = (game.item.answers[side][0] for side in game.shown)
        marks = {"instruction": game.item.turns[0], "output_1": first, "output_2": second}
        messages = tuple({**message, "content": fill(message["content"], **marks)} for message in self.template)
        return Request(messages=messages, decoding=self.decoding)

    @override
    def rows(self, item: Item, games: Sequence[Game], outcomes: Sequence[Outcome], context: Context) -> list[Row]:
        (game,), (outcome,) = games, outcomes
        found = outcome if isinstance(outcome, Verdict) else None
        return [
            {
                "instruction": item.turns[0],
                "output_1": item.answers[BASELINE][0],
                "generator_1": context.baseline,
                "dataset": item.category,
                "output_2": item.answers[MODEL][0],
                "generator_2": context.model,
                "annotator": context.judge,
                "preference": 1 + value_for_model(game, found) if found else None,
                "first": "model" if game.shown[0] == MODEL else "baseline",
                "verdict": found.label if found else None,
                **failure_fields(outcome),
            }
        ]

    @override
    def record(self, row: Row, context: Context, where: str) -> Record:
        preference = number_field(row, "preference", where)
        # Older files write 0 for a draw. Upstream leaves out what lies outside of 1 to 2; here it is counted too.
        value = 0.5 if preference == 0 else preference - 1 if preference is not None else None
        is_preference = value is not None and 0 <= value <= 1
        failure = None if is_preference else row.get("failure") or ("no verdict" if value is None else "no preference")
        game = GameRecord(
            value=value if is_preference else None,
            first=_first_shown(row, preference),
            label=row.get("verdict") or (None if preference is None else f"{preference:g}"),
            text=row.get("detail") or "",
            failure=failure,
        )
        instruction = text_field(row, "instruction", where)
        return PairRecord(
            key=instruction,
            prompt=instruction,
            category=row.get("dataset"),
            model=row.get("generator_2") or context.model,
            baseline=row.get("generator_1") or context.baseline,
            games=(game,),
            model_length=len(text_field(row, "output_2", where)),
            baseline_length=len(text_field(row, "output_1", where)),
        )

    @override
    def figures(self, records: Sequence[Record], *, seed: int) -> list[Figure]:
        pairs = [record for record in records if isinstance(record, PairRecord)]
        value_P = np.array([record.score for record in pairs if record.is_complete])
        num = len(value_P)
        figures = [
            Figure(name="win_rate", value=100 * float(value_P.mean()), note="weighted by preference"),
            Figure(name="discrete_win_rate", value=50 * float((np.sign(value_P - 0.5) + 1).mean())),
            Figure(name="n_wins", value=int((value_P > 0.5).sum())),
            Figure(name="n_wins_base", value=int((value_P < 0.5).sum())),
            Figure(name="n_draws", value=int((value_P == 0.5).sum())),
            Figure(name="n_total", value=num),
        ]
        if num > 1:
            figures.insert(1, Figure(name="standard_error", value=100 * float(value_P.std(ddof=1)) / math.sqrt(num)))
        if self.length_control is not None:
            figures += self.length_control.figures(pairs)
        return figures


class AlpacaEval1Preset(AlpacaEvalPreset):
    """AlpacaEval 1: ``alpaca_eval_gpt4``, a ranking of two models; its baseline is text-davinci-003."""

    name = "alpaca_eval_1"
    judge_model = "gpt-4"
    decoding: ClassVar[Mapping[str, Any]] = {"temperature": 0, "max_tokens": 100, "top_p": 1.0}
    template_file = "alpaca_eval_gpt4/alpaca_eval.txt"

    @override
    def parse(self, reply: Reply) -> Verdict:
        try:
            ranks = [
                entry["rank"]
                for entry in ast.literal_eval(final_answer(reply.text).text.strip())
                if entry["model"] == "model_1"
            ]
        except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
            raise NoVerdictError("no list of models and ranks") from None
        if not ranks or isinstance(ranks[0], bool) or ranks[0] not in (1, 2):
            raise NoVerdictError("no rank 1 or 2 of model_1")
        return Verdict(value=2.0 - ranks[0], label=f"model_1 ranks {ranks[0]}", text=reply.text)


class AlpacaEval2Preset(AlpacaEvalPreset):
    """AlpacaEval 2: ``weighted_alpaca_eval_gpt4_turbo``, the first token's probabilities; its baseline is GPT-4 Turbo.

    The preference for the answer shown first is P(m) / (P(m) + P(M)); a token not among the five likeliest has 0.
    """

    name = "alpaca_eval_2"
    judge_model = "gpt-4-1106-preview"
    decoding: ClassVar[Mapping[str, Any]] = {
        "temperature": 1,
        "max_tokens": 1,
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    template_file = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"

    @override
    def parse(self, reply: Reply) -> Verdict:
        value = _share_of_first(reply.first_token_logprobs or {})
        if value is None:
            raise NoVerdictError("neither m nor M among the first token's log-probabilities")
        return Verdict(value=value, label=reply.text.strip(), text=reply.text)


def _share_of_first(logprobs: Mapping[str, float]) -> float | None:
    first, second = logprobs.get("m", -math.inf), logprobs.get("M", -math.inf)
    highest = max(first, second)
    if highest == -math.inf:
        return None
    return math.exp(first - highest) / (math.exp(first - highest) + math.exp(second - highest))


def _first_shown(row: Row, preference: float | None) -> First:
    """Return whose answer was shown first: as the row says, or as its raw completion and preference agree."""
    first = row.get("first")
    if first in ("model", "baseline"):
        return "model" if first == "model" else "baseline"
    try:
        tops = row["raw_completion"]["logprobs"]["content"][0]["top_logprobs"]
        share = _share_of_first({top["token"]: top["logprob"] for top in tops})
    except (KeyError, TypeError, IndexError):
        return "unknown"
    if share is None or preference is None or abs(share - 0.5) < _ROUNDING:
        return "unknown"
    if abs(1 + share - preference) < _ROUNDING:
        return "model"
    return "baseline" if abs(2 - share - preference) < _ROUNDING else "unknown"
