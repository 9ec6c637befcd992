"""MT-Bench by pairs, as FastChat's ``llm_judge`` does it: both orders of both turns.

A turn is won where both games name the same model; a tie in the first game, or two games that disagree, is a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.reasoning import final_answer
from dpr_lightning.judging.chat import NoVerdictError, Reply, Request
from dpr_lightning.judging.games import BASELINE, MODEL, Failure, Game, Item, Outcome, Verdict
from dpr_lightning.judging.mt_bench import has_reference, official_category
from dpr_lightning.judging.preset import Context, Figure, Preset, Record, Row, fill, value_for_model
from dpr_lightning.judging.records import GameRecord, PairRecord

PAIR_TEMPLATE_NAMES = ("pair-v2", "pair-math-v1", "pair-v2-multi-turn", "pair-math-v1-multi-turn")
"""Of FastChat's ``judge_prompts.jsonl``: first turn without and with reference, second turn likewise."""
_VERDICTS = (("[[A]]", 1.0), ("[[B]]", 0.0), ("[[C]]", 0.5))
"""In upstream's order: the first that occurs in the reply counts; after reasoning, the one that stands last."""
_WINNERS = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5}
_WINNER_OF_VALUE = {value: name for name, value in _WINNERS.items()}


class MTBenchPairPreset(Preset):
    """Win rates of two models' answers.

    Args:
        templates: ``system_prompt`` and ``prompt_template`` by name, see :data:`PAIR_TEMPLATE_NAMES`.
    """

    name = "mt_bench_pair"
    judge_model = "gpt-4"
    needs_answers_in_turn = 2
    uses_references = True

    def __init__(self, *, templates: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.templates = templates or {}

    @override
    def games(self, item: Item) -> list[Game]:
        return [
            Game(item=item, shown=shown, turn=turn)
            for turn in range(len(item.turns))
            for shown in ((MODEL, BASELINE), (BASELINE, MODEL))
        ]

    def template_name(self, game: Game) -> str:
        """Return which template a game takes.

        Raises:
            UserError: Its category wants references that the item lacks.
        """
        return f"pair-{'math-v1' if has_reference(game) else 'v2'}{'-multi-turn' if game.turn else ''}"

    @override
    def request(self, game: Game) -> Request:
        item = game.item
        template = self.templates[self.template_name(game)]
        a, b = (item.answers[side] for side in game.shown)
        marks = {"question": item.turns[0], "answer_a": a[0], "answer_b": b[0]}
        marks |= {f"question_{number}": text for number, text in enumerate(item.turns, start=1)}
        marks |= {f"answer_a_{number}": text for number, text in enumerate(a, start=1)}
        marks |= {f"answer_b_{number}": text for number, text in enumerate(b, start=1)}
        marks |= {f"ref_answer_{number}": text for number, text in enumerate(item.references, start=1)}
        return Request(
            messages=(
                {"role": "system", "content": template["system_prompt"]},
                {"role": "user", "content": fill(template["prompt_template"], **marks)},
            ),
            decoding={"temperature": 0, "max_tokens": 2048},
        )

    @override
    def parse(self, reply: Reply) -> Verdict:
        answer = final_answer(reply.text)
        found = [(mark, value) for mark, value in _VERDICTS if mark in answer.text]
        if not found:
            raise NoVerdictError("no [[A]], [[B]] or [[C]]" + (" after the reasoning" if answer.has_reasoning else ""))
        mark, value = (
            max(found, key=lambda verdict: answer.text.rfind(verdict[0])) if answer.has_reasoning else found[0]
        )
        return Verdict(value=value, label=mark, text=reply.text)

    @override
    def rows(self, item: Item, games: Sequence[Game], outcomes: Sequence[Outcome], context: Context) -> list[Row]:
        rows: list[Row] = []
        for start in range(0, len(games), 2):
            game = games[start]
            row: dict[str, object] = {
                "question_id": int(item.key) if item.key.isdecimal() else item.key,
                "category": item.category,
                "model_1": context.model,
                "model_2": context.baseline,
                "judge": [context.judge, self.template_name(game)],
                "turn": game.turn + 1,
                "model_1_length": len(item.answers[MODEL][game.turn]),
                "model_2_length": len(item.answers[BASELINE][game.turn]),
            }
            for number in (1, 2):
                game, outcome = games[start + number - 1], outcomes[start + number - 1]
                winner = _WINNER_OF_VALUE[value_for_model(game, outcome)] if isinstance(outcome, Verdict) else "error"
                row |= {
                    f"g{number}_winner": winner,
                    f"g{number}_user_prompt": self.request(game).messages[-1]["content"],
                    f"g{number}_judgment": outcome.text if isinstance(outcome, Verdict) else "",
                }
                if isinstance(outcome, Failure):
                    row |= {f"g{number}_failure": outcome.kind, f"g{number}_detail": outcome.detail}
            rows.append(row)
        return rows

    @override
    def records(self, row: Row, context: Context, where: str) -> list[Record]:
        """Return the row as seen by the model that is not the chosen baseline; by either where none is chosen."""
        first, second = row.get("model_1"), row.get("model_2")
        if context.chosen_baseline is None:
            return [
                self._record(row, is_swapped=is_swapped, context=context, where=where) for is_swapped in (False, True)
            ]
        if context.chosen_baseline not in (first, second):
            return []
        is_swapped = first == context.chosen_baseline
        return [self._record(row, is_swapped=is_swapped, context=context, where=where)]

    @override
    def record(self, row: Row, context: Context, where: str) -> Record:
        return self._record(row, is_swapped=False, context=context, where=where)

    def _record(self, row: Row, *, is_swapped: bool, context: Context, where: str) -> PairRecord:
        key, turn, models = row.get("question_id"), row.get("turn", 1), (row.get("model_1"), row.get("model_2"))
        winners = [row.get("g1_winner"), row.get("g2_winner")]
        is_known = all(isinstance(winner, str) and winner in (*_WINNERS, "error") for winner in winners)
        if key is None or turn not in (1, 2) or not is_known or not all(isinstance(name, str) for name in models):
            raise UserError(
                f"{where}: needs 'question_id', 'model_1', 'model_2', and 'g1_winner' and 'g2_winner' of model_1, "
                "model_2, tie and error; is it a gpt-4_pair.jsonl?"
            )
        games = []
        for number, winner in enumerate(winners, start=1):
            value = _WINNERS.get(str(winner))
            # Model 1 is shown first in the first game.
            is_model_first = (number == 1) != is_swapped
            games.append(
                GameRecord(
                    value=None if value is None else 1 - value if is_swapped else value,
                    first="model" if is_model_first else "baseline",
                    label=str(winner),
                    text=row.get(f"g{number}_judgment") or row.get(f"g{number}_detail") or "",
                    failure=None if value is not None else row.get(f"g{number}_failure") or "no verdict",
                )
            )
        names, lengths = list(models), [row.get("model_1_length"), row.get("model_2_length")]
        if is_swapped:
            names, lengths = names[::-1], lengths[::-1]
        return PairRecord(
            key=str(key),
            turn=turn,
            model=str(names[0]),
            baseline=str(names[1]),
            games=tuple(games),
            prompt=row.get("g1_user_prompt") or "",
            category=row.get("category") or context.categories.get(str(key)) or official_category(str(key)),
            model_length=lengths[0],
            baseline_length=lengths[1],
        )

    @override
    def figures(self, records: Sequence[Record], *, seed: int) -> list[Figure]:
        whole = [record for record in records if isinstance(record, PairRecord) and record.is_complete]
        outcome_N = np.array([_outcome(record) for record in whole])
        wins, losses = int((outcome_N == 1).sum()), int((outcome_N == 0).sum())
        num = len(outcome_N)
        return [
            Figure(name="win_rate_adjusted", value=float(outcome_N.mean()), note="of turns, a tie is half a win"),
            Figure(name="win_rate", value=wins / num, note="both games won"),
            Figure(name="loss_rate", value=losses / num),
            Figure(name="win", value=wins),
            Figure(name="loss", value=losses),
            Figure(name="tie", value=num - wins - losses),
        ]


def _outcome(record: PairRecord) -> float:
    first, second = (game.value for game in record.games)
    return 0.5 if first is None or first != second else first
