"""A key-value cache of slots: rows that one sequence after another moves into, each filled from its left end.

In one forward some slots go on by a token, and others read a whole prompt: the blocks see one flat row of tokens, and
only attention treats the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override

from dpr_lightning.models.ragged import Layout, PackedLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Keys and values of a prompt that one slot holds and others begin with."""

    source: int
    targets: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the tokens of one forward are."""

    slot_N: Tensor
    position_N: Tensor
    num_decoded: int
    """The first of them go on in slots 0, 1, ...; the others are prompts in the slots after these."""
    num_columns: int
    """Of the cache, that any of the first attends to."""
    copies: Sequence[Copy]
    prompts: PackedLayout | None


class SlotCache(Layout):
    """Keys and values of every block, [slots, K, columns, E] each; slots in use are the first ones.

    Args:
        num_slots: Sequences that are decoded together.
        max_length: Longest prompt and response together; memory grows up to it as sequences do.
        device: Where the model runs.
    """

    def __init__(self, num_slots: int, max_length: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.max_length = max_length
        self.device = device
        self.num_columns = 0
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values, by block."""
        self._plan: _Plan | None = None
        self._masks: dict[int | None, Tensor] = {}

    def plan(
        self, positions: Sequence[int], prompt_lengths: Sequence[int], copies: Sequence[Copy] = ()
    ) -> tuple[Tensor, list[int]]:
        """Say what the tokens of the next forward are.

        Args:
            positions: Of the token with which each of the first slots goes on.
            prompt_lengths: Of the prompts that the slots after these read, whole.
            copies: What slots among the first begin with.

        Returns:
            [N] positions of all tokens, and which of the tokens is the last of each slot.
        """
        num_decoded = len(positions)
        slots = list(range(num_decoded))
        position = list(positions)
        lasts = list(range(num_decoded))
        for number, length in enumerate(prompt_lengths):
            slots += [num_decoded + number] * length
            position += range(length)
            lasts.append(len(position) - 1)
        needed = max([place + 1 for place in positions] + list(prompt_lengths))
        if needed > self.num_columns:
            self._grow(needed)
        prompts = None
        if prompt_lengths:
            length_B = torch.tensor(list(prompt_lengths))
            mask_BT = torch.arange(int(length_B.max())) < length_B[:, None]
            prompts = PackedLayout.of(mask_BT.to(self.device))
        slot_N, position_N = torch.tensor([slots, position], device=self.device)
        self._plan = _Plan(slot_N, position_N, num_decoded, max(positions, default=-1) + 1, copies, prompts)
        self._masks.clear()
        return position_N, lasts

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` columns and a quarter more, one block's memory at a time."""
        self.num_columns = min(self.max_length, needed + max(16, needed // 4))
        for layer, pair in self.states.items():
            keys, values = (self._room_for(states) for states in pair)
            for room, states in zip((keys, values), pair, strict=True):
                room[:, :, : states.shape[2]] = states
            self.states[layer] = keys, values

    def _room_for(self, states: Tensor) -> Tensor:
        """Return [slots, K, columns, E] like [N, K, E] or [slots, K, fewer columns, E]; padding must be finite."""
        return states.new_zeros((self.num_slots, states.shape[1], self.num_columns, states.shape[-1]))

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` columns of some slots over others."""
        if not sources:
            return
        source_M, target_M = torch.tensor([list(sources), list(targets)], device=self.device)
        for keys, values in self.states.values():
            for states in (keys, values):
                states[target_M, :, :length] = states[source_M, :, :length]

    @override
    def attend(
        self, layer: int, query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        plan = self._plan
        assert plan is not None
        if layer not in self.states:
            self.states[layer] = self._room_for(key_NKE), self._room_for(value_NKE)
        keys, values = self.states[layer]
        keys[plan.slot_N, :, plan.position_N] = key_NKE
        values[plan.slot_N, :, plan.position_N] = value_NKE
        for copy in plan.copies:
            for states in (keys, values):
                states[copy.targets, :, : copy.length] = states[copy.source, :, : copy.length]
        first = plan.num_decoded
        parts = []
        if first:
            # Heads of one group are rows of one product, so keys need not be repeated.
            query = query_NHE[:first].unflatten(1, (key_NKE.shape[1], -1))
            out = scaled_dot_product_attention(
                query,
                keys[:first, :, : plan.num_columns],
                values[:first, :, : plan.num_columns],
                attn_mask=self._mask(plan, window),
                scale=scale,
            )
            parts.append(out.flatten(1, 2))
        if plan.prompts is not None:
            prompt = (states[first:] for states in (query_NHE, key_NKE, value_NKE))
            parts.append(plan.prompts.attend(layer, *prompt, scale=scale, window=window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mask(self, plan: _Plan, window: int | None) -> Tensor:
        """Return [slots that go on, 1, 1, columns] bool: which columns each token sees."""
        if window not in self._masks:
            back_MC = plan.position_N[: plan.num_decoded, None] - torch.arange(plan.num_columns, device=self.device)
            sees_MC = back_MC >= 0
            if window is not None:
                sees_MC &= back_MC < window
            self._masks[window] = sees_MC[:, None, None]
        return self._masks[window]
