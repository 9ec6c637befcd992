"""Forwards without padding: the tokens of all sequences lie in one row, and only attention knows where each ends.

Everything in a transformer block but attention works token by token, so a batch of sequences of unequal length costs
what its tokens cost. The tokens go through a transformers decoder as [1, N]; what they attend to is said by a layout,
which travels to every attention as a keyword, and which an attention function of our own, registered with
transformers, asks. Without a layout that function is transformers' own for SDPA, so a model stays what it was.

Samples of one prompt in a batch share its tokens: they go through the blocks once, and gradients of all samples meet in
them. That is the same sum in another order.

Shapes: N tokens of all sequences, B sequences of at most T tokens, H query heads, K key-value heads, E their size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from typing_extensions import override

from dpr_lightning.types import TokenBatch

IMPLEMENTATION = "dpr_lightning"
"""Name of the attention function among those of transformers."""
_LAYOUT = "layout"
_REFUSED: set[type[PreTrainedModel]] = set()
"""Classes whose attention was found to be more than a layout says."""


class Layout(ABC):
    """Where the sequences of a flat forward lie, and what their tokens attend to."""

    @abstractmethod
    def attend(
        self, layer: int, query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Return [N, H, E]: causal attention within each sequence.

        Args:
            layer: Number of the block.
            query_NHE: Queries of all tokens, positions applied.
            key_NKE: Keys.
            value_NKE: Values.
            scale: What products of queries and keys are multiplied by.
            window: How many tokens back, itself included, a token sees; None is all.
        """


@dataclass(frozen=True, slots=True)
class PackedLayout(Layout):
    """Whole sequences one after another, without anything that was there before; differentiable."""

    place_N: Tensor
    """[N] int64: where each token lies in B rows of T columns, right-padded."""
    num_rows: int
    num_columns: int
    token_P: Tensor | None = None
    """[B * T] int64: which token each place reads, where some read another row's; a place of padding reads any."""

    @classmethod
    def of(cls, mask_BT: Tensor) -> PackedLayout:
        """Return the layout of what a mask leaves of B rows, each in its own order.

        Args:
            mask_BT: [B, T] bool, on any device; padding may lie on either side.
        """
        num_rows, num_columns = mask_BT.shape
        # To the left end of the row, whichever side its padding is on: then the causal mask hides it.
        column_BT = mask_BT.long().cumsum(dim=1) - 1
        row_B1 = torch.arange(num_rows, device=mask_BT.device)[:, None] * num_columns
        return cls((row_B1 + column_BT)[mask_BT], num_rows, num_columns)

    @property
    def is_full(self) -> bool:
        """Whether each place has a token of its own."""
        return len(self.place_N) == self.num_rows * self.num_columns

    def positions(self) -> Tensor:
        """Return [N] int64: each token's number in its sequence, from 0."""
        return self.place_N % self.num_columns

    @override
    def attend(
        self, layer: int, query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        query, key, value = (self._pad(states) for states in (query_NHE, key_NKE, value_NKE))
        mask = causal_window(self.num_columns, window, query.device) if _cuts(window, self.num_columns) else None
        out_BHTE = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=_is_grouped(query, key)
        )
        out: Tensor = out_BHTE.transpose(1, 2).flatten(0, 1)
        return out if self.is_full else out.index_select(0, self.place_N)

    def _pad(self, states: Tensor) -> Tensor:
        """[N, heads, E] to [B, heads, T, E]; what is where there is no token is finite."""
        if self.token_P is not None:
            states = states.index_select(0, self.token_P)
        elif not self.is_full:
            empty = states.new_zeros((self.num_rows * self.num_columns, *states.shape[1:]))
            states = empty.index_copy(0, self.place_N, states)
        return states.reshape(self.num_rows, self.num_columns, *states.shape[1:]).transpose(1, 2)


def first_of_prompt(batch: TokenBatch) -> Tensor:
    """Return [B] int64: for each row the first row that has the same prompt, itself included.

    A prompt is what is attended to before the response; a row without a response is all prompt.

    Args:
        batch: Padded on either side.
    """
    ids_BT, is_prompt_BT = batch.input_ids_BT, _is_prompt(batch)
    num_rows, num_columns = ids_BT.shape
    row_B = torch.arange(num_rows, device=ids_BT.device)
    length_B = is_prompt_BT.sum(dim=1)
    prompts_BT = ids_BT.new_full((num_rows, num_columns), -1)
    column_BT = torch.arange(num_columns, device=ids_BT.device).expand(num_rows, -1)
    prompts_BT[column_BT < length_B[:, None]] = ids_BT[is_prompt_BT]
    distinct, group_B = prompts_BT.unique(dim=0, return_inverse=True)
    first_G = row_B.new_full((len(distinct),), num_rows).scatter_reduce_(0, group_B, row_B, "amin")
    return first_G[group_B]


def _is_prompt(batch: TokenBatch) -> Tensor:
    return batch.attention_mask_BT & (batch.response_mask_BT.cumsum(dim=1) == 0)


