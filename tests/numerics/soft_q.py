"""Soft control on the token MDP: occupancies, values of successor states, and the soft Bellman equation, by tables.

The tables share no code with what they are used to check; the two functions named ``package_*`` are the package's own.

Shapes: B all responses, T positions, P prefixes, V tokens.
"""

from __future__ import annotations

import torch
from token_mdp import EOS, HORIZON, NUM_TOKENS, TokenMDP
from torch import Tensor

from dpr_lightning.functional import DenseWithValueReward, LMHead, masked_sum, token_logprobs


def incidence(mdp: TokenMDP) -> Tensor:
    """Return [B, P, V] float64, 1 where the response chooses that token in that state."""
    incidence_BPV = torch.zeros(len(mdp.sequences), len(mdp.prefixes), NUM_TOKENS, dtype=torch.float64)
    row_N = mdp.mask_BT.nonzero()[:, 0]
    incidence_BPV[row_N, mdp.prefix_BT[mdp.mask_BT], mdp.input_ids_BT[mdp.mask_BT]] = 1.0
    return incidence_BPV


def occupancy(mdp: TokenMDP, probability_B: Tensor) -> Tensor:
    """Return [P, V] how often each token is chosen in each state; the sum is the expected length."""
    return torch.einsum("b,bpv->pv", probability_B, incidence(mdp))


def next_value(mdp: TokenMDP, value_P: Tensor, *, at_cut_off: float = 0.0) -> Tensor:
    """Return [P, V] the value of the state that a token leads to; 0 behind EOS, ``at_cut_off`` at the horizon."""
    padded_P = torch.cat([value_P, value_P.new_tensor([0.0, at_cut_off])])
    ended = len(mdp.prefixes)
    number = {prefix: p for p, prefix in enumerate(mdp.prefixes)}
    index_PV = torch.tensor(
        [
            [ended if token == EOS else number.get((*prefix, token), ended + 1) for token in range(NUM_TOKENS)]
            for prefix in mdp.prefixes
        ]
    )
    return padded_P[index_PV]


def soft_q(mdp: TokenMDP, reward_PV: Tensor) -> Tensor:
    """Return [P, V], the Q that solves Q(s, a) = r(s, a) + logsumexp Q(s', .), by induction from the longest prefix."""
    q_PV = reward_PV.clone()
    for _ in range(HORIZON):
        q_PV = reward_PV + next_value(mdp, q_PV.logsumexp(dim=-1))
    return q_PV


def from_table(mdp: TokenMDP, table_PV: Tensor) -> Tensor:
    """Return [B, T], the table's entry for each response token, 0 elsewhere."""
    return torch.where(mdp.mask_BT, table_PV[mdp.prefix_BT, mdp.input_ids_BT], 0.0)


def package_reward(mdp: TokenMDP, q_PV: Tensor) -> Tensor:
    """Return [B, T], the reward that the package reads out of logits alone (Eq. 4)."""
    return DenseWithValueReward(relative=False)(mdp.scores(q_PV, q_PV, q_PV))


def package_logp(mdp: TokenMDP, q_PV: Tensor) -> Tensor:
    """Return [B, T], the package's log-probabilities, differentiable in the logits."""
    head = LMHead(weight_VD=torch.eye(NUM_TOKENS, dtype=torch.float64))
    hidden_ND, target_N = q_PV[mdp.prefix_BT[mdp.mask_BT]], mdp.input_ids_BT[mdp.mask_BT]
    logp_N = token_logprobs(hidden_ND, head, target_N, chunk_size=50).logp_N
    return torch.zeros_like(mdp.mask_BT, dtype=torch.float64).masked_scatter(mdp.mask_BT, logp_N)


def expected_return(mdp: TokenMDP, logits_PV: Tensor, reward_BT: Tensor) -> Tensor:
    """Return the scalar J_r(pi), the expected sum of token rewards."""
    return masked_sum(mdp.probability(logits_PV)[:, None] * reward_BT, mdp.mask_BT)
