"""Which ways of crediting tokens leave the gradient unbiased, and which do not (ALGORITHM.md section 4).

test_objective_gradient has the dense, sentence and expected-reward returns, with and without clipping of the latter,
the KL penalty and a leave-one-out baseline of two samples. Here: clipped rewards under plain returns, a clipped
sentence, three samples of a prompt, the two estimators as they stand, and what is biased: a discount, one's own return
in the baseline, an expectation that forgets the clip, and rewards that do not depend on one token alone.

Shapes: B all responses, T positions, P prefixes, V tokens, R responses in all tuples of samples.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from soft_q import expected_return
from token_mdp import TokenMDP, gradient_of_expectation
from torch import Tensor

from dpr_lightning.functional import (
    ClippedReward,
    DenseReward,
    DiscountedReturns,
    ExpectedReturns,
    RawAdvantage,
    ReturnEstimator,
    SentenceReward,
    k1,
    reinforce_loss,
)
from dpr_lightning.types import TokenScores

BETA = 0.3


def _scores(mdp: TokenMDP, actor_PV: Tensor, reward: ClippedReward | None = None) -> TokenScores:
    if reward is None:
        return mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2))
    return mdp.scores(actor_PV, mdp.policy(1), mdp.policy(2), low=reward.low, high=reward.high)


def _penalised(scores: TokenScores, reward_BT: Tensor, beta: float) -> Tensor:
    return reward_BT - beta * k1(scores.old_logp_BT, scores.teacher_logp_BT)


def _average_gradient(mdp: TokenMDP, actor_PV: Tensor, advantage_BT: Tensor) -> Tensor:
    """Return the [P, V] gradient that REINFORCE follows, averaged over all responses with their probabilities."""
    leaf_PV = actor_PV.clone().requires_grad_()
    weighted_BT = mdp.probability(actor_PV)[:, None] * advantage_BT
    loss = reinforce_loss(mdp.logp(leaf_PV), weighted_BT, mdp.mask_BT, num_sequences=1).loss
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    return -grad_PV


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize(
    "reward",
    [
        pytest.param(DenseReward(clip_low=-0.5, clip_high=0.8), id="both"),
        pytest.param(DenseReward(clip_high=0.0), id="costs"),
        pytest.param(SentenceReward(clip_low=-2.0, clip_high=1.0), id="sentence"),
    ],
)
def test_clipped_rewards_under_plain_returns_are_exact(mdp: TokenMDP, reward: ClippedReward, beta: float) -> None:
    # The clip changes what is maximised, not whether its gradient is right.
    actor_PV = mdp.policy(0)
    scores = _scores(mdp, actor_PV)
    hits, num_values = reward.clip_counts(scores).tolist()
    assert 0.05 * num_values < hits < num_values
    reward_BT = _penalised(scores, reward(scores), beta)
    # log pi's own derivative in the penalty averages to 0: E[grad log pi] = 0.
    exact_PV = gradient_of_expectation(mdp, actor_PV, reward_BT.sum(dim=1))
    got_PV = _average_gradient(mdp, actor_PV, DiscountedReturns()(reward_BT, None, mdp.mask_BT))
    torch.testing.assert_close(got_PV, exact_PV, rtol=1e-10, atol=1e-12)
    free_PV = gradient_of_expectation(mdp, actor_PV, _penalised(scores, DenseReward()(scores), beta).sum(dim=1))
    assert (exact_PV - free_PV).norm() > 0.1 * free_PV.norm()


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("seed", range(5))
def test_expected_return_at_each_token_is_the_plain_ones_expectation_less_a_baseline(
    mdp: TokenMDP, seed: int, beta: float
) -> None:
    # Stronger than an unbiased gradient: given the prefix and the token, E[plain G_t - expected G_t] is b(s_t) alone.
    actor_PV, reward = mdp.policy(seed), DenseReward(clip_low=-0.5, clip_high=0.8)
    scores = _scores(mdp, actor_PV, reward)
    assert scores.teacher_kl_BT is not None
    assert scores.expected_dense_BT is not None
    expected_BT = scores.expected_dense_BT - beta * scores.teacher_kl_BT
    reward_BT = _penalised(scores, reward(scores), beta)
    plain_BT = DiscountedReturns()(reward_BT, None, mdp.mask_BT)
    difference_BT = plain_BT - ExpectedReturns()(reward_BT, expected_BT, mdp.mask_BT)
    probability_B = mdp.probability(actor_PV)
    for t in range(1, mdp.mask_BT.shape[1]):
        starts = [tuple(row[: t + 1]) for row in mdp.input_ids_BT.tolist()]
        for start in sorted({starts[row] for row in mdp.mask_BT[:, t].nonzero()[:, 0].tolist()}):
            same_B = torch.tensor([one == start for one in starts]) & mdp.mask_BT[:, t]
            mean = (probability_B * difference_BT[:, t])[same_B].sum() / probability_B[same_B].sum()
            torch.testing.assert_close(mean, expected_BT[same_B, t][0], rtol=1e-10, atol=1e-12)


def test_expectation_that_forgets_the_clip_is_biased(mdp: TokenMDP) -> None:
    actor_PV, reward = mdp.policy(0), DenseReward(clip_low=-0.5, clip_high=0.8)
    scores = _scores(mdp, actor_PV)
    assert scores.expected_dense_BT is not None
    exact_PV = gradient_of_expectation(mdp, actor_PV, reward(scores).sum(dim=1))
    return_BT = ExpectedReturns()(reward(scores), scores.expected_dense_BT, mdp.mask_BT)
    assert (_average_gradient(mdp, actor_PV, return_BT) - exact_PV).norm() > 0.1 * exact_PV.norm()


def test_expected_returns_of_a_sentence_reward_are_biased(mdp: TokenMDP) -> None:
    # The sentence's sum is not the last token's own reward, so b(s) is not its expectation: the module refuses the two.
    actor_PV = mdp.policy(0)
    scores = _scores(mdp, actor_PV)
    assert scores.expected_dense_BT is not None
    exact_PV = gradient_of_expectation(mdp, actor_PV, DenseReward()(scores).sum(dim=1))
    return_BT = ExpectedReturns()(SentenceReward()(scores), scores.expected_dense_BT, mdp.mask_BT)
    assert (_average_gradient(mdp, actor_PV, return_BT) - exact_PV).norm() > 0.1 * exact_PV.norm()


def test_expected_returns_need_the_policy_that_acts(mdp: TokenMDP) -> None:
    # b under another policy than the one that sampled: its later sums are no longer what the actor will earn.
    actor_PV, stale_PV = mdp.policy(0), mdp.policy(0) + mdp.policy(3, scale=0.5)
    reward_BT, expected_BT = DenseReward()(_scores(mdp, actor_PV)), _scores(mdp, stale_PV).expected_dense_BT
    exact_PV = gradient_of_expectation(mdp, actor_PV, reward_BT.sum(dim=1))
    wrong_PV = _average_gradient(mdp, actor_PV, ExpectedReturns()(reward_BT, expected_BT, mdp.mask_BT))
    assert (wrong_PV - exact_PV).norm() > 0.02 * exact_PV.norm()


def test_a_discount_is_biased_and_the_more_so_the_lower_it_is(mdp: TokenMDP) -> None:
    actor_PV = mdp.policy(0)
    reward_BT = DenseReward()(_scores(mdp, actor_PV))
    exact_PV = gradient_of_expectation(mdp, actor_PV, reward_BT.sum(dim=1))
    shares = []
    for gamma in (1.0, 0.99, 0.9, 0.5, 0.0):
        got_PV = _average_gradient(mdp, actor_PV, DiscountedReturns(gamma=gamma)(reward_BT, None, mdp.mask_BT))
        shares.append(float((got_PV - exact_PV).norm() / exact_PV.norm()))
    assert shares[0] < 1e-12
    assert all(later > earlier for earlier, later in itertools.pairwise(shares))
    assert shares[1] > 1e-3
    assert shares[-1] > 0.2


def test_a_discount_is_not_the_gradient_of_the_discounted_return_either(mdp: TokenMDP) -> None:
    # That one weighs the token at t by gamma^t; reward-to-go, as everyone uses it, does not.
    actor_PV, gamma = mdp.policy(0), 0.5
    reward_BT = DenseReward()(_scores(mdp, actor_PV))
    return_BT = DiscountedReturns(gamma=gamma)(reward_BT, None, mdp.mask_BT)
    discounted_PV = gradient_of_expectation(mdp, actor_PV, return_BT[:, 1])
    got_PV = _average_gradient(mdp, actor_PV, return_BT)
    assert (got_PV - discounted_PV).norm() > 0.2 * discounted_PV.norm()
    # Column 1 holds the first response token.
    weight_T = torch.tensor([0.0, *(gamma**t for t in range(mdp.mask_BT.shape[1] - 1))], dtype=torch.float64)
    weighted_PV = _average_gradient(mdp, actor_PV, weight_T * return_BT)
    torch.testing.assert_close(weighted_PV, discounted_PV, rtol=1e-10, atol=1e-12)


def test_discounted_dense_and_sentence_part_ways(mdp: TokenMDP) -> None:
    # At gamma = 1 both have the exact gradient; the sentence's reward lies at the end, and a discount eats it.
    actor_PV = mdp.policy(0)
    scores = _scores(mdp, actor_PV)
    dense_PV, sentence_PV = (
        _average_gradient(mdp, actor_PV, DiscountedReturns(gamma=0.5)(reward(scores), None, mdp.mask_BT))
        for reward in (DenseReward(), SentenceReward())
    )
    assert (dense_PV - sentence_PV).norm() > 0.2 * dense_PV.norm()


def _short(mdp: TokenMDP, actor_PV: Tensor) -> tuple[TokenMDP, Tensor]:
    """Return the MDP without the responses that say token 1 or 2, and a policy that never says them: 5 responses."""
    row_K = torch.tensor([row for row, sequence in enumerate(mdp.sequences) if not {1, 2} & set(sequence)])
    fields = {name: getattr(mdp, name)[row_K] for name in ("input_ids_BT", "prefix_BT", "mask_BT")}
    short = dataclasses.replace(mdp, sequences=[mdp.sequences[row] for row in row_K], **fields)
    # exp(-1000) is 0 in float64, and the logit stays finite.
    never_V = torch.tensor([0.0, -1000.0, -1000.0, 0.0], dtype=torch.float64)
    return short, actor_PV + never_V


def _tuples(short: TokenMDP, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return [R] response of each sample of every ordered tuple of samples, and [R] the number of its tuple."""
    choices = torch.cartesian_prod(*[torch.arange(len(short.sequences))] * num_samples)
    return choices.flatten(), torch.arange(len(choices)).repeat_interleave(num_samples)


