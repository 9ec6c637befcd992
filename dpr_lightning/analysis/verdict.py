"""Whether DPR is expected to help, and with which reference and form of the reward: an explicit, careful rule.

A candidate is one reference in one form, the reward as it is or cut at 0 from above. It is held to these tests, each
by its 95% interval: passed where the whole interval lies beyond the threshold, failed where none of it does, open
otherwise.

1. *ranking*: the summed reward puts the better of two responses first in at least ``MIN_RANKING`` of pairs.
2. *gain*: of what the best of a prompt's responses is better than a random one, the response that the summed reward
   picks keeps at least ``MIN_GAIN_SHARE`` (where responses have a quality of their own; preferences have none).
3. *length*: only for the reward as it is: within prompts its sum does not go with length by more than
   ``MAX_LENGTH_CORRELATION`` either way. Cut at 0 it pays for no token.

DPR is *expected* to help where a candidate passes all of its tests, *not expected* where every candidate fails one,
and *cannot tell* otherwise. Nor can the rule tell where fewer than ``MIN_PROMPTS`` prompts have a pair, nor a good
result from demonstrations against samples: the teacher was trained on demonstrations, so what separates them from its
samples need not be what is good. A bad result there counts. Where the best of a prompt's samples is hardly better than
a random one there is nothing to gain, whatever the reward.

Among the candidates that pass, those cut at 0 come first: as it is, the reward was over-optimised in every setting of
``docs/demo.md``. Then the greater gain counts, else the greater ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dpr_lightning.evaluation.ranking import RankingAccuracy

MIN_RANKING = 0.7
"""Runs of ``docs/demo.md`` whose reward ranked 0.36 to 0.68 of pairs rightly did not gain, those from 0.81 up did."""
MIN_GAIN_SHARE = 0.5
"""Share of the headroom. Cut at 0 it was 0.56 to 0.80 in the demo's settings where DPR gained, and 0.03 to 0.15 where
SFT had saturated and DPR lost, although the ranking reached 0.7 there; half lies between."""
MIN_HEADROOM = 0.05
"""Best of n by the quality itself, less random, on its scale: DPR sharpens what the teacher can already do."""
MAX_LENGTH_CORRELATION = 0.1
"""Pearson's, of the summed reward and the length within prompts: beyond it, longer or shorter answers are paid for."""
MIN_PROMPTS = 30
"""Prompts with a pair of which one is better; with fewer the bootstrap's interval is too narrow."""

Status = Literal["expected", "not expected", "cannot tell"]
Outcome = Literal["passed", "failed", "open"]
Evidence = Literal["verifier", "judge", "demonstrations"]
"""What said which response is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What was measured of one reference in one form."""

    alpha: str
    clip_high: float | None
    ranking: RankingAccuracy
    """Of the summed reward."""
    gain: tuple[float, float, float] | None
    """Best of n by the summed reward less random: value and both ends of its interval; None without a quality."""
    length_correlation: float
    """Pearson's, of the summed reward and the length within prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do, and why."""

    status: Status
    """Whether DPR is expected to lift what the teacher samples."""
    alpha: str | None
    """The reference to take; None unless expected."""
    clip_high: float | None
    """``model.reward.clip_high`` to set; None is the reward as it is."""
    reason: str
    """One sentence."""
    evidence: Evidence
    checks: list[dict[str, Any]]
    """Outcome of each test of each candidate."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the thresholds among them."""
        thresholds = {
            "min_ranking": MIN_RANKING,
            "min_gain_share": MIN_GAIN_SHARE,
            "min_headroom": MIN_HEADROOM,
            "max_length_correlation": MAX_LENGTH_CORRELATION,
            "min_prompts": MIN_PROMPTS,
        }
        return {**asdict(self), "thresholds": thresholds}


