"""The gradient of our objective, averaged over all responses, is the exact gradient of the expected return.

Shapes: B all responses, T positions, P prefixes, V tokens, R responses in all pairs of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from token_mdp import TokenMDP, gradient_of_expectation
from torch import Tensor

from dpr_lightning.functional import (
    ClippedReward,
    DenseReward,
    DiscountedReturns,
    ExpectedReturns,
    ReturnEstimator,
    Reward,
    SentenceReward,
    k1,
    leave_one_out,
    policy_loss,
    reinforce_loss,
)
from dpr_lightning.types import TokenScores

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def _policy(logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return policy_loss(logp_BT, logp_BT.detach(), advantage_BT, mask_BT, num_tokens=1).loss


def _reinforce(logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return reinforce_loss(logp_BT, advantage_BT, mask_BT, num_sequences=1).loss


OBJECTIVES = [pytest.param(_policy, id="policy"), pytest.param(_reinforce, id="reinforce")]
CREDITS = [
    pytest.param(DenseReward(), DiscountedReturns(), id="dense"),
    pytest.param(SentenceReward(), DiscountedReturns(), id="sentence"),
    pytest.param(DenseReward(), ExpectedReturns(), id="expected"),
    pytest.param(DenseReward(clip_low=-1.0, clip_high=0.0), ExpectedReturns(), id="expected-clipped"),
]


def _return(scores: TokenScores, reward: Reward, returns: ReturnEstimator, beta: float) -> Tensor:
    reward_BT = reward(scores) - beta * k1(scores.old_logp_BT, scores.teacher_logp_BT)
    assert scores.teacher_kl_BT is not None
    assert scores.expected_dense_BT is not None
    # E[r_hat - beta k1] = E[r_hat] - beta KL_SFT
    expected_BT = scores.expected_dense_BT - beta * scores.teacher_kl_BT
    return returns(reward_BT, expected_BT, scores.response_mask_BT)


def _average_gradient(mdp: TokenMDP, actor_PV: Tensor, advantage_BT: Tensor, objective: Objective) -> Tensor:
    """Return minus the loss's [P, V] gradient, averaged over all responses with their probabilities.

    At rho = 1 both losses are linear in the advantage under a positive factor, so the probability is put there.
    """
    leaf_PV = actor_PV.clone().requires_grad_()
    weight_B1 = mdp.probability(actor_PV)[:, None]
    (grad_PV,) = torch.autograd.grad(objective(mdp.logp(leaf_PV), weight_B1 * advantage_BT, mdp.mask_BT), leaf_PV)
    return -grad_PV


def _exact_gradient(
    mdp: TokenMDP, actor_PV: Tensor, scores: TokenScores, beta: float, low: float = -math.inf, high: float = math.inf
) -> Tensor:
    """Differentiate E[sum_t clamp(r_hat)] - beta KL(pi || pi_SFT) through everything that depends on pi."""
    leaf_PV = actor_PV.clone().requires_grad_()
    logp_BT = mdp.logp(leaf_PV)
    penalty_B = (logp_BT - scores.teacher_logp_BT).sum(dim=1)
    r_hat_BT = (scores.teacher_logp_BT - scores.reference_logp_BT).clamp(low, high)
    total_B = r_hat_BT.sum(dim=1) - beta * penalty_B
    (grad_PV,) = torch.autograd.grad((mdp.probability(leaf_PV) * total_B).sum(), leaf_PV)
    return grad_PV


def test_all_responses_are_there(mdp: TokenMDP) -> None:
    # 1 + 3 + 9 + 27 states; as many responses that end with EOS, and 3^4 that are cut off
    assert len(mdp.prefixes) == 40
    assert len(mdp.sequences) == 40 + 81
    assert len(set(mdp.sequences)) == 121
    total = mdp.probability(mdp.policy(0)).sum()
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_scores_of_the_package_equal_the_tables(mdp: TokenMDP) -> None:
    actor_PV, teacher_PV, reference_PV = mdp.policy(0), mdp.policy(1), mdp.policy(2)
    scores = mdp.scores(actor_PV, teacher_PV, reference_PV)
    for got_BT, table_PV in (
        (scores.old_logp_BT, actor_PV),
        (scores.teacher_logp_BT, teacher_PV),
        (scores.reference_logp_BT, reference_PV),
    ):
        torch.testing.assert_close(got_BT, mdp.logp(table_PV), rtol=1e-12, atol=1e-12)
    # The chain rule of the KL: over whole responses it is the expected sum over states.
    probability_B = mdp.probability(actor_PV)
    whole = (probability_B * (scores.old_logp_BT - scores.teacher_logp_BT).sum(dim=1)).sum()
    assert scores.teacher_kl_BT is not None
    torch.testing.assert_close((probability_B * scores.teacher_kl_BT.sum(dim=1)).sum(), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("reward", "returns"), CREDITS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_average_gradient_is_exact(
    mdp: TokenMDP, objective: Objective, reward: ClippedReward, returns: ReturnEstimator, beta: float
) -> None:
    actor_PV = mdp.policy(0)
    scores = mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2), low=reward.low, high=reward.high)
    got_PV = _average_gradient(mdp, actor_PV, _return(scores, reward, returns, beta), objective)
    exact_PV = _exact_gradient(mdp, actor_PV, scores, beta, reward.low, reward.high)
    assert exact_PV.norm() > 0.1
    torch.testing.assert_close(got_PV, exact_PV, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("reward", "returns"), CREDITS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_average_gradient_with_leave_one_out_is_exact(
    mdp: TokenMDP, objective: Objective, reward: ClippedReward, returns: ReturnEstimator, beta: float
) -> None:
    actor_PV = mdp.policy(0)
    scores = mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2), low=reward.low, high=reward.high)
    return_BT = _return(scores, reward, returns, beta)
    # Every ordered pair of responses is two samples of one prompt.
    num_sequences = len(mdp.sequences)
    pair_R = torch.cartesian_prod(torch.arange(num_sequences), torch.arange(num_sequences)).flatten()
    prompt_index_R = torch.arange(num_sequences**2).repeat_interleave(2)
    advantage_RT = leave_one_out(return_BT[pair_R], mdp.mask_BT[pair_R], prompt_index_R)
    probability_B = mdp.probability(actor_PV)
    # The mean of the two samples, weighted by the pair's probability.
    weight_R1 = 0.5 * torch.outer(probability_B, probability_B).flatten().repeat_interleave(2)[:, None]
    leaf_PV = actor_PV.clone().requires_grad_()
    loss = objective(mdp.logp(leaf_PV)[pair_R], weight_R1 * advantage_RT, mdp.mask_BT[pair_R])
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    torch.testing.assert_close(
        -grad_PV, _exact_gradient(mdp, actor_PV, scores, beta, reward.low, reward.high), rtol=1e-10, atol=1e-12
    )
    assert not torch.allclose(advantage_RT, return_BT[pair_R])


def test_subtracting_every_later_expectation_removes_the_future(mdp: TokenMDP) -> None:
    # The tempting baseline: r_k - b(s_k) at every k >= t. What is left is the gradient without any future.
    actor_PV = mdp.policy(0)
    scores = mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2))
    assert scores.teacher_kl_BT is not None
    assert scores.expected_dense_BT is not None
    centred_BT = DenseReward()(scores) - scores.expected_dense_BT
    wrong_PV = _average_gradient(mdp, actor_PV, DiscountedReturns()(centred_BT, None, mdp.mask_BT), _reinforce)
    myopic_BT = DiscountedReturns(gamma=0.0)(DenseReward()(scores), None, mdp.mask_BT)
    myopic_PV = _average_gradient(mdp, actor_PV, myopic_BT, _reinforce)
    exact_PV = _exact_gradient(mdp, actor_PV, scores, 0.0)
    torch.testing.assert_close(wrong_PV, myopic_PV, rtol=1e-10, atol=1e-12)
    assert (wrong_PV - exact_PV).norm() > 0.2 * exact_PV.norm()


def test_forgetting_the_penalty_in_the_expectation_is_biased(mdp: TokenMDP) -> None:
    # b without its (1 + beta): the check above is sharp enough to see it.
    actor_PV, beta = mdp.policy(0), 0.3
    scores = mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2))
    assert scores.teacher_kl_BT is not None
    assert scores.expected_dense_BT is not None
    reward_BT = DenseReward()(scores) - beta * k1(scores.old_logp_BT, scores.teacher_logp_BT)
    return_BT = ExpectedReturns()(reward_BT, scores.expected_dense_BT, mdp.mask_BT)
    wrong_PV = _average_gradient(mdp, actor_PV, return_BT, _reinforce)
    exact_PV = _exact_gradient(mdp, actor_PV, scores, beta)
    assert (wrong_PV - exact_PV).norm() > 0.02 * exact_PV.norm()


def test_the_two_ways_to_the_exact_gradient_agree(mdp: TokenMDP) -> None:
    actor_PV = mdp.policy(0)
    scores = mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2))
    torch.testing.assert_close(
        gradient_of_expectation(mdp, actor_PV, DenseReward()(scores).sum(dim=1)),
        _exact_gradient(mdp, actor_PV, scores, 0.0),
        rtol=1e-12,
        atol=1e-14,
    )
