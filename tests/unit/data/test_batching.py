from __future__ import annotations

import random

import pytest

from dpr_lightning.data.batching import PADDING_ROW, MicroBatchPlan, accumulation, plan_micro_batches
from dpr_lightning.errors import UserError


def test_one_step_worked_by_hand() -> None:
    total = [5, 9, 3, 7]
    response = [1, 2, 3, 4]
    # One step of four rows, longest first: 1 (9), 3 (7), 0 (5), 2 (3); 1+2+3+4 = 10 response tokens.
    plans = plan_micro_batches([0, 1, 2, 3], total, response, global_batch_size=4, micro_batch_size=2)
    assert plans == [MicroBatchPlan([1, 3], 10, 4), MicroBatchPlan([0, 2], 10, 4)]


def test_samples_of_a_prompt_stand_together_where_the_longest_of_them_does() -> None:
    total = [9, 4, 8, 2, 7, 8]
    prompts = [5, 6, 7, 5, 6, 7]
    order = [4, 2, 0, 1, 5, 3]
    kwargs = {"global_batch_size": 6, "micro_batch_size": 2, "prompts": prompts}
    plans = plan_micro_batches(order, total, [1] * 6, **kwargs)  # type: ignore[arg-type]
    # Prompt 5 has 9 and 2 tokens, 7 has 8 and 8, 6 has 7 and 4.
    assert [plan.rows for plan in plans] == [[0, 3], [2, 5], [4, 1]]


def test_prompts_of_one_sample_change_nothing() -> None:
    total = [3, 5, 3, 5, 3, 5]
    order = [4, 3, 0, 1, 2, 5]
    kwargs = {"global_batch_size": 6, "micro_batch_size": 3}
    alone = plan_micro_batches(order, total, total, **kwargs)  # type: ignore[arg-type]
    assert plan_micro_batches(order, total, total, prompts=[9, 1, 8, 2, 7, 3], **kwargs) == alone  # type: ignore[arg-type]


def test_steps_are_consecutive_groups_of_the_order() -> None:
    plans = plan_micro_batches([3, 0, 2, 1], [1, 2, 3, 4], [1, 1, 1, 1], global_batch_size=2, micro_batch_size=1)
    assert [plan.rows for plan in plans] == [[3], [0], [2], [1]]
    assert {plan.num_tokens for plan in plans} == {2}


def test_ranks_have_like_lengths_and_the_same_steps_as_one_rank() -> None:
    lengths = [8, 1, 7, 2, 6, 3, 5, 4]
    kwargs = {"global_batch_size": 8, "micro_batch_size": 2}
    ranks = [
        plan_micro_batches(range(8), lengths, lengths, world_size=2, rank=rank, **kwargs)  # type: ignore[arg-type]
        for rank in (0, 1)
    ]
    # Longest first: rows 0 2 | 4 6 | 7 5 | 3 1, dealt to rank 0, 1, 0, 1.
    assert [plan.rows for plan in ranks[0]] == [[0, 2], [7, 5]]
    assert [plan.rows for plan in ranks[1]] == [[4, 6], [3, 1]]
    assert {plan.num_tokens for rank in ranks for plan in rank} == {36}


@pytest.mark.parametrize(("num_rows", "world_size"), [(1, 1), (1, 2), (5, 2), (16, 2), (17, 2), (23, 4), (40, 1)])
def test_every_row_is_served_once_and_ranks_stay_in_step(num_rows: int, world_size: int) -> None:
    rng = random.Random(num_rows)
    response = [rng.randint(1, 9) for _ in range(num_rows)]
    total = [length + rng.randint(1, 9) for length in response]
    order = rng.sample(range(num_rows), num_rows)
    ranks = [
        plan_micro_batches(
            order, total, response, global_batch_size=16, micro_batch_size=2, world_size=world_size, rank=rank
        )
        for rank in range(world_size)
    ]
    assert len({len(plans) for plans in ranks}) == 1
    served = [row for plans in ranks for plan in plans for row in plan.rows if row != PADDING_ROW]
    assert sorted(served) == list(range(num_rows))
    assert all(len(plan.rows) == 2 for plans in ranks for plan in plans)
    # Each complete step is 16 / (2 * world_size) micro-batches on each rank; the last has what its rows need.
    full, rest = divmod(num_rows, 16)
    assert len(ranks[0]) == full * 16 // (2 * world_size) + -(-rest // (2 * world_size))
    for step in range(full):
        members = order[step * 16 : step * 16 + 16]
        per_rank = 16 // (2 * world_size)
        plans_of_step = [plan for plans in ranks for plan in plans[step * per_rank : (step + 1) * per_rank]]
        assert sorted(row for plan in plans_of_step for row in plan.rows) == sorted(members)
        assert {plan.num_tokens for plan in plans_of_step} == {sum(response[row] for row in members)}


def test_padding_is_spread_so_that_no_micro_batch_is_empty() -> None:
    # Five rows in three micro-batches of two: 2 + 2 + 1 and one padding row.
    plans = plan_micro_batches(range(5), [5, 4, 3, 2, 1], [1] * 5, global_batch_size=6, micro_batch_size=2)
    assert [plan.rows for plan in plans] == [[0, 1], [2, 3], [4, PADDING_ROW]]
    assert {(plan.num_tokens, plan.num_sequences) for plan in plans} == {(5, 5)}
    # Nine rows for two ranks of micro-batches of four: two each, 3 + 2 + 2 + 2 rather than 4 + 4 + 1 + 0.
    rows = [
        plan.rows
        for rank in (0, 1)
        for plan in plan_micro_batches(
            range(9), [1] * 9, [1] * 9, global_batch_size=16, micro_batch_size=4, world_size=2, rank=rank
        )
    ]
    assert sorted(4 - row.count(PADDING_ROW) for row in rows) == [2, 2, 2, 3]


def test_drop_last_leaves_the_incomplete_step_out() -> None:
    plans = plan_micro_batches(range(5), [1] * 5, [1] * 5, global_batch_size=2, micro_batch_size=1, drop_last=True)
    assert [plan.rows for plan in plans] == [[0], [1], [2], [3]]


def test_accumulation_divides() -> None:
    assert accumulation(global_batch_size=256, micro_batch_size=8, world_size=4) == 8


def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do() -> None:
    # 100 / (8 * 3): 96 and 120 are the multiples of 24 around it; no micro-batch x 3 divides 100.
    with pytest.raises(UserError, match=r"data\.global_batch_size: 100 .* data\.micro_batch_size 8 .* 96 or 120$"):
        accumulation(global_batch_size=100, micro_batch_size=8, world_size=3)
    # 12 = 5 x ... : multiples 10 and 15; of the divisors of 12, four and six are equally near, the first is named.
    with pytest.raises(UserError, match=r"to 10 or 15, or data\.micro_batch_size to 4$"):
        accumulation(global_batch_size=12, micro_batch_size=5, world_size=1)
    with pytest.raises(UserError, match=r"global_batch_size to 8, or data\.micro_batch_size to 4"):
        accumulation(global_batch_size=4, micro_batch_size=8, world_size=1)
    with pytest.raises(UserError, match=r"data\.micro_batch_size: found 0"):
        accumulation(global_batch_size=4, micro_batch_size=0, world_size=1)