@pytest.mark.parametrize("returns", [DiscountedReturns(), ExpectedReturns()])
@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_leave_one_out_over_several_samples_is_exact(mdp: TokenMDP, num_samples: int, returns: ReturnEstimator) -> None:
    short, actor_PV = _short(mdp, mdp.policy(0))
    assert len(short.sequences) == 5
    scores = _scores(short, actor_PV)
    assert scores.teacher_kl_BT is not None
    assert scores.expected_dense_BT is not None
    reward_BT = _penalised(scores, DenseReward()(scores), BETA)
    return_BT = returns(reward_BT, scores.expected_dense_BT - BETA * scores.teacher_kl_BT, short.mask_BT)
    row_R, tuple_R = _tuples(short, num_samples)
    # The estimator as the module uses it, over all tuples at once; they do not touch one another.
    out = RawAdvantage(leave_one_out=True)(return_BT[row_R], short.mask_BT[row_R], tuple_R)
    leaf_PV = actor_PV.clone().requires_grad_()
    probability_B = short.probability(actor_PV)
    torch.testing.assert_close(probability_B.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)
    weight_R = probability_B[row_R].view(-1, num_samples).prod(dim=1).repeat_interleave(num_samples) / num_samples
    loss = reinforce_loss(
        short.logp(leaf_PV)[row_R], weight_R[:, None] * out.advantage_BT, short.mask_BT[row_R], num_sequences=1
    ).loss
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    exact_PV = gradient_of_expectation(short, actor_PV, reward_BT.sum(dim=1))
    assert exact_PV.norm() > 0.1
    torch.testing.assert_close(-grad_PV, exact_PV, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_ones_own_return_in_the_baseline_shrinks_the_gradient(mdp: TokenMDP, num_samples: int) -> None:
    # The mean over all n samples, one's own among them: of a sentence's return (n - 1) / n is left.
    short, actor_PV = _short(mdp, mdp.policy(0))
    return_BT = DiscountedReturns()(SentenceReward()(_scores(short, actor_PV)), None, short.mask_BT)
    row_R, _ = _tuples(short, num_samples)
    first_R = return_BT[row_R, 1]
    mean_R = first_R.view(-1, num_samples).mean(dim=1).repeat_interleave(num_samples)
    leaf_PV = actor_PV.clone().requires_grad_()
    weight_R = short.probability(actor_PV)[row_R].view(-1, num_samples).prod(dim=1).repeat_interleave(num_samples)
    advantage_RT = (weight_R / num_samples)[:, None] * (return_BT[row_R] - mean_R[:, None])
    loss = reinforce_loss(short.logp(leaf_PV)[row_R], advantage_RT, short.mask_BT[row_R], num_sequences=1).loss
    (grad_PV,) = torch.autograd.grad(loss, leaf_PV)
    exact_PV = gradient_of_expectation(short, actor_PV, return_BT[:, 1])
    torch.testing.assert_close(-grad_PV, (num_samples - 1) / num_samples * exact_PV, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_expected_dense_reward_is_a_difference_of_two_kls(mdp: TokenMDP, seed: int) -> None:
    # b(s) = KL(pi_old || pi_ref) - KL(pi_old || pi_SFT), each KL by the package; and E[sum r_hat] over responses.
    actor_PV, teacher_PV, reference_PV = mdp.policy(seed), mdp.policy(100 + seed), mdp.policy(200 + seed)
    scores = mdp.scores(actor_PV, teacher_PV, reference_PV)
    to_reference_BT = mdp.scores(actor_PV, reference_PV, reference_PV).teacher_kl_BT
    assert to_reference_BT is not None
    assert scores.teacher_kl_BT is not None
    assert scores.expected_dense_BT is not None
    torch.testing.assert_close(scores.expected_dense_BT, to_reference_BT - scores.teacher_kl_BT, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        expected_return(mdp, actor_PV, scores.expected_dense_BT),
        expected_return(mdp, actor_PV, DenseReward()(scores)),
        rtol=1e-11,
        atol=1e-12,
    )
