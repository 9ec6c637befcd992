"""Eq. 4: the reward in the logits, r = log pi + V(s) - V(s') = Q - V(s'), inverts the soft Bellman equation.

Per-token identity and telescoping of Eq. 4 are in test_reward_identities; here the operator is inverted both ways, and
the reward is shown to explain its policy: softmax(Q) is what an entropy-seeking agent does under r_Q.

Shapes: B all responses, T positions, P prefixes, V tokens.
"""

from __future__ import annotations

import pytest
import torch
from soft_q import expected_return, from_table, next_value, package_reward, soft_q
from token_mdp import HORIZON, TokenMDP
from torch import Tensor

from dpr_lightning.functional import (
    DenseReward,
    DenseWithValueReward,
    TeacherLogprobReward,
    k1,
    reinforce_loss,
    reward_to_go,
)

seeds = pytest.mark.parametrize("seed", range(3))


@seeds
def test_reward_of_the_q_of_a_reward_is_that_reward(mdp: TokenMDP, seed: int) -> None:
    reward_PV = mdp.policy(seed, scale=2.0)
    torch.testing.assert_close(
        package_reward(mdp, soft_q(mdp, reward_PV)), from_table(mdp, reward_PV), rtol=1e-12, atol=1e-12
    )


@seeds
def test_q_of_the_reward_of_a_q_is_that_q(mdp: TokenMDP, seed: int) -> None:
    # Every state's constant comes back too: V(terminal) = 0 ties it down.
    q_PV = mdp.policy(seed, scale=2.0)
    reward_BT, table_PV = package_reward(mdp, q_PV), torch.full_like(q_PV, torch.nan)
    table_PV[mdp.prefix_BT[mdp.mask_BT], mdp.input_ids_BT[mdp.mask_BT]] = reward_BT[mdp.mask_BT]
    torch.testing.assert_close(soft_q(mdp, table_PV), q_PV, rtol=1e-12, atol=1e-12)


@seeds
def test_inverse_under_any_policy(mdp: TokenMDP, seed: int) -> None:
    # T^pi Q = Q - V^pi(s'), V^pi(s) = E_pi[Q - log pi]; its inverse is the evaluation of pi with its entropy.
    reward_PV, logp_PV = mdp.policy(seed), mdp.policy(seed + 100).log_softmax(dim=-1)

    def value(q_PV: Tensor) -> Tensor:
        return (logp_PV.exp() * (q_PV - logp_PV)).sum(dim=-1)

    q_PV = reward_PV
    for _ in range(HORIZON):
        q_PV = reward_PV + next_value(mdp, value(q_PV))
    torch.testing.assert_close(q_PV - next_value(mdp, value(q_PV)), reward_PV, rtol=1e-12, atol=1e-12)
    # V^pi(s_0) is the expected return with entropy, by summing over all responses.
    soft_return = expected_return(mdp, logp_PV, from_table(mdp, reward_PV - logp_PV))
    torch.testing.assert_close(value(q_PV)[0], soft_return, rtol=1e-12, atol=1e-12)
    # No policy beats the soft-optimal one, and this one is not it.
    assert value(q_PV)[0] < soft_q(mdp, reward_PV)[0].logsumexp(dim=-1) - 0.01


@seeds
def test_each_response_has_a_probability_in_proportion_to_the_exponential_of_its_return(
    mdp: TokenMDP, seed: int
) -> None:
    # log pi(y) = sum r - V(s_0), and V(s_0) = log sum_y exp(sum r): maximum entropy over all responses.
    q_PV = mdp.policy(seed, scale=2.0)
    total_B = package_reward(mdp, q_PV).sum(dim=1)
    torch.testing.assert_close(total_B.logsumexp(dim=0), q_PV[0].logsumexp(dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total_B.softmax(dim=0), mdp.probability(q_PV), rtol=1e-11, atol=0)


def _soft_gradient(mdp: TokenMDP, actor_PV: Tensor, reward_BT: Tensor) -> Tensor:
    """Return the package's policy gradient of the expected return under a reward with an entropy or KL term in it."""
    leaf_PV = actor_PV.clone().requires_grad_()
    advantage_BT = mdp.probability(actor_PV)[:, None] * reward_to_go(reward_BT, mdp.mask_BT, gamma=1.0)
    loss = reinforce_loss(mdp.logp(leaf_PV), advantage_BT, mdp.mask_BT, num_sequences=1).loss
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    return -grad_PV


@seeds
def test_no_gradient_is_left_at_the_policy_that_the_reward_was_read_from(mdp: TokenMDP, seed: int) -> None:
    q_PV, other_PV = mdp.policy(seed), mdp.policy(seed + 100)
    reward_BT = package_reward(mdp, q_PV)
    at_home_PV = _soft_gradient(mdp, q_PV, reward_BT - mdp.logp(q_PV))
    torch.testing.assert_close(at_home_PV, torch.zeros_like(at_home_PV), rtol=0, atol=1e-13)
    assert _soft_gradient(mdp, other_PV, reward_BT - mdp.logp(other_PV)).norm() > 0.1
    # Without the entropy there is one: the greedy optimum is another policy.
    assert _soft_gradient(mdp, q_PV, reward_BT).norm() > 0.1


@seeds
def test_dense_reward_explains_the_teacher_to_one_who_starts_at_the_reference(mdp: TokenMDP, seed: int) -> None:
    # E[sum r_hat] - KL(pi || pi_ref) = -KL(pi || pi_SFT): largest, and 0, at the teacher.
    teacher_PV, reference_PV = mdp.policy(seed), mdp.policy(seed + 100)
    for reward in (DenseReward(), DenseWithValueReward()):
        scores = mdp.scores(teacher_PV, teacher_PV, reference_PV)
        reward_BT = reward(scores) - k1(scores.old_logp_BT, scores.reference_logp_BT)
        grad_PV = _soft_gradient(mdp, teacher_PV, reward_BT)
        torch.testing.assert_close(grad_PV, torch.zeros_like(grad_PV), rtol=0, atol=1e-13)
    for other in range(200, 204):
        actor_PV = teacher_PV + mdp.policy(other, scale=0.3)
        scores = mdp.scores(actor_PV, teacher_PV, reference_PV)
        assert scores.teacher_kl_BT is not None
        gain = expected_return(mdp, actor_PV, DenseReward()(scores) - k1(scores.old_logp_BT, scores.reference_logp_BT))
        kl = expected_return(mdp, actor_PV, scores.teacher_kl_BT)
        assert kl > 0.0
        torch.testing.assert_close(gain, -kl, rtol=1e-10, atol=1e-12)


def test_log_probability_alone_is_its_own_reward_with_value_zero(mdp: TokenMDP) -> None:
    # log pi is r_Q shaped so that V = 0 at every state; its soft-optimal policy is pi again.
    teacher_PV = mdp.policy(1)
    reward_BT = TeacherLogprobReward()(mdp.scores(teacher_PV, teacher_PV, mdp.policy(2)))
    logp_PV = teacher_PV.log_softmax(dim=-1)
    torch.testing.assert_close(package_reward(mdp, logp_PV), reward_BT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(soft_q(mdp, logp_PV), logp_PV, rtol=1e-12, atol=1e-12)
