"""Batched sampling for models whose attention takes no layout: transformers' own forward and key-value cache.

Prompts are grouped by length and padded on the left, so that every row's next token is in the last column; families
that padding on the left would change decode prompts of one length at a time. Rows leave the batch when they end: once
a quarter of it has, the cache is cut down to the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from dpr_lightning.rollout.draws import draw, finite
from dpr_lightning.rollout.response import Response
from dpr_lightning.types import SamplingConfig

_COMPACT_AT = 0.75
"""The cache is cut when this share of its rows, or less, is still alive: copying it costs about one step."""


def decode_padded(
    model: PreTrainedModel,
    rows: Sequence[Response],
    config: SamplingConfig,
    on_progress: Callable[[int], object],
    *,
    allow_padding: bool = True,
) -> None:
    """Write the responses of all rows; without padding, only prompts of one length are decoded together."""
    batch: list[Response] = []
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        is_other = bool(batch) and not allow_padding and len(batch[0].prompt) != len(row.prompt)
        if is_other or len(batch) == config.batch_size:
            _decode(model, batch, config, allow_padding)
            on_progress(len(batch))
            batch = []
        batch.append(row)
    if batch:
        _decode(model, batch, config, allow_padding)
        on_progress(len(batch))


def _cache_argument(model: PreTrainedModel) -> str:
    """Return what the model's forward calls its cache: state-space models have a name of their own for it."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names and "past_key_values" not in names else "past_key_values"


def _decode(model: PreTrainedModel, rows: Sequence[Response], config: SamplingConfig, is_masked: bool) -> None:
    device = model.device
    width = max(len(row.prompt) for row in rows)
    # Any valid id: the mask hides it.
    input_BT = torch.tensor([[row.prompt[0]] * (width - len(row.prompt)) + list(row.prompt) for row in rows])
    length_B = torch.tensor([len(row.prompt) for row in rows])
    mask_BT = (torch.arange(width) >= width - length_B[:, None]).long()
    input_BT, mask_BT = input_BT.to(device), mask_BT.to(device)
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp_(min=0)
    cached = list(rows)
    """Whose row of the cache each one is; some may have ended."""
    alive = [True] * len(rows)
    cache = DynamicCache(config=model.config)
    cache_argument = {_cache_argument(model): cache}
    # Some state-space models take a mask for one of the step's own tokens.
    for step in range(max(len(row.uniforms) for row in rows)):
        logits_BV = model(
            input_ids=input_BT,
            attention_mask=mask_BT if is_masked else None,
            position_ids=position_BT,
            use_cache=True,
            logits_to_keep=1,
            **cache_argument,
        ).logits[:, -1]
        uniform_B = torch.tensor(
            [row.uniforms[step] if is_alive else 0.0 for row, is_alive in zip(cached, alive, strict=True)],
            dtype=torch.float64,
        )
        token_B, logp_B = draw(logits_BV.float(), uniform_B, config)
        for number, (row, token, logp) in enumerate(zip(cached, token_B.tolist(), finite(logp_B), strict=True)):
            if alive[number]:
                row.ids.append(token)
                row.logps.append(logp)
                alive[number] = not row.is_finished
        num_alive = sum(alive)
        if num_alive == 0:
            break
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones((mask_BT.shape[0], 1))], dim=1)
        input_BT, position_BT = token_B.unsqueeze(1), position_BT[:, -1:] + 1
        if num_alive <= _COMPACT_AT * len(alive):
            kept = [number for number, is_alive in enumerate(alive) if is_alive]
            kept_B = torch.tensor(kept, device=device)
            # Every kind of layer can reorder its rows, also those without keys and values.
            cache.reorder_cache(kept_B)  # type: ignore[arg-type]
            mask_BT, input_BT, position_BT = mask_BT[kept_B], input_BT[kept_B], position_BT[kept_B]
            cached, alive = [cached[number] for number in kept], [True] * len(kept)
