"""Per-token estimators of KL(pi || other) from the log-probabilities of a token that pi sampled.

http://joschu.net/blog/kl-approx.html names them k1, k2 and k3. k1 and k3 have the KL as their expectation; k2 has the
KL's gradient as the expectation of its gradient.
"""

from __future__ import annotations

from torch import Tensor


def k1(logp: Tensor, other_logp: Tensor) -> Tensor:
    """Return log pi - log other: unbiased, of either sign."""
    return logp - other_logp


def k2(logp: Tensor, other_logp: Tensor) -> Tensor:
    """Return (log pi - log other)^2 / 2: never negative, biased, small variance."""
    return 0.5 * (logp - other_logp).square()


def k3(logp: Tensor, other_logp: Tensor) -> Tensor:
    """Return exp(log other - log pi) - 1 - (log other - log pi): unbiased and never negative."""
    log_ratio = other_logp - logp
    return log_ratio.expm1() - log_ratio
