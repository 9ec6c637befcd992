"""Theorem 2: with a quadratic (strongly convex) regulariser the recovered reward is unique, and its error is bounded.

What is public of the paper's Theorem 2: a "dual contraction" that bounds reward error by policy error, and that assumes
a strongly convex regulariser, which Prop. 1's linear conjugate is not (a reviewer says so, rightly: no psi is both).
The text was not at hand; the following is our own derivation, gamma = 1, occupancies over (state, token), and
S(r) = max over pi of E_pi[sum r] + entropy = log sum_y exp(sum r), whose gradient is the occupancy rho_r of the
soft-optimal policy. IRL is min over pi, max over r of E_demo[sum r] - E_pi[sum r] - entropy(pi) - psi(r); IQ-Learn's
phi(x) = x - x^2 / (4 alpha) is psi(r) = E_demo[r^2] / (4 alpha), and w below is the diagonal of psi's Hessian:
w = rho_demo / (2 alpha) for phi, w = mu for psi = mu |r|^2 / 2. With |x|_w^2 = sum w x^2 and rho_E for rho_demo:

1. For a given policy the best reward is (rho_E - rho_pi) / w, that is 2 alpha (1 - rho_pi / rho_E) for phi. So
   |r_pi - r_pi'|_w = |rho_pi - rho_pi'|_{1/w}: with mu, |dr| = |drho| / mu. For any mu-strongly convex psi, <=.
2. The joint optimum r* is unique, and r* = (rho_E - rho_{r*}) / w.
3. Duality: the optimum equals the least of 1/2 |rho_E - rho_pi|_{1/w}^2 - entropy(pi) over policies: chi^2.
4. Other demonstrations: mu |r* - r*'| <= |rho_E - rho_E'|, because rho_r is monotone in r.
5. |rho_r - rho_r'| <= H / 2 |r - r'|, so best responses to one another contract when mu > H / 2.

Shapes: B all responses, S state-token pairs (P * V), P prefixes, V tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from soft_q import expected_return, from_table, incidence, next_value, occupancy, package_reward, soft_q
from token_mdp import HORIZON, NUM_TOKENS, TokenMDP
from torch import Tensor

from dpr_lightning.functional import reinforce_loss, reward_to_go

ALPHA = 0.5


def _flat(mdp: TokenMDP, probability_B: Tensor) -> Tensor:
    """Return the [S] occupancy of a distribution over responses."""
    return occupancy(mdp, probability_B).flatten()


def _soft_occupancy(mdp: TokenMDP, reward_S: Tensor) -> Tensor:
    """Return the [S] occupancy of the policy that is soft-optimal for a reward."""
    return _flat(mdp, mdp.probability(soft_q(mdp, reward_S.view(-1, NUM_TOKENS))))


def _objective(mdp: TokenMDP, reward_S: Tensor, rho_S: Tensor, weight_S: Tensor) -> Tensor:
    """Return E_demo[sum r] - 1/2 |r|_w^2 - V(s_0), the recovered reward's objective."""
    value = soft_q(mdp, reward_S.view(-1, NUM_TOKENS))[0].logsumexp(dim=-1)
    return (rho_S * reward_S).sum() - 0.5 * (weight_S * reward_S.square()).sum() - value


def _recover(mdp: TokenMDP, rho_S: Tensor, weight_S: Tensor, start_S: Tensor | None = None) -> Tensor:
    """Return the [S] reward that maximises the objective, by Newton's method with backtracking."""
    count_BS = incidence(mdp).flatten(1)
    reward_S = torch.zeros_like(rho_S) if start_S is None else start_S
    for _ in range(100):
        probability_B = mdp.probability(soft_q(mdp, reward_S.view(-1, NUM_TOKENS)))
        mean_S = probability_B @ count_BS
        grad_S = rho_S - weight_S * reward_S - mean_S
        if grad_S.norm() < 1e-14:
            break
        # S(r)'s Hessian is the covariance of the counts.
        centred_BS = count_BS - mean_S
        hessian_SS = torch.diag(weight_S) + centred_BS.T @ (probability_B[:, None] * centred_BS)
        step_S, size = torch.linalg.solve(hessian_SS, grad_S), 1.0
        before = _objective(mdp, reward_S, rho_S, weight_S)
        while size > 1e-6 and _objective(mdp, reward_S + size * step_S, rho_S, weight_S) < before - 1e-13:
            size /= 2.0
        reward_S = reward_S + size * step_S
    assert (rho_S - weight_S * reward_S - _soft_occupancy(mdp, reward_S)).norm() < 1e-11
    return reward_S


