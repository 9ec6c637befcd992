"""The exact variance of the one-sample gradient under each way of crediting tokens.

Shapes: B all responses, T positions, P prefixes, V tokens.
"""

from __future__ import annotations

import pytest
import torch
from token_mdp import TokenMDP
from torch import Tensor

from dpr_lightning.functional import (
    DenseReward,
    SentenceReward,
    expected_reward_to_go,
    reinforce_loss,
    reward_to_go,
)

SEEDS = range(8)


def _variance(mdp: TokenMDP, actor_PV: Tensor, advantage_BT: Tensor) -> float:
    """Return E|g|^2 - |E g|^2 of a single response's gradient g, over all responses with their probabilities."""
    # A copy of the policy for each response gives all their gradients in one backward pass.
    leaf_BPV = actor_PV.expand(len(mdp.sequences), -1, -1).clone().requires_grad_()
    row_B1 = torch.arange(len(mdp.sequences))[:, None]
    logp_BT = leaf_BPV.log_softmax(dim=-1)[row_B1, mdp.prefix_BT, mdp.input_ids_BT]
    loss = reinforce_loss(logp_BT, advantage_BT, mdp.mask_BT, num_sequences=1).loss
    (grad_BPV,) = torch.autograd.grad(loss, leaf_BPV)
    probability_B = mdp.probability(actor_PV)
    mean_PV = torch.einsum("b,bpv->pv", probability_B, grad_BPV)
    return float((probability_B * grad_BPV.square().sum(dim=(1, 2))).sum() - mean_PV.square().sum())


def _variances(mdp: TokenMDP, seed: int) -> dict[str, float]:
    """Return the variances at the teacher, where training starts; the reference is the teacher's logits, shrunk and
    shaken, as half a training run leaves them."""
    teacher_PV = mdp.policy(seed)
    reference_PV = 0.7 * teacher_PV + mdp.policy(1000 + seed, scale=0.3)
    scores = mdp.scores(teacher_PV, teacher_PV, reference_PV)
    assert scores.teacher_kl_BT is not None
    assert scores.expected_dense_BT is not None
    assert not scores.teacher_kl_BT.any()
    dense_BT = DenseReward()(scores)
    expected_BT = scores.expected_dense_BT
    # Every token credited with the whole return: REINFORCE with neither reward-to-go nor baseline.
    sentence_BT = reward_to_go(SentenceReward()(scores), mdp.mask_BT, gamma=1.0)
    return {
        "dense": _variance(mdp, teacher_PV, reward_to_go(dense_BT, mdp.mask_BT, gamma=1.0)),
        "expected": _variance(mdp, teacher_PV, expected_reward_to_go(dense_BT, expected_BT, mdp.mask_BT)),
        "sentence": _variance(mdp, teacher_PV, sentence_BT),
    }


def test_dense_has_less_variance_than_sentence_and_expected_less_than_dense(mdp: TokenMDP) -> None:
    variances = [_variances(mdp, seed) for seed in SEEDS]
    mean = {name: sum(one[name] for one in variances) / len(variances) for name in variances[0]}
    assert mean["expected"] < mean["dense"] < mean["sentence"]


@pytest.mark.parametrize("seed", SEEDS)
def test_order_at_each_stated_seed(mdp: TokenMDP, seed: int) -> None:
    variance = _variances(mdp, seed)
    assert variance["dense"] < variance["sentence"]
    assert variance["expected"] < variance["dense"]
