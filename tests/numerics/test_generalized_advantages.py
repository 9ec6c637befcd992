"""Generalized advantages over every response of the token MDP: the double sum, the exact values, and no bias.

Shapes: B all responses, T positions, P prefixes (states), V tokens, L positions ahead.
"""

from __future__ import annotations

import pytest
import torch
from token_mdp import TokenMDP
from torch import Tensor

from dpr_lightning.functional import (
    DenseReward,
    Reward,
    SentenceReward,
    generalized_advantages,
    lambda_returns,
    reinforce_loss,
    reward_to_go,
)

REWARDS = [pytest.param(DenseReward(), id="dense"), pytest.param(SentenceReward(), id="sentence")]


def rewards(mdp: TokenMDP, reward: Reward) -> Tensor:
    return reward(mdp.scores(mdp.policy(0), mdp.policy(1), mdp.policy(2)))


def exact_values(mdp: TokenMDP, actor_PV: Tensor, reward_BT: Tensor) -> Tensor:
    """Return [P]: the mean of what is still to come over all responses that pass through the state."""
    probability_B = mdp.probability(actor_PV)
    value_P = torch.zeros(len(mdp.prefixes), dtype=torch.float64)
    for number, prefix in enumerate(mdp.prefixes):
        through = [row for row, sequence in enumerate(mdp.sequences) if sequence[: len(prefix)] == prefix]
        # An EOS ends a response, so every sequence that begins with the prefix goes on from it.
        to_come_B = reward_BT[through, 1 + len(prefix) :].sum(dim=1)
        value_P[number] = (probability_B[through] * to_come_B).sum() / probability_B[through].sum()
    return value_P


