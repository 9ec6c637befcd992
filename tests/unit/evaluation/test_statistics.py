from __future__ import annotations

import math
import time

import numpy as np
import pytest

from dpr_lightning.evaluation.statistics import (
    bootstrap_interval,
    mean_estimate,
    paired_difference,
    ratio_interval,
    share_estimate,
    student_t_quantile,
    wilson_interval,
    win_rate,
)


@pytest.mark.parametrize(("successes", "n"), [(1, 10), (50, 100), (97, 100), (4, 7)])
def test_wilson_ends_solve_the_score_equation(successes: int, n: int) -> None:
    # Independent of the closed form: at each end p, the observed share is 1.959964 standard errors of p away.
    interval = wilson_interval(successes, n)
    for end in (interval.low, interval.high):
        assert abs(successes / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-6)
    assert interval.low < successes / n < interval.high


def test_wilson_at_the_extremes() -> None:
    # With no success of 10 the upper end is z^2 / (n + z^2) = 3.841459 / 13.841459.
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(0, 10).high == pytest.approx(0.277533, abs=1e-6)
    assert wilson_interval(10, 10).high == 1.0
    assert wilson_interval(10, 10).low == pytest.approx(1 - 0.277533, abs=1e-6)
    empty = wilson_interval(0, 0)
    assert (empty.low, empty.high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="got 11 of 10"):
        wilson_interval(11, 10)


@pytest.mark.parametrize(
    ("confidence", "degrees", "quantile"),
    # The usual printed table of Student's t, two-sided.
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 5, 2.571),
        (0.95, 9, 2.262),
        (0.95, 10, 2.228),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.99, 7, 3.499),
        (0.80, 6, 1.440),
    ],
)
def test_student_t_agrees_with_the_table(confidence: float, degrees: int, quantile: float) -> None:
    assert student_t_quantile(confidence, degrees) == pytest.approx(quantile, abs=5.1e-4)


def test_paired_difference_over_seeds() -> None:
    # Differences 1, 2, 3, 4, 5: mean 3, sample deviation sqrt(2.5), t(4) = 2.776: half-width 2.776 * sqrt(0.5) = 1.963.
    estimate = paired_difference([11, 12, 13, 14, 15], [10, 10, 10, 10, 10])
    assert (estimate.value, estimate.n) == (3.0, 5)
    assert estimate.high - 3.0 == pytest.approx(2.7764 * math.sqrt(0.5), abs=1e-4)
    assert 3.0 - estimate.low == pytest.approx(estimate.high - 3.0)
    with pytest.raises(ValueError, match="two or more seeds, got 1 and 1"):
        paired_difference([1.0], [2.0])
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_bootstrap_of_two_prompts_is_a_known_distribution() -> None:
    # The mean of a resample of {0, 1} is 0, 0.5 or 1 with probabilities 1/4, 1/2, 1/4.
    interval = bootstrap_interval([0.0, 1.0], confidence=0.95)
    assert (interval.low, interval.high) == (0.0, 1.0)
    inner = bootstrap_interval([0.0, 1.0], confidence=0.4)
    assert (inner.low, inner.high) == (0.5, 0.5)


def test_bootstrap_approaches_the_normal_interval_and_is_seeded() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    interval = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(2000)
    # Percentiles of 10,000 resamples are off by about 2% of the half-width.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.06 * half)
    assert interval == bootstrap_interval(values, seed=1)
    assert interval != bootstrap_interval(values, seed=2)


def test_bootstrap_resamples_prompts_not_responses() -> None:
    # Four responses of each of two prompts, all alike within a prompt: two units, not eight.
    values, prompts = [0.0] * 4 + [1.0] * 4, [7] * 4 + [3] * 4
    assert bootstrap_interval(values, prompt_index=prompts) == bootstrap_interval([1.0, 0.0])
    with pytest.raises(ValueError, match="8 values but 2 prompt indices"):
        bootstrap_interval(values, prompt_index=[0, 1])
    with pytest.raises(ValueError, match="non-empty list"):
        bootstrap_interval([])


def test_bootstrap_of_many_prompts_is_fast() -> None:
    start = time.perf_counter()
    bootstrap_interval(np.arange(1000) % 2)
    assert time.perf_counter() - start < 2.0


def test_win_rate_counts_ties_half() -> None:
    # Win, win, tie, loss: 2.5 of 4.
    estimate = win_rate([1, 2, 3, 0], [0, 1, 3, 1])
    assert (estimate.value, estimate.n) == (0.625, 4)
    outcomes = bootstrap_interval([1.0, 1.0, 0.5, 0.0])
    assert (estimate.low, estimate.high) == (outcomes.low, outcomes.high)


def test_win_rate_over_several_samples_of_a_prompt() -> None:
    # Prompt 0: win, loss: 0.5. Prompt 1: win, win, tie, tie: 0.75.
    estimate = win_rate([1, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1], prompt_index=[0, 0, 1, 1, 1, 1])
    assert (estimate.value, estimate.n) == (0.625, 2)
    assert (estimate.low, estimate.high) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("a", "b", "successes"), [([1] * 9, [0] * 9, 9), ([0] * 9, [1] * 9, 0), ([1] * 9, [1] * 9, 4.5)]
)
def test_win_rate_without_variation_is_still_uncertain(a: list[int], b: list[int], successes: float) -> None:
    estimate, wilson = win_rate(a, b), wilson_interval(successes, 9)
    assert estimate.value == successes / 9
    assert (estimate.low, estimate.high) == (wilson.low, wilson.high)


def test_win_rate_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same length"):
        win_rate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        win_rate([float("nan")], [1.0])


def test_ratio_interval_of_two_prompts_is_a_known_distribution() -> None:
    # Prompts 3 of 4 and 0 of 1: a resample has 3/4 (1 in 4), 3/5 (1 in 2) or 0 (1 in 4).
    interval = ratio_interval([3.0, 0.0], [4.0, 1.0])
    assert (interval.low, interval.high) == (0.0, 0.75)
    inner = ratio_interval([3.0, 0.0], [4.0, 1.0], confidence=0.4)
    assert (inner.low, inner.high) == (0.6, 0.6)


def test_ratio_interval_of_equal_denominators_is_that_of_the_mean() -> None:
    values = [0.1, 0.9, 0.4, 0.7, 0.2]
    ratio, mean = ratio_interval(values, [1.0] * 5), bootstrap_interval(values)
    assert (ratio.low, ratio.high) == pytest.approx((mean.low, mean.high))


def test_ratio_interval_refuses() -> None:
    with pytest.raises(ValueError, match="not positive"):
        ratio_interval([1.0], [0.0])
    with pytest.raises(ValueError, match="two equally long lists"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="two equally long lists"):
        ratio_interval([], [])


def test_share_estimate_weighs_prompts_alike_and_never_claims_certainty() -> None:
    # Prompt 0: 1 of 2; prompt 1: 1 of 1. Mean of prompt means 0.75.
    assert share_estimate([1.0, 0.0, 1.0], prompt_index=[0, 0, 1]).value == 0.75
    every = share_estimate([1.0] * 10)
    assert (every.value, every.high, every.n) == (1.0, 1.0, 10)
    assert every.low == pytest.approx(1 - 0.277533, abs=1e-6)


def test_mean_estimate_of_a_constant_is_that_constant() -> None:
    estimate = mean_estimate([-2.0, -2.0, -2.0])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (-2.0, -2.0, -2.0, 3)
