"""Finds how a model can be decoded step by step, and refuses one whose cached decoding is not what its forward says.

Families name, fill and cut their caches differently, and a cache that is not read, or read wrongly, raises no error:
samples are then drawn from another distribution than the one that is trained. So a few tokens are drawn in the way that
a rollout would draw them (prompts of unequal length, responses that end at different steps), and their
log-probabilities are compared with those of a forward over each whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from dpr_lightning.errors import NonFiniteError, UserError
from dpr_lightning.models import ragged
from dpr_lightning.rollout.continuous import decode_packed
from dpr_lightning.rollout.draws import row_uniforms
from dpr_lightning.rollout.padded import decode_padded
from dpr_lightning.rollout.response import Response
from dpr_lightning.types import SamplingConfig


class Decode(Protocol):
    """Writes the responses of all rows, and calls ``on_progress`` with how many have ended."""

    def __call__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Response],
        config: SamplingConfig,
        on_progress: Callable[[int], object],
    ) -> None:
        """Write them."""


_FOUND: WeakKeyDictionary[PreTrainedModel, Decode] = WeakKeyDictionary()
_PROMPT_LENGTHS, _RESPONSE_LENGTHS = (5, 2, 3, 5, 2), (1, 4, 2, 3, 4)
"""Of the rows of the check, decoded four at a time: padding, an early end, a cut cache, and a row that comes later."""


@torch.no_grad()
def find_decoding(model: PreTrainedModel) -> Decode:
    """Return the fastest way of decoding that gives the log-probabilities of a full forward; found once for a model.

    Tried in turn: continuous batching without padding, batches padded on the left, batches of prompts of one length.

    Raises:
        UserError: None of them does.
    """
    if model in _FOUND:
        if _FOUND[model] is decode_packed:
            # Whoever set the model's attention meanwhile took the layouts out.
            ragged.enable(model)
        return _FOUND[model]
    was_training = model.training
    model.eval()
    problem = ""
    try:
        for decode in _candidates(model):
            problem = _problem(model, decode)
            if not problem:
                _FOUND[model] = decode
                return decode
            if decode is decode_packed:
                ragged.disable(model)
    finally:
        model.train(was_training)
    raise UserError(
        f"{type(model).__name__} cannot be sampled here: {problem}. This family is not supported where responses are "
        "drawn (DPR, PPO, pairs, generate, metrics of responses); SFT without these works"
    )


def _candidates(model: PreTrainedModel) -> list[Decode]:
    padded: list[Decode] = [decode_padded, partial(decode_padded, allow_padding=False)]
    return [decode_packed, *padded] if ragged.enable(model) else padded


def _problem(model: PreTrainedModel, decode: Decode) -> str:
    """Return what is wrong with a way of decoding a model, or nothing."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    draws = torch.Generator().manual_seed(0)
    rows = []
    for row, (prompt_length, length) in enumerate(zip(_PROMPT_LENGTHS, _RESPONSE_LENGTHS, strict=True)):
        prompt = torch.randint(vocabulary, (prompt_length,), generator=draws).tolist()
        rows.append(Response(row, tuple(prompt), row_uniforms(0, row, length), frozenset()))
    try:
        decode(model, rows, SamplingConfig(max_new_tokens=max(_RESPONSE_LENGTHS), batch_size=4), lambda _: None)
        gaps = [gap for row in rows for gap in _gaps(model, row)]
    except (NonFiniteError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Whatever a family's cache does not know ends in an error of any type.
        return f"decoding with its cache fails ({' '.join(str(error).split()) or type(error).__name__})"
    is_exact = model.dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    # In coarser types single tokens may differ by rounding; a cache that is not read shifts all of them.
    gap, tolerance = (max(gaps), 0.02) if is_exact else (sum(gaps) / len(gaps), 0.1)
    if gap <= tolerance:
        return ""
    return f"decoding with its cache gives log-probabilities {gap:.3g} nats away from those of a full forward"


def _gaps(model: PreTrainedModel, row: Response) -> list[float]:
    """Return how far the log-probability of each token of a response is from that of a forward over the whole row."""
    ids_1T = torch.tensor([[*row.prompt, *row.ids]], device=model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(row.prompt) - 1 : -1].float()
    logp_T = logits_TV.log_softmax(dim=-1).gather(1, ids_1T[0, len(row.prompt) :, None]).squeeze(1)
    return [abs(found - logp) for found, logp in zip(logp_T.tolist(), row.logps, strict=True)]
