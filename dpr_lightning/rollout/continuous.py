"""Continuous batching for models whose attention takes a layout: a response that ends makes room for the next prompt.

A rollout has ``batch_size`` slots. Every forward takes one token of each running response and, for slots that have
come free, whole prompts beside them, without padding. A prompt that another slot holds is not read again: its keys and
values are copied. So the cost follows the tokens that are drawn, and not the longest response times the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpr_lightning.models import ragged
from dpr_lightning.models.backbone import lm_head
from dpr_lightning.rollout.draws import draw, finite
from dpr_lightning.rollout.packed import packed_head
from dpr_lightning.rollout.response import Response
from dpr_lightning.rollout.slots import Copy, SlotCache
from dpr_lightning.types import SamplingConfig

PROMPT_TOKENS = 8192
"""Tokens of prompts that one forward reads at most, but for a single prompt that is longer."""


def decode_packed(
    model: PreTrainedModel,
    rows: Sequence[Response],
    config: SamplingConfig,
    on_progress: Callable[[int], object],
) -> None:
    """Write the responses of all rows."""
    decoder = model.get_decoder()
    device = model.device
    longest = max((len(row.prompt) + len(row.uniforms) for row in rows), default=0)
    cache = SlotCache(min(config.batch_size, len(rows)), longest, device)
    waiting = deque(rows)
    running: list[Response] = []
    logits_of: Callable[[Tensor], Tensor] | None = None
    while waiting or running:
        known, new = _admit(waiting, running, cache.num_slots)
        copies = _copies(running, known, new)
        running += known
        position_N, lasts = cache.plan([row.position for row in running], [len(row.prompt) for row in new], copies)
        ids = [row.last_id for row in running] + [token for row in new for token in row.prompt]
        running += new
        hidden_ND = ragged.run(decoder, torch.tensor(ids, device=device), position_N, cache)
        if new:
            hidden_ND = hidden_ND[lasts]
        with torch.autocast(device.type, enabled=False):
            if logits_of is None:
                logits_of = packed_head(lm_head(model, dtype=hidden_ND.dtype))
            logits_NV = logits_of(hidden_ND)
        uniform_N = torch.tensor([row.uniforms[len(row.ids)] for row in running], dtype=torch.float64)
        token_N, logp_N = draw(logits_NV, uniform_N, config)
        for row, token, logp in zip(running, token_N.tolist(), finite(logp_N), strict=True):
            row.ids.append(token)
            row.logps.append(logp)
        running = _leave(running, cache, on_progress)


def _admit(
    waiting: deque[Response], running: Sequence[Response], num_slots: int
) -> tuple[list[Response], list[Response]]:
    """Take rows for the free slots: those whose prompt a slot holds or will hold, and those that must be read."""
    known: list[Response] = []
    new: list[Response] = []
    prompts = {row.prompt for row in running}
    num_tokens = 0
    while waiting and len(running) + len(known) + len(new) < num_slots:
        row = waiting[0]
        if len(row.prompt) > 1 and row.prompt in prompts:
            known.append(waiting.popleft())
            continue
        num_tokens += len(row.prompt)
        if new and num_tokens > PROMPT_TOKENS:
            break
        new.append(waiting.popleft())
        prompts.add(row.prompt)
    return known, new


def _copies(running: Sequence[Response], known: Sequence[Response], new: Sequence[Response]) -> list[Copy]:
    """Say which slot the rows of known prompts take keys and values from: all but those of the prompt's last token."""
    if not known:
        return []
    slots = {row.prompt: len(running) + len(known) + number for number, row in enumerate(new)}
    slots |= {row.prompt: number for number, row in enumerate(running)}
    targets: dict[int, list[int]] = {}
    for number, row in enumerate(known):
        targets.setdefault(slots[row.prompt], []).append(len(running) + number)
    length = {slots[row.prompt]: len(row.prompt) - 1 for row in known}
    return [Copy(source=source, targets=found, length=length[source]) for source, found in targets.items()]


def _leave(
    running: list[Response],
    cache: SlotCache,
    on_progress: Callable[[int], object],
) -> list[Response]:
    """Let finished responses go, and move the last slots into theirs; return who is in which slot."""
    is_done = [row.is_finished for row in running]
    num_left = len(running) - sum(is_done)
    if num_left == len(running):
        return running
    holes = [slot for slot in range(num_left) if is_done[slot]]
    movers = [slot for slot in range(num_left, len(running)) if not is_done[slot]]
    cache.move(movers, holes, max((running[slot].position for slot in movers), default=0))
    for source, target in zip(movers, holes, strict=True):
        running[target] = running[source]
    on_progress(len(running) - num_left)
    return running[:num_left]
