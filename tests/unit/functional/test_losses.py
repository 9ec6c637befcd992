"""The five tests of each loss: value, gradient, inert masked positions, splitting, bad input.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional import (
    ClippedPolicyLoss,
    LossOutput,
    ReinforceLoss,
    policy_loss,
    reinforce_loss,
    sft_loss,
)
from dpr_lightning.types import DPRBatch

MASK_BT = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
NUM_TOKENS = 7
NUM_SEQUENCES = 4
# Ratios far outside, outside and inside the clip of 0.2 on each side, with advantages of both signs.
RATIO_BT = torch.tensor(
    [[1, 1.5, 1.5, 0.5, 1], [1, 1, 0.5, 1.1, 0.9], [1, 1.3, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.float64
)
ADVANTAGE_BT = torch.tensor(
    [[0, 0.7, -0.4, 1.3, 0], [0, 0, -2.1, 0.6, -0.9], [0, 1.7, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.float64
)
Loss = Callable[[Tensor, DPRBatch], LossOutput]

LOSSES = [
    pytest.param(
        lambda logp_BT, batch: sft_loss(logp_BT, batch.response_mask_BT, num_tokens=batch.num_tokens), id="sft"
    ),
    pytest.param(
        lambda logp_BT, batch: policy_loss(
            logp_BT, batch.old_logp_BT, batch.advantage_BT, batch.response_mask_BT, num_tokens=batch.num_tokens
        ),
        id="policy",
    ),
    pytest.param(
        lambda logp_BT, batch: reinforce_loss(
            logp_BT, batch.advantage_BT, batch.response_mask_BT, num_sequences=batch.num_sequences
        ),
        id="reinforce",
    ),
    pytest.param(ClippedPolicyLoss(kl_coefficient=0.3, kl_estimator="k2"), id="clipped_k2"),
    pytest.param(ClippedPolicyLoss(kl_coefficient=0.3, kl_estimator="k3"), id="clipped_k3"),
    pytest.param(ReinforceLoss(), id="reinforce_module"),
]


def _normal(seed: int) -> Tensor:
    return torch.randn(MASK_BT.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _batch(mask_BT: Tensor = MASK_BT, poison: float = 0.0, **fields: Tensor) -> DPRBatch:
    """Return a batch of random float64 numbers whose masked positions hold ``poison``."""
    numbers = {"old_logp_BT": _normal(1) - 2.0, "teacher_logp_BT": _normal(2) - 2.0, "advantage_BT": ADVANTAGE_BT}
    return DPRBatch(
        input_ids_BT=torch.zeros_like(mask_BT, dtype=torch.int64),
        attention_mask_BT=torch.ones_like(mask_BT),
        response_mask_BT=mask_BT,
        num_tokens=NUM_TOKENS,
        num_sequences=NUM_SEQUENCES,
        **{name: x_BT.masked_fill(~mask_BT, poison) for name, x_BT in {**numbers, **fields}.items()},
    )


def _logp(poison: float = 0.0) -> Tensor:
    logp_BT = _batch().old_logp_BT + RATIO_BT.log()
    return logp_BT.masked_fill(~MASK_BT, poison).requires_grad_()


def _rows(batch: DPRBatch, rows: slice) -> DPRBatch:
    cut = {
        field.name: value[rows]
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **cut)


# 1. Hand-worked values


def test_sft_value() -> None:
    logp_BT = torch.tensor([[-9.0, -1.0, -2.0], [-9.0, -4.0, -9.0]])
    mask_BT = torch.tensor([[False, True, True], [False, True, False]])
    # (1 + 2 + 4) / 14: this micro-batch holds 3 of the step's 14 tokens
    out = sft_loss(logp_BT, mask_BT, num_tokens=14)
    assert out.loss.item() == 0.5
    assert out.metrics["train/loss"].item() == 0.5


def test_reinforce_value() -> None:
    logp_BT = torch.tensor([[-9.0, -1.0, -2.0], [-9.0, -4.0, -9.0]])
    advantage_BT = torch.tensor([[7.0, 3.0, -1.0], [7.0, 0.5, 7.0]])
    mask_BT = torch.tensor([[False, True, True], [False, True, False]])
    # sum logp * A = -3 + 2 - 2 = -3; over 4 sequences, with a minus sign: 0.75
    out = reinforce_loss(logp_BT, advantage_BT, mask_BT, num_sequences=4)
    assert out.loss.item() == 0.75
    assert out.metrics["policy/loss"].item() == 0.75


def test_policy_value_and_metrics() -> None:
    # rho = 2, 2, 1/2, 1/2, 1.1 with A = 1, -1, 1, -1, 3; the last position is masked
    ratio_BT = torch.tensor([[2.0, 2.0, 0.5, 0.5, 1.1, 8.0]], dtype=torch.float64)
    advantage_BT = torch.tensor([[1.0, -1.0, 1.0, -1.0, 3.0, 5.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True, True, True, False]])
    old_logp_BT = torch.full((1, 6), -1.5, dtype=torch.float64)
    out = policy_loss(old_logp_BT + ratio_BT.log(), old_logp_BT, advantage_BT, mask_BT, num_tokens=10)
    # min(2, 1.2) = 1.2; min(-2, -1.2) = -2; min(0.5, 0.8) = 0.5; min(-0.5, -0.8) = -0.8; 3.3: together 2.2
    assert out.loss.item() == pytest.approx(-0.22)
    assert out.metrics["policy/loss"].item() == pytest.approx(-0.22)
    # Two of the tokens lost their gradient to the clip.
    assert out.metrics["policy/clip_share"].item() == pytest.approx(0.2)
    # (2 + 2 + 0.5 + 0.5 + 1.1) / 10
    assert out.metrics["policy/ratio_mean"].item() == pytest.approx(0.61)
    # k3 of KL(old || new): rho - 1 - log rho = 2 (1 - log 2) + 2 (log 2 - 0.5) + 0.1 - log 1.1 = 1.1 - 0.0953102
    assert out.metrics["policy/old_kl"].item() == pytest.approx(0.1004690, abs=1e-7)


def test_policy_clips_each_side_by_its_own_range() -> None:
    old_logp_BT = torch.zeros(1, 2, dtype=torch.float64)
    logp_BT = torch.tensor([[math.log(2.0), math.log(0.5)]], dtype=torch.float64)
    advantage_BT = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    out = policy_loss(logp_BT, old_logp_BT, advantage_BT, mask_BT, num_tokens=1, clip_low=0.1, clip_high=0.3)
    # -(1.3 - 2 * 0.9)
    assert out.loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("estimator", "kl"),
    # log ratio to the teacher log 2 and -log 2. k2: (log 2)^2 = 0.4804530.
    # k3: (1/2 - 1 + log 2) + (2 - 1 - log 2) = 1/2
    [("k2", 0.4804530), ("k3", 0.5)],
)
def test_clipped_value_with_kl_term(estimator: str, kl: float) -> None:
    mask_BT = torch.tensor([[True, True, False]])
    logp_BT = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    batch = dataclasses.replace(
        _batch(),
        response_mask_BT=mask_BT,
        old_logp_BT=logp_BT,
        teacher_logp_BT=logp_BT - math.log(2.0) * torch.tensor([[1.0, -1.0, 1.0]]),
        advantage_BT=torch.tensor([[2.0, -0.5, 9.0]], dtype=torch.float64),
        num_tokens=4,
    )
    out = ClippedPolicyLoss(kl_coefficient=0.1, kl_estimator=estimator)(logp_BT, batch)  # type: ignore[arg-type]
    # rho = 1: -(2 - 0.5) / 4 = -0.375, and a tenth of the KL term over 4 tokens
    assert out.loss.item() == pytest.approx(-0.375 + 0.1 * kl / 4, abs=1e-8)
    assert out.metrics["policy/loss"].item() == out.loss.item()
    assert out.metrics["policy/kl_term"].item() == pytest.approx(kl / 4, abs=1e-7)


def test_clipped_without_kl_term_is_the_policy_loss() -> None:
    batch, logp_BT = _batch(), _logp()
    out = ClippedPolicyLoss(clip_low=0.1, clip_high=0.3)(logp_BT, batch)
    expected = policy_loss(
        logp_BT,
        batch.old_logp_BT,
        batch.advantage_BT,
        MASK_BT,
        num_tokens=NUM_TOKENS,
        clip_low=0.1,
        clip_high=0.3,
    )
    assert out.loss.item() == expected.loss.item()
    assert out.metrics.keys() == expected.metrics.keys()


# 2. Gradients against the closed form


def test_sft_gradient() -> None:
    logp_BT = _logp()
    sft_loss(logp_BT, MASK_BT, num_tokens=NUM_TOKENS).loss.backward()
    torch.testing.assert_close(logp_BT.grad, -MASK_BT.double() / NUM_TOKENS)


def test_reinforce_gradient() -> None:
    batch, logp_BT = _batch(), _logp()
    ReinforceLoss()(logp_BT, batch).loss.backward()
    torch.testing.assert_close(logp_BT.grad, -torch.where(MASK_BT, batch.advantage_BT, 0.0) / NUM_SEQUENCES)


def _policy_gradient(logp_BT: Tensor, batch: DPRBatch) -> Tensor:
    """Return -rho A / N where the ratio is inside its clip, or outside on the side on which the clip does not bind."""
    ratio_BT = (logp_BT - batch.old_logp_BT).detach().exp()
    is_live_BT = torch.where(batch.advantage_BT > 0, ratio_BT < 1.2, ratio_BT > 0.8) & MASK_BT
    # (1.5, +), (0.5, -) and (1.3, +) are clipped.
    assert int(is_live_BT.sum()) == NUM_TOKENS - 3
    return torch.where(is_live_BT, -ratio_BT * batch.advantage_BT, 0.0) / NUM_TOKENS


def test_policy_gradient() -> None:
    batch, logp_BT = _batch(), _logp()
    policy_loss(logp_BT, batch.old_logp_BT, batch.advantage_BT, MASK_BT, num_tokens=NUM_TOKENS).loss.backward()
    torch.testing.assert_close(logp_BT.grad, _policy_gradient(logp_BT, batch))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_clipped_gradient_with_kl_term(estimator: str) -> None:
    batch, logp_BT = _batch(), _logp()
    ClippedPolicyLoss(kl_coefficient=0.3, kl_estimator=estimator)(logp_BT, batch).loss.backward()  # type: ignore[arg-type]
    log_ratio_BT = (logp_BT - batch.teacher_logp_BT).detach()
    # d k2 / d logp = log ratio; d k3 / d logp = 1 - exp(-log ratio)
    kl_gradient_BT = log_ratio_BT if estimator == "k2" else 1.0 - (-log_ratio_BT).exp()
    expected_BT = _policy_gradient(logp_BT, batch) + torch.where(MASK_BT, 0.3 * kl_gradient_BT, 0.0) / NUM_TOKENS
    torch.testing.assert_close(logp_BT.grad, expected_BT)


def test_on_policy_gradients_of_both_losses_differ_by_their_denominators_alone() -> None:
    batch = _batch()
    grads = []
    for loss in (ClippedPolicyLoss(), ReinforceLoss()):
        logp_BT = batch.old_logp_BT.clone().requires_grad_()
        loss(logp_BT, batch).loss.backward()
        assert logp_BT.grad is not None
        grads.append(logp_BT.grad)
    torch.testing.assert_close(grads[0] * NUM_TOKENS, grads[1] * NUM_SEQUENCES)


def test_extreme_ratios_stay_finite() -> None:
    logp_BT = torch.tensor([[0.0, -200.0]], requires_grad=True)
    old_logp_BT = torch.tensor([[-200.0, 0.0]])
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    out = policy_loss(logp_BT, old_logp_BT, torch.tensor([[-1.0, -1.0]]), mask_BT, num_tokens=2)
    out.loss.backward()
    # log rho is held at 20: -min(-e^20, -1.2 e^0) = e^20; and max(e^-20, 0.8) = 0.8
    torch.testing.assert_close(out.loss.detach(), torch.tensor((math.exp(20.0) + 0.8) / 2))
    assert logp_BT.grad is not None
    assert not logp_BT.grad.any()


# 3. Masked positions are inert


@pytest.mark.parametrize("poison", [1e6, -1e6, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_positions_are_inert(loss: Loss, poison: float) -> None:
    clean_logp_BT, dirty_logp_BT = _logp(), _logp(poison)
    clean, dirty = loss(clean_logp_BT, _batch()), loss(dirty_logp_BT, _batch(poison=poison))
    clean.loss.backward()
    dirty.loss.backward()
    torch.testing.assert_close(dirty.loss, clean.loss, rtol=0, atol=0)
    torch.testing.assert_close(dirty_logp_BT.grad, clean_logp_BT.grad, rtol=0, atol=0)
    assert clean_logp_BT.grad is not None
    assert not clean_logp_BT.grad[~MASK_BT].any()
    for name, value in clean.metrics.items():
        torch.testing.assert_close(dirty.metrics[name], value, rtol=0, atol=0)


# 4. Splitting the batch changes nothing


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (2, 2)])
def test_splitting_the_batch_changes_nothing(sizes: tuple[int, ...], loss: Loss) -> None:
    batch, whole_logp_BT, parts_logp_BT = _batch(), _logp(), _logp()
    whole = loss(whole_logp_BT, batch)
    whole.loss.backward()
    totals = dict.fromkeys(["loss", *whole.metrics], torch.tensor(0.0, dtype=torch.float64))
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        part = loss(parts_logp_BT[rows], _rows(batch, rows))
        part.loss.backward()
        for name, value in {"loss": part.loss.detach(), **part.metrics}.items():
            totals[name] = totals[name] + value
        start += size
    torch.testing.assert_close(parts_logp_BT.grad, whole_logp_BT.grad, rtol=1e-12, atol=1e-15)
    for name, value in {"loss": whole.loss.detach(), **whole.metrics}.items():
        torch.testing.assert_close(totals[name], value, rtol=1e-12, atol=1e-15)


# 5. Bad input


@pytest.mark.parametrize("count", [0, -3])
def test_counts_below_one_are_refused(count: int) -> None:
    batch, logp_BT = _batch(), _logp()
    with pytest.raises(ValueError, match=f"num_tokens must be at least 1, got {count}"):
        sft_loss(logp_BT, MASK_BT, num_tokens=count)
    with pytest.raises(ValueError, match=f"num_tokens must be at least 1, got {count}"):
        policy_loss(logp_BT, batch.old_logp_BT, batch.advantage_BT, MASK_BT, num_tokens=count)
    with pytest.raises(ValueError, match=f"num_sequences must be at least 1, got {count}"):
        reinforce_loss(logp_BT, batch.advantage_BT, MASK_BT, num_sequences=count)


@pytest.mark.parametrize("loss", [ClippedPolicyLoss(), ReinforceLoss()])
def test_advantages_with_gradient_are_refused(loss: Loss) -> None:
    batch = dataclasses.replace(_batch(), advantage_BT=ADVANTAGE_BT.clone().requires_grad_())
    with pytest.raises(ValueError, match="advantage_BT must be detached"):
        loss(_logp(), batch)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.0, 0.2), (-0.1, 0.2), (0.2, 0.0), (math.nan, 0.2)])
def test_clip_ranges_are_refused(low: float, high: float) -> None:
    batch = _batch()
    with pytest.raises(ValueError, match=f"clip_high > 0, got {low} and {high}"):
        ClippedPolicyLoss(clip_low=low, clip_high=high)
    with pytest.raises(ValueError, match=f"clip_high > 0, got {low} and {high}"):
        policy_loss(
            _logp(),
            batch.old_logp_BT,
            batch.advantage_BT,
            MASK_BT,
            num_tokens=1,
            clip_low=low,
            clip_high=high,
        )


@pytest.mark.parametrize("coefficient", [-1.0, math.nan])
def test_negative_kl_coefficient_is_refused(coefficient: float) -> None:
    with pytest.raises(ValueError, match="kl_coefficient must be 0 or more"):
        ClippedPolicyLoss(kl_coefficient=coefficient)


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_carry_no_gradient(loss: Loss) -> None:
    out = loss(_logp(), _batch())
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out.metrics.values())
