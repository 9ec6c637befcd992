"""How well sums and means of token rewards rank responses to one prompt, and how they go with length.

Shapes: N responses, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpr_lightning.analysis.frozen import ScoredResponses
from dpr_lightning.evaluation.association import correlation, rank_correlation
from dpr_lightning.evaluation.ranking import Pairs, ranking_accuracy
from dpr_lightning.terminal import Table

DENSE, COSTS, TEACHER, LENGTH = "r_hat", "min(r_hat, 0)", "log pi_SFT", "length"
"""Scores: the dense reward, its negative part alone, the teacher's log-probability, and the number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseScore:
    """One figure for each response."""

    score: str
    """Which token score."""
    alpha: str | None
    """Of which reference; None where none is in it."""
    of: str
    """``sum`` or ``mean`` over the response's tokens."""
    value_N: npt.NDArray[np.float64]
    """[N], nats, or tokens for the length."""


def response_scores(scored: ScoredResponses) -> list[ResponseScore]:
    """Return sum and mean of every token score of each response; the mean of a response without tokens is 0."""
    tokens: list[tuple[str, str | None, Tensor]] = [(TEACHER, None, scored.teacher_logp_BT)]
    for name in scored.reference_logp_BT:
        dense_BT = scored.dense(name)
        tokens += [(DENSE, name, dense_BT), (COSTS, name, dense_BT.clamp(max=0.0))]
    length_N = scored.lengths.double().numpy()
    found = []
    for score, alpha, value_BT in tokens:
        sum_N = value_BT.sum(dim=1, dtype=torch.float64).numpy()
        found.append(ResponseScore(score=score, alpha=alpha, of="sum", value_N=sum_N))
        found.append(ResponseScore(score=score, alpha=alpha, of="mean", value_N=sum_N / np.maximum(length_N, 1)))
    return [*found, ResponseScore(score=LENGTH, alpha=None, of="sum", value_N=length_N)]


def rank(scored: ScoredResponses, pairs: Pairs, *, seed: int) -> list[dict[str, Any]]:
    """Return, for every score of a response, how often it puts the better one first, and how it goes with length.

    Args:
        scored: The responses.
        pairs: Which of them is better than which.
        seed: Of the intervals' resampling.

    Returns:
        Rows with ``score``, ``alpha``, ``of``, ``accuracy`` (None without pairs) with ``low`` and ``high`` (95% over
        prompts), and ``pearson`` and ``spearman`` with the length over all responses.
    """
    length_N = scored.lengths.double().numpy()
    rows = []
    for found in response_scores(scored):
        accuracy = ranking_accuracy(found.value_N, pairs, seed=seed)
        rows.append(
            {
                "score": found.score,
                "alpha": found.alpha,
                "of": found.of,
                "accuracy": None if math.isnan(accuracy.value) else accuracy.value,
                "low": accuracy.low,
                "high": accuracy.high,
                "pearson": correlation(found.value_N, length_N),
                "spearman": rank_correlation(found.value_N, length_N),
            }
        )
    return rows


def ranking_table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """Return the table of what :func:`rank` found."""
    table = Table(title=title, title_justify="left")
    table.add_column("score of a response")
    for column in ("alpha", "better first", "95% over prompts", "with length: Pearson", "rank"):
        table.add_column(column, justify="right")
    for row in rows:
        of = "longer first" if row["score"] == LENGTH else f"{row['of']} of {row['score']}"
        accuracy = "no pairs" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        table.add_row(
            of,
            row["alpha"] or "",
            accuracy,
            f"[{row['low']:.3f}, {row['high']:.3f}]",
            f"{row['pearson']:+.2f}",
            f"{row['spearman']:+.2f}",
        )
    return table