def _chi_squared(mdp: TokenMDP, seed: int, alpha: float = ALPHA) -> tuple[Tensor, Tensor]:
    """Return rho_E and w of IQ-Learn's quadratic phi, for the demonstrations of a random policy."""
    rho_S = _flat(mdp, mdp.probability(mdp.policy(seed)))
    return rho_S, rho_S / (2.0 * alpha)


def _constant(mdp: TokenMDP, seed: int, mu: float) -> tuple[Tensor, Tensor]:
    """Return rho_E and w of psi = mu |r|^2 / 2."""
    rho_S = _flat(mdp, mdp.probability(mdp.policy(seed)))
    return rho_S, torch.full_like(rho_S, mu)


REGULARISERS = [
    pytest.param(lambda mdp, seed: _chi_squared(mdp, seed), id="chi_squared"),
    pytest.param(lambda mdp, seed: _chi_squared(mdp, seed, alpha=5.0), id="chi_squared_weak"),
    pytest.param(lambda mdp, seed: _constant(mdp, seed, 0.1), id="constant"),
]
Regulariser = Callable[[TokenMDP, int], tuple[Tensor, Tensor]]
regularisers = pytest.mark.parametrize("regulariser", REGULARISERS)


# 2. The optimum.


@regularisers
@pytest.mark.parametrize("seed", range(3))
def test_every_start_ends_at_the_first_order_condition(mdp: TokenMDP, regulariser: Regulariser, seed: int) -> None:
    rho_S, weight_S = regulariser(mdp, seed)
    reward_S = _recover(mdp, rho_S, weight_S)
    for start in (50, 51):
        other_S = _recover(mdp, rho_S, weight_S, start_S=mdp.policy(start, scale=0.5).flatten())
        torch.testing.assert_close(other_S, reward_S, rtol=0, atol=1e-8)
    closed_S = (rho_S - _soft_occupancy(mdp, reward_S)) / weight_S
    torch.testing.assert_close(reward_S, closed_S, rtol=0, atol=1e-9)
    assert reward_S.abs().max() > 0.05
    for direction in range(60, 65):
        away_S = reward_S + 0.1 * mdp.policy(direction).flatten()
        gap = _objective(mdp, reward_S, rho_S, weight_S) - _objective(mdp, away_S, rho_S, weight_S)
        # Strong concavity: at least 1/2 |away|_w^2 is lost.
        assert gap >= 0.5 * (weight_S * (away_S - reward_S).square()).sum()


