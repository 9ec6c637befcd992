"""The sampler's two kinds of forward on fake tensors: prompts that are read, and one token of every response.

What decides how long a loop runs are ids that fake tensors do not have, so the loops themselves are not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from dpr_lightning.models import ragged
from dpr_lightning.models.backbone import lm_head
from dpr_lightning.planning.batches import Shape
from dpr_lightning.planning.tracker import CACHE, Tracker
from dpr_lightning.rollout.continuous import PROMPT_TOKENS
from dpr_lightning.rollout.draws import draw
from dpr_lightning.rollout.slots import SlotCache
from dpr_lightning.types import SamplingConfig

PROMPTS, LAST_TOKEN = "rollout: prompts", "rollout: last token"
BETWEEN = "not of the program"
"""How stages are named in which only what the next one finds is made."""


def decode_slots(
    model: PreTrainedModel,
    tracker: Tracker,
    begin: Callable[[str], None],
    shape: Shape,
    late: int,
    sampling: SamplingConfig,
) -> None:
    """Run both forwards as the sampler does with models whose attention takes layouts.

    Args:
        model: With fake weights.
        tracker: In whose context this is called.
        begin: Begins a stage of the tracker's.
        shape: Rows that are decoded together, and their longest prompt and response.
        late: Tokens of prompt and response before the last token.
        sampling: Settings of the draw.
    """
    rows, width = shape.rows, shape.prompt_tokens
    num_read = min(rows, max(1, PROMPT_TOKENS // width))
    for place, positions, lengths in ((PROMPTS, [], [width] * num_read), (LAST_TOKEN, [late] * rows, [])):
        cache = _SlotCache(rows, width + shape.response_tokens, tracker)
        position_N, lasts = cache.plan(positions, lengths)
        # The first time makes room in all blocks.
        for name in (BETWEEN, place):
            begin(name)
            hidden_ND = ragged.run(model.get_decoder(), torch.ones_like(position_N), position_N, cache)[lasts]
            with torch.autocast("cpu", enabled=False):
                logits_NV = lm_head(model, dtype=hidden_ND.dtype).logits(hidden_ND)
            draw(logits_NV, torch.zeros(len(lasts), dtype=torch.float64), sampling)
            del hidden_ND, logits_NV
    for name, stage in tracker.stages.items():
        if name.startswith(PROMPTS):
            # All prompts take as many such forwards.
            stage.seconds *= rows / num_read


def decode_padded(
    model: PreTrainedModel,
    tracker: Tracker,
    begin: Callable[[str], None],
    shape: Shape,
    late: int,
    sampling: SamplingConfig,
) -> None:
    """Run both forwards as the sampler does with all other models; see :func:`decode_slots`."""
    rows, width = shape.rows, shape.prompt_tokens
    begin(PROMPTS)
    mask_BT = torch.ones((rows, late + 1), dtype=torch.long)
    mask_BT[: rows // 2, 0] = 0
    cache = _Cache(model, tracker)
    _forward(model, cache, mask_BT[:, :width], width, sampling)
    begin(BETWEEN)
    late_cache = _Cache(model, tracker)
    for number, layer in enumerate(cache.layers):
        keys, values = _states(layer)
        # In two parts, because a layer with a window forgets when it is given more.
        for length in (late - 1, 1):
            late_cache.update(
                keys.new_empty((*keys.shape[:2], length, keys.shape[3])),
                values.new_empty((*values.shape[:2], length, values.shape[3])),
                number,
            )
    del cache, layer, keys, values
    begin(LAST_TOKEN)
    _forward(model, late_cache, mask_BT, 1, sampling)


def _forward(model: PreTrainedModel, cache: _Cache, mask_BT: Tensor, width: int, sampling: SamplingConfig) -> None:
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp_(min=0)
    logits_BV = model(
        input_ids=torch.ones((len(mask_BT), width), dtype=torch.long),
        attention_mask=mask_BT,
        position_ids=position_BT[:, -width:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    draw(logits_BV.float(), torch.zeros(len(mask_BT), dtype=torch.float64), sampling)


class _SlotCache(SlotCache):
    """The sampler's cache, whose tensors are known for what they are."""

    def __init__(self, num_slots: int, max_length: int, tracker: Tracker) -> None:
        super().__init__(num_slots, max_length, torch.device("cpu"))
        self._tracker = tracker

    @override
    def _room_for(self, states: Tensor) -> Tensor:
        room = super()._room_for(states)
        self._tracker.tag([room], CACHE)
        return room


class _Cache(DynamicCache):
    """The padded sampler's cache, whose tensors are known for what they are."""

    def __init__(self, model: PreTrainedModel, tracker: Tracker) -> None:
        super().__init__(config=model.config)
        self._tracker = tracker

    @override
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._tracker.tag(_states(self.layers[layer_idx]), CACHE)
        return out


def _states(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a cache's layer that has been given some."""
    return layer.keys, layer.values
