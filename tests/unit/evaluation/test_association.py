from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from dpr_lightning.evaluation.association import (
    between_share,
    centred_by_prompt,
    correlation,
    mid_ranks,
    rank_correlation,
)


def test_mid_ranks_share_the_mean_rank() -> None:
    assert mid_ranks([30, 10, 30, 20, 30]).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_correlations_agree_with_numpy_and_pandas() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, size=40).astype(float)
    y = x**2 + rng.normal(size=40)
    assert correlation(x, y) == pytest.approx(float(np.corrcoef(x, y)[0, 1]))
    # pandas ranks by itself; its spearman wants scipy, so Pearson's of its ranks.
    ranked = pd.Series(x).rank().corr(pd.Series(y).rank())
    assert rank_correlation(x, y) == pytest.approx(ranked)


def test_correlation_of_a_constant_is_zero_whatever_rounding_does() -> None:
    assert correlation([0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0]) == 0.0
    assert rank_correlation([1.0, 2.0], [5.0, 5.0]) == 0.0
    with pytest.raises(ValueError, match="lengths differ"):
        correlation([1.0], [1.0, 2.0])


def test_centred_by_prompt() -> None:
    assert centred_by_prompt([1.0, 5.0, 3.0, 7.0], [2, 0, 2, 0]).tolist() == [-1.0, -1.0, 1.0, 1.0]


def test_between_share_by_hand() -> None:
    # Prompts (1, 3) and (5, 7): means 2 and 6. Within: 4 * 1 / 2 = 2; between: 2 * (4 + 4) / 1 = 16.
    # (16 - 2) / 2 = 7 between against 2 within.
    assert between_share([1.0, 3.0, 5.0, 7.0], [0, 0, 1, 1]) == pytest.approx(7 / 9)


def test_between_share_of_known_variances_and_uneven_groups() -> None:
    # 9 between, 1 within: 0.9, whatever the numbers of responses.
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(4000), rng.integers(1, 6, size=4000))
    values = 3.0 * rng.normal(size=4000)[prompts] + rng.normal(size=len(prompts))
    assert between_share(values, prompts) == pytest.approx(0.9, abs=0.01)


def test_between_share_has_edges() -> None:
    assert between_share([1.0, 1.0, 1.0, 1.0], [0, 0, 1, 1]) == 0.0
    # Prompts that differ less than their responses would make them: not below 0.
    assert between_share([0.0, 2.0, 0.0, 2.0], [0, 0, 1, 1]) == 0.0
    assert math.isnan(between_share([1.0, 2.0], [0, 1]))
    assert math.isnan(between_share([1.0, 2.0], [0, 0]))
