from __future__ import annotations

import json

import pytest

from dpr_lightning.analysis.verdict import MIN_PROMPTS, Candidate, Evidence, judge
from dpr_lightning.evaluation.ranking import RankingAccuracy

HEADROOM = (0.4, 0.35, 0.45)
GAIN = (0.3, 0.25, 0.35)


def candidate(
    *,
    alpha: str = "0.5",
    clip_high: float | None = 0.0,
    ranking: tuple[float, float, float] = (0.85, 0.8, 0.9),
    gain: tuple[float, float, float] | None = GAIN,
    length: float = 0.0,
    num_prompts: int = 100,
) -> Candidate:
    return Candidate(
        alpha=alpha,
        clip_high=clip_high,
        ranking=RankingAccuracy(*ranking, num_pairs=10 * num_prompts, num_prompts=num_prompts),
        gain=gain,
        length_correlation=length,
    )


def test_helpful_reward_is_recommended_with_the_greatest_gain_cut_at_zero_first() -> None:
    verdict = judge(
        [
            candidate(alpha="0.1", clip_high=None, gain=(0.4, 0.39, 0.41)),
            candidate(alpha="0.1", gain=(0.25, 0.21, 0.3)),
            candidate(alpha="0.25", gain=(0.3, 0.25, 0.35)),
        ],
        evidence="verifier",
        headroom=HEADROOM,
    )
    assert (verdict.status, verdict.alpha, verdict.clip_high) == ("expected", "0.25", 0.0)
    assert "min(r_hat, 0) at alpha 0.25" in verdict.reason


def test_reward_as_it_is_only_where_it_pays_for_no_length_and_nothing_else_passes() -> None:
    cut = candidate(ranking=(0.6, 0.55, 0.65))
    verdict = judge([candidate(clip_high=None, length=-0.1), cut], evidence="verifier", headroom=HEADROOM)
    assert (verdict.status, verdict.alpha, verdict.clip_high) == ("expected", "0.5", None)
    verdict = judge([candidate(clip_high=None, length=-0.11), cut], evidence="verifier", headroom=HEADROOM)
    assert verdict.status == "not expected"
    assert verdict.alpha is None


@pytest.mark.parametrize(
    ("changes", "status", "because"),
    [
        ({"ranking": (0.5, 0.45, 0.55)}, "not expected", "it ranks 0.500 [0.450, 0.550] of pairs"),
        ({"ranking": (0.75, 0.69, 0.81)}, "cannot tell", "it ranks 0.750 [0.690, 0.810] of pairs"),
        ({"ranking": (0.75, 0.7, 0.81)}, "expected", "0.750"),
        # Half of the headroom is 0.2.
        ({"gain": (0.15, 0.1, 0.199)}, "not expected", "its best of n gains +0.150 [+0.100, +0.199], wanted are 0.200"),
        ({"gain": (0.25, 0.19, 0.3)}, "cannot tell", "its best of n gains +0.250"),
        ({"gain": (0.25, 0.2, 0.3)}, "expected", "gains +0.250 over a random"),
        ({"gain": None}, "expected", "0.850"),
        ({"num_prompts": MIN_PROMPTS - 1}, "cannot tell", "Only 29 prompts"),
        ({"num_prompts": MIN_PROMPTS}, "expected", "0.850"),
    ],
)
def test_each_test_by_its_interval(changes: dict[str, object], status: str, because: str) -> None:
    verdict = judge([candidate(**changes)], evidence="verifier", headroom=HEADROOM)  # type: ignore[arg-type]
    assert verdict.status == status
    assert because in verdict.reason


def test_nothing_to_gain_where_the_best_sample_is_like_any() -> None:
    verdict = judge([candidate()], evidence="verifier", headroom=(0.03, 0.02, 0.04))
    assert verdict.status == "not expected"
    assert "0.030 better than a random one" in verdict.reason


@pytest.mark.parametrize(
    ("evidence", "ranking", "status"),
    [
        ("demonstrations", (0.85, 0.8, 0.9), "cannot tell"),
        ("demonstrations", (0.5, 0.45, 0.55), "not expected"),
        ("judge", (0.85, 0.8, 0.9), "expected"),
    ],
)
def test_demonstrations_can_speak_against_but_not_for(
    evidence: Evidence, ranking: tuple[float, float, float], status: str
) -> None:
    assert judge([candidate(ranking=ranking, gain=None)], evidence=evidence, headroom=None).status == status


def test_reason_is_of_the_candidate_that_comes_nearest() -> None:
    near = candidate(alpha="0.1", ranking=(0.68, 0.66, 0.69))
    far = candidate(alpha="0.5", ranking=(0.4, 0.35, 0.45), gain=(0.0, -0.02, 0.01))
    verdict = judge([far, near], evidence="verifier", headroom=HEADROOM)
    assert verdict.status == "not expected"
    assert "alpha 0.1" in verdict.reason
    assert "gains" not in verdict.reason


def test_json_holds_every_check_and_threshold() -> None:
    verdict = judge([candidate(), candidate(clip_high=None)], evidence="verifier", headroom=HEADROOM)
    written = json.loads(json.dumps(verdict.to_json()))
    assert written["thresholds"]["min_ranking"] == 0.7
    assert written["checks"] == [
        {"alpha": "0.5", "clip_high": 0.0, "ranking": "passed", "gain": "passed"},
        {"alpha": "0.5", "clip_high": None, "ranking": "passed", "gain": "passed", "length": "passed"},
    ]
