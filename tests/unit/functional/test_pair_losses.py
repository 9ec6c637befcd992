from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional.pair_losses import (
    BernoulliGSILLoss,
    BrierGSILLoss,
    HingeGSILLoss,
    KLIEPGSILLoss,
    LSIFGSILLoss,
    PairLoss,
    SPINLoss,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
PLAIN = {"scale": 1.0, "shift": 0.0}
GSIL = [BernoulliGSILLoss, BrierGSILLoss, HingeGSILLoss, KLIEPGSILLoss, LSIFGSILLoss]
ALL: list[Callable[[], PairLoss]] = [SPINLoss, *GSIL]


def tensors(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


@pytest.mark.parametrize(
    ("loss", "demonstration", "sample", "expected"),
    [
        # beta 0.5 and a difference of 2 ln 3: -log sigmoid(ln 3) = -log(3/4)
        (SPINLoss(0.5), LN3, -LN3, math.log(4 / 3)),
        # sigmoid(ln 3) = 3/4, sigmoid(-ln 2) = 1/3, so 1 - 1/3 = 2/3 for the sample
        (BernoulliGSILLoss(**PLAIN), LN3, -LN2, math.log(4 / 3) + math.log(3 / 2)),
        (BrierGSILLoss(**PLAIN), LN3, -LN2, 1 / 16 + 1 / 9),
        # 1 - 0.25 on one side, 1 - 0.5 on the other; beyond 1 nothing is left of either
        (HingeGSILLoss(**PLAIN), 0.25, -0.5, 0.75 + 0.5),
        (HingeGSILLoss(**PLAIN), 1.5, -1.5, 0.0),
        # -0.5 + e^(ln 3)
        (KLIEPGSILLoss(**PLAIN), 0.5, LN3, 2.5),
        # -e^(ln 4) + e^(2 ln 3) / 2
        (LSIFGSILLoss(**PLAIN), LN4, LN3, -4 + 4.5),
        # f+ = 2 * (ln 3 - 1) + 2 = 2 ln 3 and f- = 2 * (-1) + 2 = 0: sigmoid 9/10 and 1/2
        (BernoulliGSILLoss(scale=2.0, shift=2.0), LN3 - 1, -1.0, math.log(10 / 9) + LN2),
    ],
)
def test_worked_by_hand(loss: PairLoss, demonstration: float, sample: float, expected: float) -> None:
    out = loss(*tensors([demonstration], [sample]), num_pairs=1)
    assert float(out.loss) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "slopes"),
    [
        # SPIN: beta * sigmoid(-beta d), d = 0.3 + 0.8
        (SPINLoss(0.5), lambda up, down: (-0.5 / (1 + math.exp(0.5 * (up - down))),) * 2),
        (BernoulliGSILLoss(0.1, 0.7), lambda up, down: (-sigmoid(-f(up)), -sigmoid(f(down)))),
        (
            BrierGSILLoss(0.1, 0.7),
            lambda up, down: (
                -2 * sigmoid(-f(up)) ** 2 * sigmoid(f(up)),
                -2 * sigmoid(f(down)) ** 2 * sigmoid(-f(down)),
            ),
        ),
        (HingeGSILLoss(0.1, 0.7), lambda up, down: (-1.0, -1.0)),
        (KLIEPGSILLoss(0.1, 0.7), lambda up, down: (-1.0, -math.exp(f(down)))),
        (LSIFGSILLoss(0.1, 0.7), lambda up, down: (-math.exp(f(up)), -math.exp(2 * f(down)))),
    ],
)
def test_gradients_are_the_closed_forms(loss: PairLoss, slopes: Callable[[float, float], tuple[float, float]]) -> None:
    """``slopes``: the derivative by f+, and minus the derivative by f- (SPIN: by the two log-ratios themselves)."""
    scale = 1.0 if isinstance(loss, SPINLoss) else 0.1
    demonstration_P, sample_P = tensors([0.3], [-0.8])
    demonstration_P.requires_grad_()
    sample_P.requires_grad_()
    loss(demonstration_P, sample_P, num_pairs=1).loss.backward()
    by_demonstration, by_sample = slopes(0.3, -0.8)
    assert demonstration_P.grad is not None
    assert sample_P.grad is not None
    assert float(demonstration_P.grad) == pytest.approx(scale * by_demonstration, abs=1e-12)
    assert float(sample_P.grad) == pytest.approx(-scale * by_sample, abs=1e-12)


