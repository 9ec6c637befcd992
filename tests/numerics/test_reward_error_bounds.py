"""What an error in the teacher costs: from logits to policy and reward, and from reward to the policy trained on it.

Section 8 names "A.9's bound" and "Eq. 6's bound". The paper's text was not at hand; what is public says that it has a
bound that links reward error to policy error, and a safe-improvement argument under a KL to pi_SFT. So the statements
below are ours, the strongest of those names that we can prove for gamma = 1 and at most H tokens. In the order of the
chain logits -> policy -> reward -> return (r the right reward, r' the one in hand, eps = max |r - r'| per token):

1. span: |log pi - log pi'| <= max dQ - min dQ at each state, <= 2 max |dQ|; |dV| <= max |dQ|; KL <= span^2 / 8.
2. dual: |dr| <= 2 max |dQ| through the inverse Bellman operator, and |dQ| <= H eps through the Bellman operator.
3. dense reward: with one reference, r_hat's error *is* the teacher's error in log pi, token by token.
4. value: |J_r(pi) - J_r'(pi)| <= eps E[T] <= H eps.
5. suboptimality: the best policy for r' loses at most 2 H eps of r.
6. safe improvement: J_r gains at least what J_r' gains less eps |rho_pi - rho_0|_1, and
   |rho_pi - rho_0|_1 <= 2 H sqrt(KL(pi || pi_0) / 2), KL over whole responses. With pi_0 = pi_SFT, this is why the KL
   to the teacher keeps an error of the reward from mattering.

Each holds on random tables, is reached or nearly reached in a constructed case, and fails without its condition.

Shapes: B all responses, T positions, P prefixes, V tokens.
"""

from __future__ import annotations

import pytest
import torch
from soft_q import expected_return, from_table, next_value, occupancy, package_logp, package_reward, soft_q
from token_mdp import EOS, HORIZON, NUM_TOKENS, TokenMDP
from torch import Tensor

from dpr_lightning.functional import DenseReward, DenseWithValueReward, LMHead, state_expectations

SEEDS = range(8)
SLACK = 1e-12
"""Rounding, where a bound is reached."""


def _state_kl(logits_PV: Tensor, other_PV: Tensor) -> Tensor:
    """Return [P], the package's KL between two policies at each state."""
    head = LMHead(weight_VD=torch.eye(NUM_TOKENS, dtype=torch.float64))
    return state_expectations((logits_PV, head), (other_PV, head), (other_PV, head)).teacher_kl_N


def _dense(mdp: TokenMDP, teacher_PV: Tensor, reference_PV: Tensor) -> Tensor:
    return DenseReward()(mdp.scores(teacher_PV, teacher_PV, reference_PV))


def _kl_of_responses(mdp: TokenMDP, actor_PV: Tensor, teacher_PV: Tensor) -> Tensor:
    """Return KL(actor || teacher) over whole responses, from the package's per-state KL."""
    kl_BT = mdp.scores(actor_PV, teacher_PV, teacher_PV).teacher_kl_BT
    assert kl_BT is not None
    return expected_return(mdp, actor_PV, kl_BT)


def _everywhere(mdp: TokenMDP, row: list[float]) -> Tensor:
    """Return [P, V] the logs of one distribution, the same at each state."""
    return torch.tensor(row, dtype=torch.float64).log().expand(len(mdp.prefixes), -1).contiguous()


