"""Prop. 1: SFT is IQ-Learn (Garg et al. 2021) with a linear conjugate, undiscounted, on the token MDP.

What the paper says (its abstract and public reviews; the full text was not at hand): with phi(x) = x, gamma = 1 and
deterministic transitions, J*(Q) = E_demo[sum phi(Q(s,a) - V(s'))] - E_flow[sum V(s) - V(s')] telescopes to the
expected log-likelihood of the demonstrations under softmax(Q). V is logsumexp Q, 0 in terminal states; the flow may be
any policy's. IQ-Learn's saddle is J*(Q) = min over pi of J(pi, Q).

What we add: each condition is dropped in turn (gamma, phi, V(terminal)), and what a state-only shift of Q does is
stated exactly. A state holds the whole prefix, so every distribution over responses, mixtures of policies and finite
data included, is some policy's: "non-Markov" demonstrations need no separate case, but are tested.

Shapes: B all responses, T positions, P prefixes, V tokens, R demonstrations of a finite data set.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from soft_q import from_table, next_value, occupancy, package_logp, package_reward
from token_mdp import EOS, TokenMDP
from torch import Tensor

from dpr_lightning.functional import masked_sum, reward_to_go, sft_loss

Demonstrations = Callable[[TokenMDP], Tensor]

ROWS = [0, 0, 0, 7, 33, 33, 60, 90, 101, 120]
"""A finite data set with repeats: responses that end at EOS at each length, and three that are cut off."""


def _from_rows(mdp: TokenMDP) -> Tensor:
    return torch.bincount(torch.tensor(ROWS), minlength=len(mdp.sequences)).double() / len(ROWS)


def _one_policy(mdp: TokenMDP) -> Tensor:
    return mdp.probability(mdp.policy(11))


def _mixture(mdp: TokenMDP) -> Tensor:
    return 0.3 * mdp.probability(mdp.policy(12, scale=3.0)) + 0.7 * mdp.probability(mdp.policy(13))


def _any_distribution(mdp: TokenMDP) -> Tensor:
    generator = torch.Generator().manual_seed(14)
    return (2.0 * torch.randn(len(mdp.sequences), generator=generator, dtype=torch.float64)).softmax(dim=0)


def _empty_answers(mdp: TokenMDP) -> Tensor:
    return torch.tensor([float(sequence == (EOS,)) for sequence in mdp.sequences], dtype=torch.float64)


def _cut_off(mdp: TokenMDP) -> Tensor:
    weight_B = torch.tensor([float(sequence[-1] != EOS) for sequence in mdp.sequences], dtype=torch.float64)
    return weight_B / weight_B.sum()


DEMONSTRATIONS = [_one_policy, _mixture, _any_distribution, _from_rows, _empty_answers, _cut_off]
demonstrations = pytest.mark.parametrize("demonstrations", DEMONSTRATIONS)


def _linear(x: Tensor) -> Tensor:
    return x


def _quadratic(x: Tensor) -> Tensor:
    return x - x.square() / 4.0


def _iq_objective(
    mdp: TokenMDP,
    q_PV: Tensor,
    demo_B: Tensor,
    flow_B: Tensor,
    *,
    phi: Callable[[Tensor], Tensor] = _linear,
    at_cut_off: float = 0.0,
) -> Tensor:
    """Return J*(Q), term by term as IQ-Learn writes it, from tables."""
    value_P = q_PV.logsumexp(dim=-1)
    next_PV = next_value(mdp, value_P, at_cut_off=at_cut_off)
    demonstrated = (occupancy(mdp, demo_B) * phi(q_PV - next_PV)).sum()
    return demonstrated - (occupancy(mdp, flow_B) * (value_P[:, None] - next_PV)).sum()


def _log_likelihood(mdp: TokenMDP, q_PV: Tensor, demo_B: Tensor) -> Tensor:
    """Return the expected log-likelihood of a demonstration: minus the package's SFT loss."""
    return -sft_loss(demo_B[:, None] * package_logp(mdp, q_PV), mdp.mask_BT, num_tokens=1).loss


@demonstrations
def test_value_is_the_log_likelihood_for_every_flow(mdp: TokenMDP, demonstrations: Demonstrations) -> None:
    q_PV, demo_B = mdp.policy(1, scale=2.0), demonstrations(mdp)
    likelihood = _log_likelihood(mdp, q_PV, demo_B)
    assert likelihood < -0.1
    # The demonstrations' own flow, the policy's, and those of two strangers.
    for flow_B in (demo_B, mdp.probability(q_PV), mdp.probability(mdp.policy(5)), _cut_off(mdp)):
        torch.testing.assert_close(_iq_objective(mdp, q_PV, demo_B, flow_B), likelihood, rtol=1e-12, atol=1e-12)