def f(log_ratio: float) -> float:
    return 0.1 * log_ratio + 0.7


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("make", ALL)
def test_every_loss_wants_demonstrations_up_and_samples_down(make: Callable[[], PairLoss]) -> None:
    loss = make()
    demonstration_P, sample_P = (torch.zeros(1, requires_grad=True) for _ in range(2))
    loss(demonstration_P, sample_P, num_pairs=1).loss.backward()
    assert demonstration_P.grad is not None
    assert sample_P.grad is not None
    # Where the policy has not moved f is the shift, 2: the hinge has nothing to ask of the demonstration any more.
    assert float(demonstration_P.grad) < 0.0 or isinstance(loss, HingeGSILLoss)
    assert float(sample_P.grad) > 0.0


@pytest.mark.parametrize("make", ALL)
def test_micro_batches_add_up_to_the_step(make: Callable[[], PairLoss]) -> None:
    loss = make()
    demonstration_P, sample_P = tensors([0.5, -1.0, 2.0, 0.0, -0.25], [0.25, 1.0, -3.0, 0.0, 1.5])
    whole = loss(demonstration_P, sample_P, num_pairs=5)
    parts = [loss(demonstration_P[part], sample_P[part], num_pairs=5) for part in (slice(0, 2), slice(2, 5))]
    assert float(whole.loss) == pytest.approx(float(sum(part.loss for part in parts)), abs=1e-12)
    for name, value in whole.metrics.items():
        assert float(value) == pytest.approx(float(sum(part.metrics[name] for part in parts)), abs=1e-12), name


def test_metrics_worked_by_hand() -> None:
    out = SPINLoss()(*tensors([1.0, -2.0, 0.0, 3.0], [0.0, 1.0, 0.0, -4.0]), num_pairs=4)
    found = {name: float(value) for name, value in out.metrics.items()}
    # Differences 1, -3, 0 and 7: a tie is no win.
    assert found == {
        "policy/loss": float(out.loss),
        "pairs/margin": 1.25,
        "pairs/accuracy": 0.5,
        "pairs/demonstration_log_ratio": 0.5,
        "pairs/sample_log_ratio": -0.75,
    }
    assert not any(value.requires_grad for value in out.metrics.values())


def test_no_pair_is_no_loss() -> None:
    none_P = torch.zeros(0, requires_grad=True)
    out = SPINLoss()(none_P, none_P, num_pairs=3)
    out.loss.backward()
    assert float(out.loss) == 0.0
    assert all(float(value) == 0.0 for value in out.metrics.values())


def test_spin_takes_the_beta_of_the_iteration() -> None:
    loss = SPINLoss([0.5, 2.0])
    assert loss.num_iterations == 2
    pair = tensors([LN3], [0.0])
    # sigmoid(ln 3 / 2) = 1 / (1 + 3^-1/2), sigmoid(2 ln 3) = 9/10
    assert float(loss(*pair, num_pairs=1, iteration=0).loss) == pytest.approx(math.log(1 + 3**-0.5), abs=1e-12)
    assert float(loss(*pair, num_pairs=1, iteration=1).loss) == pytest.approx(math.log(10 / 9), abs=1e-12)
    assert SPINLoss(0.1).num_iterations is None
    assert BernoulliGSILLoss().num_iterations is None


def test_spin_depends_on_the_difference_alone_and_gsil_does_not() -> None:
    demonstration_P, sample_P = tensors([1.0, -0.5], [0.0, 2.0])
    plain, shifted = (SPINLoss()(demonstration_P + by, sample_P + by, num_pairs=2).loss for by in (0.0, 3.0))
    assert float(plain) == float(shifted)
    for make in (BernoulliGSILLoss, LSIFGSILLoss):
        plain = make()(demonstration_P, sample_P, num_pairs=2).loss
        assert float(plain) != float(make()(demonstration_P + 3, sample_P + 3, num_pairs=2).loss)


def test_large_log_ratios_stay_finite() -> None:
    far = tensors([-4000.0, 4000.0], [4000.0, -4000.0])
    for loss in (SPINLoss(5.0), BernoulliGSILLoss(), BrierGSILLoss(), HingeGSILLoss()):
        assert math.isfinite(float(loss(*far, num_pairs=2).loss))


def test_refusals() -> None:
    pair = tensors([0.0], [0.0])
    with pytest.raises(ValueError, match="num_pairs must be at least 1, got 0"):
        SPINLoss()(*pair, num_pairs=0)
    with pytest.raises(ValueError, match=r"must both be \[P\], got \(1,\) and \(2,\)"):
        SPINLoss()(pair[0], torch.zeros(2), num_pairs=1)
    with pytest.raises(ValueError, match=r"must both be \[P\]"):
        SPINLoss()(torch.zeros(1, 2), torch.zeros(1, 2), num_pairs=1)
    for beta in (0.0, -1.0, [], [0.1, 0.0]):
        with pytest.raises(ValueError, match="beta must be above 0"):
            SPINLoss(beta)
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        BernoulliGSILLoss(scale=0.0)
