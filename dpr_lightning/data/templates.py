"""Prompt templates: from messages to the text that the model continues.

One template serves SFT, rollouts and evaluation; the teacher's manifest names it (ALGORITHM.md section 6).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from dpr_lightning.data.chat_template import ChatTemplate
from dpr_lightning.data.chats import Message
from dpr_lightning.data.prompt_template import (
    TEMPLATE_KEY,
    PromptTemplate,
    TemplateRefusalError,
    Tools,
    without_opening,
)
from dpr_lightning.errors import UserError

__all__ = [
    "TEMPLATE_KEY",
    "ChatTemplate",
    "PromptTemplate",
    "TemplateRefusalError",
    "TextTemplate",
    "special_strings",
    "template_from_manifest",
    "without_opening",
]


class TextTemplate(PromptTemplate):
    r"""Plain text for base models, which know no control tokens.

    The text is the system part (left out without a system message), then the prompt part of each user message. In a
    conversation each earlier answer follows its prompt as it stands, closed by ``turn_end``.

    Args:
        prompt: Text of a user message; holds ``{prompt}`` once.
        system: Text of a system message; holds ``{system}`` once.
        turn_end: What follows an earlier answer in a conversation.
    """

    writes_control_tokens = False

    def __init__(self, prompt: str = "{prompt}\n", system: str = "{system}\n\n", turn_end: str = "\n\n") -> None:
        for name, text in (("prompt", prompt), ("system", system)):
            if text.count(f"{{{name}}}") != 1:
                raise UserError(f"{TEMPLATE_KEY}.{name}: found {text!r}; it must hold {{{name}}} exactly once")
        self.prompt = prompt
        self.system = system
        self.turn_end = turn_end

    @override
    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for token in special_strings(tokenizer):
            if any(token in text for text in (self.prompt, self.system, self.turn_end)):
                raise UserError(
                    f"{TEMPLATE_KEY}: the plain text template holds the special token {token!r}; "
                    "BOS and EOS are added by themselves: remove it, or use ChatTemplate for control tokens"
                )

    @override
    def render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None) -> str:
        pieces = []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                pieces.append(content + self.turn_end)
            elif message["role"] == "system":
                pieces.append(self.system.replace("{system}", content))
            else:
                pieces.append(self.prompt.replace("{prompt}", content))
        return "".join(pieces)

    @override
    def opening(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return self.prompt.split("{prompt}")[1]

    @override
    def to_jinja(self, tokenizer: PreTrainedTokenizerBase, *, prefix: str) -> str:
        before, after = self.prompt.split("{prompt}")
        system_before, system_after = self.system.split("{system}")
        content = "message['content']"

        def written(*parts: str) -> str:
            terms = [part if part is content else json.dumps(part, ensure_ascii=False) for part in parts if part]
            return "{{- " + " ~ ".join(terms) + " -}}"

        return (
            (written(prefix) if prefix else "")
            + "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
            + written(content, self.turn_end)
            + "{%- elif message['role'] == 'system' -%}"
            + written(system_before, content, system_after)
            + "{%- else -%}"
            + written(before, content, after)
            + "{%- endif -%}{%- endfor -%}"
        )

    @override
    def to_manifest(self) -> dict[str, Any]:
        return {"type": "text", "prompt": self.prompt, "system": self.system, "turn_end": self.turn_end}


def template_from_manifest(manifest: Mapping[str, Any]) -> PromptTemplate:
    """Return the template that ``to_manifest`` described.

    Raises:
        UserError: The manifest names a kind of template that this version does not know.
    """
    values = dict(manifest)
    kind = values.pop("type", None)
    if kind == "text":
        return TextTemplate(**values)
    if kind == "chat":
        return ChatTemplate(**values)
    raise UserError(f"manifest: prompt template of type {kind!r} is unknown; use the version that wrote it")


def special_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the text of every special token, sorted."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_tokens)))
