"""Figures with their uncertainty. The prompt is the unit of sampling: what was drawn for one prompt goes together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    means = [mean_P[rows_RP].mean(axis=1) for rows_RP in _resamples(len(mean_P), num_resamples, seed)]
    return _percentiles(np.concatenate(means), confidence)


def ratio_interval(
    numerators: Values,
    denominators: Values,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Return the percentile bootstrap interval of sum(numerators) / sum(denominators), from resampled prompts.

    Args:
        numerators: One value per prompt, such as its pairs that are ranked rightly.
        denominators: One positive value per prompt, such as its pairs.
        num_resamples: Bootstrap samples.
        seed: Seed of the resampling.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: There are no values, the lengths differ, or a denominator is not positive.
    """
    numerator_P, denominator_P = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if numerator_P.shape != denominator_P.shape or numerator_P.ndim != 1 or numerator_P.size == 0:
        raise ValueError(f"need two equally long lists, got shapes {numerator_P.shape} and {denominator_P.shape}")
    if not (denominator_P > 0).all():
        raise ValueError("a denominator is not positive; leave such prompts out")
    ratios = [
        numerator_P[rows_RP].sum(axis=1) / denominator_P[rows_RP].sum(axis=1)
        for rows_RP in _resamples(len(numerator_P), num_resamples, seed)
    ]
    return _percentiles(np.concatenate(ratios), confidence)


def share_estimate(
    shares: Values, *, prompt_index: Values | None = None, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Return the mean of values in [0, 1] over prompts.

    The interval is the bootstrap's over prompts. Where all prompts had the same outcome there is nothing to resample,
    and it is Wilson's.

    Args:
        shares: One value in [0, 1] per response, such as 1 for a right one.
        prompt_index: Which prompt each answers; None takes each for its own.
        seed: Seed of the resampling.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: There are no values, or the two sequences differ in length.
    """
    share_P = _prompt_means(shares, prompt_index)
    value, n = float(share_P.mean()), len(share_P)
    if np.ptp(share_P) == 0:
        interval = wilson_interval(value * n, n, confidence=confidence)
    else:
        interval = bootstrap_interval(share_P, seed=seed, confidence=confidence)
    return Estimate(value, interval.low, interval.high, n)


def mean_estimate(
    values: Values, *, prompt_index: Values | None = None, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Return the mean of any values over prompts with the bootstrap's interval; see :func:`share_estimate`."""
    mean_P = _prompt_means(values, prompt_index)
    interval = bootstrap_interval(mean_P, seed=seed, confidence=confidence)
    return Estimate(float(mean_P.mean()), interval.low, interval.high, len(mean_P))


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
    outcome_N = (np.sign(a_N - b_N) + 1) / 2
    return share_estimate(outcome_N, prompt_index=prompt_index, seed=seed, confidence=confidence)


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


def _resamples(num_prompts: int, num_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield [R, P] rows of prompts drawn with replacement, some resamples at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, _RESAMPLED_VALUES_AT_ONCE // num_prompts)
    for start in range(0, num_resamples, chunk):
        yield generator.integers(num_prompts, size=(min(chunk, num_resamples - start), num_prompts))


def _percentiles(values: npt.NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


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
