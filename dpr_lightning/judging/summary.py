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

MIN_CONSISTENCY = 0.6
"""Below this share of pairs whose two orders agree there is a warning."""
FIRST_SHOWN_RANGE = (0.4, 0.6)
"""Where the interval of the preference for the answer shown first leaves this there is a warning."""
_MAX_BINS = 5
_MIN_PROMPTS_A_BIN = 10


def lost_prompts(records: Sequence[Record]) -> set[str]:
    """Return the keys of prompts that lack a verdict, or the judgment of a turn that others have."""
    lost = set()
    turns: dict[tuple[str, str], set[int]] = {}
    for record in records:
        is_complete = record.is_complete if isinstance(record, PairRecord) else record.rating is not None
        if not is_complete:
            lost.add(record.key)
        turns.setdefault((record.key, _opponent(record)), set()).add(record.turn)
    all_turns = {record.turn for record in records}
    return lost | {key for (key, _), found in turns.items() if found != all_turns}


def repeated_prompts(records: Sequence[Record]) -> set[str]:
    """Return the keys of prompts that have two judgments of one turn against one baseline."""
    counts = Counter((record.key, record.turn, _opponent(record)) for record in records)
    return {key for (key, _, _), count in counts.items() if count > 1}


def _opponent(record: Record) -> str:
    return record.baseline if isinstance(record, PairRecord) else ""


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
        "warnings": [],
    }
    if whole:
        order, warnings = _order(whole, seed)
        result |= {
            "baseline": _baseline(whole),
            "win_rate": _win_rate(whole, seed),
            "units": {"win_rate": "mean preference over games", "wins_ties_losses": _unit(whole)},
            "order": order,
            "warnings": warnings,
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


def _unit(records: Sequence[PairRecord]) -> str:
    """Return what is won, tied or lost as a whole, its games' mean above, at or below one half."""
    if any(record.turn != records[0].turn for record in records):
        return "turns"
    return "prompts" if len({record.key for record in records}) == len(records) else "pairs of answers"


def _order(records: Sequence[PairRecord], seed: int) -> tuple[dict[str, Any], list[str]]:
    """Return how often both orders of a pair agree, how the judge leans to the place of an answer, and warnings.

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
    consistency = _estimate(in_both, agrees, seed) if agrees else None
    first_shown = _estimate(told, first, seed) if first else None
    warnings = []
    if consistency is not None and consistency["value"] < MIN_CONSISTENCY:
        warnings.append(
            f"both orders agree in {consistency['value']:.1%} of the pairs, less than {MIN_CONSISTENCY:.0%}: the "
            "place of an answer decides more than the answer does, so the win rate says little; use another judge"
        )
    # Without a single pair in which the place mattered, a wide interval only says that the prompts are few.
    if first_shown is not None and any(value != 0.5 for value in first):
        low, high = first_shown["low"], first_shown["high"]
        if low < FIRST_SHOWN_RANGE[0] or high > FIRST_SHOWN_RANGE[1]:
            is_outside = high < FIRST_SHOWN_RANGE[0] or low > FIRST_SHOWN_RANGE[1]
            place = "first" if first_shown["value"] > 0.5 else "second"
            warnings.append(
                f"the judge {'prefers' if is_outside else 'may prefer'} the answer shown {place}: the preference for "
                f"the first is {first_shown['value']:.3f} [{low:.3f}, {high:.3f}], which should lie within "
                f"{FIRST_SHOWN_RANGE[0]} to {FIRST_SHOWN_RANGE[1]}; judge both orders of more "
                "prompts, or use another judge"
            )
    return {"consistency": consistency, "first_shown": first_shown}, warnings


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
