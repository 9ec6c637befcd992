"""What the dense reward says of every token of given responses, and where each token lies in its text.

Spans tile the text: a span begins where the one before it ends, and joined they give the text of the scored tokens.
Where several tokens share a character (its bytes are split over them), the character is in the span of the token that
completes it, and the spans of the others are empty there. EOS is an empty span at the end.

Shapes: B responses, T positions.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.rollout.scoring import policy_logprobs

Span = tuple[int, int]
"""First character, and the one after the last."""

_SENTINEL = "\n"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One prompt with its response, as SFT encodes them."""

    row: int
    """Row of the source, from 1."""
    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    """EOS included, unless the response was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRewards:
    """The token rewards of one response; the lists have one entry for every scored token."""

    row: int
    """Row of the source, from 1."""
    prompt: str
    response: str
    """The whole text, also where the tokens were cut."""
    tokens: list[str]
    """Text of each token; bytes that are no whole character are written ``<0xF0>``."""
    offsets: list[Span]
    """Span of each token in ``response``, in characters."""
    teacher_logp: list[float]
    """log pi_SFT."""
    reference_logp: list[float]
    """log pi_ref."""
    rewards: list[float]
    """log pi_SFT - log pi_ref, in nats."""
    sum: float
    mean: float
    """Per token, EOS included."""
    num_tokens: int
    ends_by_eos: bool
    """False where the response was cut, so that its end is not scored."""


class TokenLocator:
    """Finds the texts of a tokenizer's tokens, and their spans in a response.

    Args:
        tokenizer: One that knows where its tokens lie.

    Raises:
        UserError: It does not: it has no backend of the ``tokenizers`` library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "to_str"):
            raise UserError(
                f"tokenizer of {tokenizer.name_or_path or 'this model'}: {type(tokenizer).__name__} does not say where "
                "its tokens lie in the text; save it as a fast tokenizer (tokenizer.json)"
            )
        # A post-processor may take white space off the spans, and is not needed: EOS is ours.
        settings = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        self._backend = Tokenizer.from_str(json.dumps(settings))
        self._backend.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._is_byte_level = '"ByteLevel"' in json.dumps([settings["pre_tokenizer"], settings["decoder"]])

    def spans(self, responses: Sequence[str], response_ids: Sequence[Sequence[int]]) -> list[list[Span]]:
        """Return the span of every token of responses that SFT's path encoded.

        Args:
            responses: Their whole texts.
            response_ids: Their ids, cut or with EOS.

        Raises:
            UserError: The text gives other tokens here.
        """
        alone = self._backend.encode_batch(list(responses), add_special_tokens=False)
        found: list[list[Span] | None] = [
            _tile(encoding.offsets, ids, 0) if _begins(encoding.ids, ids) else None
            for encoding, ids in zip(alone, response_ids, strict=True)
        ]
        # The rest were encoded behind a line end; see data/tokenization.py.
        left = [index for index, spans in enumerate(found) if spans is None]
        if left:
            behind = self._backend.encode_batch([_SENTINEL + responses[index] for index in left], False, False)
            skipped = len(self._backend.encode(_SENTINEL, add_special_tokens=False).ids)
            for index, encoding in zip(left, behind, strict=True):
                if not _begins(encoding.ids[skipped:], response_ids[index]):
                    raise UserError(
                        f"tokenizer of {self._tokenizer.name_or_path or 'this model'}: it encodes "
                        f"{responses[index][:40]!r} in two ways; check its tokenizer.json"
                    )
                found[index] = _tile(encoding.offsets[skipped:], response_ids[index], len(_SENTINEL))
        return [spans for spans in found if spans is not None]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token by itself; bytes that are no whole character are written ``<0xF0>``."""
        return [self._text(int(index)) for index in ids]

    def _text(self, index: int) -> str:
        name = str(self._tokenizer.convert_ids_to_tokens(index))
        if index in self._special_ids:
            return name
        if self._is_byte_level and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name).decode("utf-8", errors="dpr_bytes")
        if _BYTE_TOKEN.fullmatch(name):
            byte = bytes([int(name[3:5], 16)])
            return byte.decode("utf-8", errors="dpr_bytes")
        return name.replace("\u2581", " ")


def _begins(whole: Sequence[int], ids: Sequence[int]) -> bool:
    """Return whether ``ids`` are ``whole`` and one more (EOS), or the beginning of ``whole``."""
    length = min(len(whole), len(ids))
    return len(ids) <= len(whole) + 1 and list(whole[:length]) == list(ids[:length])


def _tile(offsets: Sequence[Span], ids: Sequence[int], shift: int) -> list[Span]:
    """Return spans without gaps or overlaps for the first ``len(ids)`` tokens; one that is too many is EOS."""
    spans: list[Span] = []
    end = shift
    for index, (_, stop) in enumerate(offsets[: len(ids)]):
        start = end
        # A character that the next token shares is the next token's.
        following = offsets[index + 1][0] if index + 1 < len(offsets) else stop
        end = max(start, min(stop, following))
        spans.append((start - shift, end - shift))
    spans += [(end - shift, end - shift)] * (len(ids) - len(spans))
    return spans


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, and the other bytes for the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _write_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("dpr_bytes", _write_bytes)


@torch.no_grad()
def score_rows(
    rows: Sequence[EncodedRow],
    *,
    teacher: CausalPolicy,
    reference: CausalPolicy,
    locator: TokenLocator,
    eos_id: int,
    pad_id: int,
    micro_batch_size: int,
) -> list[TokenRewards]:
    """Return the token rewards of every row, in their order; rows of like length are scored together.

    Args:
        rows: Encoded rows, none without response tokens.
        teacher: pi_SFT.
        reference: pi_ref.
        locator: The tokenizer's.
        eos_id: What ends a complete response.
        pad_id: Any valid id.
        micro_batch_size: Rows of one forward.
    """
    spans = locator.spans([row.response for row in rows], [row.response_ids for row in rows])
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].prompt_ids) - len(rows[index].response_ids))
    found: dict[int, TokenRewards] = {}
    for start in range(0, len(order), micro_batch_size):
        chosen = order[start : start + micro_batch_size]
        batch = collate(
            [rows[index].prompt_ids for index in chosen], [rows[index].response_ids for index in chosen], pad_id=pad_id
        )
        said = [policy_logprobs(batch, policy, micro_batch_size=micro_batch_size)[0] for policy in (teacher, reference)]
        for place, index in enumerate(chosen):
            mask_T = batch.response_mask_BT[place]
            found[index] = make_rewards(
                rows[index],
                teacher_logp_N=said[0][place][mask_T],
                reference_logp_N=said[1][place][mask_T],
                tokens=locator.texts(rows[index].response_ids),
                offsets=spans[index],
                eos_id=eos_id,
            )
    return [found[index] for index in range(len(rows))]


def make_rewards(
    row: EncodedRow,
    *,
    teacher_logp_N: Tensor,
    reference_logp_N: Tensor,
    tokens: list[str],
    offsets: list[Span],
    eos_id: int,
) -> TokenRewards:
    """Return the token rewards of one row, whose sums are of float64.

    Args:
        row: The row, of N response tokens.
        teacher_logp_N: [N] log pi_SFT.
        reference_logp_N: [N] log pi_ref.
        tokens: Texts of the tokens.
        offsets: Their spans.
        eos_id: What ends a complete response.
    """
    rewards_N = teacher_logp_N.double() - reference_logp_N.double()
    return TokenRewards(
        row=row.row,
        prompt=row.prompt,
        response=row.response,
        tokens=tokens,
        offsets=offsets,
        teacher_logp=teacher_logp_N.tolist(),
        reference_logp=reference_logp_N.tolist(),
        rewards=rewards_N.tolist(),
        sum=float(rewards_N.sum()),
        mean=float(rewards_N.mean()),
        num_tokens=len(row.response_ids),
        ends_by_eos=row.response_ids[-1] == eos_id,
    )
