"""Figures with their uncertainty. The prompt is the unit of sampling: what was drawn for one prompt goes together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Values: TypeAlias = Sequence[float] | npt.NDArray[np.floating] | npt.NDArray[np.integer] | npt.NDArray[np.bool_]

_RESAMPLED_VALUES_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Interval:
    """Both ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, its confidence interval, and on how many units (prompts or seeds) it stands."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class RankingAccuracy:
    """How often a score puts a right response above a wrong one of the same prompt."""

    value: float
    """Share of pairs ranked rightly, ties counted half; NaN without pairs."""
    num_pairs: int
    num_prompts: int
    """Prompts with at least one right and one wrong response."""


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a proportion; [0, 1] where ``n`` is 0.

    Args:
        successes: How many of the ``n`` succeeded.
        n: Independent trials.
        confidence: Coverage, between 0 and 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, n], got {successes} of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    z_squared = _normal_quantile(confidence) ** 2
    share = successes / n
    centre = (share + z_squared / (2 * n)) / (1 + z_squared / n)
    half = math.sqrt(z_squared * (share * (1 - share) / n + z_squared / (4 * n**2))) / (1 + z_squared / n)
    # At 0 and n successes one end is 0 or 1, up to rounding.
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def bootstrap_interval(
    values: Values,
    *,
    prompt_index: Values | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Return the percentile bootstrap interval of the mean of prompt means, from resampled prompts.

    Args:
        values: One value per response.
        prompt_index: Which prompt each response answers; None takes each for its own.
        num_resamples: Bootstrap samples.
        seed: Seed of the resampling: the same values give the same interval.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: There are no values, or the two sequences differ in length.
    """
    mean_P = _prompt_means(values, prompt_index)
    generator = np.random.default_rng(seed)
    num_prompts = len(mean_P)
    chunk = max(1, _RESAMPLED_VALUES_AT_ONCE // num_prompts)
    means = np.concatenate(
        [
            mean_P[generator.integers(num_prompts, size=(min(chunk, num_resamples - start), num_prompts))].mean(axis=1)
            for start in range(0, num_resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def win_rate(
    a: Values, b: Values, *, prompt_index: Values | None = None, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Return how often ``a`` beats ``b`` on the same prompt, ties counted half.

    The interval is the bootstrap's over prompts. Where all prompts had the same outcome there is nothing to resample,
    and it is Wilson's, which is wider than a bootstrap's with ties.

    Args:
        a: Score of each response of the one policy; greater is better.
        b: Score of the response of the other policy that it is compared with.
        prompt_index: Which prompt each pair answers; None takes each for its own.
        seed: Seed of the resampling.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: There are no pairs, or the sequences differ in length.
    """
    a_N, b_N = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_N.shape != b_N.shape:
        raise ValueError(f"a and b must have the same length, got {a_N.shape} and {b_N.shape}")
    if np.isnan(a_N).any() or np.isnan(b_N).any():
        raise ValueError("a score is NaN: it neither wins nor ties")
    outcome_P = _prompt_means((np.sign(a_N - b_N) + 1) / 2, prompt_index)
    value, n = float(outcome_P.mean()), len(outcome_P)
    if np.ptp(outcome_P) == 0:
        interval = wilson_interval(value * n, n, confidence=confidence)
    else:
        interval = bootstrap_interval(outcome_P, seed=seed, confidence=confidence)
    return Estimate(value, interval.low, interval.high, n)


def paired_difference(a_by_seed: Values, b_by_seed: Values, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of a - b over seeds, with Student's t interval.

    Args:
        a_by_seed: The figure of the one method, one per seed.
        b_by_seed: The figure of the other, in the same order of seeds.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: Fewer than two seeds, or different numbers of them.
    """
    a_S, b_S = np.asarray(a_by_seed, dtype=np.float64), np.asarray(b_by_seed, dtype=np.float64)
    if a_S.shape != b_S.shape or len(a_S) < 2:
        raise ValueError(f"both methods need the same two or more seeds, got {len(a_S)} and {len(b_S)}")
    difference_S = a_S - b_S
    n, mean = len(difference_S), float(difference_S.mean())
    half = student_t_quantile(confidence, n - 1) * float(difference_S.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def ranking_accuracy(scores: Values, is_correct: Values, prompt_index: Values) -> RankingAccuracy:
    """Return the share of same-prompt (right, wrong) pairs whose right response has the greater score.

    Args:
        scores: Score of each response, such as the sum of its token rewards.
        is_correct: Whether each response is right, by a verifier.
        prompt_index: Which prompt each response answers.

    Raises:
        ValueError: The sequences differ in length.
    """
    score_N, correct_N = np.asarray(scores, dtype=np.float64), np.asarray(is_correct, dtype=bool)
    prompt_N = np.asarray(prompt_index)
    if not score_N.shape == correct_N.shape == prompt_N.shape:
        raise ValueError(f"lengths differ: {score_N.shape}, {correct_N.shape}, {prompt_N.shape}")
    num_right, num_pairs, num_prompts = 0.0, 0, 0
    for prompt in np.unique(prompt_N):
        is_here_N = prompt_N == prompt
        right_R, wrong_W = score_N[is_here_N & correct_N], score_N[is_here_N & ~correct_N]
        outcome_RW = (np.sign(right_R[:, None] - wrong_W[None, :]) + 1) / 2
        num_right += float(outcome_RW.sum())
        num_pairs += outcome_RW.size
        num_prompts += outcome_RW.size > 0
    return RankingAccuracy(num_right / num_pairs if num_pairs else math.nan, num_pairs, num_prompts)


def student_t_quantile(confidence: float, degrees: int) -> float:
    """Return t with P(|T| < t) = ``confidence`` for Student's distribution with a whole number of degrees of freedom.

    For whole numbers the distribution function is a finite sum in the angle atan(t / sqrt(degrees)) (Abramowitz and
    Stegun 26.7.3 and 26.7.4); it is inverted by bisection to double precision.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"need degrees >= 1 and 0 < confidence < 1, got {degrees} and {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_mass(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _student_t_mass(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + is_odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _prompt_means(values: Values, prompt_index: Values | None) -> npt.NDArray[np.float64]:
    value_N = np.asarray(values, dtype=np.float64)
    if value_N.ndim != 1 or value_N.size == 0:
        raise ValueError(f"need a non-empty list of values, got shape {value_N.shape}")
    if prompt_index is None:
        return value_N
    if len(prompt_index) != len(value_N):
        raise ValueError(f"{len(value_N)} values but {len(prompt_index)} prompt indices")
    _, group_N = np.unique(np.asarray(prompt_index), return_inverse=True)
    return np.bincount(group_N, weights=value_N) / np.bincount(group_N)
