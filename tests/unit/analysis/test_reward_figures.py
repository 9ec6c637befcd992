from __future__ import annotations

import numpy as np
import pytest
import torch

from dpr_lightning.analysis.frozen import ScoredResponses
from dpr_lightning.analysis.preferences import COSTS, DENSE, LENGTH, TEACHER, rank
from dpr_lightning.analysis.reward_figures import best_of_n, reward_figures
from dpr_lightning.evaluation.ranking import pair_up

PROMPTS = np.array([0, 0, 1, 1])


@pytest.fixture
def scored() -> ScoredResponses:
    """One prompt token, then responses of 2, 3, 1 and 2 tokens; r_hat is (1, -2), (1, 1, 1), (-1), (0, 4)."""
    length = torch.tensor([2, 3, 1, 2])
    position = torch.arange(4)
    mask = (position >= 1) & (position <= length[:, None])
    dense = torch.tensor([[0, 1.0, -2.0, 0], [0, 1.0, 1.0, 1.0], [0, -1.0, 0, 0], [0, 0.0, 4.0, 0]])
    teacher = torch.tensor([[0, -1.0, -1.0, 0], [0, -1.0, -1.0, -1.0], [0, -4.0, 0, 0], [0, -1.0, -1.0, 0]])
    return ScoredResponses(
        response_mask_BT=mask,
        teacher_logp_BT=teacher,
        teacher_entropy_BT=torch.zeros(4, 4),
        reference_logp_BT={"0.5": teacher - dense},
        expected_dense_BT={},
    )


def test_figures_by_hand(scored: ScoredResponses) -> None:
    as_is, cut = reward_figures(scored, PROMPTS)
    assert (as_is["alpha"], as_is["clip_high"], cut["clip_high"]) == ("0.5", None, 0.0)
    tokens = [1, -2, 1, 1, 1, -1, 0, 4]
    assert as_is["mean_per_token"] == pytest.approx(5 / 8)
    assert as_is["std_per_token"] == pytest.approx(np.std(tokens))
    # Paid: 1, 3, 0, 4; charged: -2, 0, -1, 0.
    assert (as_is["positive_mass"], as_is["negative_mass"]) == pytest.approx((2.0, -0.75))
    assert (cut["positive_mass"], cut["negative_mass"]) == pytest.approx((0.0, -0.75))
    assert cut["mean_per_token"] == pytest.approx(-3 / 8)
    # Sums -1, 3, -1, 4 against lengths 2, 3, 1, 2.
    assert as_is["pearson"] == pytest.approx(np.corrcoef([-1, 3, -1, 4], [2, 3, 1, 2])[0, 1])
    # Within prompts: -2, 2, -2.5, 2.5 against -0.5, 0.5, -0.5, 0.5.
    assert as_is["pearson_within"] == pytest.approx(np.corrcoef([-2, 2, -2.5, 2.5], [-1, 1, -1, 1])[0, 1])
    # Sums cut: -2, 0, -1, 0: means -1 and -0.5. Within (1+1+.25+.25)/2 = 1.25; between 2*(.0625*2)/1 = .25 < 1.25.
    assert cut["between_share"] == 0.0


def test_one_response_a_prompt_has_no_share_between(scored: ScoredResponses) -> None:
    assert reward_figures(scored, np.arange(4))[0]["between_share"] is None


def test_best_of_n_by_hand(scored: ScoredResponses) -> None:
    quality = np.array([1.0, 0.0, 0.0, 1.0])
    best = best_of_n(scored, quality, PROMPTS, seed=0)
    assert {name: best[name]["value"] for name in ("random", "oracle", "headroom")} == {
        "random": 0.5, "oracle": 1.0, "headroom": 0.5,
    }  # fmt: skip
    # log pi_SFT: -2 over -3, and -2 over -4: both right.
    assert best["teacher_gain"]["value"] == 0.5
    as_is, cut = best["rewards"]
    # As it is: 3 over -1 is wrong, 4 over -1 right. Cut: 0 over -2 wrong, 0 over -1 right.
    assert (as_is["value"]["value"], as_is["gain"]["value"], as_is["gain_over_teacher"]["value"]) == (0.5, 0.0, -0.5)
    assert (cut["form"], cut["value"]["value"]) == ("clip_high 0", 0.5)


def test_rank_by_hand(scored: ScoredResponses) -> None:
    rows = rank(scored, pair_up([1, 0, 0, 1], PROMPTS), seed=0)
    accuracy = {(row["score"], row["alpha"], row["of"]): row["accuracy"] for row in rows}
    assert accuracy == {
        (TEACHER, None, "sum"): 1.0,
        # Means: -1 and -1 tie; -1 over -4.
        (TEACHER, None, "mean"): 0.75,
        (DENSE, "0.5", "sum"): 0.5,
        (DENSE, "0.5", "mean"): 0.5,
        (COSTS, "0.5", "sum"): 0.5,
        (COSTS, "0.5", "mean"): 0.5,
        # 2 against 3 wrong, 2 against 1 right.
        (LENGTH, None, "sum"): 0.5,
    }
    assert [row["pearson"] for row in rows if row["score"] == LENGTH] == pytest.approx([1.0])
    without = rank(scored, pair_up([1, 1, 1, 1], PROMPTS), seed=0)
    assert {row["accuracy"] for row in without} == {None}