@demonstrations
def test_gradient_is_that_of_sft_for_every_flow(mdp: TokenMDP, demonstrations: Demonstrations) -> None:
    leaf_PV, demo_B = mdp.policy(1, scale=2.0).requires_grad_(), demonstrations(mdp)
    (sft_PV,) = torch.autograd.grad(_log_likelihood(mdp, leaf_PV, demo_B), leaf_PV)
    assert sft_PV.norm() > 0.1
    for flow_B in (demo_B, mdp.probability(leaf_PV.detach()), mdp.probability(mdp.policy(5))):
        (iq_PV,) = torch.autograd.grad(_iq_objective(mdp, leaf_PV, demo_B, flow_B), leaf_PV)
        torch.testing.assert_close(iq_PV, sft_PV, rtol=1e-12, atol=1e-13)
    # Closed form: d/dQ = rho_demo(s, a) - rho_demo(s) pi(a|s); 0 in states that no demonstration visits.
    rho_PV = occupancy(mdp, demo_B)
    closed_PV = rho_PV - rho_PV.sum(dim=1, keepdim=True) * leaf_PV.detach().softmax(dim=-1)
    torch.testing.assert_close(sft_PV, closed_PV, rtol=1e-12, atol=1e-13)


def test_finite_data_set_as_the_trainer_sees_it(mdp: TokenMDP) -> None:
    # The loss is a mean over the step's tokens, J* over its responses: they differ by tokens per response.
    leaf_PV, row_R = mdp.policy(1, scale=2.0).requires_grad_(), torch.tensor(ROWS)
    num_tokens = int(mdp.mask_BT[row_R].sum())
    loss = sft_loss(package_logp(mdp, leaf_PV)[row_R], mdp.mask_BT[row_R], num_tokens=num_tokens).loss
    objective = _iq_objective(mdp, leaf_PV, _from_rows(mdp), mdp.probability(mdp.policy(5)))
    tokens_per_response = num_tokens / len(ROWS)
    # Rows 0, 7, 33 have 1, 3 and 4 tokens with EOS, rows 60 to 120 are cut off at 4: 3 + 3 + 8 + 16.
    assert num_tokens == 30
    torch.testing.assert_close(-loss * tokens_per_response, objective, rtol=1e-12, atol=0)
    (loss_PV,) = torch.autograd.grad(loss, leaf_PV)
    (objective_PV,) = torch.autograd.grad(objective, leaf_PV)
    torch.testing.assert_close(-loss_PV * tokens_per_response, objective_PV, rtol=1e-12, atol=1e-13)


