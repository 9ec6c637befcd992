from __future__ import annotations

import pytest
import torch

from dpr_lightning.functional.collate import collate


def test_right_padding_worked_by_hand() -> None:
    # The pad id 2 is also a real token here (EOS, closing both responses): masks must not care.
    batch = collate([[5, 6], [7]], [[8, 2], [2]], pad_id=2)
    assert batch.input_ids_BT.tolist() == [[5, 6, 8, 2], [7, 2, 2, 2]]
    assert batch.input_ids_BT.dtype == torch.int64
    assert batch.attention_mask_BT.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.response_mask_BT.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_left_padding_worked_by_hand() -> None:
    batch = collate([[5, 6], [7]], [[8, 2], [2]], pad_id=0, side="left")
    assert batch.input_ids_BT.tolist() == [[5, 6, 8, 2], [0, 0, 7, 2]]
    assert batch.attention_mask_BT.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.response_mask_BT.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_row_attends_to_something_and_has_no_response(side: str) -> None:
    batch = collate([[5, 6], []], [[8], []], pad_id=0, side=side)  # type: ignore[arg-type]
    assert batch.attention_mask_BT.sum(1).tolist() == [3, 1]
    assert batch.response_mask_BT.sum(1).tolist() == [1, 0]


def test_micro_batch_of_padding_rows_alone() -> None:
    batch = collate([[], []], [[], []], pad_id=3)
    assert batch.input_ids_BT.tolist() == [[3], [3]]
    assert batch.attention_mask_BT.all()
    assert not batch.response_mask_BT.any()


def test_prompts_alone() -> None:
    assert not collate([[5, 6], [7]], [[], []], pad_id=0, side="left").response_mask_BT.any()


def test_response_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        collate([[]], [[3]], pad_id=0)
    with pytest.raises(ValueError, match="got 0 and 0"):
        collate([], [], pad_id=0)