def test_the_package_reads_the_reward_out_of_the_logits_that_iq_learn_ends_with(mdp: TokenMDP) -> None:
    # IQ-Learn as it is run: over logits Q, from two starts, by a general optimizer; no table of rewards anywhere.
    rho_S = _flat(mdp, mdp.probability(mdp.policy(1, scale=0.5)))
    weight_S, rho_PV = rho_S / (2.0 * ALPHA), rho_S.view(-1, NUM_TOKENS)

    def iq_loss(q_PV: Tensor) -> Tensor:
        value_P = q_PV.logsumexp(dim=-1)
        reward_PV = q_PV - next_value(mdp, value_P)
        return value_P[0] - (rho_PV * (reward_PV - reward_PV.square() / (4.0 * ALPHA))).sum()

    reward_PV = _recover(mdp, rho_S, weight_S).view(-1, NUM_TOKENS)
    for start in (70, 71):
        q_PV = mdp.policy(start, scale=0.5).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [q_PV],
            max_iter=1000,
            tolerance_grad=1e-10,
            tolerance_change=0.0,
            history_size=100,
            line_search_fn="strong_wolfe",
        )

        def closure(q_PV: Tensor = q_PV, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = iq_loss(q_PV)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        # The line search sees the value to about 1e-15. At the rarest token its curvature is w, here above 1e-4, so the
        # reward is found to sqrt(2 * 1e-15 / 1e-4), about 5e-6.
        assert weight_S.min() > 1e-4
        torch.testing.assert_close(package_reward(mdp, q_PV.detach()), from_table(mdp, reward_PV), rtol=0, atol=5e-5)
    # The closed form again, from the package's reward and the policy's own occupancy: r* = 2 alpha (1 - rho / rho_E).
    best_PV = soft_q(mdp, reward_PV)
    ratio_PV = occupancy(mdp, mdp.probability(best_PV)) / rho_PV
    torch.testing.assert_close(
        package_reward(mdp, best_PV), from_table(mdp, 2.0 * ALPHA * (1.0 - ratio_PV)), rtol=0, atol=1e-9
    )
    # It stays where phi rises, x < 2 alpha, which is what makes softmax Q the minimiser in IQ-Learn's saddle.
    assert package_reward(mdp, best_PV).max() < 2.0 * ALPHA


@regularisers
def test_no_policy_gradient_is_left_at_the_optimum(mdp: TokenMDP, regulariser: Regulariser) -> None:
    rho_S, weight_S = regulariser(mdp, 1)
    best_PV = soft_q(mdp, _recover(mdp, rho_S, weight_S).view(-1, NUM_TOKENS))
    leaf_PV = best_PV.clone().requires_grad_()
    return_BT = reward_to_go(package_reward(mdp, best_PV) - mdp.logp(best_PV), mdp.mask_BT, gamma=1.0)
    advantage_BT = mdp.probability(best_PV)[:, None] * return_BT
    loss = reinforce_loss(mdp.logp(leaf_PV), advantage_BT, mdp.mask_BT, num_sequences=1).loss
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    torch.testing.assert_close(grad_PV, torch.zeros_like(grad_PV), rtol=0, atol=1e-12)


# 3. Duality.


@regularisers
@pytest.mark.parametrize("seed", range(3))
def test_optimum_is_the_least_chi_squared_less_entropy(mdp: TokenMDP, regulariser: Regulariser, seed: int) -> None:
    rho_S, weight_S = regulariser(mdp, seed)
    reward_S = _recover(mdp, rho_S, weight_S)

    def primal(logits_PV: Tensor) -> Tensor:
        distance_S = rho_S - _flat(mdp, mdp.probability(logits_PV))
        # E[log pi(y)] is minus the entropy.
        return 0.5 * (distance_S.square() / weight_S).sum() + expected_return(mdp, logits_PV, mdp.logp(logits_PV))

    best_PV = soft_q(mdp, reward_S.view(-1, NUM_TOKENS))
    optimum = _objective(mdp, reward_S, rho_S, weight_S)
    torch.testing.assert_close(primal(best_PV), optimum, rtol=1e-10, atol=1e-10)
    for other in range(80, 90):
        assert primal(best_PV + mdp.policy(other, scale=0.1 * (other - 79))) > optimum


def test_the_regulariser_pulls_the_policy_from_the_demonstrations_and_lets_go_as_alpha_grows(mdp: TokenMDP) -> None:
    # chi^2 against entropy: only the linear conjugate, alpha without end, gives SFT's policy.
    distances = []
    for alpha in (0.1, 1.0, 10.0, 100.0):
        rho_S, weight_S = _chi_squared(mdp, 1, alpha=alpha)
        distances.append(float((_soft_occupancy(mdp, _recover(mdp, rho_S, weight_S)) - rho_S).norm()))
    assert distances[0] > 0.1
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(distances))
    # rho - rho_E = -r* rho_E / (2 alpha), and r* tends to a limit: ten times alpha, a tenth of the distance.
    assert distances[3] / distances[2] == pytest.approx(0.1, rel=0.1)


# 1. The contraction, for given demonstrations, from policy error to reward error.