# 1. Logits to policy.


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_moves_no_more_than_the_span_of_the_logits(mdp: TokenMDP, seed: int, size: float) -> None:
    q_PV = mdp.policy(seed, scale=2.0)
    change_PV = mdp.policy(1000 + seed, scale=size)
    moved_PV = q_PV + change_PV
    span_P = change_PV.amax(dim=-1) - change_PV.amin(dim=-1)
    assert span_P.min() > 0.0
    logp_change_BT = (package_logp(mdp, moved_PV) - package_logp(mdp, q_PV)).abs()
    assert (logp_change_BT <= mdp.by_state(span_P) + SLACK).all()
    assert (span_P <= 2.0 * change_PV.abs().amax(dim=-1)).all()
    scores = mdp.scores(q_PV, q_PV, moved_PV)
    assert scores.teacher_value_BT is not None
    assert scores.reference_value_BT is not None
    value_change_BT = (scores.reference_value_BT - scores.teacher_value_BT).abs()
    assert (value_change_BT <= mdp.by_state(change_PV.abs().amax(dim=-1)) + SLACK).all()
    # Hoeffding's lemma: log E[exp(x - E x)] <= span^2 / 8.
    assert (_state_kl(q_PV, moved_PV) <= span_P.square() / 8.0 + SLACK).all()
    assert (_state_kl(moved_PV, q_PV) <= span_P.square() / 8.0 + SLACK).all()


def test_span_bound_is_reached_by_a_rare_token_and_a_constant_moves_nothing(mdp: TokenMDP) -> None:
    q_PV = _everywhere(mdp, [0.5, 0.3, 0.2 - 1e-9, 1e-9])
    change_V = torch.tensor([-0.4, -0.4, -0.4, 0.4], dtype=torch.float64)
    moved_BT = package_logp(mdp, q_PV + change_V) - package_logp(mdp, q_PV)
    torch.testing.assert_close(moved_BT.max(), torch.tensor(0.8, dtype=torch.float64), rtol=1e-8, atol=0)
    # Of |dQ| alone the bound needs its factor 2; of the span it needs none, and a shift of a state has no span.
    shifted_BT = package_logp(mdp, q_PV + 7.0) - package_logp(mdp, q_PV)
    torch.testing.assert_close(shifted_BT, torch.zeros_like(shifted_BT), rtol=0, atol=1e-12)
    value_change_BT = package_reward(mdp, q_PV + 7.0) - package_reward(mdp, q_PV)
    # V moves by the whole 7: a token that ends the response earns Q, so 7 more; all others 7 - 7.
    assert value_change_BT.abs().max().item() == pytest.approx(7.0)


def test_kl_bound_is_nearly_reached_by_two_halves(mdp: TokenMDP) -> None:
    q_PV = _everywhere(mdp, [0.25, 0.25, 0.25, 0.25])
    change_V = torch.tensor([0.05, 0.05, -0.05, -0.05], dtype=torch.float64)
    # log cosh(0.05) = 0.05^2 / 2 - 0.05^4 / 12, and span^2 / 8 = 0.1^2 / 8 = 0.05^2 / 2
    share_P = _state_kl(q_PV, q_PV + change_V) / (0.1**2 / 8.0)
    assert (share_P > 0.999).all()
    assert (share_P <= 1.0).all()


# 2. Logits to reward and back.


@pytest.mark.parametrize("seed", SEEDS)
def test_reward_moves_at_most_twice_as_much_as_the_logits(mdp: TokenMDP, seed: int) -> None:
    q_PV, change_PV = mdp.policy(seed), mdp.policy(1000 + seed, scale=0.5)
    moved_BT = (package_reward(mdp, q_PV + change_PV) - package_reward(mdp, q_PV)).abs()
    assert moved_BT.max() <= 2.0 * change_PV.abs().max()
    # EOS has no successor, so its factor is 1.
    is_eos_BT = mdp.mask_BT & (mdp.input_ids_BT == EOS)
    assert moved_BT[is_eos_BT].max() <= change_PV.abs().max() + SLACK