def judge(
    candidates: Sequence[Candidate], *, evidence: Evidence, headroom: tuple[float, float, float] | None
) -> Verdict:
    """Apply the rule of this module.

    Args:
        candidates: At least one.
        evidence: What said which response is better.
        headroom: Best of n by the quality itself less random, value and both ends; None without a quality.
    """
    wanted_gain = 0.0 if headroom is None else MIN_GAIN_SHARE * headroom[0]
    checks = [_check(candidate, wanted_gain) for candidate in candidates]
    described = [
        {"alpha": candidate.alpha, "clip_high": candidate.clip_high, **outcomes}
        for candidate, outcomes in zip(candidates, checks, strict=True)
    ]

    def verdict(status: Status, reason: str, chosen: Candidate | None = None) -> Verdict:
        return Verdict(
            status=status,
            alpha=None if chosen is None else chosen.alpha,
            clip_high=None if chosen is None else chosen.clip_high,
            reason=reason,
            evidence=evidence,
            checks=described,
        )

    num_prompts = candidates[0].ranking.num_prompts
    if headroom is not None and headroom[2] < MIN_HEADROOM:
        return verdict(
            "not expected",
            f"The best of a prompt's samples is only {headroom[0]:.3f} better than a random one, so there is next to "
            "nothing to gain.",
        )
    if num_prompts < MIN_PROMPTS:
        return verdict(
            "cannot tell",
            f"Only {num_prompts} prompts have a better and a worse response; at least {MIN_PROMPTS} are needed: give "
            "more prompts, or more samples of each.",
        )
    passing = [c for c, outcomes in zip(candidates, checks, strict=True) if set(outcomes.values()) == {"passed"}]
    best = max(passing or candidates, key=_preference)
    shown = _describe(best)
    ranked = f"{best.ranking.value:.3f} [{best.ranking.low:.3f}, {best.ranking.high:.3f}]"
    if passing and evidence == "demonstrations":
        return verdict(
            "cannot tell",
            f"{shown} puts {ranked} of demonstrations above samples, but this is the weaker test; give a verifier or "
            "judged responses.",
        )
    if passing:
        gain = "" if best.gain is None else f" and its best of n gains {best.gain[0]:+.3f} over a random sample"
        return verdict("expected", f"{shown} puts the better response first in {ranked} of pairs{gain}.", best)
    # The candidate that comes nearest, by its tests and then by its figures.
    nearest = max(
        zip(candidates, checks, strict=True),
        key=lambda pair: (-_count(pair[1], "failed"), _count(pair[1], "passed"), *_preference(pair[0])),
    )
    shown = _describe(nearest[0])
    why = "; ".join(
        _explain(nearest[0], name, wanted_gain) for name, outcome in nearest[1].items() if outcome != "passed"
    )
    if any("failed" not in outcomes.values() for outcomes in checks):
        return verdict("cannot tell", f"The intervals are too wide, even for {shown}: {why}; give more prompts.")
    return verdict("not expected", f"The reward does not know better from worse well enough, even {shown}: {why}.")


def _check(candidate: Candidate, wanted_gain: float) -> dict[str, Outcome]:
    outcomes = {"ranking": _compare(candidate.ranking.low, candidate.ranking.high, MIN_RANKING)}
    if candidate.gain is not None:
        outcomes["gain"] = _compare(candidate.gain[1], candidate.gain[2], wanted_gain)
    if candidate.clip_high is None:
        is_even = abs(candidate.length_correlation) <= MAX_LENGTH_CORRELATION
        outcomes["length"] = "passed" if is_even else "failed"
    return outcomes


def _compare(low: float, high: float, threshold: float) -> Outcome:
    return "passed" if low >= threshold else "failed" if high < threshold else "open"


def _preference(candidate: Candidate) -> tuple[bool, float, float]:
    gain = 0.0 if candidate.gain is None else candidate.gain[0]
    return candidate.clip_high == 0, gain, candidate.ranking.value


def _describe(candidate: Candidate) -> str:
    return f"{'min(r_hat, 0)' if candidate.clip_high == 0 else 'r_hat'} at alpha {candidate.alpha}"


def _count(outcomes: dict[str, Outcome], wanted: Outcome) -> int:
    return sum(outcome == wanted for outcome in outcomes.values())


def _explain(candidate: Candidate, test: str, wanted_gain: float) -> str:
    if test == "ranking":
        ranking = candidate.ranking
        shown = f"{ranking.value:.3f} [{ranking.low:.3f}, {ranking.high:.3f}]"
        return f"it ranks {shown} of pairs rightly, wanted are {MIN_RANKING}"
    if test == "gain":
        assert candidate.gain is not None
        value, low, high = candidate.gain
        return f"its best of n gains {value:+.3f} [{low:+.3f}, {high:+.3f}], wanted are {wanted_gain:.3f}"
    correlation = candidate.length_correlation
    return f"its sum goes with length by {correlation:+.2f}, allowed are {MAX_LENGTH_CORRELATION}"
