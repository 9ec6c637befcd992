"""The tokenizer's own chat template as a prompt template."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from dpr_lightning.data.chats import Message
from dpr_lightning.data.prompt_template import TEMPLATE_KEY, PromptTemplate, TemplateRefusalError, Tools
from dpr_lightning.errors import UserError

_MARK = "textprobe"
_USER: Message = {"role": "user", "content": _MARK}
_TOOL = {"type": "function", "function": {"name": "toolprobe", "description": "d", "parameters": {"type": "object"}}}
_CALL = {"type": "function", "id": "callprobe", "function": {"name": "toolprobe", "arguments": {"a": "argprobe"}}}
_FOLD_IN_JINJA = (
    "{%- set arranged = namespace(out=[], text='') -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and not KEPT -%}"
    "{%- set arranged.text = arranged.text ~ message['content'] ~ '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' and arranged.text -%}"
    "{%- set arranged.out = arranged.out + [dict(message, content=arranged.text ~ message['content'])] -%}"
    "{%- set arranged.text = '' -%}"
    "{%- else -%}{%- set arranged.out = arranged.out + [message] -%}{%- endif -%}{%- endfor -%}"
    "{%- if arranged.text and arranged.out and arranged.out[-1]['role'] == 'user' -%}"
    "{%- set last = arranged.out[-1] -%}{%- set arranged.out = arranged.out[:-1] + "
    "[dict(last, content=last['content'] ~ '\\n\\n' ~ arranged.text[:-2])] -%}"
    "{%- elif arranged.text -%}"
    "{%- set arranged.out = arranged.out + [{'role': 'user', 'content': arranged.text[:-2]}] -%}"
    "{%- endif -%}{%- set messages = arranged.out -%}"
)
"""``_fold`` for an exported template, which others render without us."""
_SEVERAL = ("system", "user", "assistant", "system", "user")
# Jinja's own, and what a template's expressions raise on values that they do not expect.
_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


class ChatTemplate(PromptTemplate):
    """The tokenizer's own chat template, ending where the assistant's turn begins.

    System text that a template has no role for goes to the head of the next user message.

    Args:
        chat_template: A Jinja template in place of the tokenizer's own, or the name of one of several that it has.
        variables: Further template variables, for example ``{"enable_thinking": false}``.
    """

    writes_control_tokens = True

    def __init__(self, chat_template: str | None = None, variables: Mapping[str, Any] | None = None) -> None:
        self.chat_template = chat_template
        self.variables = dict(variables or {})
        # Answers of probes, by what was probed. One object serves one tokenizer; its template is part of the key.
        self._probes: dict[tuple[object, ...], Any] = {}

    @override
    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not self.chat_template and not tokenizer.chat_template:
            raise UserError(
                f"{TEMPLATE_KEY}: ChatTemplate, but the tokenizer of {tokenizer.name_or_path or 'this model'} has no "
                "chat template; use TextTemplate or give chat_template"
            )
        try:
            source = tokenizer.get_chat_template(self.chat_template)
        except ValueError as error:  # several templates, none of them the default
            names = ", ".join(tokenizer.chat_template)
            raise UserError(f"{TEMPLATE_KEY}: the tokenizer has chat templates {names}; set chat_template") from error
        if "strftime_now" in source and "date_string" not in self.variables:
            raise UserError(
                f"{TEMPLATE_KEY}: the chat template writes today's date, so prompts would change from day to day; "
                "set variables.date_string"
            )
        try:
            text = self._apply(tokenizer, [_USER])
        except _ERRORS as error:
            raise UserError(f"{TEMPLATE_KEY}: the chat template fails on one user message ({error})") from error
        if _MARK not in text:
            raise UserError(
                f"{TEMPLATE_KEY}: the chat template leaves out the text of a user message (a vision model's template "
                "may expect a list of parts); give chat_template"
            )

    @override
    def render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None) -> str:
        return self._try(tokenizer, self.arrange(tokenizer, messages), tools)

    @override
    def arrange(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
        roles = tuple(message["role"] for message in messages)
        if "system" not in roles:
            return [dict(message) for message in messages]
        return _fold(messages, self._probe(tokenizer, ("fold", roles), lambda: self._to_fold(tokenizer, roles)))

    @override
    def unrendered(self, tokenizer: PreTrainedTokenizerBase, fields: Collection[str]) -> list[str]:
        return [
            name
            for name in sorted(fields)
            if not self._probe(tokenizer, ("field", name), lambda name=name: self._renders(tokenizer, name))
        ]

    @override
    def render_answered(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._apply(tokenizer, messages, add_generation_prompt=False)

    @override
    def opening(self, tokenizer: PreTrainedTokenizerBase) -> str:
        def find() -> str:
            _, is_there, after = self._apply(tokenizer, [_USER]).rpartition(_MARK)
            return after if is_there else ""

        found: str = self._probe(tokenizer, ("opening",), find)
        return found

    @override
    def render_answer(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: Message, tools: Tools
    ) -> str:
        arranged = self.arrange(tokenizer, messages)
        before = self._try(tokenizer, arranged, tools)
        after = self._try(tokenizer, [*arranged, answer], tools, add_generation_prompt=False)
        plain = [*arranged, {"role": "assistant", "content": _MARK}]
        end = self._try(tokenizer, plain, tools, add_generation_prompt=False).rpartition(_MARK)[2]
        text = after[len(before) : len(after) - len(end)]
        said = [answer["content"], *(value for value in answer.values() if isinstance(value, str))]
        is_lost = any(value.strip() not in after for value in said if value != answer["role"])
        if not after.startswith(before) or not after.endswith(end) or is_lost:
            reason = "answer that the chat template does not write after its prompt"
            raise TemplateRefusalError(f"{TEMPLATE_KEY}: {reason}", reason=reason)
        return text

    @override
    def to_jinja(self, tokenizer: PreTrainedTokenizerBase, *, prefix: str) -> str | dict[str, str] | None:
        fold = self._fold_in_jinja(tokenizer)
        if self.chat_template is None and not self.variables and not fold:
            return None
        own = tokenizer.chat_template
        values = {name: "none" if value is None else json.dumps(value) for name, value in self.variables.items()}
        head = "".join(f"{{%- set {name} = {value} -%}}" for name, value in values.items()) + fold
        if self.chat_template is None and isinstance(own, dict):
            return {name: head + source for name, source in own.items()}
        return head + str(tokenizer.get_chat_template(self.chat_template))

    @override
    def to_manifest(self) -> dict[str, Any]:
        return {"type": "chat", "chat_template": self.chat_template, "variables": self.variables}

    def _apply(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Sequence[Message],
        tools: Tools = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        text = tokenizer.apply_chat_template(
            list(conversation),
            tools=None if tools is None else list(tools),
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )
        assert isinstance(text, str)
        return text

    def _try(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Sequence[Message],
        tools: Tools,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        try:
            return self._apply(tokenizer, conversation, tools, add_generation_prompt=add_generation_prompt)
        except _ERRORS as error:
            roles = ", ".join(message["role"] for message in conversation)
            line = " ".join(str(error).split())
            raise TemplateRefusalError(
                f"{TEMPLATE_KEY}: the chat template refuses the roles {roles} ({line})",
                reason=f"refused by the chat template ({line[:80] or type(error).__name__})",
            ) from error

    def _probe(self, tokenizer: PreTrainedTokenizerBase, what: tuple[object, ...], find: Any) -> Any:
        key = (str(tokenizer.chat_template), *what)
        if key not in self._probes:
            self._probes[key] = find()
        return self._probes[key]

    def _to_fold(self, tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> frozenset[int] | None:
        """Return which system messages go into a user's turn: none, all but the first, or all; None if none works."""
        conversation = [{"role": role, "content": f"{_MARK}{number}end"} for number, role in enumerate(roles)]
        systems = frozenset(number for number, role in enumerate(roles) if role == "system")
        marks = [conversation[number]["content"] for number in systems]
        candidates = [frozenset(), systems - {0}, systems]
        # One rule for all chats, which an exported template can follow too.
        if roles != _SEVERAL and self._probe(tokenizer, ("fold", _SEVERAL), lambda: self._to_fold(tokenizer, _SEVERAL)):
            candidates = candidates[1:]
        refused = False
        for folded in dict.fromkeys(candidates):
            arranged = _fold(conversation, folded)
            try:
                text = self._apply(tokenizer, arranged)
            except _ERRORS:
                refused = True
                continue
            refused = False
            if all(mark in text for mark in marks) and not self._takes_for_assistant(tokenizer, arranged, text):
                return folded
        # Rendering tells the template's own error; text that is left out without one has none to tell.
        return systems if refused else None

    def _fold_in_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return statements that do to ``messages`` what :func:`_fold` does; none where the template has the role."""
        first, later = (
            self._probe(tokenizer, ("fold", roles), lambda roles=roles: self._to_fold(tokenizer, roles))
            for roles in (("system", "user"), _SEVERAL)
        )
        if not later:
            return ""
        return _FOLD_IN_JINJA.replace("KEPT", "false" if first else "loop.first")

    def _takes_for_assistant(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message], text: str
    ) -> bool:
        """Return whether system messages are written as the assistant's turns are, and not as the user's."""
        if all(message["role"] != "system" for message in conversation):
            return False

        def written_as(role: str) -> str | None:
            changed = [
                {**message, "role": role} if message["role"] == "system" else message for message in conversation
            ]
            try:
                return self._apply(tokenizer, changed)
            except _ERRORS:
                return None

        return written_as("assistant") == text != written_as("user")

    def _renders(self, tokenizer: PreTrainedTokenizerBase, field: str) -> bool:
        """Return whether the template writes a field of a message (or ``tools``, or the role ``tool``)."""
        call: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        answer: Message = {"role": "tool", "content": "fieldprobe", "name": "toolprobe", "tool_call_id": "callprobe"}
        said: Message = {"role": "assistant", "content": _MARK}
        tools, marks = None, ["fieldprobe"]
        if field == "tools":
            conversations, tools, marks = [[_USER]], [_TOOL], ["toolprobe"]
        elif field == "tool":
            conversations = [[_USER, call, answer], [_USER, said, answer]]
        elif field == "tool_calls":
            conversations, marks = [[_USER, call]], ["toolprobe", "argprobe"]
        elif field == "function_call":
            conversations = [[_USER, {**said, field: {"name": "fieldprobe", "arguments": "{}"}}]]
        else:
            conversations = [[_USER, {**said, field: "fieldprobe"}]]
        for conversation in conversations:
            try:
                text = self._apply(tokenizer, conversation, tools, add_generation_prompt=False)
            except _ERRORS:
                continue
            if all(mark in text for mark in marks):
                return True
        return False


def _fold(messages: Sequence[Message], positions: frozenset[int] | None) -> list[Message]:
    """Return the messages with the system texts at ``positions`` in the next user message, or behind the last one.

    Raises:
        TemplateRefusalError: ``positions`` is None: the template loses system text wherever it stands.
    """
    if positions is None:
        reason = "system message that the chat template leaves out"
        raise TemplateRefusalError(f"{TEMPLATE_KEY}: {reason}", reason=reason)
    pending: list[str] = []
    arranged: list[Message] = []
    for number, message in enumerate(messages):
        if number in positions:
            pending.append(message["content"])
        elif pending and message["role"] == "user":
            arranged.append({**message, "content": "\n\n".join([*pending, message["content"]])})
            pending = []
        else:
            arranged.append(dict(message))
    if pending and arranged and arranged[-1]["role"] == "user":
        arranged[-1]["content"] = "\n\n".join([arranged[-1]["content"], *pending])
    elif pending:
        arranged.append({"role": "user", "content": "\n\n".join(pending)})
    return arranged