def test_factor_two_is_reached_and_the_total_reward_needs_none_of_it(mdp: TokenMDP) -> None:
    # Even prefixes up, odd ones down: each token that goes on earns +-(c + c).
    sign_P = torch.tensor([(-1.0) ** len(prefix) for prefix in mdp.prefixes], dtype=torch.float64)
    q_PV = mdp.policy(1)
    moved_BT = package_reward(mdp, q_PV + 0.5 * sign_P[:, None]) - package_reward(mdp, q_PV)
    assert moved_BT.abs().max().item() == pytest.approx(1.0)
    # The policy has not moved at all: reward error does not bound policy error from below. Only the sum is tied to it.
    torch.testing.assert_close(moved_BT.sum(dim=1), torch.full_like(moved_BT[:, 0], 0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_policy_move_at_most_with_the_horizon_times_the_reward(mdp: TokenMDP, seed: int) -> None:
    reward_PV, error_PV = mdp.policy(seed), mdp.policy(1000 + seed).tanh() * 0.2
    eps = error_PV.abs().max()
    q_PV, moved_PV = soft_q(mdp, reward_PV), soft_q(mdp, reward_PV + error_PV)
    # A state that is t tokens in has H - t left.
    left_P = torch.tensor([HORIZON - len(prefix) for prefix in mdp.prefixes], dtype=torch.float64)
    assert ((moved_PV - q_PV).abs().amax(dim=-1) <= left_P * eps + SLACK).all()
    logp_change_BT = (package_logp(mdp, moved_PV) - package_logp(mdp, q_PV)).abs()
    assert (logp_change_BT <= mdp.by_state(2.0 * left_P * eps) + SLACK).all()


def test_horizon_factor_is_nearly_reached_where_all_after_a_rare_token_is_underrated(mdp: TokenMDP) -> None:
    # Token 1 first is nearly certain, and it and all that follows is rated eps higher than it should be; token 0 first
    # is rare, and rated eps lower all the way. After either, only 2, 2, 2 is likely, so that no shorter way counts.
    eps = 0.1
    reward_PV = torch.full((len(mdp.prefixes), NUM_TOKENS), -60.0, dtype=torch.float64)
    reward_PV[:, 2] = 0.0
    reward_PV[0] = torch.tensor([-20.0, 0.0, -60.0, -60.0], dtype=torch.float64)
    sign_PV = torch.tensor([[1.0 if prefix[:1] == (0,) else -1.0] for prefix in mdp.prefixes], dtype=torch.float64)
    error_PV = eps * sign_PV.repeat(1, NUM_TOKENS)
    error_PV[0, 0] = eps
    before_PV, after_PV = soft_q(mdp, reward_PV), soft_q(mdp, reward_PV + error_PV)
    change_BT = package_logp(mdp, after_PV) - package_logp(mdp, before_PV)
    assert 0.9999 < float(change_BT.max() / (2.0 * HORIZON * eps)) <= 1.0
    assert (after_PV - before_PV).abs().max().item() == pytest.approx(HORIZON * eps, rel=1e-9)


# 3. Teacher to dense reward.


@pytest.mark.parametrize("seed", SEEDS)
def test_error_of_the_dense_reward_is_the_error_of_the_teacher(mdp: TokenMDP, seed: int) -> None:
    expert_PV, reference_PV = mdp.policy(seed), mdp.policy(100 + seed)
    teacher_PV = expert_PV + mdp.policy(200 + seed, scale=0.3)
    error_BT = _dense(mdp, teacher_PV, reference_PV) - _dense(mdp, expert_PV, reference_PV)
    torch.testing.assert_close(error_BT, mdp.logp(teacher_PV) - mdp.logp(expert_PV), rtol=1e-11, atol=1e-11)
    assert error_BT.abs().max() > 0.1
    # It is another thing with the values: there the shift of a state's logits is in the reward.
    shifted_PV = expert_PV + mdp.policy(300 + seed)[:, :1]
    torch.testing.assert_close(
        _dense(mdp, shifted_PV, reference_PV), _dense(mdp, expert_PV, reference_PV), rtol=1e-11, atol=1e-11
    )
    with_value = [
        DenseWithValueReward()(mdp.scores(logits_PV, logits_PV, reference_PV)) for logits_PV in (shifted_PV, expert_PV)
    ]
    assert (with_value[0] - with_value[1]).abs().max() > 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_leaving_the_values_out_moves_tokens_by_a_bounded_amount_and_all_responses_alike(
    mdp: TokenMDP, seed: int
) -> None:
    teacher_PV = mdp.policy(seed)
    reference_PV = teacher_PV + mdp.policy(100 + seed, scale=0.5)
    scores = mdp.scores(teacher_PV, teacher_PV, reference_PV)
    left_out_BT = DenseWithValueReward()(scores) - DenseReward()(scores)
    largest = (teacher_PV - reference_PV).abs().max()
    assert 0.0 < left_out_BT.abs().max() <= 2.0 * largest
    total_B = left_out_BT.sum(dim=1)
    torch.testing.assert_close(total_B, total_B[:1].expand_as(total_B), rtol=0, atol=1e-12)
    assert total_B[0].abs() <= largest


# 4 and 5. Reward to return.


@pytest.mark.parametrize("seed", SEEDS)
def test_return_is_off_by_at_most_eps_for_each_token(mdp: TokenMDP, seed: int) -> None:
    expert_PV, reference_PV, actor_PV = mdp.policy(seed), mdp.policy(100 + seed), mdp.policy(300 + seed, scale=2.0)
    right_BT = _dense(mdp, expert_PV, reference_PV)
    wrong_BT = _dense(mdp, expert_PV + mdp.policy(200 + seed, scale=0.3), reference_PV)
    eps = (right_BT - wrong_BT).abs().max()
    length = expected_return(mdp, actor_PV, mdp.mask_BT.double())
    off = (expected_return(mdp, actor_PV, right_BT) - expected_return(mdp, actor_PV, wrong_BT)).abs()
    assert 0.0 < off <= eps * length <= HORIZON * eps


def test_value_bound_is_nearly_reached_and_needs_the_error_of_what_the_actor_says(mdp: TokenMDP) -> None:
    reference_PV = _everywhere(mdp, [0.25, 0.25, 0.25, 0.25])
    expert_PV = _everywhere(mdp, [0.4, 0.3, 0.1, 0.2])
    # The teacher is off by log 2 at token 0 alone, apart from what the others need to make room.
    teacher_PV = _everywhere(mdp, [0.2, 0.4, 0.4 / 3, 0.8 / 3])
    right_BT, wrong_BT = _dense(mdp, expert_PV, reference_PV), _dense(mdp, teacher_PV, reference_PV)
    eps = (right_BT - wrong_BT).abs().max()
    assert eps.item() == pytest.approx(0.6931, abs=1e-4)
    always_0_PV = _everywhere(mdp, [1.0 - 3e-6, 1e-6, 1e-6, 1e-6])
    off = expected_return(mdp, always_0_PV, right_BT - wrong_BT)
    assert 0.9999 < float(off / (HORIZON * eps)) <= 1.0
    # Measured on the tokens of an expert who never says 0, the error is log(4/3), and the bound is broken.
    on_others = (right_BT - wrong_BT)[mdp.mask_BT & (mdp.input_ids_BT != 0)].abs().max()
    assert on_others.item() == pytest.approx(0.2877, abs=1e-4)
    assert off > 2.0 * HORIZON * on_others


def _best_return(right_BT: Tensor, chosen_by_BT: Tensor) -> Tensor:
    """Return the right reward of the response that is best under ``chosen_by_BT``: its deterministic optimum."""
    return right_BT.sum(dim=1)[chosen_by_BT.sum(dim=1).argmax()]


@pytest.mark.parametrize("size", [0.1, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_policy_for_the_wrong_reward_loses_at_most_2_h_eps(mdp: TokenMDP, seed: int, size: float) -> None:
    expert_PV, reference_PV = mdp.policy(seed), mdp.policy(100 + seed)
    right_BT = _dense(mdp, expert_PV, reference_PV)
    wrong_BT = _dense(mdp, expert_PV + mdp.policy(200 + seed, scale=size), reference_PV)
    eps = (right_BT - wrong_BT).abs().max()
    loss = _best_return(right_BT, right_BT) - _best_return(right_BT, wrong_BT)
    assert 0.0 <= loss <= 2.0 * HORIZON * eps


def _rivals(mdp: TokenMDP) -> tuple[Tensor, Tensor, float]:
    """Return right and wrong dense reward, and eps: the teacher has tokens 0 and 1 the wrong way round, only just.

    The expert says 0 with a and 1 with a exp(-2 eps + delta). The teacher's are exp(-eps) and exp(+eps) times as
    likely, so that 1 leads by delta. The reference hardly knows either, so both pay, and all else costs.
    """
    eps, delta, likely = 0.5, 0.001, 0.1
    expert_0, expert_1 = likely, likely * torch.e ** (-2.0 * eps + delta)
    teacher_0, teacher_1 = expert_0 * torch.e**-eps, expert_1 * torch.e**eps
    rows = []
    for token_0, token_1 in ((expert_0, expert_1), (teacher_0, teacher_1), (0.001, 0.001)):
        rest = 0.5 * (1.0 - token_0 - token_1)
        rows.append(_everywhere(mdp, [token_0, token_1, rest, rest]))
    expert_PV, teacher_PV, reference_PV = rows
    return _dense(mdp, expert_PV, reference_PV), _dense(mdp, teacher_PV, reference_PV), eps


def test_2_h_eps_is_nearly_lost_where_two_rivals_change_places(mdp: TokenMDP) -> None:
    right_BT, wrong_BT, eps = _rivals(mdp)
    assert (right_BT - wrong_BT).abs().max().item() == pytest.approx(eps)
    loss = _best_return(right_BT, right_BT) - _best_return(right_BT, wrong_BT)
    # H (2 eps - delta)
    assert loss.item() == pytest.approx(HORIZON * (2.0 * eps - 0.001))
    assert 0.998 < loss.item() / (2.0 * HORIZON * eps) < 1.0
    # An error below half the lead of the best response cannot change it, and costs nothing.
    mild_BT = right_BT + 0.49 * (wrong_BT - right_BT)
    assert _best_return(right_BT, mild_BT) == _best_return(right_BT, right_BT)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_error_that_is_a_shaping_costs_nothing_however_large(mdp: TokenMDP, seed: int) -> None:
    # So eps may be taken modulo potentials; without V(terminal) = 0 it may not.
    right_BT = _dense(mdp, mdp.policy(seed), mdp.policy(100 + seed))
    potential_P = mdp.policy(200 + seed, scale=10.0)[:, 0]
    shaped_BT = right_BT + from_table(mdp, next_value(mdp, potential_P) - potential_P[:, None])
    assert (shaped_BT - right_BT).abs().max() > 5.0
    assert _best_return(right_BT, shaped_BT) == _best_return(right_BT, right_BT)
    unending_BT = right_BT + from_table(mdp, next_value(mdp, 0.0 * potential_P, at_cut_off=-20.0))
    changed = _best_return(right_BT, unending_BT)
    cut_off = torch.tensor([sequence[-1] != EOS for sequence in mdp.sequences])
    best_ended = right_BT.sum(dim=1).masked_fill(cut_off, -torch.inf).max()
    torch.testing.assert_close(changed, best_ended, rtol=0, atol=0)


# 6. Safe improvement.


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_gained_of_the_wrong_reward_is_gained_of_the_right_one_but_for_eps_times_the_move(
    mdp: TokenMDP, seed: int, size: float
) -> None:
    expert_PV, reference_PV = mdp.policy(seed), mdp.policy(100 + seed)
    teacher_PV = expert_PV + mdp.policy(200 + seed, scale=0.3)
    right_BT, wrong_BT = _dense(mdp, expert_PV, reference_PV), _dense(mdp, teacher_PV, reference_PV)
    eps = (right_BT - wrong_BT).abs().max()
    actor_PV = teacher_PV + mdp.policy(300 + seed, scale=size)
    gain_right, gain_wrong = (
        expected_return(mdp, actor_PV, reward_BT) - expected_return(mdp, teacher_PV, reward_BT)
        for reward_BT in (right_BT, wrong_BT)
    )
    moved_PV = occupancy(mdp, mdp.probability(actor_PV)) - occupancy(mdp, mdp.probability(teacher_PV))
    distance = moved_PV.abs().sum()
    assert 0.0 < (gain_right - gain_wrong).abs() <= eps * distance
    # Time by time, occupancies are marginals of the responses' distributions; then Pinsker.
    kl = _kl_of_responses(mdp, actor_PV, teacher_PV)
    assert distance <= 2.0 * HORIZON * (kl / 2.0).sqrt()


def test_safe_improvement_is_nearly_reached(mdp: TokenMDP) -> None:
    # Two ways of four tokens, 0000 and 1111, that the first token decides; the actor leans to one of them a little.
    never = 1e-12
    fixed_PV = torch.full((len(mdp.prefixes), NUM_TOKENS), never, dtype=torch.float64)
    for p, prefix in enumerate(mdp.prefixes):
        fixed_PV[p, prefix[0] if prefix else 0] = 1.0
    teacher_PV, actor_PV = fixed_PV.clone(), fixed_PV.clone()
    teacher_PV[0, :2] = torch.tensor([0.5, 0.5], dtype=torch.float64)
    actor_PV[0, :2] = torch.tensor([0.51, 0.49], dtype=torch.float64)
    teacher_PV, actor_PV = teacher_PV.log(), actor_PV.log()
    moved_PV = occupancy(mdp, mdp.probability(actor_PV)) - occupancy(mdp, mdp.probability(teacher_PV))
    distance = moved_PV.abs().sum()
    # 2 * 0.01 in each of four steps
    assert distance.item() == pytest.approx(0.08, abs=1e-9)
    kl = _kl_of_responses(mdp, actor_PV, teacher_PV)
    # KL = 0.51 log 1.02 + 0.49 log 0.98 = 2 * 0.01^2 and a little
    assert 0.9999 < float(distance / (2.0 * HORIZON * (kl / 2.0).sqrt())) <= 1.0
    # An error of eps against the move on every token loses all of eps times the distance.
    eps = 0.3
    error_BT = from_table(mdp, -eps * moved_PV.sign())
    lost = expected_return(mdp, actor_PV, error_BT) - expected_return(mdp, teacher_PV, error_BT)
    assert lost.item() == pytest.approx(-eps * float(distance))


def test_without_the_kl_a_gain_of_the_wrong_reward_can_be_a_loss_of_the_right_one(mdp: TokenMDP) -> None:
    # The actor goes all the way to where the rivals' wrong reward is best. Its own estimate says that it has gained.
    right_BT, wrong_BT, eps = _rivals(mdp)
    start_PV = _everywhere(mdp, [1.0 - 3e-6, 1e-6, 1e-6, 1e-6])
    end_PV = _everywhere(mdp, [1e-6, 1.0 - 3e-6, 1e-6, 1e-6])
    gain_wrong = expected_return(mdp, end_PV, wrong_BT) - expected_return(mdp, start_PV, wrong_BT)
    gain_right = expected_return(mdp, end_PV, right_BT) - expected_return(mdp, start_PV, right_BT)
    assert gain_wrong > 0.0
    assert gain_right < -1.9 * HORIZON * eps
    # The guarantee's price, 2 H eps sqrt(KL / 2), is by then more than any two policies can differ by.
    assert _kl_of_responses(mdp, end_PV, start_PV) > 10.0
