"""What truncated importance weights per token make exact, and what not, when q and not pi drew the responses.

Shapes: B all responses, T positions, P prefixes, V tokens.
"""

from __future__ import annotations

import pytest
import torch
from token_mdp import TokenMDP
from torch import Tensor

from dpr_lightning.functional import policy_loss, reinforce_loss, truncated_importance

HUGE = 1e30
"""A cap above every ratio."""


def average_gradient(
    mdp: TokenMDP, actor_PV: Tensor, sampler_PV: Tensor, advantage_BT: Tensor, weight_BT: Tensor
) -> Tensor:
    """Return minus the clipped loss's [P, V] gradient at rho = 1, averaged over all responses as q draws them."""
    leaf_PV = actor_PV.clone().requires_grad_()
    logp_BT = mdp.logp(leaf_PV)
    probability_B1 = mdp.probability(sampler_PV)[:, None]
    loss = policy_loss(logp_BT, logp_BT.detach(), probability_B1 * weight_BT * advantage_BT, mdp.mask_BT, num_tokens=1)
    (grad_PV,) = torch.autograd.grad(loss.loss, leaf_PV)
    return -grad_PV


def weights(mdp: TokenMDP, actor_PV: Tensor, sampler_PV: Tensor, cap: float = HUGE) -> Tensor:
    return truncated_importance(mdp.logp(actor_PV), mdp.logp(sampler_PV), mdp.mask_BT, cap=cap).weight_BT


@pytest.fixture
def response_return(mdp: TokenMDP) -> Tensor:
    """A reward for each response, given back from every token: REINFORCE's return of the whole response."""
    total_B = torch.randn(len(mdp.sequences), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.where(mdp.mask_BT, total_B[:, None], 0.0)


def exact(mdp: TokenMDP, actor_PV: Tensor, advantage_BT: Tensor) -> Tensor:
    return average_gradient(mdp, actor_PV, actor_PV, advantage_BT, torch.ones_like(advantage_BT))


def near(mdp: TokenMDP, actor_PV: Tensor, distance: float) -> Tensor:
    return actor_PV + distance * mdp.policy(7)


def test_the_product_over_the_response_is_exact(mdp: TokenMDP, response_return: Tensor) -> None:
    actor_PV = mdp.policy(0)
    sampler_PV = near(mdp, actor_PV, 0.5)
    product_BT = torch.where(mdp.mask_BT, weights(mdp, actor_PV, sampler_PV), 1.0).prod(dim=1, keepdim=True)
    wanted_PV = exact(mdp, actor_PV, response_return)
    got_PV = average_gradient(mdp, actor_PV, sampler_PV, response_return, product_BT)
    torch.testing.assert_close(got_PV, wanted_PV, rtol=1e-10, atol=1e-12)


def test_responses_of_one_token_are_exact(mdp: TokenMDP, response_return: Tensor) -> None:
    # The first token's loss alone, and a return that depends on that token alone: nothing follows it.
    actor_PV = mdp.policy(0)
    sampler_PV = near(mdp, actor_PV, 1.0)
    by_token_V = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    first_BT = torch.zeros_like(response_return)
    first_BT[:, 1] = by_token_V[mdp.input_ids_BT[:, 1]]
    wanted_PV = exact(mdp, actor_PV, first_BT)
    got_PV = average_gradient(mdp, actor_PV, sampler_PV, first_BT, weights(mdp, actor_PV, sampler_PV))
    torch.testing.assert_close(got_PV, wanted_PV, rtol=1e-10, atol=1e-12)
    uncorrected_PV = average_gradient(mdp, actor_PV, sampler_PV, first_BT, torch.ones_like(first_BT))
    assert (uncorrected_PV - wanted_PV).norm() > 0.2 * wanted_PV.norm()


def test_a_cap_below_a_ratio_is_biased(mdp: TokenMDP, response_return: Tensor) -> None:
    actor_PV = mdp.policy(0)
    sampler_PV = near(mdp, actor_PV, 1.0)
    first_BT = torch.zeros_like(response_return)
    first_BT[:, 1] = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)[mdp.input_ids_BT[:, 1]]
    assert float(weights(mdp, actor_PV, sampler_PV)[:, 1].max()) > 1.2
    wanted_PV = exact(mdp, actor_PV, first_BT)
    got_PV = average_gradient(mdp, actor_PV, sampler_PV, first_BT, weights(mdp, actor_PV, sampler_PV, cap=1.2))
    assert (got_PV - wanted_PV).norm() > 0.01 * wanted_PV.norm()


