"""What every prompt template does: from messages to the text that the model continues."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from dpr_lightning.data.chats import Message
from dpr_lightning.errors import UserError

TEMPLATE_KEY = "data.template"
Tools = Sequence[Any] | None
"""Functions that the assistant may call, as JSON values; None without."""


class TemplateRefusalError(UserError):
    """A template cannot render one row; others it can.

    Args:
        message: One line for the user.
        reason: Under which such rows are counted.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class PromptTemplate(ABC):
    """Renders the messages of a prompt as text."""

    writes_control_tokens: ClassVar[bool]
    """True where the rendered text spells out control tokens that must be encoded as such."""

    @abstractmethod
    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError if this template cannot be used with ``tokenizer``."""

    @abstractmethod
    def render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None) -> str:
        """Return the text after which the response begins; TemplateRefusalError where there is none."""

    @abstractmethod
    def to_jinja(self, tokenizer: PreTrainedTokenizerBase, *, prefix: str) -> str | dict[str, str] | None:
        """Return a chat template for ``tokenizer`` that renders prompts as this one does; None keeps its own.

        Args:
            tokenizer: The model's.
            prefix: Text of the special tokens that every prompt begins with, which a chat template has to spell out.
        """

    @abstractmethod
    def to_manifest(self) -> dict[str, Any]:
        """Return plain JSON values from which ``template_from_manifest`` makes an equal template."""

    def render_answered(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
        """Return the text of a question with its answer, closed as the template closes an assistant's turn."""
        return self.render(tokenizer, [{"role": "user", "content": question}]) + answer

    @abstractmethod
    def opening(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text between the last user message and the response."""

    def unrendered(self, tokenizer: PreTrainedTokenizerBase, fields: Collection[str]) -> list[str]:
        """Return those of ``fields`` (see ``Demonstration.prompt_fields``) that the template leaves out: here all."""
        del tokenizer
        return sorted(fields)

    def arrange(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
        """Return the messages in roles that the template has; rendering does so by itself."""
        del tokenizer
        return [dict(message) for message in messages]

    def render_answer(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: Message, tools: Tools
    ) -> str:
        """Return the text of an answer that has fields of ``unrendered`` beside its content.

        Raises:
            TemplateRefusalError: The template does not write it as the continuation of the prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} renders no fields")

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


def without_opening(answer: str, opening: str) -> str:
    r"""Return the answer without the tags that the prompt ends with: ``<think>\n`` is not taught twice."""
    for tag in re.finditer(r"[<\[]", opening):
        pieces = opening[tag.start() :].split()
        if match := re.match(r"\s*" + r"\s*".join(map(re.escape, pieces)), answer):
            rest, space = answer[match.end() :], opening[len(opening.rstrip()) :]
            while rest and space and rest[0] == space[0]:
                rest, space = rest[1:], space[1:]
            return rest
    return answer
