"""MT-Bench by single-answer grading, as FastChat's ``llm_judge`` does it: both turns, 1 to 10.

Math, reasoning and coding are judged against reference answers. A score is the mean of all ratings; a reply without a
rating is left out of it (upstream stores -1), and counted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.reasoning import final_answer
from dpr_lightning.evaluation.statistics import ratio_interval
from dpr_lightning.judging.chat import NoVerdictError, Reply, Request
from dpr_lightning.judging.games import MODEL, Game, Item, Outcome, Verdict
from dpr_lightning.judging.preset import Context, Figure, Preset, Record, Row, failure_fields, fill, number_field
from dpr_lightning.judging.records import GradeRecord

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are judged against reference answers."""
TEMPLATE_NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
"""Of FastChat's ``judge_prompts.jsonl``: first turn without and with reference, second turn likewise."""
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_FIRST_QUESTION, _QUESTIONS_A_CATEGORY = 81, 10
_LOWEST, _HIGHEST = 1.0, 10.0


class MTBenchPreset(Preset):
    """Ratings of one model's answers.

    Args:
        templates: ``system_prompt`` and ``prompt_template`` by name, see :data:`TEMPLATE_NAMES`.
    """

    name = "mt_bench"
    judge_model = "gpt-4"
    num_sides = 1
    needs_answers_in_turn = 2
    uses_references = True

    def __init__(self, *, templates: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.templates = templates or {}

    @override
    def games(self, item: Item) -> list[Game]:
        return [Game(item=item, shown=(MODEL,), turn=turn) for turn in range(len(item.turns))]

    def template_name(self, game: Game) -> str:
        """Return which template a game takes.

        Raises:
            UserError: Its category wants references that the item lacks.
        """
        return f"single-{'math-' if has_reference(game) else ''}v1{'-multi-turn' if game.turn else ''}"

    @override
    def request(self, game: Game) -> Request:
        item, answers = game.item, game.item.answers[MODEL]
        template = self.templates[self.template_name(game)]
        marks = {"question": item.turns[0], "answer": answers[0]}
        marks |= {f"question_{number}": text for number, text in enumerate(item.turns, start=1)}
        marks |= {f"answer_{number}": text for number, text in enumerate(answers, start=1)}
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
        matches = list(_RATINGS[0].finditer(answer.text)) or list(_RATINGS[1].finditer(answer.text))
        if not matches:
            raise NoVerdictError("no [[rating]]" + (" after the reasoning" if answer.has_reasoning else ""))
        # Upstream's rule is the first, and knows of no reasoning.
        match = matches[-1 if answer.has_reasoning else 0]
        rating = float(match[1])
        if not _LOWEST <= rating <= _HIGHEST:
            raise NoVerdictError(f"[[{match[1]}]] is no rating from 1 to 10")
        return Verdict(value=rating, label=match[1], text=reply.text)

    @override
    def rows(self, item: Item, games: Sequence[Game], outcomes: Sequence[Outcome], context: Context) -> list[Row]:
        return [
            {
                "question_id": int(item.key) if item.key.isdecimal() else item.key,
                "category": item.category,
                "model": context.model,
                "judge": [context.judge, self.template_name(game)],
                "user_prompt": self.request(game).messages[-1]["content"],
                "judgment": outcome.text if isinstance(outcome, Verdict) else "",
                "score": outcome.value if isinstance(outcome, Verdict) else -1,
                "turn": game.turn + 1,
                **failure_fields(outcome),
            }
            for game, outcome in zip(games, outcomes, strict=True)
        ]

    @override
    def record(self, row: Row, context: Context, where: str) -> Record:
        key, turn = row.get("question_id"), row.get("turn")
        if key is None or turn not in (1, 2) or "score" not in row:
            raise UserError(f"{where}: needs 'question_id', 'score', and 'turn' 1 or 2; is it a gpt-4_single.jsonl?")
        score = number_field(row, "score", where)
        rating = None if score is None or score == -1 else score
        return GradeRecord(
            key=str(key),
            model=row.get("model") or context.model,
            turn=turn,
            rating=rating,
            category=row.get("category") or context.categories.get(str(key)) or official_category(str(key)),
            prompt=row.get("user_prompt") or "",
            text=row.get("judgment") or row.get("detail") or "",
            failure=None if rating is not None else row.get("failure") or "no verdict",
        )

    @override
    def figures(self, records: Sequence[Record], *, seed: int) -> list[Figure]:
        grades = [record for record in records if isinstance(record, GradeRecord) and record.rating is not None]
        figures = [_mean("score", grades, seed, note="mean of both turns' ratings; 95% over questions")]
        for turn, name in ((1, "first_turn"), (2, "second_turn")):
            of_turn = [grade for grade in grades if grade.turn == turn]
            if of_turn:
                figures.append(_mean(name, of_turn, seed))
        found = {grade.category for grade in grades if grade.category is not None}
        for category in [*(name for name in _CATEGORIES if name in found), *sorted(found - set(_CATEGORIES))]:
            of_category = [grade for grade in grades if grade.category == category]
            figures.append(_mean(f"category {category}", of_category, seed))
        return figures


def has_reference(game: Game) -> bool:
    """Return whether a game is judged against reference answers.

    Raises:
        UserError: Its category wants references that the item lacks.
    """
    if game.item.category not in WITH_REFERENCE:
        return False
    if len(game.item.references) <= game.turn:
        raise UserError(
            f"--references: question {game.item.key} ({game.item.category}) has no reference answer for turn "
            f"{game.turn + 1}; give FastChat's reference_answer file"
        )
    return True


def _mean(name: str, grades: Sequence[GradeRecord], seed: int, *, note: str = "") -> Figure:
    ratings = [grade.rating for grade in grades if grade.rating is not None]
    by_question: dict[str, list[float]] = {}
    for grade, rating in zip(grades, ratings, strict=True):
        by_question.setdefault(grade.key, []).append(rating)
    interval = ratio_interval(
        [sum(found) for found in by_question.values()], [len(found) for found in by_question.values()], seed=seed
    )
    return Figure(name=name, value=sum(ratings) / len(ratings), low=interval.low, high=interval.high, note=note)


def official_category(key: str) -> str | None:
    """Return the category of one of MT-Bench's own questions, 81 to 160, ten to a category."""
    number = int(key) - _FIRST_QUESTION if key.isdecimal() else -1
    is_official = 0 <= number < _QUESTIONS_A_CATEGORY * len(_CATEGORIES)
    return _CATEGORIES[number // _QUESTIONS_A_CATEGORY] if is_official else None
