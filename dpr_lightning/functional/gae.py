"""Generalized advantage estimation over response tokens (arXiv 1506.02438), by way of its lambda-returns.

``value_BT[b, t]`` is V of the state in which token t was chosen. V behind a response's last token is 0, a truncated
response's too: its reward is final, as nothing is sampled behind the length limit. So does the stack that the paper
used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpr_lightning.functional.advantages import AllReduce, moments


def _check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {share}")


def lambda_returns(
    reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, gae_lambda: float = 1.0
) -> Tensor:
    """Return R_t = r_t + gamma * ((1 - lambda) * V_{t+1} + lambda * R_{t+1}), exactly 0 outside the response.

    R - V is the sum of (gamma * lambda)^l * (r_{t+l} + gamma * V_{t+l+1} - V_{t+l}) over l. At gamma = lambda = 1 it
    is the reward-to-go, in which V does not occur.

    Args:
        reward_BT: [B, T] token rewards.
        value_BT: [B, T] detached values of the states in which the tokens were chosen.
        mask_BT: [B, T] bool, True on response tokens, which have no gaps.
        gamma: Discount in [0, 1].
        gae_lambda: Weight in [0, 1] of the sampled rewards against V of the next state.

    Raises:
        ValueError: ``gamma`` or ``gae_lambda`` lies outside [0, 1], or ``value_BT`` carries gradients.
    """
    _check_share("gamma", gamma)
    _check_share("gae_lambda", gae_lambda)
    if value_BT.requires_grad:
        raise ValueError("value_BT must be detached: returns are the critic's targets")
    reward_BT, value_BT = torch.where(mask_BT, reward_BT, 0.0), torch.where(mask_BT, value_BT, 0.0)
    return_BT = torch.zeros_like(reward_BT)
    next_return_B, next_value_B = torch.zeros_like(reward_BT[:, 0]), torch.zeros_like(reward_BT[:, 0])
    for t in reversed(range(reward_BT.shape[1])):
        # Outside the response both stay 0, so its last token sees nothing behind it.
        later_B = (1.0 - gae_lambda) * next_value_B + gae_lambda * next_return_B
        next_return_B = torch.where(mask_BT[:, t], reward_BT[:, t] + gamma * later_B, 0.0)
        next_value_B = value_BT[:, t]
        return_BT[:, t] = next_return_B
    return return_BT


def generalized_advantages(
    reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, gae_lambda: float = 1.0
) -> Tensor:
    """Return :func:`lambda_returns` less V, exactly 0 outside the response; arguments and errors are the same."""
    return_BT = lambda_returns(reward_BT, value_BT, mask_BT, gamma=gamma, gae_lambda=gae_lambda)
    return torch.where(mask_BT, return_BT - value_BT, 0.0)


def explained_variance(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, *, all_reduce: AllReduce) -> float:
    """Return 1 - Var(R - V) / Var(R) over all response tokens of all ranks; 0 where all returns are the same.

    1 is a perfect critic, 0 one that knows no more than a constant, and less than 0 one that is worse than that.

    Args:
        value_BT: [B, T] values.
        return_BT: [B, T] returns.
        mask_BT: [B, T] bool, True on response tokens.
        all_reduce: Sums a float64 tensor over ranks.

    Raises:
        ValueError: No rank has a response token.
    """
    _, left = moments(return_BT - value_BT, mask_BT, all_reduce=all_reduce)
    _, whole = moments(return_BT, mask_BT, all_reduce=all_reduce)
    return float(1.0 - left / whole) if whole > 0 else 0.0
