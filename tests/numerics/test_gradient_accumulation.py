"""One micro-batch of N responses and N micro-batches of one take the same optimizer steps.

Shapes: B responses of a step, T positions, N response tokens laid end to end, P prefixes, V tokens, D hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from token_mdp import NUM_TOKENS, TokenMDP
from torch import Tensor, nn

from dpr_lightning.functional import LMHead, policy_loss, reinforce_loss, sft_loss, token_logprobs

WIDTH = 6
STEPS = [[0, 5, 17, 33, 60, 90, 101, 120], [3, 3, 8, 110, 41, 2, 77, 64]]
"""Rows of each optimizer step: responses of one to four tokens."""


def _sft(mdp: TokenMDP, logp_BT: Tensor, row_B: Tensor, step_row_B: Tensor) -> Tensor:
    return sft_loss(logp_BT, mdp.mask_BT[row_B], num_tokens=int(mdp.mask_BT[step_row_B].sum())).loss


def _policy(mdp: TokenMDP, logp_BT: Tensor, row_B: Tensor, step_row_B: Tensor) -> Tensor:
    old_logp_BT, advantage_BT = mdp.logp(mdp.policy(3)), mdp.logp(mdp.policy(4)) + 1.5
    return policy_loss(
        logp_BT,
        old_logp_BT[row_B],
        advantage_BT[row_B],
        mdp.mask_BT[row_B],
        num_tokens=int(mdp.mask_BT[step_row_B].sum()),
    ).loss


def _reinforce(mdp: TokenMDP, logp_BT: Tensor, row_B: Tensor, step_row_B: Tensor) -> Tensor:
    advantage_BT = mdp.logp(mdp.policy(4)) + 1.5
    return reinforce_loss(logp_BT, advantage_BT[row_B], mdp.mask_BT[row_B], num_sequences=len(step_row_B)).loss


def _train(
    mdp: TokenMDP,
    loss: Callable[[TokenMDP, Tensor, Tensor, Tensor], Tensor],
    micro_batch_size: int,
    optimizer_type: type[torch.optim.Optimizer],
) -> list[Tensor]:
    """Return gradients of the first step, then the weights after all steps."""
    generator = torch.Generator().manual_seed(0)
    embedding_PD = nn.Parameter(torch.randn(len(mdp.prefixes), WIDTH, generator=generator, dtype=torch.float64))
    weight_VD = nn.Parameter(torch.randn(NUM_TOKENS, WIDTH, generator=generator, dtype=torch.float64))
    optimizer = optimizer_type([embedding_PD, weight_VD], lr=0.05)  # type: ignore[call-arg]
    first_grads: list[Tensor] = []
    for step in STEPS:
        step_row_B = torch.tensor(step)
        optimizer.zero_grad()
        for row_B in step_row_B.split(micro_batch_size):
            mask_BT = mdp.mask_BT[row_B]
            hidden_ND = embedding_PD[mdp.prefix_BT[row_B][mask_BT]]
            target_N = mdp.input_ids_BT[row_B][mask_BT]
            logp_N = token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N, chunk_size=5).logp_N
            logp_BT = torch.zeros_like(mask_BT, dtype=torch.float64).masked_scatter(mask_BT, logp_N)
            loss(mdp, logp_BT, row_B, step_row_B).backward()
        if not first_grads:
            first_grads = [parameter.grad.clone() for parameter in (embedding_PD, weight_VD)]  # type: ignore[union-attr]
        optimizer.step()
    return [*first_grads, embedding_PD.detach(), weight_VD.detach()]


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@pytest.mark.parametrize("loss", [_sft, _policy, _reinforce])
def test_micro_batches_add_up(
    mdp: TokenMDP,
    loss: Callable[[TokenMDP, Tensor, Tensor, Tensor], Tensor],
    micro_batch_size: int,
    optimizer_type: type[torch.optim.Optimizer],
) -> None:
    whole = _train(mdp, loss, len(STEPS[0]), optimizer_type)
    parts = _train(mdp, loss, micro_batch_size, optimizer_type)
    assert whole[1].norm() > 0.01
    # Sums in another order: float64 rounding, which AdamW's division by the root of tiny squares may raise.
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
