"""Whether a score knows better from worse: pairs of responses to one prompt, and the best of several by a score.

Shapes: N responses, M pairs, P prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpr_lightning.evaluation.statistics import Values, ratio_interval, wilson_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs of responses of which one is better."""

    better_M: npt.NDArray[np.int64]
    """[M] number of the better response."""
    worse_M: npt.NDArray[np.int64]
    """[M] number of the worse one."""
    prompt_M: npt.NDArray[np.int64]
    """[M] the prompt that both answer."""

    def __len__(self) -> int:
        return len(self.better_M)

    @property
    def num_prompts(self) -> int:
        """Prompts with at least one pair."""
        return len(np.unique(self.prompt_M))


@dataclass(frozen=True, slots=True)
class RankingAccuracy:
    """How often a score puts the better of two responses to one prompt first."""

    value: float
    """Share of pairs ranked rightly, ties counted half; NaN without pairs."""
    low: float
    """Lower end of the interval over prompts; 0 without pairs."""
    high: float
    """Upper end; 1 without pairs."""
    num_pairs: int
    num_prompts: int
    """Prompts with at least one pair."""


def pair_up(quality: Values, prompt_index: Values) -> Pairs:
    """Return every pair of responses to one prompt whose qualities differ.

    Args:
        quality: How good each response is, by a verifier (right or wrong) or a judge; greater is better.
        prompt_index: Which prompt each response answers.

    Raises:
        ValueError: The sequences differ in length.
    """
    quality_N, prompt_N = np.asarray(quality, dtype=np.float64), np.asarray(prompt_index)
    if quality_N.shape != prompt_N.shape:
        raise ValueError(f"lengths differ: {quality_N.shape} and {prompt_N.shape}")
    better, worse, prompts = [], [], []
    for prompt in np.unique(prompt_N):
        here_R = np.flatnonzero(prompt_N == prompt)
        row, column = np.nonzero(quality_N[here_R][:, None] > quality_N[here_R][None, :])
        better.append(here_R[row])
        worse.append(here_R[column])
        prompts.append(np.full(len(row), prompt))
    empty = [np.zeros(0, dtype=np.int64)]
    return Pairs(
        better_M=np.concatenate(better or empty).astype(np.int64),
        worse_M=np.concatenate(worse or empty).astype(np.int64),
        prompt_M=np.concatenate(prompts or empty).astype(np.int64),
    )


def ranking_accuracy(scores: Values, pairs: Pairs, *, seed: int = 0, confidence: float = 0.95) -> RankingAccuracy:
    """Return the share of pairs whose better response has the greater score; pairs count alike, prompts are resampled.

    Where every prompt has the same share there is nothing to resample, and the interval is Wilson's over prompts.

    Args:
        scores: Score of each response, such as the sum of its token rewards.
        pairs: Which response is better than which.
        seed: Seed of the resampling.
        confidence: Coverage, between 0 and 1.
    """
    score_N = np.asarray(scores, dtype=np.float64)
    if len(pairs) == 0:
        return RankingAccuracy(math.nan, 0.0, 1.0, 0, 0)
    outcome_M = (np.sign(score_N[pairs.better_M] - score_N[pairs.worse_M]) + 1) / 2
    _, group_M = np.unique(pairs.prompt_M, return_inverse=True)
    right_P, count_P = np.bincount(group_M, weights=outcome_M), np.bincount(group_M)
    value, num_prompts = float(outcome_M.mean()), len(count_P)
    if np.ptp(right_P / count_P) == 0:
        interval = wilson_interval(value * num_prompts, num_prompts, confidence=confidence)
    else:
        interval = ratio_interval(right_P, count_P, seed=seed, confidence=confidence)
    return RankingAccuracy(value, interval.low, interval.high, len(pairs), num_prompts)


def best_by_score(scores: Values, quality: Values, prompt_index: Values) -> npt.NDArray[np.float64]:
    """Return, for each prompt, the quality of the response with the greatest score.

    Responses that tie for the greatest score share the place: their mean quality counts.

    Args:
        scores: Score of each response.
        quality: How good each is.
        prompt_index: Which prompt each answers.

    Returns:
        [P], prompts in ascending order of their index.
    """
    score_N, quality_N = np.asarray(scores, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    prompts_P, group_N = np.unique(np.asarray(prompt_index), return_inverse=True)
    best_P = np.full(len(prompts_P), -np.inf)
    np.maximum.at(best_P, group_N, score_N)
    is_best_N = (score_N == best_P[group_N]).astype(np.float64)
    best: npt.NDArray[np.float64] = np.bincount(group_N, weights=is_best_N * quality_N) / np.bincount(
        group_N, weights=is_best_N
    )
    return best
