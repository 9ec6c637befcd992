from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional import value_loss

MASK_BT = torch.tensor([[False, True, True, True], [False, True, True, False]])


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_by_hand() -> None:
    mask_BT = torch.ones(1, 4, dtype=torch.bool)
    value_BT, old_BT, return_BT = row(1.0, 1.5, 0.5, 1.5), row(1.0, 1.0, 1.0, 1.0), row(2.0, 2.0, 2.0, 0.0)
    # 1: not moved, error 1. 2: moved by 0.5 towards its return; clipped to 1.2, so 0.8^2 = 0.64 counts, not 0.25.
    # 3: moved away from it by 0.5; clipped to 0.8 the error would be 1.44, so the whole 2.25 counts. 4: likewise away;
    # clipped to 1.2 it would be 1.44, so 2.25 counts.
    out = value_loss(value_BT, old_BT, return_BT, mask_BT, num_tokens=8, clip=0.2)
    assert float(out.loss) == pytest.approx(0.5 * (1.0 + 0.64 + 2.25 + 2.25) / 8)
    assert float(out.metrics["value/loss"]) == float(out.loss)
    assert float(out.metrics["value/clip_share"]) == pytest.approx(1 / 8)
    unlimited = value_loss(value_BT, old_BT, return_BT, mask_BT, num_tokens=8, clip=math.inf)
    assert float(unlimited.loss) == pytest.approx(0.5 * (1.0 + 0.25 + 2.25 + 2.25) / 8)
    assert float(unlimited.metrics["value/clip_share"]) == 0.0


def test_gradient_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    value_BT, old_BT, return_BT = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    value_BT[0, 1] = old_BT[0, 1]
    value_BT.requires_grad_()
    value_loss(value_BT, old_BT, return_BT, MASK_BT, num_tokens=5, clip=0.2).loss.backward()
    num_still = 0
    for b, t in MASK_BT.nonzero().tolist():
        v, old, target = (float(x[b, t].detach()) for x in (value_BT, old_BT, return_BT))
        clipped = min(max(v, old - 0.2), old + 0.2)
        is_still = (clipped - target) ** 2 > (v - target) ** 2
        num_still += is_still
        assert value_BT.grad is not None
        assert float(value_BT.grad[b, t]) == pytest.approx(0.0 if is_still else (v - target) / 5, abs=1e-14)
    assert 0 < num_still < 5


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("-inf")])
def test_what_lies_outside_the_response_is_inert(junk: float) -> None:
    generator = torch.Generator().manual_seed(1)
    clean = [torch.randn(2, 4, generator=generator) for _ in range(3)]
    results = []
    for tensors in (clean, [torch.where(MASK_BT, x_BT, junk) for x_BT in clean]):
        value_BT = tensors[0].clone().requires_grad_()
        out = value_loss(value_BT, tensors[1], tensors[2], MASK_BT, num_tokens=5)
        out.loss.backward()
        assert value_BT.grad is not None
        results.append((out.loss.detach(), value_BT.grad, out.metrics["value/clip_share"]))
    for clean_result, dirty_result in zip(*results, strict=True):
        assert torch.equal(clean_result, dirty_result)
    assert torch.equal(results[1][1][~MASK_BT], torch.zeros(3))


def test_micro_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    whole = value_loss(*tensors, MASK_BT, num_tokens=5)
    parts = [value_loss(*(x_BT[b : b + 1] for x_BT in tensors), MASK_BT[b : b + 1], num_tokens=5) for b in range(2)]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, rtol=1e-12, atol=0)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], value, rtol=1e-12, atol=0)


def test_a_value_that_is_not_finite_shows() -> None:
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    out = value_loss(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, 2), torch.zeros(1, 2), mask_BT, num_tokens=2)
    assert math.isnan(float(out.loss))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, r"^clip must be above 0, got 0\.0"),
        ({"clip": float("nan")}, r"^clip must be above 0, got nan"),
        ({"num_tokens": 0}, r"^num_tokens must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    zero_BT = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=message):
        value_loss(zero_BT, zero_BT, zero_BT, MASK_BT, **({"num_tokens": 5} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("position", [1, 2])
def test_targets_must_be_detached(position: int) -> None:
    tensors = [torch.zeros(2, 4) for _ in range(3)]
    tensors[position].requires_grad_()
    with pytest.raises(ValueError, match="must be detached"):
        value_loss(*tensors, MASK_BT, num_tokens=5)