@regularisers
@pytest.mark.parametrize("seed", range(3))
def test_best_rewards_of_two_policies_differ_as_their_occupancies_do(
    mdp: TokenMDP, regulariser: Regulariser, seed: int
) -> None:
    rho_S, weight_S = regulariser(mdp, seed)
    rhos = [_flat(mdp, mdp.probability(mdp.policy(100 + 2 * seed + i))) for i in range(2)]
    rewards = []
    for rho_pi_S in rhos:
        # The maximum over r of a policy's saddle, by autograd and one Newton step, exact for a quadratic.
        leaf_S = torch.zeros_like(rho_S, requires_grad=True)
        saddle = ((rho_S - rho_pi_S) * leaf_S).sum() - 0.5 * (weight_S * leaf_S.square()).sum()
        (grad_S,) = torch.autograd.grad(saddle, leaf_S)
        rewards.append(grad_S / weight_S)
    reward_error = (weight_S * (rewards[0] - rewards[1]).square()).sum().sqrt()
    policy_error = ((rhos[0] - rhos[1]).square() / weight_S).sum().sqrt()
    assert policy_error > 0.1
    torch.testing.assert_close(reward_error, policy_error, rtol=1e-12, atol=0)


def test_for_other_strongly_convex_regularisers_it_is_a_bound(mdp: TokenMDP) -> None:
    # psi = mu r^2 / 2 + log cosh r, whose best reward solves mu r + tanh r = rho_E - rho_pi.
    mu = 0.1

    def best_reward(difference_S: Tensor) -> Tensor:
        low_S, high_S = -difference_S.abs() / mu, difference_S.abs() / mu
        for _ in range(100):
            middle_S = 0.5 * (low_S + high_S)
            is_low_S = mu * middle_S + middle_S.tanh() < difference_S
            low_S, high_S = torch.where(is_low_S, middle_S, low_S), torch.where(is_low_S, high_S, middle_S)
        return low_S

    rho_S, _ = _constant(mdp, 0, mu)
    for seed in range(100, 110):
        rhos = [_flat(mdp, mdp.probability(mdp.policy(seed + i))) for i in (0, 50)]
        reward_error = (best_reward(rho_S - rhos[0]) - best_reward(rho_S - rhos[1])).norm()
        assert 0.0 < reward_error < (rhos[0] - rhos[1]).norm() / mu
    # Where tanh is flat only mu is left, and the bound is nearly reached.
    far, farther = (best_reward(torch.full((3,), value, dtype=torch.float64)) for value in (2.0, 3.0))
    assert 0.999 < float(mu * (farther - far).norm() / 3.0**0.5) <= 1.0


