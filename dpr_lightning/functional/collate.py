"""Lays prompts and responses of unequal length out as one rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from dpr_lightning.types import TokenBatch


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
) -> TokenBatch:
    """Return prompts and responses as a padded batch; masks come from lengths, never from ids.

    A padding row is an empty prompt with an empty response. It attends to one padding token, because the softmax
    of a row that attends to nothing is NaN, and has no response.

    Args:
        prompts: Token ids, at least one in each row that has a response.
        responses: Token ids, possibly none.
        pad_id: Any valid id.
        side: Where padding goes.

    Raises:
        ValueError: The lists differ in length, are empty, or a response has no token before it.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"need as many prompts as responses, at least one; got {len(prompts)} and {len(responses)}")
    if any(len(response) > 0 and len(prompt) == 0 for prompt, response in zip(prompts, responses, strict=True)):
        raise ValueError("a response needs a prompt of at least one token: column 0 is never part of a response")
    sequences = [[*prompt, *response] or [pad_id] for prompt, response in zip(prompts, responses, strict=True)]
    num_positions = max(map(len, sequences))
    # From the left end of each row: padding on the left, prompt, response, padding on the right.
    length_B = torch.tensor([len(sequence) for sequence in sequences])
    response_length_B = torch.tensor([len(response) for response in responses])
    start_B = num_positions - length_B if side == "left" else torch.zeros_like(length_B)
    end_B = start_B + length_B
    position_T = torch.arange(num_positions)
    is_before_end_BT = position_T < end_B[:, None]
    input_ids_BT = torch.full((len(sequences), num_positions), pad_id, dtype=torch.int64)
    attention_mask_BT = is_before_end_BT & (position_T >= start_B[:, None])
    input_ids_BT[attention_mask_BT] = torch.tensor([i for sequence in sequences for i in sequence])
    return TokenBatch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        response_mask_BT=is_before_end_BT & (position_T >= (end_B - response_length_B)[:, None]),
    )