@demonstrations
def test_reward_that_the_package_reads_out_is_the_argument_of_phi(
    mdp: TokenMDP, demonstrations: Demonstrations
) -> None:
    # J* = E_demo[sum r_Q] - V(s_0) with the package's Eq. 4 reward and its V.
    q_PV, demo_B = mdp.policy(1, scale=2.0), demonstrations(mdp)
    value_BT = mdp.scores(q_PV, q_PV, q_PV).teacher_value_BT
    assert value_BT is not None
    rewarded = masked_sum(demo_B[:, None] * package_reward(mdp, q_PV), mdp.mask_BT)
    # Column 1 holds the first response token of every row, chosen in the initial state.
    torch.testing.assert_close(rewarded - value_BT[0, 1], _log_likelihood(mdp, q_PV, demo_B), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("demonstrations", [_one_policy, _mixture, _any_distribution])
def test_maximum_is_the_demonstrators_policy_and_the_gap_is_a_kl(mdp: TokenMDP, demonstrations: Demonstrations) -> None:
    demo_B = demonstrations(mdp)
    rho_PV = occupancy(mdp, demo_B)
    # The conditional distribution of each next token, moved by a constant at each state, which must not matter.
    best_PV = (rho_PV.log() - rho_PV.sum(dim=1, keepdim=True).log() + mdp.policy(8)[:, :1]).requires_grad_()
    best = _iq_objective(mdp, best_PV, demo_B, demo_B)
    (grad_PV,) = torch.autograd.grad(best, best_PV)
    torch.testing.assert_close(grad_PV, torch.zeros_like(grad_PV), rtol=0, atol=1e-14)
    for seed in range(5):
        q_PV = mdp.policy(seed)
        kl = (demo_B * (demo_B.log() - mdp.probability(q_PV).log())).sum()
        assert kl > 0.1
        gap = best.detach() - _iq_objective(mdp, q_PV, demo_B, demo_B)
        torch.testing.assert_close(gap, kl, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("phi", [_linear, torch.tanh])
@demonstrations
def test_softmax_is_the_policy_that_minimises_the_saddle(
    mdp: TokenMDP, demonstrations: Demonstrations, phi: Callable[[Tensor], Tensor]
) -> None:
    # J(pi, Q) = E_demo[phi(Q - V^pi(s'))] - V^pi(s_0), V^pi(s) = E_pi[Q - log pi]. phi rises, so a larger V^pi makes
    # it less, and the largest at each state is logsumexp Q.
    q_PV, demo_B = mdp.policy(1, scale=2.0), demonstrations(mdp)
    rho_PV = occupancy(mdp, demo_B)

    def saddle(policy_PV: Tensor) -> Tensor:
        logp_PV = policy_PV.log_softmax(dim=-1)
        value_P = (logp_PV.exp() * (q_PV - logp_PV)).sum(dim=-1)
        return (rho_PV * phi(q_PV - next_value(mdp, value_P))).sum() - value_P[0]

    best = saddle(q_PV)
    torch.testing.assert_close(
        best, _iq_objective(mdp, q_PV, demo_B, mdp.probability(mdp.policy(5)), phi=phi), rtol=1e-12, atol=1e-12
    )
    for seed in range(20, 40):
        # From far away to close by.
        assert saddle(q_PV + mdp.policy(seed, scale=0.1 * (seed - 19))) > best


@demonstrations
def test_a_shift_of_each_states_logits_changes_the_reward_and_nothing_else(
    mdp: TokenMDP, demonstrations: Demonstrations
) -> None:
    q_PV, demo_B, flow_B = mdp.policy(1), demonstrations(mdp), mdp.probability(mdp.policy(5))
    shift_P = mdp.policy(9, scale=3.0)[:, 0]
    shifted_PV = q_PV + shift_P[:, None]
    # The policy, so the likelihood, is the same ...
    torch.testing.assert_close(package_logp(mdp, shifted_PV), package_logp(mdp, q_PV), rtol=1e-12, atol=1e-12)
    before, after = (_iq_objective(mdp, logits_PV, demo_B, flow_B) for logits_PV in (q_PV, shifted_PV))
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)
    # ... and so is J*, although each of its two terms moves by the initial state's shift.
    total_B = (package_reward(mdp, shifted_PV) - package_reward(mdp, q_PV)).sum(dim=1)
    torch.testing.assert_close(total_B, shift_P[0].expand_as(total_B), rtol=1e-11, atol=1e-11)
    # The token reward moves by c(s) - c(s'), which is A.10's shaping with potential -c.
    moved_BT = package_reward(mdp, shifted_PV) - package_reward(mdp, q_PV)
    expected_BT = from_table(mdp, shift_P[:, None] - next_value(mdp, shift_P))
    torch.testing.assert_close(moved_BT, expected_BT, rtol=1e-11, atol=1e-11)
    assert moved_BT.abs().max() > 1.0


def test_with_a_quadratic_conjugate_it_is_neither_sft_nor_blind_to_the_shift(mdp: TokenMDP) -> None:
    q_PV, demo_B = mdp.policy(1), _one_policy(mdp)
    objective = _iq_objective(mdp, q_PV, demo_B, demo_B, phi=_quadratic)
    # phi(x) < x wherever x is not 0.
    assert objective < _log_likelihood(mdp, q_PV, demo_B) - 0.1
    shifted_PV = q_PV + mdp.policy(9)[:, :1]
    assert (_iq_objective(mdp, shifted_PV, demo_B, demo_B, phi=_quadratic) - objective).abs() > 0.1


def test_discounted_it_is_the_discounted_likelihood_and_not_sft(mdp: TokenMDP) -> None:
    # sum_t gamma^t [Q - gamma V(s')] - V(s_0) telescopes as well, to sum_t gamma^t log pi.
    q_PV, demo_B, gamma = mdp.policy(1), _one_policy(mdp), 0.8
    value_P = q_PV.logsumexp(dim=-1)
    reward_BT = from_table(mdp, q_PV - gamma * next_value(mdp, value_P))
    objective = (demo_B * reward_to_go(reward_BT, mdp.mask_BT, gamma=gamma)[:, 1]).sum() - value_P[0]
    discounted = (demo_B * reward_to_go(package_logp(mdp, q_PV), mdp.mask_BT, gamma=gamma)[:, 1]).sum()
    torch.testing.assert_close(objective, discounted, rtol=1e-12, atol=1e-12)
    assert (objective - _log_likelihood(mdp, q_PV, demo_B)).abs() > 0.1


def test_a_value_where_responses_are_cut_off_cancels_for_the_demonstrations_flow_only(mdp: TokenMDP) -> None:
    q_PV, demo_B = mdp.policy(1), _cut_off(mdp)
    likelihood = _log_likelihood(mdp, q_PV, demo_B)
    own_flow = _iq_objective(mdp, q_PV, demo_B, demo_B, at_cut_off=2.5)
    torch.testing.assert_close(own_flow, likelihood, rtol=1e-12, atol=1e-12)
    # Every demonstration is cut off and pays -2.5; a flow that ends at once pays nothing back.
    other_flow = _iq_objective(mdp, q_PV, demo_B, _empty_answers(mdp), at_cut_off=2.5)
    torch.testing.assert_close(other_flow, likelihood - 2.5, rtol=1e-12, atol=1e-12)
