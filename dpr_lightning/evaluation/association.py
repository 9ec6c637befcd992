"""How figures of responses go together: correlation, and variance between prompts against within them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dpr_lightning.evaluation.statistics import Values

_ROUNDING = 1e-12
"""Deviations this small beside the values themselves are rounding: the values count as constant."""


def correlation(x: Values, y: Values) -> float:
    """Return Pearson's correlation; 0 where either is constant.

    Raises:
        ValueError: The sequences differ in length.
    """
    x_N, y_N = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x_N.shape != y_N.shape:
        raise ValueError(f"lengths differ: {x_N.shape} and {y_N.shape}")
    x_centred_N, y_centred_N = x_N - x_N.mean(), y_N - y_N.mean()
    for values_N, centred_N in ((x_N, x_centred_N), (y_N, y_centred_N)):
        if np.abs(centred_N).max() <= _ROUNDING * np.abs(values_N).max():
            return 0.0
    scale = float(np.linalg.norm(x_centred_N) * np.linalg.norm(y_centred_N))
    return float(x_centred_N @ y_centred_N) / scale


def mid_ranks(values: Values) -> npt.NDArray[np.float64]:
    """Return the rank of each value from 1, the least first; equal values share the mean of their ranks."""
    value_N = np.asarray(values, dtype=np.float64)
    _, group_N, count_G = np.unique(value_N, return_inverse=True, return_counts=True)
    last_G = np.cumsum(count_G)
    ranks: npt.NDArray[np.float64] = (last_G - (count_G - 1) / 2)[group_N]
    return ranks


def rank_correlation(x: Values, y: Values) -> float:
    """Return Spearman's correlation, ties by mid-ranks; 0 where either is constant."""
    return correlation(mid_ranks(x), mid_ranks(y))


def centred_by_prompt(values: Values, prompt_index: Values) -> npt.NDArray[np.float64]:
    """Return each value less the mean of its prompt's: what a baseline per prompt leaves."""
    value_N = np.asarray(values, dtype=np.float64)
    _, group_N = np.unique(np.asarray(prompt_index), return_inverse=True)
    means_P = np.bincount(group_N, weights=value_N) / np.bincount(group_N)
    centred: npt.NDArray[np.float64] = value_N - means_P[group_N]
    return centred


def between_share(values: Values, prompt_index: Values) -> float:
    """Return which share of the variance lies between prompts: the part that a baseline per prompt can remove.

    The one-way random-effects estimate, free of the sampling variance of prompt means: with mean squares B between
    and W within, the between variance is (B - W) / n0, not below 0, n0 being the number of responses a prompt (for
    unequal numbers, Searle's average). NaN where no prompt has two responses or there is one prompt only; 0 where
    nothing varies.

    Args:
        values: One per response.
        prompt_index: Which prompt each answers.
    """
    value_N = np.asarray(values, dtype=np.float64)
    _, group_N = np.unique(np.asarray(prompt_index), return_inverse=True)
    count_P = np.bincount(group_N)
    num_prompts, num = len(count_P), len(value_N)
    if num_prompts < 2 or num == num_prompts:
        return math.nan
    mean_P = np.bincount(group_N, weights=value_N) / count_P
    within = float(np.square(value_N - mean_P[group_N]).sum()) / (num - num_prompts)
    between = float((count_P * np.square(mean_P - value_N.mean())).sum()) / (num_prompts - 1)
    responses = (num - float(np.square(count_P).sum()) / num) / (num_prompts - 1)
    variance_between = max(0.0, (between - within) / responses)
    total = variance_between + within
    return variance_between / total if total > 0 else 0.0
