from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional import explained_variance, generalized_advantages, lambda_returns

MASK_BT = torch.tensor([[False, True, True, True, False], [False, False, True, False, False]])
REWARD_BT = torch.tensor([[0.0, 1.0, 0.0, 4.0, 0.0], [0.0, 0.0, -2.0, 0.0, 0.0]])
VALUE_BT = torch.tensor([[0.0, 2.0, 3.0, 1.0, 0.0], [0.0, 0.0, 5.0, 0.0, 0.0]])


def one_rank(value: Tensor) -> Tensor:
    return value


def test_by_hand() -> None:
    # gamma 0.5, lambda 0.5, from the back.
    # R_3 = 4; R_2 = 0 + 0.5 (0.5 * 1 + 0.5 * 4) = 1.25; R_1 = 1 + 0.5 (0.5 * 3 + 0.5 * 1.25) = 2.0625.
    # The second response is one token long, nothing comes behind it, and the value of the first has no part in it.
    expected_BT = torch.tensor([[0.0, 2.0625, 1.25, 4.0, 0.0], [0.0, 0.0, -2.0, 0.0, 0.0]])
    return_BT = lambda_returns(REWARD_BT, VALUE_BT, MASK_BT, gamma=0.5, gae_lambda=0.5)
    torch.testing.assert_close(return_BT, expected_BT)
    advantage_BT = generalized_advantages(REWARD_BT, VALUE_BT, MASK_BT, gamma=0.5, gae_lambda=0.5)
    torch.testing.assert_close(advantage_BT, torch.tensor([[0.0, 0.0625, -1.75, 3.0, 0.0], [0.0, 0.0, -7.0, 0.0, 0.0]]))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_what_lies_outside_the_response_is_inert(gae_lambda: float, junk: float) -> None:
    clean_BT = generalized_advantages(REWARD_BT, VALUE_BT, MASK_BT, gae_lambda=gae_lambda)
    dirty_BT = generalized_advantages(
        torch.where(MASK_BT, REWARD_BT, junk), torch.where(MASK_BT, VALUE_BT, junk), MASK_BT, gae_lambda=gae_lambda
    )
    assert torch.equal(clean_BT, dirty_BT)


def test_a_row_without_a_response_is_zero() -> None:
    mask_BT = torch.zeros(1, 3, dtype=torch.bool)
    ones_BT = torch.ones(1, 3)
    assert torch.equal(lambda_returns(ones_BT, ones_BT, mask_BT), torch.zeros(1, 3))


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\], got"):
        lambda_returns(REWARD_BT, VALUE_BT, MASK_BT, **{name: value})


def test_values_must_be_detached() -> None:
    with pytest.raises(ValueError, match="value_BT must be detached"):
        generalized_advantages(REWARD_BT, VALUE_BT.clone().requires_grad_(), MASK_BT)


def test_explained_variance_by_hand() -> None:
    mask_BT = torch.tensor([[True, True, True, True, False]])
    return_BT = torch.tensor([[1.0, 2.0, 3.0, 4.0, 100.0]])

    def explained(*values: float) -> float:
        return explained_variance(torch.tensor([[*values, -7.0]]), return_BT, mask_BT, all_reduce=one_rank)

    assert explained(1.0, 2.0, 3.0, 4.0) == 1.0
    # A constant, whatever it is, explains nothing and costs nothing.
    assert explained(0.0, 0.0, 0.0, 0.0) == 0.0
    assert explained(9.0, 9.0, 9.0, 9.0) == 0.0
    # Half of each return leaves half of each: a quarter of the variance.
    assert explained(0.5, 1.0, 1.5, 2.0) == pytest.approx(0.75)
    # The wrong way round: R - V = 2 R, four times the variance.
    assert explained(-1.0, -2.0, -3.0, -4.0) == pytest.approx(-3.0)


def test_explained_variance_of_equal_returns_is_zero() -> None:
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    return_BT = torch.full((1, 3), 2.0)
    assert explained_variance(torch.tensor([[1.0, 2.0, 3.0]]), return_BT, mask_BT, all_reduce=one_rank) == 0.0