def double_sum(mdp: TokenMDP, reward_BT: Tensor, value_BT: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Return A_t = sum over l of (gamma lambda)^l delta_{t+l}, response by response with plain numbers."""
    out_BT = torch.zeros_like(reward_BT)
    for row, sequence in enumerate(mdp.sequences):
        length = len(sequence)
        r = reward_BT[row, 1 : 1 + length].tolist()
        v = [*value_BT[row, 1 : 1 + length].tolist(), 0.0]
        for t in range(length):
            out_BT[row, 1 + t] = sum(
                (gamma * gae_lambda) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length)
            )
    return out_BT


@pytest.mark.parametrize("gae_lambda", [0.0, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("reward", REWARDS)
def test_advantages_are_the_double_sum(mdp: TokenMDP, reward: Reward, gamma: float, gae_lambda: float) -> None:
    reward_BT = rewards(mdp, reward)
    value_BT = mdp.by_state(mdp.policy(5)[:, 0])
    got_BT = generalized_advantages(reward_BT, value_BT, mdp.mask_BT, gamma=gamma, gae_lambda=gae_lambda)
    expected_BT = double_sum(mdp, reward_BT, value_BT, gamma, gae_lambda)
    torch.testing.assert_close(got_BT, expected_BT, rtol=1e-12, atol=1e-13)
    assert torch.equal(got_BT[~mdp.mask_BT], torch.zeros_like(got_BT[~mdp.mask_BT]))
    return_BT = lambda_returns(reward_BT, value_BT, mdp.mask_BT, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(return_BT, expected_BT + value_BT, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.7, 1.0])
def test_at_lambda_one_returns_know_no_value(mdp: TokenMDP, gamma: float) -> None:
    reward_BT, value_BT = rewards(mdp, DenseReward()), mdp.by_state(mdp.policy(5)[:, 0])
    plain_BT = reward_to_go(reward_BT, mdp.mask_BT, gamma=gamma)
    return_BT = lambda_returns(reward_BT, value_BT, mdp.mask_BT, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(return_BT, plain_BT, rtol=1e-13, atol=1e-14)
    # Not even by rounding: wild values give the very same returns.
    wild_BT = lambda_returns(reward_BT, 1e9 * value_BT, mdp.mask_BT, gamma=gamma, gae_lambda=1.0)
    assert torch.equal(wild_BT, return_BT)


def test_at_lambda_zero_advantages_are_the_td_error(mdp: TokenMDP) -> None:
    reward_BT, value_P = rewards(mdp, DenseReward()), mdp.policy(5)[:, 0]
    value_BT = mdp.by_state(value_P)
    got_BT = generalized_advantages(reward_BT, value_BT, mdp.mask_BT, gamma=0.9, gae_lambda=0.0)
    for row, sequence in enumerate(mdp.sequences):
        for t in range(len(sequence)):
            behind = sequence[: t + 1]
            # A response that is over, by EOS or by the horizon, has no next state.
            next_value = float(value_P[mdp.prefixes.index(behind)]) if behind in mdp.prefixes else 0.0
            expected = (
                float(reward_BT[row, 1 + t]) + 0.9 * next_value - float(value_P[mdp.prefixes.index(sequence[:t])])
            )
            assert float(got_BT[row, 1 + t]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("reward", REWARDS)
def test_exact_values_leave_nothing_to_expect(mdp: TokenMDP, reward: Reward, gae_lambda: float) -> None:
    # E[A_t | s_t] = 0 in every state, for every lambda.
    actor_PV, reward_BT = mdp.policy(0), rewards(mdp, reward)
    value_BT = mdp.by_state(exact_values(mdp, actor_PV, reward_BT))
    advantage_BT = generalized_advantages(reward_BT, value_BT, mdp.mask_BT, gae_lambda=gae_lambda)
    total_P = torch.zeros(len(mdp.prefixes), dtype=torch.float64)
    weighted_BT = mdp.probability(actor_PV)[:, None] * advantage_BT
    total_P.index_add_(0, mdp.prefix_BT[mdp.mask_BT], weighted_BT[mdp.mask_BT])
    torch.testing.assert_close(total_P, torch.zeros_like(total_P), rtol=0, atol=1e-14)


def average_gradient(mdp: TokenMDP, actor_PV: Tensor, advantage_BT: Tensor) -> Tensor:
    leaf_PV = actor_PV.clone().requires_grad_()
    weight_B1 = mdp.probability(actor_PV)[:, None]
    loss = reinforce_loss(mdp.logp(leaf_PV), weight_B1 * advantage_BT, mdp.mask_BT, num_sequences=1).loss
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    return -grad_PV


def exact_gradient(mdp: TokenMDP, actor_PV: Tensor, reward_BT: Tensor) -> Tensor:
    leaf_PV = actor_PV.clone().requires_grad_()
    (grad_PV,) = torch.autograd.grad((mdp.probability(leaf_PV) * reward_BT.sum(dim=1)).sum(), leaf_PV)
    return grad_PV


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("reward", REWARDS)
def test_exact_values_give_the_exact_gradient(mdp: TokenMDP, reward: Reward, gae_lambda: float) -> None:
    actor_PV, reward_BT = mdp.policy(0), rewards(mdp, reward)
    value_BT = mdp.by_state(exact_values(mdp, actor_PV, reward_BT))
    advantage_BT = generalized_advantages(reward_BT, value_BT, mdp.mask_BT, gae_lambda=gae_lambda)
    exact_PV = exact_gradient(mdp, actor_PV, reward_BT)
    assert exact_PV.norm() > 0.1
    torch.testing.assert_close(average_gradient(mdp, actor_PV, advantage_BT), exact_PV, rtol=1e-10, atol=1e-12)


def test_wrong_values_bias_the_gradient_only_below_lambda_one(mdp: TokenMDP) -> None:
    actor_PV, reward_BT = mdp.policy(0), rewards(mdp, SentenceReward())
    value_BT = mdp.by_state(3.0 * mdp.policy(5)[:, 0])
    exact_PV = exact_gradient(mdp, actor_PV, reward_BT)
    got_PV = {
        gae_lambda: average_gradient(
            mdp, actor_PV, generalized_advantages(reward_BT, value_BT, mdp.mask_BT, gae_lambda=gae_lambda)
        )
        for gae_lambda in (0.6, 1.0)
    }
    torch.testing.assert_close(got_PV[1.0], exact_PV, rtol=1e-10, atol=1e-12)
    assert (got_PV[0.6] - exact_PV).norm() > 0.1 * exact_PV.norm()
