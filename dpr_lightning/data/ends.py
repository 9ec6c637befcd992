"""Which token ends a response: the one that demonstrations teach, and all at which sampling stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.templates import PromptTemplate
from dpr_lightning.data.tokenization import eos_id
from dpr_lightning.types import as_ends

_PROBE = "answerprobe"


def response_end(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None) -> int:
    """Return the id that closes a response: what the chat template writes after an assistant's turn, else EOS.

    A template that writes no control token there, and plain text, end a response by the tokenizer's EOS.
    """
    own = eos_id(tokenizer)
    if template is None or not template.writes_control_tokens:
        return own
    try:
        text = template.render_answered(tokenizer, "userprobe", _PROBE)
    except (jinja2.TemplateError, TypeError):
        return own
    _, found, tail = text.rpartition(_PROBE)
    tail = tail.lstrip()
    tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    tokens |= {str(tokenizer.eos_token): own}
    # Longest first: one token may begin with another.
    matches = sorted((token for token in tokens if token and tail.startswith(token)), key=len)
    return tokens[matches[-1]] if found and matches else own


def response_ends(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None, generation_config: Any = None
) -> int | list[int]:
    """Return all ids at which a response ends, the one that demonstrations teach first; a plain id where it is alone.

    Args:
        tokenizer: Its EOS is one of them.
        template: Its end of an assistant's turn is another.
        generation_config: The model's, with the ends that it declares.
    """
    declared: int | Sequence[int] | None = getattr(generation_config, "eos_token_id", None)
    others = [declared] if isinstance(declared, int) else list(declared or ())
    ends = list(dict.fromkeys([response_end(tokenizer, template), eos_id(tokenizer), *map(int, others)]))
    return ends if len(ends) > 1 else ends[0]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: int | Sequence[int]) -> str:
    """Return the text of a response without its end, which a tokenizer need not know for a special token."""
    is_ended = bool(ids) and ids[-1] in as_ends(ends)
    text = tokenizer.decode(list(ids[:-1] if is_ended else ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text
