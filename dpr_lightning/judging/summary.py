"""Judgments of one model in figures: the preset's own, and what every pairwise preset is asked besides.

Shapes: P prompts, G games.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dpr_lightning.evaluation.statistics import share_estimate
from dpr_lightning.judging.preset import Preset, Record
from dpr_lightning.judging.records import GradeRecord, PairRecord

_MAX_BINS = 5
_MIN_PROMPTS_A_BIN = 10


def lost_prompts(records: Sequence[Record]) -> set[str]:
    """Return the keys of prompts that lack a verdict."""
    lost = set()
    for record in records:
        is_complete = record.is_complete if isinstance(record, PairRecord) else record.rating is not None
        if not is_complete:
            lost.add(record.key)
    return lost


def failures(records: Sequence[Record]) -> Counter[str]:
    """Return the number of games without a verdict, by kind."""
    found: Counter[str] = Counter()
    for record in records:
        kinds = [game.failure for game in record.games] if isinstance(record, PairRecord) else [record.failure]
        found.update(kind for kind in kinds if kind is not None)
    return found


def summarize(records: Sequence[Record], preset: Preset, *, seed: int) -> dict[str, Any]:
    """Return all figures of one model as plain JSON values.

    Args:
        records: Judgments of one model; at least one prompt has all its verdicts.
        preset: Has the official figures.
        seed: Of the intervals' resampling.
    """
    pairs = [record for record in records if isinstance(record, PairRecord)]
    whole = [record for record in pairs if record.is_complete]
    result: dict[str, Any] = {
        "model": records[0].model,
        "official": [asdict(figure) for figure in preset.figures(records, seed=seed)],
    }
    if whole:
        result |= {
            "baseline": _baseline(whole),
            "win_rate": _win_rate(whole, seed),
            "order": _order(whole, seed),
            "length": _lengths(whole, seed),
            "categories": _by(whole, lambda record: record.category, seed),
        }
    if isinstance(records[0], GradeRecord):
        result["num_ratings"] = sum(isinstance(record, GradeRecord) and record.rating is not None for record in records)
    return result


def _baseline(records: Sequence[PairRecord]) -> str:
    names = {record.baseline for record in records}
    return names.pop() if len(names) == 1 else f"{len(names)} models"


def _estimate(records: Sequence[PairRecord], shares: Sequence[float], seed: int) -> dict[str, Any]:
    """Return the mean over prompts: turns, and pairs with several baselines, go together."""
    place: dict[str, int] = {}
    index = [place.setdefault(record.key, len(place)) for record in records]
    return asdict(share_estimate(shares, prompt_index=index, seed=seed))


def _win_rate(records: Sequence[PairRecord], seed: int) -> dict[str, Any]:
    scores = [record.score for record in records]
    return {
        **_estimate(records, scores, seed),
        "wins": sum(score > 0.5 for score in scores),
        "ties": sum(score == 0.5 for score in scores),
        "losses": sum(score < 0.5 for score in scores),
    }


def _order(records: Sequence[PairRecord], seed: int) -> dict[str, Any]:
    """Return how often both orders of a pair agree, and how the judge leans to the place of an answer.

    ``consistency`` is over prompts judged in both orders: both games favour the same answer, or both are ties.
    ``first_shown`` is the mean preference for the answer shown first; one half is no bias. With both orders of every
    prompt each answer is first equally often; with one order drawn by chance it also holds that luck.
    """
    in_both: list[PairRecord] = []
    told: list[PairRecord] = []
    agrees, first = [], []
    for record in records:
        known = [game for game in record.games if game.value is not None and game.first != "unknown"]
        signs = {game.first: np.sign(game.value - 0.5) for game in known if game.value is not None}
        if len(signs) == 2:
            in_both.append(record)
            agrees.append(float(signs["model"] == signs["baseline"]))
        values = [game.value if game.first == "model" else 1 - game.value for game in known if game.value is not None]
        if values:
            told.append(record)
            first.append(sum(values) / len(values))
    return {
        "consistency": _estimate(in_both, agrees, seed) if agrees else None,
        "first_shown": _estimate(told, first, seed) if first else None,
    }


def _lengths(records: Sequence[PairRecord], seed: int) -> dict[str, Any] | None:
    """Return mean lengths in characters, and the win rate in bins of equally many prompts by length difference."""
    known = [r for r in records if r.model_length is not None and r.baseline_length is not None]
    if not known:
        return None
    model_P = np.array([record.model_length for record in known], dtype=np.float64)
    baseline_P = np.array([record.baseline_length for record in known], dtype=np.float64)
    difference_P = model_P - baseline_P
    order_P = np.argsort(difference_P, kind="stable")
    num_bins = max(1, min(_MAX_BINS, len(known) // _MIN_PROMPTS_A_BIN))
    bins = []
    for chosen in np.array_split(order_P, num_bins):
        bins.append(
            {
                "from": int(difference_P[chosen].min()),
                "to": int(difference_P[chosen].max()),
                **_estimate([known[n] for n in chosen], [known[n].score for n in chosen], seed),
            }
        )
    return {"model": float(model_P.mean()), "baseline": float(baseline_P.mean()), "bins": bins}


def _by(records: Sequence[PairRecord], group: Callable[[PairRecord], str | None], seed: int) -> list[Mapping[str, Any]]:
    names = sorted({name for record in records if (name := group(record)) is not None})
    if len(names) < 2:
        return []
    result: list[Mapping[str, Any]] = []
    for name in names:
        found = [record for record in records if group(record) == name]
        result.append({"category": name, **_estimate(found, [record.score for record in found], seed)})
    return result
