"""What two models' answers to the same prompts come to: figures of each, and the difference, paired by prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.metrics import ResponseMetric, grade_rows
from dpr_lightning.evaluation.statistics import mean_estimate, win_rate

Rows = list[dict[str, Any]]


def read_rows(path: Path) -> Rows:
    """Return the rows of a file that ``generate`` wrote."""
    # Not splitlines: JSON leaves other line breaks than \n as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def describe(rows: Rows) -> dict[str, float]:
    """Return what a file of answers looks like: tokens, truncated share, empty share."""
    texts = [row["response"] if isinstance(row["response"], str) else "".join(row["response"]) for row in rows]
    return {
        "num_responses": len(rows),
        "tokens": float(np.mean([row["num_tokens"] for row in rows])),
        "truncated_share": float(np.mean([row["is_truncated"] for row in rows])),
        "empty_share": float(np.mean([not text.strip() for text in texts])),
    }


def compare_by_metric(metric: ResponseMetric, policy: Rows, teacher: Rows, *, seed: int) -> dict[str, Any]:
    """Return both models' figures, and how the policy's differ, with 95% bootstrap intervals over prompts.

    Args:
        metric: Grades single answers.
        policy: Rows of the one model.
        teacher: Rows of the other, to the same prompts.
        seed: Of the resampling.

    Raises:
        UserError: The two files answer different prompts.
    """
    sides = {"policy": policy, "teacher": teacher}
    keys = {name: [(row["row"], row["sample"]) for row in rows] for name, rows in sides.items()}
    if keys["policy"] != keys["teacher"]:
        raise UserError("the two models answered different prompts; delete both files of answers and run it again")
    figures = {name: _grade(metric, rows, seed) for name, rows in sides.items()}
    found = {}
    for number, name in enumerate(metric.figures):
        score = {side: _scores(metric, rows, number) for side, rows in sides.items()}
        prompt_index = [row["row"] for row in policy]
        difference_N = np.array(score["policy"]) - np.array(score["teacher"])
        found[name] = {
            "policy": asdict(figures["policy"][name]),
            "teacher": asdict(figures["teacher"][name]),
            "difference": asdict(mean_estimate(difference_N, prompt_index=prompt_index, seed=seed)),
            "win_rate": asdict(win_rate(score["policy"], score["teacher"], prompt_index=prompt_index, seed=seed)),
        }
    return found


def _grade(metric: ResponseMetric, rows: Rows, seed: int) -> dict[str, Any]:
    return grade_rows(
        metric,
        [row["source"] for row in rows],
        [row["response"] for row in rows],
        [row["is_truncated"] for row in rows],
        [row["row"] for row in rows],
        seed=seed,
    )


def _scores(metric: ResponseMetric, rows: Rows, number: int) -> list[float]:
    """Return the share that each answer reached of one figure."""
    grades = [metric.grade(row["source"], row["response"], is_truncated=row["is_truncated"])[number] for row in rows]
    return [reached / possible for reached, possible in grades]


def compare_ratings(
    policy: Sequence[dict[str, Any]], teacher: Sequence[dict[str, Any]], *, seed: int
) -> dict[str, Any]:
    """Return the mean rating of both models, and the difference over the questions that both have all ratings of.

    Args:
        policy: Judgments of the one model as MT-Bench writes them: ``question_id``, ``turn``, ``score`` (-1 for none).
        teacher: Of the other.
        seed: Of the resampling.
    """
    means = [_rating_by_question(side) for side in (policy, teacher)]
    both = [key for key in means[0] if key in means[1]]
    if not both:
        return {"num_questions": 0}
    score_2P = np.array([[side[key] for key in both] for side in means])
    return {
        "num_questions": len(both),
        "policy": asdict(mean_estimate(score_2P[0], seed=seed)),
        "teacher": asdict(mean_estimate(score_2P[1], seed=seed)),
        "difference": asdict(mean_estimate(score_2P[0] - score_2P[1], seed=seed)),
    }


def _rating_by_question(judgments: Sequence[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for judgment in judgments:
        found.setdefault(str(judgment["question_id"]), []).append(float(judgment["score"]))
    return {key: float(np.mean(scores)) for key, scores in found.items() if min(scores) >= 0}
