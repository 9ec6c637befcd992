"""Returns: what each token is credited with (ALGORITHM.md section 3 step 4, section 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override


def reward_to_go(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Return G_t = r_t + gamma * G_{t+1} over response tokens, exactly 0 elsewhere.

    Args:
        reward_BT: [B, T] token rewards.
        mask_BT: [B, T] bool, True on response tokens; the discount counts these alone, wherever they lie.
        gamma: Discount in [0, 1].

    Raises:
        ValueError: ``gamma`` lies outside [0, 1].
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    reward_BT = torch.where(mask_BT, reward_BT, 0.0)
    if gamma == 1.0:
        return torch.where(mask_BT, reward_BT.flip(1).cumsum(dim=1).flip(1), 0.0)
    running_B = torch.zeros_like(reward_BT[:, 0])
    return_BT = torch.zeros_like(reward_BT)
    for t in reversed(range(reward_BT.shape[1])):
        running_B = torch.where(mask_BT[:, t], reward_BT[:, t] + gamma * running_B, running_B)
        return_BT[:, t] = running_B
    return torch.where(mask_BT, return_BT, 0.0)


def expected_reward_to_go(reward_BT: Tensor, expected_reward_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return G_t = [r_t - b_t] + sum_{k>t} b_k with b_t = E[r_t | s_t], exactly 0 outside the response.

    Every later reward is replaced by its exact conditional expectation, and the action's own reward is measured
    against its state's. Unbiased on-policy and undiscounted, because E[r_k | s_k] = b_k.

    Args:
        reward_BT: [B, T] rewards of the tokens that were sampled.
        expected_reward_BT: [B, T] expectation of the reward over the acting policy, at the same states.
        mask_BT: [B, T] bool, True on response tokens.
    """
    later_BT = reward_to_go(expected_reward_BT, mask_BT, gamma=1.0)
    return torch.where(mask_BT, reward_BT - 2.0 * expected_reward_BT + later_BT, 0.0)


class ReturnEstimator(ABC):
    """Turns rewards into returns."""

    needs_expected_reward: ClassVar[bool] = False
    """True where the expectation of the reward at each state is used."""

    @abstractmethod
    def __call__(self, reward_BT: Tensor, expected_reward_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
        """Return [B, T] returns, 0 outside the response."""


class DiscountedReturns(ReturnEstimator):
    """Reward-to-go.

    Args:
        gamma: Discount in [0, 1]; the paper's method is undiscounted.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        self.gamma = gamma

    @override
    def __call__(self, reward_BT: Tensor, expected_reward_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
        return reward_to_go(reward_BT, mask_BT, gamma=self.gamma)


class ExpectedReturns(ReturnEstimator):
    """Undiscounted reward-to-go with every later reward replaced by its expectation (ours; ALGORITHM.md section 4).

    Exact for the dense reward, clipped or not, with or without the KL penalty.
    """

    needs_expected_reward = True

    @override
    def __call__(self, reward_BT: Tensor, expected_reward_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
        assert expected_reward_BT is not None, "score_tokens was not asked for the KLs"
        return expected_reward_to_go(reward_BT, expected_reward_BT, mask_BT)
