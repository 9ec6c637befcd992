"""Batched sampling for models whose attention takes no layout: transformers' own forward and key-value cache.

Prompts are grouped by length and padded on the left, so that every row's next token is in the last column. Rows leave
the batch when they end: once a quarter of it has, the cache is cut down to the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from dpr_lightning.rollout.draws import draw, finite
from dpr_lightning.types import SamplingConfig

_COMPACT_AT = 0.75
"""The cache is cut when this share of its rows, or less, is still alive: copying it costs about one step."""


class Response(Protocol):
    """A response that is being written."""

    prompt: tuple[int, ...]
    uniforms: list[float]
    ids: list[int]
    logps: list[float]


def decode_padded(
    model: PreTrainedModel,
    rows: Sequence[Response],
    config: SamplingConfig,
    eos_token_id: int,
    on_progress: Callable[[int], object],
) -> None:
    """Write the responses of all rows."""
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    for start in range(0, len(by_length), config.batch_size):
        batch = by_length[start : start + config.batch_size]
        _decode(model, batch, config, eos_token_id)
        on_progress(len(batch))


def _decode(model: PreTrainedModel, rows: Sequence[Response], config: SamplingConfig, eos_token_id: int) -> None:
    device = model.device
    width = max(len(row.prompt) for row in rows)
    input_BT = torch.tensor([[eos_token_id] * (width - len(row.prompt)) + list(row.prompt) for row in rows])
    length_B = torch.tensor([len(row.prompt) for row in rows])
    mask_BT = (torch.arange(width) >= width - length_B[:, None]).long()
    input_BT, mask_BT = input_BT.to(device), mask_BT.to(device)
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp_(min=0)
    cached = list(rows)
    """Whose row of the cache each one is; some may have ended."""
    alive = [True] * len(rows)
    cache = DynamicCache(config=model.config)
    for step in range(config.max_new_tokens):
        logits_BV = model(
            input_ids=input_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        uniform_B = torch.tensor([row.uniforms[step] for row in cached], dtype=torch.float64)
        token_B, logp_B = draw(logits_BV.float(), uniform_B, config)
        for number, (row, token, logp) in enumerate(zip(cached, token_B.tolist(), finite(logp_B), strict=True)):
            if alive[number]:
                row.ids.append(token)
                row.logps.append(logp)
                alive[number] = token != eos_token_id
        num_alive = sum(alive)
        if num_alive == 0:
            break
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones((mask_BT.shape[0], 1))], dim=1)
        input_BT, position_BT = token_B.unsqueeze(1), position_BT[:, -1:] + 1
        if num_alive <= _COMPACT_AT * len(alive):
            kept = [number for number, is_alive in enumerate(alive) if is_alive]
            kept_B = torch.tensor(kept, device=device)
            cache.batch_select_indices(kept_B)
            mask_BT, input_BT, position_BT = mask_BT[kept_B], input_BT[kept_B], position_BT[kept_B]
            cached, alive = [cached[number] for number in kept], [True] * len(kept)
