"""Every loss and estimator on the device, against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_checks import relative_error
from torch import Tensor

from dpr_lightning.functional.advantages import WhitenedAdvantage
from dpr_lightning.functional.gae import generalized_advantages
from dpr_lightning.functional.losses import ClippedPolicyLoss, PolicyLoss, ReinforceLoss, sft_loss, value_loss
from dpr_lightning.functional.pair_losses import (
    BernoulliGSILLoss,
    BrierGSILLoss,
    HingeGSILLoss,
    KLIEPGSILLoss,
    LSIFGSILLoss,
    PairLoss,
    SPINLoss,
)
from dpr_lightning.functional.returns import reward_to_go
from dpr_lightning.types import DPRBatch

pytestmark = pytest.mark.gpu

SHAPE = (6, 9)
GENERATOR = torch.Generator().manual_seed(0)
NORMAL = [torch.randn(SHAPE, generator=GENERATOR, dtype=torch.float64) for _ in range(4)]
MASK_BT = torch.arange(9) < torch.tensor([9, 1, 4, 7, 2, 5])[:, None]


def batch(device: torch.device, dtype: torch.dtype) -> DPRBatch:
    old, teacher, advantage = (values.to(device, dtype) for values in NORMAL[1:])
    ids = torch.zeros(SHAPE, dtype=torch.int64, device=device)
    mask = MASK_BT.to(device)
    return DPRBatch(
        input_ids_BT=ids,
        attention_mask_BT=mask,
        response_mask_BT=mask,
        old_logp_BT=old,
        teacher_logp_BT=teacher,
        advantage_BT=advantage,
        num_tokens=int(MASK_BT.sum()),
        num_sequences=SHAPE[0],
    )


def value_and_gradient(loss_of: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(
    "loss",
    [ReinforceLoss(), ClippedPolicyLoss(), ClippedPolicyLoss(kl_coefficient=0.1, kl_estimator="k3")],
    ids=["reinforce", "clipped", "clipped with kl"],
)
def test_policy_losses(loss: PolicyLoss, device: torch.device) -> None:
    def of(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return value_and_gradient(lambda x: loss(x, batch(where, dtype)).loss, NORMAL[0].to(where, dtype))

    check(of(device, torch.float32), of(torch.device("cpu"), torch.float64))


@pytest.mark.parametrize(
    "loss",
    [SPINLoss(), BernoulliGSILLoss(), BrierGSILLoss(), HingeGSILLoss(), KLIEPGSILLoss(), LSIFGSILLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_pair_losses(loss: PairLoss, device: torch.device) -> None:
    def of(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Far apart, so that some pairs are on each side of the hinge.
        demonstration_P, sample_P = (100 * NORMAL[number][:, 0].to(where, dtype) for number in (0, 1))
        return value_and_gradient(lambda x: loss(x, sample_P, num_pairs=6).loss, demonstration_P)

    check(of(device, torch.float32), of(torch.device("cpu"), torch.float64))


def test_sft_and_value_losses(device: torch.device) -> None:
    def sft(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mask = MASK_BT.to(where)
        return value_and_gradient(lambda x: sft_loss(x, mask, num_tokens=28).loss, NORMAL[0].to(where, dtype))

    def value(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mask = MASK_BT.to(where)
        old, target = (values.to(where, dtype) for values in NORMAL[1:3])
        return value_and_gradient(
            lambda x: value_loss(x, old, target, mask, num_tokens=28, clip=0.2).loss, NORMAL[0].to(where, dtype)
        )

    for of in (sft, value):
        check(of(device, torch.float32), of(torch.device("cpu"), torch.float64))


def test_returns_and_advantages(device: torch.device) -> None:
    def of(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        reward_BT, value_BT = (NORMAL[number].to(where, dtype) * MASK_BT.to(where) for number in (0, 1))
        mask_BT, prompt_B = MASK_BT.to(where), torch.tensor([0, 0, 1, 1, 2, 2], device=where)
        return_BT = reward_to_go(reward_BT, mask_BT, gamma=0.9)
        whitened = WhitenedAdvantage()(return_BT, mask_BT, prompt_B, all_reduce=lambda value: value)
        advantages_BT = generalized_advantages(reward_BT, value_BT, mask_BT, gamma=0.9, gae_lambda=0.8)
        return return_BT, whitened.advantage_BT, advantages_BT

    check(of(device, torch.float32), of(torch.device("cpu"), torch.float64))


def check(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours, theirs) < 1e-5