def states_before_responses(decoder: nn.Module, batch: TokenBatch) -> Tensor:
    """Return [N, D]: the last hidden state before each response token, in row-major order of the response mask.

    Args:
        decoder: A transformers decoder for which :func:`enable` said yes.
        batch: Padded on either side; rows with the same prompt share it.
    """
    mask_BT = batch.attention_mask_BT
    layout = PackedLayout.of(mask_BT)
    place_N, num_columns = layout.place_N, layout.num_columns
    first_N = first_of_prompt(batch)[place_N // num_columns] * num_columns + place_N % num_columns
    source_N = torch.where(_is_prompt(batch)[mask_BT], first_N, place_N)
    is_own_N = source_N == place_N
    own_N = place_N[is_own_N]
    token_P = place_N.new_zeros(mask_BT.numel())
    token_P[own_N] = torch.arange(len(own_N), device=own_N.device)
    token_P[place_N] = token_P[source_N]
    if len(own_N) < len(place_N):
        layout = PackedLayout(own_N, layout.num_rows, num_columns, token_P)
    hidden_ND = run(decoder, batch.input_ids_BT[mask_BT][is_own_N], layout.positions(), layout)
    # The token before a response's token is its neighbour in the row.
    return hidden_ND.index_select(0, token_P[place_N[batch.response_mask_BT[mask_BT]] - 1])


@dataclass(frozen=True, slots=True)
class _RecordingLayout(PackedLayout):
    """Remembers the window of each block."""

    windows: dict[int, int | None] = field(default_factory=dict)

    @classmethod
    def recording(cls, mask_BT: Tensor) -> _RecordingLayout:
        plain = PackedLayout.of(mask_BT)
        return cls(plain.place_N, plain.num_rows, plain.num_columns)

    @override
    def attend(self, layer: int, *states: Tensor, scale: float, window: int | None) -> Tensor:
        self.windows[layer] = window
        return PackedLayout.attend(self, layer, *states, scale=scale, window=window)


def _cuts(window: int | None, length: int) -> bool:
    return window is not None and window < length


def _is_grouped(query: Tensor, key: Tensor) -> bool:
    return query.shape[1] != key.shape[1]


def causal_window(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return [T, T] bool: whether the token of a row sees that of a column."""
    position_T = torch.arange(length, device=device)
    back_TT = position_T[:, None] - position_T
    return (back_TT >= 0) & (back_TT < (length if window is None else window))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as the layout says; without one, do what transformers does."""
    layout: Layout | None = kwargs.pop(_LAYOUT, None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert kwargs.get("dropout", 0.0) == 0.0, "dropout is off by construction"
    layer: Any = module.layer_idx
    out = layout.attend(
        layer,
        *(states.squeeze(0).transpose(0, 1) for states in (query, key, value)),
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=kwargs.get("sliding_window"),
    )
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@torch.no_grad()
def verify(model: PreTrainedModel) -> bool:
    """Return whether an enabled model says of two packed sequences what it says of each; if not, take it back.

    Two small forwards. Windows are compared with the configuration, because sequences as long are not tried.
    """
    if not is_enabled(model):
        return False
    try:
        if _packs_exactly(model):
            return True
    except Exception:
        # A class that hands its attention no layout, or makes something of the mask, fails in a way of its own.
        pass
    disable(model)
    return False


def _packs_exactly(model: PreTrainedModel) -> bool:
    decoder = model.get_decoder()
    config = model.config.get_text_config()
    ids_BT = torch.arange(8, device=model.device).reshape(2, 4) % config.vocab_size
    mask_BT = torch.tensor([[True, True, True, True], [True, True, False, False]], device=model.device)
    layout = _RecordingLayout.recording(mask_BT)
    found_ND = run(decoder, ids_BT[mask_BT], layout.positions(), layout)
    expected_ND = decoder(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).last_hidden_state[mask_BT]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windows = {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds)}
    is_close = torch.allclose(
        found_ND.float(), expected_ND.float(), rtol=0.05, atol=0.05 * float(expected_ND.abs().max())
    )
    return is_close and layout.windows == windows


def disable(model: PreTrainedModel) -> None:
    """Take back what :func:`enable` did, for all models of the class from here on."""
    _REFUSED.update((type(model), type(model.get_decoder())))
    model.set_attn_implementation("sdpa")


def run(decoder: nn.Module, input_ids_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
    """Return [N, D] last hidden states of a flat forward of a decoder for which :func:`enable` said yes.

    Args:
        decoder: A transformers decoder.
        input_ids_N: Ids of all sequences' tokens.
        position_N: Their positions.
        layout: What they attend to.
    """
    # A mask of four dimensions is taken for a finished one, so that transformers makes none of its own.
    no_mask = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=input_ids_N.device)
    hidden_1ND: Tensor = decoder(
        input_ids=input_ids_N[None],
        attention_mask=no_mask,
        position_ids=position_N[None],
        use_cache=False,
        **{_LAYOUT: layout},
    ).last_hidden_state
    return hidden_1ND[0]


def is_enabled(decoder: PreTrainedModel) -> bool:
    """Return whether :func:`enable` has said yes."""
    return bool(decoder.config.get_text_config()._attn_implementation == IMPLEMENTATION)


def enable(model: PreTrainedModel) -> bool:
    """Let a model's attention take layouts, and return whether it can; forwards without one are what they were.

    A model can if transformers hands its attention out, it runs with SDPA, and its blocks attend to everything before
    or to a window of it. Other models, or other attention functions that were asked for, are left alone.
    """
    if is_enabled(model):
        return True
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    can = (
        config._attn_implementation == "sdpa"
        and type(model) not in _REFUSED
        and bool(getattr(model, "_supports_attention_backend", False))
        and model._can_set_attn_implementation()
        and kinds <= {"full_attention", "sliding_attention"}
        and getattr(config, "attn_logit_softcapping", None) is None
        and not getattr(config, "is_encoder_decoder", False)
    )
    if can:
        model.set_attn_implementation(IMPLEMENTATION)
    return can
