"""What the paper proves of its rewards, on every response of a token MDP (Eq. 4, A.8, A.10, A.11).

Shapes: B all responses, T positions, P prefixes, V tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from token_mdp import EOS, HORIZON, NUM_TOKENS, TokenMDP, gradient_of_expectation
from torch import Tensor

from dpr_lightning.functional import (
    DenseReward,
    DenseWithValueReward,
    Reward,
    SentenceReward,
    TeacherLogprobReward,
    masked_sum,
    reinforce_loss,
    reward_to_go,
)


def _policy_gradient(mdp: TokenMDP, actor_PV: Tensor, reward_BT: Tensor) -> Tensor:
    """Return the [P, V] gradient that REINFORCE follows under a token reward, averaged over all responses."""
    leaf_PV = actor_PV.clone().requires_grad_()
    return_BT = reward_to_go(reward_BT, mdp.mask_BT, gamma=1.0)
    advantage_BT = mdp.probability(actor_PV)[:, None] * return_BT
    loss = reinforce_loss(mdp.logp(leaf_PV), advantage_BT, mdp.mask_BT, num_sequences=1).loss
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    return -grad_PV


def _optimal_response(mdp: TokenMDP, reward_BT: Tensor) -> tuple[int, ...]:
    """Return what the policy that maximises the expected return says: the best response, as nothing else is random."""
    return mdp.sequences[int(reward_BT.sum(dim=1).argmax())]


def _next_value(mdp: TokenMDP, value_P: Tensor) -> Tensor:
    """Return [B, T] the value of the state behind each token, looked up by prefix; terminal states have 0."""
    next_BT = torch.zeros_like(mdp.mask_BT, dtype=torch.float64)
    for row, sequence in enumerate(mdp.sequences):
        for t in range(1, len(sequence)):
            next_BT[row, t] = value_P[mdp.prefixes.index(sequence[:t])]
    return next_BT


def test_equation_4_each_reward_is_q_less_the_next_value(mdp: TokenMDP) -> None:
    # The logits are Q, so log pi + V(s) - V(s') = Q(s, a) - V(s').
    teacher_PV = mdp.policy(1, scale=2.0)
    reward_BT = DenseWithValueReward(relative=False)(mdp.scores(mdp.policy(0), teacher_PV, mdp.policy(2)))
    q_BT = torch.where(mdp.mask_BT, teacher_PV[mdp.prefix_BT, mdp.input_ids_BT], 0.0)
    torch.testing.assert_close(reward_BT, q_BT - _next_value(mdp, teacher_PV.logsumexp(-1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relative", [True, False])
def test_equation_4_telescopes(mdp: TokenMDP, relative: bool) -> None:
    teacher_PV, reference_PV = mdp.policy(1, scale=2.0), mdp.policy(2, scale=0.5)
    scores = mdp.scores(mdp.policy(0), teacher_PV, reference_PV)
    total_B = DenseWithValueReward(relative=relative)(scores).sum(dim=1)
    first_value = teacher_PV[0].logsumexp(-1) - (reference_PV[0].logsumexp(-1) if relative else 0.0)
    logp_B = (mdp.logp(teacher_PV) - (mdp.logp(reference_PV) if relative else 0.0)).sum(dim=1)
    torch.testing.assert_close(total_B, logp_B + first_value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("plain", "shaped"),
    [
        pytest.param(TeacherLogprobReward(), DenseWithValueReward(relative=False), id="teacher_alone"),
        pytest.param(DenseReward(), DenseWithValueReward(), id="relative"),
    ],
)
def test_a8_log_probability_and_full_reward_have_the_same_policy_gradient(
    mdp: TokenMDP, plain: Reward, shaped: Reward
) -> None:
    actor_PV = mdp.policy(0)
    scores = mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2))
    plain_PV = _policy_gradient(mdp, actor_PV, plain(scores))
    assert plain_PV.norm() > 0.1
    torch.testing.assert_close(_policy_gradient(mdp, actor_PV, shaped(scores)), plain_PV, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradient_of_expectation(mdp, actor_PV, shaped(scores).sum(dim=1)), plain_PV, rtol=1e-10, atol=1e-12
    )


def test_a10_potential_based_shaping_changes_neither_gradient_nor_optimum(mdp: TokenMDP) -> None:
    actor_PV = mdp.policy(0)
    reward_BT = DenseReward()(mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2)))
    potential_P = mdp.policy(7, scale=5.0)[:, 0]
    shaped_BT = reward_BT + _next_value(mdp, potential_P) - mdp.by_state(potential_P)
    assert not torch.allclose(shaped_BT, reward_BT)
    torch.testing.assert_close(
        _policy_gradient(mdp, actor_PV, shaped_BT),
        _policy_gradient(mdp, actor_PV, reward_BT),
        rtol=1e-10,
        atol=1e-12,
    )
    assert _optimal_response(mdp, shaped_BT) == _optimal_response(mdp, reward_BT)


def test_shaping_that_is_not_zero_at_the_end_does_change_the_gradient(mdp: TokenMDP) -> None:
    # The condition on terminal states is needed. Potential 1 behind EOS and 0 elsewhere pays 1 for each EOS.
    actor_PV = mdp.policy(0)
    reward_BT = DenseReward()(mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2)))
    shaped_BT = reward_BT + (mdp.input_ids_BT == EOS).double()
    difference_PV = _policy_gradient(mdp, actor_PV, shaped_BT) - _policy_gradient(mdp, actor_PV, reward_BT)
    assert difference_PV.norm() > 0.05


def _pathological(mdp: TokenMDP) -> tuple[Tensor, Tensor]:
    """Return teacher and reference: the teacher has learnt to answer at length, the reference not yet.

    Teacher: EOS has 0.3 at every state, token 0 the 0.6, tokens 1 and 2 the rest. Reference: EOS 0.6, the others the
    same share each.
    """
    teacher_V = torch.tensor([0.6, 0.05, 0.05, 0.3], dtype=torch.float64)
    reference_V = torch.tensor([0.4 / 3, 0.4 / 3, 0.4 / 3, 0.6], dtype=torch.float64)
    num_prefixes = len(mdp.prefixes)
    return teacher_V.log().expand(num_prefixes, -1), reference_V.log().expand(num_prefixes, -1)


def test_a11_without_a_baseline_ending_at_once_is_optimal(mdp: TokenMDP) -> None:
    teacher_PV, reference_PV = _pathological(mdp)
    scores = mdp.scores(teacher_PV, teacher_PV, reference_PV)
    teacher_reward_BT, dense_BT = TeacherLogprobReward()(scores), DenseReward()(scores)
    # No reward is positive, so each further token costs: 0.3 at once beats 0.6^4 = 0.1296 and all between.
    assert (teacher_reward_BT <= 0).all()
    assert _optimal_response(mdp, teacher_reward_BT) == (EOS,)
    assert teacher_reward_BT.sum(dim=1).max().item() == pytest.approx(math.log(0.3))
    # The teacher itself ends at once in 3 of 10 answers, and token 0 is what it says most often.
    assert int(teacher_PV[0].argmax()) == 0
    # Dense: log(0.6 / 0.1333) = 1.504 for each token 0, log(0.3 / 0.6) < 0 for EOS.
    assert _optimal_response(mdp, dense_BT) == (0,) * HORIZON
    assert dense_BT.sum(dim=1).max().item() == pytest.approx(HORIZON * math.log(4.5))
    assert _optimal_response(mdp, SentenceReward()(scores)) == (0,) * HORIZON


def test_a11_the_first_gradient_step_from_the_teacher_already_points_there(mdp: TokenMDP) -> None:
    teacher_PV, reference_PV = _pathological(mdp)
    scores = mdp.scores(teacher_PV, teacher_PV, reference_PV)
    without_PV = _policy_gradient(mdp, teacher_PV, TeacherLogprobReward()(scores))
    dense_PV = _policy_gradient(mdp, teacher_PV, DenseReward()(scores))
    # d J / d logit = pi(EOS) (Q(EOS) - V). At the first state Q(EOS) = log 0.3 = -1.204 without a baseline, and V is
    # minus the entropy of the whole answer. One state has h = 0.3 log(1/0.3) + 0.6 log(1/0.6) + 0.1 log(20) = 0.9673,
    # and is reached with 0.7 each time: V = -h (1 + 0.7 + 0.49 + 0.343) = -2.4501; 0.3 (-1.204 + 2.4501) = 0.3738
    assert without_PV[0, EOS].item() == pytest.approx(0.3738, abs=2e-4)
    assert dense_PV[0, EOS].item() < 0.0
    # The shares of all tokens at a state add up to nothing, as a softmax demands.
    torch.testing.assert_close(without_PV.sum(dim=1), torch.zeros(len(mdp.prefixes), dtype=torch.float64))
    assert without_PV.shape == (len(mdp.prefixes), NUM_TOKENS)


def test_the_dense_return_at_the_teacher_is_the_kl_to_the_reference(mdp: TokenMDP) -> None:
    # E[sum r_hat] under pi_SFT = sum over states of KL(pi_SFT || pi_ref): never negative, and it grows with length.
    teacher_PV, reference_PV = mdp.policy(1), mdp.policy(2)
    scores = mdp.scores(teacher_PV, teacher_PV, reference_PV)
    weight_B1 = mdp.probability(teacher_PV)[:, None]
    assert scores.expected_dense_BT is not None
    expected = masked_sum(weight_B1 * scores.expected_dense_BT, mdp.mask_BT)
    torch.testing.assert_close(masked_sum(weight_B1 * DenseReward()(scores), mdp.mask_BT), expected)
    assert expected > 0
