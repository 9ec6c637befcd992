"""Advantages on one rank and over simulated ranks. Shapes: B sequences, T positions."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dpr_lightning.functional import Advantages, RawAdvantage, WhitenedAdvantage, leave_one_out, normalize

RETURN_BT = torch.tensor([[0.0, 1.0, 3.0], [5.0, 7.0, 0.0]])
MASK_BT = torch.tensor([[False, True, True], [True, True, False]])
SPLITS = [(3, 3), (2, 4), (2, 2, 2), (6, 0)]


def _random(num_sequences: int = 6, num_positions: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return_BT = 3.0 + 2.0 * torch.randn(num_sequences, num_positions, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(num_sequences, num_positions, generator=generator) < 0.6
    mask_BT[:, 0] = True
    return return_BT * mask_BT, mask_BT


def _on_ranks(num_ranks: int, work: Callable[[int, Callable[[Tensor], Tensor]], Advantages]) -> list[Advantages]:
    """Run ``work(rank, all_reduce)`` in one thread a rank; all_reduce waits for the others and adds up."""
    barrier = threading.Barrier(num_ranks, timeout=10.0)
    slots: list[Tensor | None] = [None] * num_ranks

    def all_reduce(rank: int, value: Tensor) -> Tensor:
        slots[rank] = value
        barrier.wait()
        total = torch.stack([slot for slot in slots if slot is not None]).sum(dim=0)
        barrier.wait()
        return total

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda rank: work(rank, lambda value: all_reduce(rank, value)), range(num_ranks)))


def test_hand_worked_normalize() -> None:
    out = normalize(RETURN_BT, MASK_BT)
    # 1, 3, 5, 7: mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5
    root = math.sqrt(5.0)
    expected_BT = torch.tensor([[0.0, -3.0 / root, -1.0 / root], [1.0 / root, 3.0 / root, 0.0]])
    assert out.advantage_BT.dtype == torch.float32
    torch.testing.assert_close(out.advantage_BT, expected_BT)
    assert out.mean.item() == pytest.approx(4.0)
    assert out.std.item() == pytest.approx(root)


@pytest.mark.parametrize(
    ("estimator", "split"),
    [
        *[(estimator, split) for estimator in (WhitenedAdvantage(), RawAdvantage()) for split in SPLITS],
        # A rank without rollouts has no prompt to leave a sample out of.
        *[(WhitenedAdvantage(leave_one_out=True), split) for split in SPLITS if 0 not in split],
    ],
)
def test_several_ranks_equal_one(estimator: WhitenedAdvantage | RawAdvantage, split: tuple[int, ...]) -> None:
    return_BT, mask_BT = _random()
    # Samples of a prompt stay on one rank under each split: 0, 0 | 1, 1 | 2, 2, but for (3, 3).
    prompt_index_B = torch.tensor([0, 0, 0, 1, 1, 1]) if split == (3, 3) else torch.tensor([0, 0, 1, 1, 2, 2])
    expected = estimator(return_BT, mask_BT, prompt_index_B)
    returns, masks, prompts = return_BT.split(split), mask_BT.split(split), prompt_index_B.split(split)

    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> Advantages:
        return estimator(returns[rank], masks[rank], prompts[rank], all_reduce=all_reduce)

    outs = _on_ranks(len(split), work)
    torch.testing.assert_close(
        torch.cat([out.advantage_BT for out in outs]), expected.advantage_BT, rtol=1e-12, atol=1e-12
    )
    for out in outs:
        torch.testing.assert_close(out.mean, expected.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.std, expected.std, rtol=1e-12, atol=1e-12)


def test_normalized_per_rank_is_another_thing() -> None:
    return_BT, mask_BT = _random()
    alone_BT = torch.cat(
        [normalize(return_BT[:3], mask_BT[:3]).advantage_BT, normalize(return_BT[3:], mask_BT[3:]).advantage_BT]
    )
    assert not torch.allclose(alone_BT, normalize(return_BT, mask_BT).advantage_BT, rtol=1e-3)


def test_normalized_returns_have_mean_zero_and_variance_one() -> None:
    return_BT, mask_BT = _random()
    value_N = normalize(return_BT, mask_BT).advantage_BT[mask_BT]
    torch.testing.assert_close(value_N.mean(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(value_N.var(correction=0), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_far_from_zero_the_variance_keeps_its_digits() -> None:
    # E[x^2] - E[x]^2 in float32 would lose all of a variance of 5 behind a mean of 100004.
    out = normalize(torch.where(MASK_BT, RETURN_BT + 1e5, 0.0), MASK_BT)
    torch.testing.assert_close(out.advantage_BT, normalize(RETURN_BT, MASK_BT).advantage_BT)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3])
def test_constant_returns_give_zero_and_no_nan(constant: float) -> None:
    out = normalize(torch.where(MASK_BT, constant, 0.0), MASK_BT)
    # The mean of equal float32 numbers is taken in float64, so what is left is below 1e-15 over the floor's 1e-4.
    torch.testing.assert_close(out.advantage_BT, torch.zeros(2, 3), rtol=0, atol=1e-10)
    single = normalize(torch.tensor([[constant]]), torch.tensor([[True]]))
    assert single.advantage_BT.item() == 0.0


def test_the_floor_holds_small_variances_back() -> None:
    # 0 and 2e-5: variance 1e-10, below the floor of 1e-8, so +-1e-5 is divided by 1e-4.
    out = normalize(torch.tensor([[0.0, 2e-5]]), torch.tensor([[True, True]]))
    torch.testing.assert_close(out.advantage_BT, torch.tensor([[-0.1, 0.1]]))


def test_hand_worked_leave_one_out() -> None:
    # Prompt 4 in rows 0, 1, 3, prompt 9 in rows 2, 4. First returns: 1, 5, 2, 6 and 3.
    return_BT = torch.tensor([[0.0, 1.0, 4.0], [5.0, 7.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 6.0], [0.0, 3.0, 1.0]])
    mask_BT = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1]]).bool()
    # Baselines: row 0 (5 + 6) / 2 = 5.5; row 1 (1 + 6) / 2 = 3.5; row 3 (1 + 5) / 2 = 3; row 2: 3; row 4: 2.
    expected_BT = torch.tensor(
        [[0.0, -4.5, -1.5], [1.5, 3.5, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 1.0, -1.0]]
    )
    got_BT = leave_one_out(return_BT, mask_BT, torch.tensor([4, 4, 9, 4, 9]))
    torch.testing.assert_close(got_BT, expected_BT)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples of each prompt"):
        leave_one_out(RETURN_BT, MASK_BT, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="samples_per_prompt"):
        WhitenedAdvantage(leave_one_out=True)(RETURN_BT, MASK_BT, torch.tensor([0, 1]))


@pytest.mark.parametrize("estimator", [WhitenedAdvantage(), WhitenedAdvantage(leave_one_out=True), RawAdvantage(True)])
def test_rows_may_come_in_any_order(estimator: WhitenedAdvantage | RawAdvantage) -> None:
    return_BT, mask_BT = _random()
    prompt_index_B = torch.tensor([0, 0, 1, 1, 1, 0])
    order_B = torch.tensor([4, 0, 5, 2, 1, 3])
    expected_BT = estimator(return_BT, mask_BT, prompt_index_B).advantage_BT[order_B]
    got = estimator(return_BT[order_B], mask_BT[order_B], prompt_index_B[order_B])
    torch.testing.assert_close(got.advantage_BT, expected_BT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poison", [1e6, math.inf, math.nan])
@pytest.mark.parametrize("estimator", [WhitenedAdvantage(), WhitenedAdvantage(leave_one_out=True), RawAdvantage()])
def test_masked_positions_are_inert(estimator: WhitenedAdvantage | RawAdvantage, poison: float) -> None:
    prompt_index_B = torch.tensor([3, 3])
    clean = estimator(RETURN_BT, MASK_BT, prompt_index_B)
    dirty = estimator(RETURN_BT.masked_fill(~MASK_BT, poison), MASK_BT, prompt_index_B)
    for name in ("advantage_BT", "mean", "std"):
        torch.testing.assert_close(getattr(dirty, name), getattr(clean, name), rtol=0, atol=0)
    assert not dirty.advantage_BT[~MASK_BT].any()


def test_raw_advantages_are_the_returns() -> None:
    out = RawAdvantage()(RETURN_BT, MASK_BT, torch.tensor([0, 1]))
    torch.testing.assert_close(out.advantage_BT, RETURN_BT, rtol=0, atol=0)
    assert out.mean.item() == pytest.approx(4.0)
    assert out.std.item() == pytest.approx(math.sqrt(5.0))


@pytest.mark.parametrize("estimator", [WhitenedAdvantage(), RawAdvantage()])
def test_a_batch_without_response_tokens_is_refused(estimator: WhitenedAdvantage | RawAdvantage) -> None:
    with pytest.raises(ValueError, match="no response token"):
        estimator(RETURN_BT, torch.zeros_like(MASK_BT), torch.tensor([0, 1]))
