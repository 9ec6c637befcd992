"""What ``dpr-lightning variance`` estimates is, in expectation, the exact variance and the exact mean.

Shapes: B all responses, T positions, P prefixes, V tokens.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from token_mdp import TokenMDP
from torch import Tensor

from dpr_lightning.analysis.gradient_variance import BASELINES, Credit, GradientMoments, credits_of
from dpr_lightning.functional import DenseReward, DiscountedReturns, ExpectedReturns, SentenceReward, leave_one_out

BASE = Credit(reward="dense", gamma=1.0, baseline="none")


def test_every_moment_is_unbiased_over_all_draws() -> None:
    # Two prompts; each prompt's gradient is one of three vectors. A half is one sample.
    generator = torch.Generator().manual_seed(0)
    table_GKD = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    probability_GK = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    # The base estimator is correlated with the other, as on the same samples.
    base_GKD = table_GKD + torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    mean_GD = torch.einsum("gk,gkd->gd", probability_GK, table_GKD)
    base_mean_GD = torch.einsum("gk,gkd->gd", probability_GK, base_GKD)
    spread_GK = (table_GKD - mean_GD[:, None]).square().sum(dim=2)
    exact_within_G = (probability_GK * spread_GK).sum(dim=1)
    # Prompts are drawn too: both from the same two, so that between-prompt variance has an exact value.
    expected = dict.fromkeys(("within", "squared_mean", "between", "product"), 0.0)
    for prompts in itertools.product(range(2), repeat=2):
        for draws in itertools.product(range(3), repeat=4):
            weight = 0.25
            own, base = GradientMoments(1), GradientMoments(1)
            for prompt, pair in zip(prompts, (draws[:2], draws[2:]), strict=True):
                weight *= float(probability_GK[prompt, pair[0]] * probability_GK[prompt, pair[1]])
                base_D = (base_GKD[prompt, pair[0]] + base_GKD[prompt, pair[1]]) / 2
                own.add(table_GKD[prompt, pair[0]], table_GKD[prompt, pair[1]], base_D)
                base.add(base_GKD[prompt, pair[0]], base_GKD[prompt, pair[1]], base_D)
            found = (own.within, own.squared_mean, own.between, own.product_with(base))
            for name, value in zip(expected, found, strict=True):
                expected[name] += weight * value
    mean_D, base_mean_D = mean_GD.mean(dim=0), base_mean_GD.mean(dim=0)
    assert expected["within"] == pytest.approx(float(exact_within_G.mean()))
    assert expected["squared_mean"] == pytest.approx(float(mean_D.square().sum()))
    assert expected["between"] == pytest.approx(float((mean_GD - mean_D).square().sum(dim=1).mean()))
    assert expected["product"] == pytest.approx(float(mean_D @ base_mean_D))


def test_halves_of_several_samples_give_the_variance_of_one() -> None:
    # Means of n have 1/n of the variance; the moments speak of a single response.
    generator = torch.Generator().manual_seed(1)
    own = GradientMoments(3)
    for _ in range(4000):
        first_D, second_D = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).mean(dim=1)
        own.add(first_D, second_D, first_D)
    assert own.within == pytest.approx(5.0, rel=0.05)


def test_credits_are_the_packages_own(mdp: TokenMDP) -> None:
    teacher_PV = mdp.policy(1)
    scores = mdp.scores(teacher_PV, teacher_PV, mdp.policy(2), low=-1.0, high=0.0)
    dense = DenseReward(clip_low=-1.0, clip_high=0.0)
    half_B = torch.arange(len(mdp.sequences)) // 2
    half_B[-1] = half_B[-2]
    found = credits_of(scores, half_B, dense=dense, gammas=[0.9])
    assert len(found) == 4 * len(BASELINES)
    mask_BT = mdp.mask_BT
    returns: dict[tuple[str, float], Tensor] = {
        ("dense", 1.0): DiscountedReturns()(dense(scores), None, mask_BT),
        ("dense", 0.9): DiscountedReturns(0.9)(dense(scores), None, mask_BT),
        ("sentence", 1.0): DiscountedReturns()(SentenceReward(token_reward=dense)(scores), None, mask_BT),
        ("expected", 1.0): ExpectedReturns()(dense(scores), scores.expected_dense_BT, mask_BT),
    }
    for (reward, gamma), return_BT in returns.items():
        by_baseline = {baseline: found[Credit(reward=reward, gamma=gamma, baseline=baseline)] for baseline in BASELINES}
        assert torch.equal(by_baseline["none"], return_BT)
        centred_BT = torch.where(mask_BT, return_BT - return_BT[mask_BT].mean(), 0.0)
        torch.testing.assert_close(by_baseline["batch mean"], centred_BT)
        assert torch.equal(by_baseline["leave one out"], leave_one_out(return_BT, mask_BT, half_B))
    assert BASE in found
    assert not Credit(reward="dense", gamma=0.9, baseline="none").is_undiscounted
