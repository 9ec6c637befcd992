"""Whether a token score finds the corrupted token of a response: top-1, top-3 and mean reciprocal rank.

Tokens are ranked from the most suspicious; of several corrupted tokens the first that is met counts. Tokens with equal
scores are put in random order and the exact mean over all orders is taken (to a rank it is the mid-rank), so a score
that says nothing gets exactly what chance gets. Shapes: B responses, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpr_lightning.analysis.frozen import ScoredResponses
from dpr_lightning.analysis.preferences import COSTS, DENSE, TEACHER
from dpr_lightning.evaluation.statistics import Estimate, mean_estimate, share_estimate
from dpr_lightning.terminal import Table

CENTRED, REFERENCE, ENTROPY, CHANCE = "r_hat - b(s)", "log pi_ref", "entropy", "chance"
"""Further scores: r_hat less its expectation b(s) under pi_SFT, the reference's log-probability, the teacher's entropy
(the highest is suspicious), and a random order."""

_TOP = 3


@dataclass(frozen=True, slots=True)
class Found:
    """How high the first corrupted token of one response stands."""

    top_1: float
    """Probability over the orders of ties that it is the first of all."""
    top_3: float
    """The same of the first three."""
    reciprocal_rank: float
    """Mean over the orders of ties."""


def locate(score_T: npt.NDArray[np.floating], is_corrupted_T: npt.NDArray[np.bool_]) -> Found:
    """Return how high the first corrupted token stands when the lowest score comes first.

    Args:
        score_T: [T] score of each token of one response.
        is_corrupted_T: [T] bool, at least one True.

    Raises:
        ValueError: No token is corrupted, or a score is NaN.
    """
    if not is_corrupted_T.any():
        raise ValueError("no token is corrupted")
    if np.isnan(score_T).any():
        raise ValueError("a score is NaN: it has no rank")
    lowest = score_T[is_corrupted_T].min()
    is_tied_T = score_T == lowest
    num_before = int((score_T < lowest).sum())
    return _first_of(num_before, int(is_tied_T.sum()), int((is_tied_T & is_corrupted_T).sum()))


def chance(num_tokens: int, num_corrupted: int) -> Found:
    """Return what a random order of ``num_tokens`` tokens gives, exactly."""
    return _first_of(0, num_tokens, num_corrupted)


def _first_of(num_before: int, num_tied: int, num_corrupted: int) -> Found:
    """Average over the orders of ``num_tied`` tokens, ``num_corrupted`` of them corrupted, behind ``num_before``."""
    ranks = range(1, num_tied - num_corrupted + 2)
    # The first corrupted one is at place j of the tied: all others of its kind lie behind it.
    share = [math.comb(num_tied - j, num_corrupted - 1) / math.comb(num_tied, num_corrupted) for j in ranks]
    at = [(num_before + j, p) for j, p in zip(ranks, share, strict=True)]
    return Found(
        top_1=sum(p for rank, p in at if rank <= 1),
        top_3=sum(p for rank, p in at if rank <= _TOP),
        reciprocal_rank=sum(p / rank for rank, p in at),
    )


def token_scores(scored: ScoredResponses) -> list[tuple[str, str | None, Tensor]]:
    """Return name, alpha and [B, T] value of every token score; the lowest is the most suspicious."""
    found: list[tuple[str, str | None, Tensor]] = []
    for name, reference_logp_BT in scored.reference_logp_BT.items():
        dense_BT = scored.dense(name)
        found += [(DENSE, name, dense_BT), (COSTS, name, dense_BT.clamp(max=0.0))]
        if name in scored.expected_dense_BT:
            found.append((CENTRED, name, dense_BT - scored.expected_dense_BT[name]))
        found.append((REFERENCE, name, reference_logp_BT))
    return [*found, (TEACHER, None, scored.teacher_logp_BT), (ENTROPY, None, -scored.teacher_entropy_BT)]


def localise(scored: ScoredResponses, is_corrupted: Sequence[Sequence[bool]], *, seed: int) -> list[dict[str, Any]]:
    """Return, for every token score, how often it finds the corrupted token.

    Args:
        scored: The corrupted responses.
        is_corrupted: Which tokens of each are corrupted, EOS included.
        seed: Of the intervals' resampling.

    Returns:
        Rows with ``score``, ``alpha``, and estimates with 95% intervals over responses: ``top_1``, ``top_3``, ``mrr``;
        ``top_1_so_far``, the same among the tokens up to and including the last corrupted one; and
        ``top_1_less_teacher``, the paired difference of ``top_1`` to that of log pi_SFT. The row of chance is exact.
    """
    marks = [np.asarray(row, dtype=np.bool_) for row in is_corrupted]
    rows, top_1_by_score = [], {}
    for score, alpha, value_BT in token_scores(scored):
        whole, so_far = [], []
        for row_T, mask_T, mark_T in zip(value_BT, scored.response_mask_BT, marks, strict=True):
            score_T = row_T[mask_T].numpy()
            end = int(np.flatnonzero(mark_T)[-1]) + 1
            whole.append(locate(score_T, mark_T))
            so_far.append(locate(score_T[:end], mark_T[:end]))
        rows.append({"score": score, "alpha": alpha, **_estimates(whole, so_far, seed)})
        top_1_by_score[score, alpha] = np.array([found.top_1 for found in whole])
    for row in rows:
        if row["score"] != TEACHER:
            difference = top_1_by_score[row["score"], row["alpha"]] - top_1_by_score[TEACHER, None]
            row["top_1_less_teacher"] = asdict(mean_estimate(difference, seed=seed))
    by_chance = [chance(len(mark_T), int(mark_T.sum())) for mark_T in marks]
    ends = [int(np.flatnonzero(mark_T)[-1]) + 1 for mark_T in marks]
    so_far_by_chance = [chance(end, int(mark_T.sum())) for end, mark_T in zip(ends, marks, strict=True)]
    return [*rows, {"score": CHANCE, "alpha": None, **_exact(by_chance, so_far_by_chance)}]


def _estimates(whole: Sequence[Found], so_far: Sequence[Found], seed: int) -> dict[str, Any]:
    values = {
        "top_1": [found.top_1 for found in whole],
        "top_3": [found.top_3 for found in whole],
        "mrr": [found.reciprocal_rank for found in whole],
        "top_1_so_far": [found.top_1 for found in so_far],
    }
    return {name: asdict(share_estimate(value, seed=seed)) for name, value in values.items()}


def _exact(whole: Sequence[Found], so_far: Sequence[Found]) -> dict[str, Any]:
    means = {
        "top_1": np.mean([found.top_1 for found in whole]),
        "top_3": np.mean([found.top_3 for found in whole]),
        "mrr": np.mean([found.reciprocal_rank for found in whole]),
        "top_1_so_far": np.mean([found.top_1 for found in so_far]),
    }
    # Nothing is estimated: the expectation given lengths and numbers of corrupted tokens.
    return {name: asdict(Estimate(float(m), float(m), float(m), len(whole))) for name, m in means.items()}


def localisation_table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """Return the table of what :func:`localise` found."""
    table = Table(title=title, title_justify="left")
    table.add_column("token score")
    for column in ("alpha", "top-1", "less log pi_SFT", "top-3", "MRR", "top-1 so far"):
        table.add_column(column, justify="right")
    for row in rows:
        less = row.get("top_1_less_teacher")
        shown = [
            f"{row[name]['value']:.3f}" if row["score"] == CHANCE else _show(row[name])
            for name in ("top_1", "top_3", "mrr", "top_1_so_far")
        ]
        difference = f"{less['value']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}]" if less else ""
        table.add_row(row["score"], row["alpha"] or "", shown[0], difference, *shown[1:])
    return table


def _show(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
