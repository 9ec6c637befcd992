"""Prompt templates: from messages to the text that the model continues.

One template serves SFT, rollouts and evaluation; the teacher's manifest names it (ALGORITHM.md section 6).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from dpr_lightning.data.presets import Message
from dpr_lightning.errors import UserError

TEMPLATE_KEY = "data.template"


class PromptTemplate(ABC):
    """Renders the messages of a prompt as text."""

    writes_control_tokens: ClassVar[bool]
    """True where the rendered text spells out control tokens that must be encoded as such."""

    @abstractmethod
    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError if this template cannot be used with ``tokenizer``."""

    @abstractmethod
    def render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
        """Return the text after which the response begins."""

    def render_answered(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
        """Return the text of a question with its answer, closed as the template closes an assistant's turn."""
        return self.render(tokenizer, [{"role": "user", "content": question}]) + answer

    @abstractmethod
    def to_jinja(self, tokenizer: PreTrainedTokenizerBase, *, prefix: str) -> str | None:
        """Return a chat template for ``tokenizer`` that renders prompts as this one does; None keeps its own.

        Args:
            tokenizer: The model's.
            prefix: Text of the special tokens that every prompt begins with, which a chat template has to spell out.
        """

    @abstractmethod
    def to_manifest(self) -> dict[str, Any]:
        """Return plain JSON values from which :func:`template_from_manifest` makes an equal template."""

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change whenever the manifest does."""
        canonical = json.dumps(self.to_manifest(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptTemplate) and self.to_manifest() == other.to_manifest()

    @override
    def __hash__(self) -> int:
        return hash(self.fingerprint())

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_manifest()})"


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
    def render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
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


class ChatTemplate(PromptTemplate):
    """The tokenizer's own chat template, ending where the assistant's turn begins.

    A template without a system role gets the system text at the head of the first user message.

    Args:
        chat_template: A Jinja template in place of the tokenizer's own.
        variables: Further template variables, for example ``{"enable_thinking": false}``.
    """

    writes_control_tokens = True

    def __init__(self, chat_template: str | None = None, variables: Mapping[str, Any] | None = None) -> None:
        self.chat_template = chat_template
        self.variables = dict(variables or {})

    @override
    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        source = self.chat_template or tokenizer.chat_template
        if not source:
            raise UserError(
                f"{TEMPLATE_KEY}: ChatTemplate, but the tokenizer of {tokenizer.name_or_path or 'this model'} has no "
                "chat template; use TextTemplate or give chat_template"
            )
        if "strftime_now" in str(source) and "date_string" not in self.variables:
            raise UserError(
                f"{TEMPLATE_KEY}: the chat template writes today's date, so prompts would change from day to day; "
                "set variables.date_string"
            )
        try:
            self._apply(tokenizer, [{"role": "user", "content": "probe"}])
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"{TEMPLATE_KEY}: the chat template fails on one user message ({error})") from error

    @override
    def render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
        conversation = [dict(message) for message in messages]
        if conversation[0]["role"] == "system" and not self._has_system_role(tokenizer):
            system = conversation.pop(0)["content"]
            conversation[0]["content"] = f"{system}\n\n{conversation[0]['content']}"
        try:
            return self._apply(tokenizer, conversation)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"{TEMPLATE_KEY}: the chat template refuses the roles {roles} ({error})") from error

    @override
    def to_jinja(self, tokenizer: PreTrainedTokenizerBase, *, prefix: str) -> str | None:
        source = self.chat_template or tokenizer.chat_template
        if not isinstance(source, str) or (self.chat_template is None and not self.variables):
            return None
        values = {name: "none" if value is None else json.dumps(value) for name, value in self.variables.items()}
        return "".join(f"{{%- set {name} = {value} -%}}" for name, value in values.items()) + source

    @override
    def to_manifest(self) -> dict[str, Any]:
        return {"type": "chat", "chat_template": self.chat_template, "variables": self.variables}

    @override
    def render_answered(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._apply(tokenizer, messages, is_answered=True)

    def _apply(
        self, tokenizer: PreTrainedTokenizerBase, conversation: list[Message], *, is_answered: bool = False
    ) -> str:
        text = tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=not is_answered,
            **self.variables,
        )
        assert isinstance(text, str)
        return text

    def _has_system_role(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        probe = "systemprobe"
        messages = [{"role": "system", "content": probe}, {"role": "user", "content": "user"}]
        try:
            return probe in self._apply(tokenizer, messages)
        except jinja2.TemplateError:
            return False


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
