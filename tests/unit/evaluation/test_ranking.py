from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from dpr_lightning.evaluation.ranking import Pairs, best_by_score, pair_up, ranking_accuracy

# Prompt 4: right 3, 1 against wrong 2, 1: 3>2, 3>1 right; 1<2 wrong; 1=1 half: 2.5 of 4.
# Prompt 9: right 5 against wrong 6: wrong. Prompt 2 has no wrong response: no pairs.
SCORES = [3.0, 5.0, 2.0, 1.0, 6.0, 1.0, 8.0]
IS_CORRECT = [True, True, False, True, False, False, True]
PROMPTS = [4, 9, 4, 4, 9, 4, 2]


def test_ranking_accuracy_by_hand() -> None:
    ranking = ranking_accuracy(SCORES, pair_up(IS_CORRECT, PROMPTS))
    assert (ranking.value, ranking.num_pairs, ranking.num_prompts) == (2.5 / 5, 5, 2)
    # Resamples of prompts (2.5 of 4) and (0 of 1): 0.625, 0.5 or 0.
    assert (ranking.low, ranking.high) == (0.0, 0.625)


def test_pairs_agree_with_a_loop_over_all_of_them() -> None:
    rng = random.Random(3)
    quality = [rng.choice([0.0, 0.5, 1.0]) for _ in range(30)]
    prompts = [rng.randrange(6) for _ in range(30)]
    scores = [float(rng.randrange(8)) for _ in range(30)]
    expected = {
        (i, j) for i, j in itertools.permutations(range(30), 2) if prompts[i] == prompts[j] and quality[i] > quality[j]
    }
    pairs = pair_up(quality, prompts)
    assert set(zip(pairs.better_M.tolist(), pairs.worse_M.tolist(), strict=True)) == expected
    assert [prompts[i] for i in pairs.better_M] == pairs.prompt_M.tolist()
    outcomes = [1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0 for i, j in expected]
    assert ranking_accuracy(scores, pairs).value == pytest.approx(sum(outcomes) / len(outcomes))


def test_score_that_says_nothing_is_at_one_half() -> None:
    assert ranking_accuracy([0.0] * 7, pair_up(IS_CORRECT, PROMPTS)).value == 0.5


def test_perfect_ranking_has_wilsons_interval_over_prompts() -> None:
    pairs = pair_up([1, 0] * 10, np.repeat(np.arange(10), 2))
    ranking = ranking_accuracy([2.0, 1.0] * 10, pairs)
    assert (ranking.value, ranking.high) == (1.0, 1.0)
    assert ranking.low == pytest.approx(1 - 0.277533, abs=1e-6)


def test_preferences_need_no_quality() -> None:
    pairs = Pairs(better_M=np.array([0, 2]), worse_M=np.array([1, 0]), prompt_M=np.array([5, 5]))
    assert (len(pairs), pairs.num_prompts) == (2, 1)
    # 3 > 1, and 2 < 3.
    assert ranking_accuracy([3.0, 1.0, 2.0], pairs).value == 0.5


def test_ranking_accuracy_without_pairs_or_of_uneven_input() -> None:
    ranking = ranking_accuracy([1.0, 2.0], pair_up([True, False], [0, 1]))
    assert math.isnan(ranking.value)
    assert (ranking.num_pairs, ranking.num_prompts, ranking.low, ranking.high) == (0, 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="lengths differ"):
        pair_up([True, False], [0])


def test_best_by_score_by_hand() -> None:
    # Prompt 1: 4 and 4 tie, qualities 1 and 0: 0.5. Prompt 7: score 9 wins, quality 0. Prompt 8: its only one.
    best_P = best_by_score([4.0, 9.0, 4.0, 1.0, 3.0, -2.0], [1, 0, 0, 1, 1, 0.25], [1, 7, 1, 1, 7, 8])
    assert best_P.tolist() == [0.5, 0.0, 0.25]
