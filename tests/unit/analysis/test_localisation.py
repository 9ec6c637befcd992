from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dpr_lightning.analysis.frozen import ScoredResponses
from dpr_lightning.analysis.localisation import CENTRED, CHANCE, ENTROPY, REFERENCE, chance, localise, locate
from dpr_lightning.analysis.preferences import COSTS, DENSE, TEACHER


def by_enumeration(scores: list[float], marks: list[bool]) -> tuple[float, float, float]:
    """Independent: every order of the tokens that puts lower scores first, each as likely, first corrupted one."""
    ranks = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order)):
            ranks.append(1 + min(order.index(i) for i, mark in enumerate(marks) if mark))
    num = len(ranks)
    return sum(r <= 1 for r in ranks) / num, sum(r <= 3 for r in ranks) / num, sum(1 / r for r in ranks) / num


@pytest.mark.parametrize(
    ("scores", "marks"),
    [
        ([0.5, -1.0, 2.0], [False, True, False]),
        ([0.0, -1.0, 0.0, 0.0, 1.0], [False, False, True, False, False]),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [False, True, True, False, False, False]),
        ([3.0, 2.0, 2.0, 1.0, 2.0, 0.0], [True, True, False, False, True, False]),
        ([1.0, 1.0], [True, True]),
        ([4.0], [True]),
    ],
)
def test_locate_agrees_with_every_order_of_the_ties(scores: list[float], marks: list[bool]) -> None:
    found = locate(np.array(scores), np.array(marks))
    assert (found.top_1, found.top_3, found.reciprocal_rank) == pytest.approx(by_enumeration(scores, marks))


@pytest.mark.parametrize(("num_tokens", "num_corrupted"), [(1, 1), (5, 1), (6, 2), (7, 3), (4, 4)])
def test_score_that_says_nothing_gets_what_chance_gets(num_tokens: int, num_corrupted: int) -> None:
    marks = [i < num_corrupted for i in range(num_tokens)]
    by_chance = chance(num_tokens, num_corrupted)
    assert locate(np.zeros(num_tokens), np.array(marks)) == by_chance
    expected = by_enumeration([0.0] * num_tokens, marks)
    assert (by_chance.top_1, by_chance.top_3, by_chance.reciprocal_rank) == pytest.approx(expected)


def test_chance_of_one_token_is_the_textbooks() -> None:
    # 1 of 20, 3 of 20, and the 20th harmonic number over 20.
    found = chance(20, 1)
    assert (found.top_1, found.top_3) == pytest.approx((0.05, 0.15))
    assert found.reciprocal_rank == pytest.approx(sum(1 / r for r in range(1, 21)) / 20)


def test_locate_refuses() -> None:
    with pytest.raises(ValueError, match="no token is corrupted"):
        locate(np.zeros(2), np.array([False, False]))
    with pytest.raises(ValueError, match="NaN"):
        locate(np.array([0.0, np.nan]), np.array([True, False]))


def test_localise_names_each_score_by_what_it_finds() -> None:
    # One prompt token, then responses of 4 and 3 tokens; corrupted are token 2 of the first and token 1 of the second.
    mask = torch.tensor([[False, True, True, True, True], [False, True, True, True, False]])
    teacher = torch.tensor([[0.0, -1.0, -2.0, -3.0, -1.0], [0.0, -4.0, -1.0, -1.0, 0.0]])
    reference = torch.tensor([[0.0, -1.5, -2.5, -1.0, -1.0], [0.0, -2.0, -1.0, -3.0, 0.0]])
    entropy = torch.tensor([[0.0, 1.0, 2.0, 0.5, 0.1], [0.0, 0.3, 0.2, 0.1, 0.0]])
    expected = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    scored = ScoredResponses(
        response_mask_BT=mask,
        teacher_logp_BT=teacher,
        teacher_entropy_BT=entropy,
        reference_logp_BT={"0.5": reference},
        expected_dense_BT={"0.5": expected},
    )
    rows = localise(scored, [[False, False, True, False], [True, False, False]], seed=0)
    top_1 = {row["score"]: row["top_1"]["value"] for row in rows}
    # r_hat: .5 .5 -2 0 | -2 0 2: both found. b(s) moves token 1 of the first to -2.5: one found.
    # log pi_SFT: both. log pi_ref: -2.5 is the least of the first, -3 of the second: none. Entropy: second only.
    assert top_1 == {
        DENSE: 1.0, COSTS: 1.0, CENTRED: 0.5, REFERENCE: 0.0, TEACHER: 1.0, ENTROPY: 0.5,
        CHANCE: pytest.approx((1 / 4 + 1 / 3) / 2),
    }  # fmt: skip
    by_score = {row["score"]: row for row in rows}
    # Up to the corrupted token: of 3 tokens, and of 1, which any score finds.
    assert by_score[CHANCE]["top_1_so_far"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    assert by_score[REFERENCE]["top_1_so_far"]["value"] == 0.5
    assert by_score[REFERENCE]["top_1_less_teacher"]["value"] == -1.0
    assert "top_1_less_teacher" not in by_score[TEACHER]
    # Padding never counts: with one more, the figures are the same.
    assert by_score[DENSE]["top_1"]["n"] == 2
