"""Sampling with transformers' models by continuous batching: a response that ends makes room for the next prompt.

A rollout has ``batch_size`` slots. Every forward takes one token of each running response and, for slots that have
come free, whole prompts beside them, without padding. A prompt that another slot holds is not read again: its keys and
values are copied. So the cost follows the tokens that are drawn, and not the longest response times the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpr_lightning.models import ragged
from dpr_lightning.models.backbone import lm_head
from dpr_lightning.rollout.draws import draw, finite, row_uniforms
from dpr_lightning.rollout.packed import packed_head, packed_linears
from dpr_lightning.rollout.padded import decode_padded
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.slots import Copy, SlotCache
from dpr_lightning.types import SamplingConfig

PROMPT_TOKENS = 8192
"""Tokens of prompts that one forward reads at most, but for a single prompt that is longer."""


@dataclass(slots=True)
class _Response:
    """A response that is being written."""

    row: int
    prompt: tuple[int, ...]
    uniforms: list[float]
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the token that the next forward takes: the last one drawn, or of the prompt where none is."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def last_id(self) -> int:
        return self.ids[-1] if self.ids else self.prompt[-1]


class TransformersSampler:
    """Samples with any transformers causal language model, on the model's own device."""

    @torch.no_grad()
    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        config: SamplingConfig,
        eos_token_id: int,
        seed: int,
        on_progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Draw one response per prompt; see ``Sampler.sample``.

        Each row has random numbers of its own, so that its response does not depend on ``batch_size`` nor on the other
        rows, but for rounding.

        Raises:
            NonFiniteError: The model's logits are not numbers.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt is empty: there is no state to sample from")
        rows = [
            _Response(row, tuple(prompt), row_uniforms(seed, row, config.max_new_tokens))
            for row, prompt in enumerate(prompts)
        ]
        was_training = model.training
        model.eval()
        try:
            decode = _decode if ragged.enable(model) else decode_padded
            with packed_linears(model.get_decoder()):
                decode(model, rows, config, eos_token_id, on_progress or (lambda _: None))
        finally:
            model.train(was_training)
        return Samples(
            response_ids=[row.ids for row in rows],
            logp=[row.logps for row in rows],
            is_truncated=[row.ids[-1] != eos_token_id for row in rows],
        )


def _decode(
    model: PreTrainedModel,
    rows: Sequence[_Response],
    config: SamplingConfig,
    eos_token_id: int,
    on_progress: Callable[[int], object],
) -> None:
    decoder = model.get_decoder()
    device = model.device
    longest = max((len(row.prompt) for row in rows), default=0) + config.max_new_tokens
    cache = SlotCache(min(config.batch_size, len(rows)), longest, device)
    waiting = deque(rows)
    running: list[_Response] = []
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
        running = _leave(running, cache, config.max_new_tokens, eos_token_id, on_progress)


def _admit(
    waiting: deque[_Response], running: Sequence[_Response], num_slots: int
) -> tuple[list[_Response], list[_Response]]:
    """Take rows for the free slots: those whose prompt a slot holds or will hold, and those that must be read."""
    known: list[_Response] = []
    new: list[_Response] = []
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


def _copies(running: Sequence[_Response], known: Sequence[_Response], new: Sequence[_Response]) -> list[Copy]:
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
    running: list[_Response],
    cache: SlotCache,
    max_new_tokens: int,
    eos_token_id: int,
    on_progress: Callable[[int], object],
) -> list[_Response]:
    """Let finished responses go, and move the last slots into theirs; return who is in which slot."""
    is_done = [len(row.ids) == max_new_tokens or row.ids[-1] == eos_token_id for row in running]
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