def test_per_token_weights_are_an_approximation_that_improves_as_the_sampler_comes_near(
    mdp: TokenMDP, response_return: Tensor
) -> None:
    actor_PV = mdp.policy(0)
    wanted_PV = exact(mdp, actor_PV, response_return)
    errors = []
    for distance in (0.4, 0.1, 0.025):
        sampler_PV = near(mdp, actor_PV, distance)
        got_PV = average_gradient(mdp, actor_PV, sampler_PV, response_return, weights(mdp, actor_PV, sampler_PV))
        errors.append(float((got_PV - wanted_PV).norm() / wanted_PV.norm()))
    # It is not exact, and its error is of first order in the distance.
    assert errors[0] > 0.02
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] == pytest.approx(errors[1] / 4, rel=0.25)


def test_the_weight_on_the_advantage_is_the_weight_on_the_loss_of_each_token(
    mdp: TokenMDP, response_return: Tensor
) -> None:
    # One place for every loss: off-policy by the updates too, with clipped ratios on both sides.
    old_PV = mdp.policy(0)
    old_BT, weight_BT = mdp.logp(old_PV), weights(mdp, old_PV, near(mdp, old_PV, 0.5), cap=1.5)
    assert float(weight_BT.max()) == pytest.approx(1.5)
    mask_BT = mdp.mask_BT

    def clipped(logp_BT: Tensor, advantage_BT: Tensor, rows: Tensor) -> Tensor:
        return policy_loss(logp_BT, old_BT, advantage_BT, rows, num_tokens=1).loss

    def plain(logp_BT: Tensor, advantage_BT: Tensor, rows: Tensor) -> Tensor:
        return reinforce_loss(logp_BT, advantage_BT, rows, num_sequences=1).loss

    for loss in (clipped, plain):
        leaf_PV = (old_PV + 0.6 * mdp.policy(3)).requires_grad_()
        (got_PV,) = torch.autograd.grad(loss(mdp.logp(leaf_PV), weight_BT * response_return, mask_BT), leaf_PV)
        total_PV = torch.zeros_like(got_PV)
        for row, column in mask_BT.nonzero()[::7].tolist():
            only_BT = torch.zeros_like(mask_BT)
            only_BT[row, column] = True
            (grad_PV,) = torch.autograd.grad(loss(mdp.logp(leaf_PV), response_return, only_BT), leaf_PV)
            (weighted_PV,) = torch.autograd.grad(loss(mdp.logp(leaf_PV), weight_BT * response_return, only_BT), leaf_PV)
            torch.testing.assert_close(weighted_PV, weight_BT[row, column] * grad_PV, rtol=1e-12, atol=1e-14)
            total_PV += weighted_PV
        assert total_PV.norm() > 0


@pytest.mark.parametrize("seed", range(5))
def test_a_temperature_biases_the_gradient_and_weights_take_part_of_it_back(mdp: TokenMDP, seed: int) -> None:
    # What the warning of DPRModule says of temperature 0.7.
    actor_PV, reward_BT = mdp.policy(seed), mdp.by_state(mdp.policy(seed + 50)[:, 0])
    return_BT = reward_BT.flip(1).cumsum(dim=1).flip(1)
    wanted_PV = exact(mdp, actor_PV, return_BT)
    cold_PV = actor_PV / 0.7
    plain_PV = average_gradient(mdp, actor_PV, cold_PV, return_BT, torch.ones_like(return_BT))
    weighted_PV = average_gradient(mdp, actor_PV, cold_PV, return_BT, weights(mdp, actor_PV, cold_PV, cap=2.0))
    plain, weighted = (float((found - wanted_PV).norm() / wanted_PV.norm()) for found in (plain_PV, weighted_PV))
    assert 0.1 < plain < 1.5
    assert weighted < plain
