"""KL estimators against a categorical distribution whose every outcome is enumerated. Shape: V outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional import k1, k2, k3

Estimator = Callable[[Tensor, Tensor], Tensor]


def _logits(seed: int) -> Tensor:
    return torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hand_worked_values() -> None:
    logp, other_logp = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    # log ratio log 2 = 0.6931472; its square over 2 is 0.2402265; 1/2 - 1 + log 2 = 0.1931472
    torch.testing.assert_close(k1(logp, other_logp), torch.tensor([0.6931472]))
    torch.testing.assert_close(k2(logp, other_logp), torch.tensor([0.2402265]))
    torch.testing.assert_close(k3(logp, other_logp), torch.tensor([0.1931472]))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    logp_V, other_logp_V = _logits(0).log_softmax(-1), _logits(1).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logp_V), torch.distributions.Categorical(logits=other_logp_V)
    )
    torch.testing.assert_close((logp_V.exp() * estimator(logp_V, other_logp_V)).sum(), expected)


def test_k2_is_biased() -> None:
    # p = (1/2, 1/2), q = (1/5, 4/5): KL = log(5/4) = 0.2231436;
    # the mean of k2 is (log(5/2)^2 + log(8/5)^2) / 4 = 0.2651230
    logp_V, other_logp_V = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.2, 0.8]).log()
    torch.testing.assert_close((logp_V.exp() * k1(logp_V, other_logp_V)).sum(), torch.tensor(0.2231436))
    torch.testing.assert_close((logp_V.exp() * k2(logp_V, other_logp_V)).sum(), torch.tensor(0.2651230))


@pytest.mark.parametrize(("estimator", "agrees"), [(k2, True), (k1, False), (k3, False)])
def test_only_k2_as_a_loss_has_the_gradient_of_the_kl(estimator: Estimator, agrees: bool) -> None:
    # As a loss term the samples are given: the expectation is over fixed weights, the gradient through the estimate.
    other_logp_V = _logits(1).log_softmax(-1)
    logits_V = _logits(0).requires_grad_()
    logp_V = logits_V.log_softmax(-1)
    (kl_grad_V,) = torch.autograd.grad((logp_V.exp() * (logp_V - other_logp_V)).sum(), logits_V, retain_graph=True)
    weight_V = logp_V.detach().exp()
    (grad_V,) = torch.autograd.grad((weight_V * estimator(logp_V, other_logp_V)).sum(), logits_V)
    assert torch.allclose(grad_V, kl_grad_V, rtol=1e-10, atol=1e-12) is agrees


def test_k2_and_k3_are_never_negative_and_zero_at_equality() -> None:
    logp_V, other_logp_V = _logits(0).log_softmax(-1), _logits(1).log_softmax(-1)
    for estimator in (k2, k3):
        assert (estimator(logp_V, other_logp_V) >= 0).all()
        assert not estimator(logp_V, logp_V).any()
    assert (k1(logp_V, other_logp_V) < 0).any()


def test_k3_keeps_its_digits_at_a_small_ratio() -> None:
    # delta = 2^-12 and exp(delta) - 1 - delta = delta^2 / 2 * (1 + delta / 3 + ...). exp(delta) - 1 as a difference
    # in float32 would be off by up to 2^-24 of it, twice the value itself.
    delta = 2.0**-12
    got = k3(torch.tensor([-1.0]), torch.tensor([-1.0 + delta]))
    # The subtraction of two numbers of size delta rounds to 2^-24 * delta, which is 2^-11 of the value.
    torch.testing.assert_close(got.double(), torch.tensor([math.expm1(delta) - delta]).double(), rtol=2.0**-11, atol=0)