def test_without_strong_convexity_there_is_no_bound(mdp: TokenMDP) -> None:
    # Linear conjugate: all shifts of a state's logits are optimal at once, so rewards differ without any policy error.
    q_PV = mdp.policy(1)
    for size in (1.0, 100.0):
        shifted_PV = q_PV + mdp.policy(9, scale=size)[:, :1]
        torch.testing.assert_close(mdp.probability(shifted_PV), mdp.probability(q_PV), rtol=1e-10, atol=1e-12)
        assert (package_reward(mdp, shifted_PV) - package_reward(mdp, q_PV)).abs().max() > size
    # Demonstrations that never say a token, with w = rho_E: psi is flat there, and the objective rises for ever.
    seen_S = (mdp.policy(2).flatten() > -0.5).view(-1, NUM_TOKENS)
    seen_S[:, 3] = True
    demo_PV = mdp.policy(1).masked_fill(~seen_S, -1e4)
    rho_S = _flat(mdp, mdp.probability(demo_PV))
    unseen = int((rho_S == 0).nonzero()[0])
    assert rho_S.view(-1, NUM_TOKENS)[unseen // NUM_TOKENS].sum() > 0
    values, reward_S = [], torch.zeros_like(rho_S)
    for reward in (0.0, -1.0, -5.0, -20.0):
        reward_S[unseen] = reward
        values.append(_objective(mdp, reward_S, rho_S, rho_S / (2.0 * ALPHA)))
    assert all(later > earlier for earlier, later in itertools.pairwise(values))
    # With w = mu everywhere the same demonstrations have an optimum.
    assert _recover(mdp, rho_S, torch.full_like(rho_S, 0.1)).abs().max() < 1.0 / 0.1


# 4. Other demonstrations.


@pytest.mark.parametrize("mu", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_reward_moves_at_most_as_the_demonstrations_over_mu(mdp: TokenMDP, seed: int, mu: float) -> None:
    # The second set is finite: 30 responses drawn from the first's policy.
    rho_S, weight_S = _constant(mdp, seed, mu)
    generator = torch.Generator().manual_seed(seed)
    row_R = torch.multinomial(mdp.probability(mdp.policy(seed)), 30, replacement=True, generator=generator)
    drawn_S = _flat(mdp, torch.bincount(row_R, minlength=len(mdp.sequences)).double() / len(row_R))
    moved_S = _recover(mdp, drawn_S, weight_S) - _recover(mdp, rho_S, weight_S)
    share = mu * moved_S.norm() / (drawn_S - rho_S).norm()
    assert 0.0 < share <= 1.0
    if mu == 20.0:
        # The policy hardly follows a small reward, so nearly all of the difference is the reward's to explain.
        assert share > 0.95


# 5. Reward error to policy error, and the two together.


@pytest.mark.parametrize("seed", range(5))
def test_occupancy_moves_at_most_half_the_horizon_times_the_reward(mdp: TokenMDP, seed: int) -> None:
    reward_S, change_S = mdp.policy(seed).flatten(), mdp.policy(100 + seed).flatten()
    moved_S = _soft_occupancy(mdp, reward_S + change_S) - _soft_occupancy(mdp, reward_S)
    assert 0.0 < moved_S.norm() <= HORIZON / 2.0 * change_S.norm()
    # Monotone: what is paid more is done more.
    assert (moved_S * change_S).sum() > 0.0


def _two_ways(mdp: TokenMDP) -> tuple[Tensor, Tensor]:
    """Return [S] masks of the tokens of 0000 and of 1111."""
    count_BS = incidence(mdp).flatten(1)
    return tuple(count_BS[mdp.sequences.index((token,) * HORIZON)] for token in (0, 1))  # type: ignore[return-value]


def test_half_the_horizon_is_nearly_reached_between_two_ways(mdp: TokenMDP) -> None:
    first_S, second_S = _two_ways(mdp)
    reward_S = 10.0 * (first_S + second_S) - 10.0
    change_S = 1e-4 * (first_S - second_S)
    moved_S = _soft_occupancy(mdp, reward_S + change_S) - _soft_occupancy(mdp, reward_S)
    assert 0.999 < float(moved_S.norm() / (HORIZON / 2.0 * change_S.norm())) <= 1.0


def _respond(mdp: TokenMDP, rho_S: Tensor, mu: float, start_S: Tensor, num_rounds: int) -> list[Tensor]:
    """Return rewards of rounds in which the policy, then the reward, is set to the best against the other."""
    rewards = [start_S]
    for _ in range(num_rounds):
        rewards.append((rho_S - _soft_occupancy(mdp, rewards[-1])) / mu)
    return rewards


@pytest.mark.parametrize("seed", range(3))
def test_best_responses_contract_to_the_optimum_above_half_the_horizon(mdp: TokenMDP, seed: int) -> None:
    mu = 1.25 * HORIZON / 2.0
    rho_S, weight_S = _constant(mdp, seed, mu)
    optimum_S = _recover(mdp, rho_S, weight_S)
    rewards = _respond(mdp, rho_S, mu, mdp.policy(seed).flatten(), 20)
    errors = [float((reward_S - optimum_S).norm()) for reward_S in rewards]
    for earlier, later in itertools.pairwise(errors):
        assert later <= HORIZON / (2.0 * mu) * earlier + 1e-13
    assert errors[-1] < 1e-8


def test_best_responses_do_not_contract_below_it(mdp: TokenMDP) -> None:
    # The optimum is as unique as before, but best responses swing between the two ways for ever.
    first_S, second_S = _two_ways(mdp)
    rho_S, mu = 0.5 * (first_S + second_S), 0.1
    optimum_S = _recover(mdp, rho_S, torch.full_like(rho_S, mu))
    start_S = optimum_S + 0.01 * (first_S - second_S)
    errors = [float((reward_S - optimum_S).norm()) for reward_S in _respond(mdp, rho_S, mu, start_S, 20)]
    assert errors[1] > 2.0 * errors[0]
    assert errors[-1] > 100.0 * errors[0]
