"""From a list of messages to a prompt and its answer, with what the prompt template has to render or the row is lost.

Two spellings are read: ``role`` and ``content`` (OpenAI, transformers), and ShareGPT's ``from`` and ``value``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpr_lightning.errors import UserError

Message = dict[str, Any]
"""One turn of a conversation: its ``role`` and ``content``, both text, and fields that templates may render."""

ROLES = ("system", "user", "assistant", "tool")
RENDERED_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that say something beside ``content``: a template that leaves them out changes the message."""
LINKING_FIELDS = ("name", "tool_call_id")
"""Fields that templates may read and whose absence from the text loses nothing."""
TRAILING_TURN = "turn after the last answer left out"
WEIGHT_ZERO = "answer of weight 0 not trained on"
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One prompt and its demonstrated response."""

    messages: tuple[Message, ...]
    """The prompt: system messages and turns, of which the user's is the last; empty if there is no prompt."""
    response: str
    """The demonstrated answer; empty if there is none."""
    tools: tuple[Any, ...] | None = None
    """Functions that the assistant may call, for the template."""
    answer: Message | None = None
    """The answer's message where it has fields beside its text."""
    prompt_fields: frozenset[str] = frozenset()
    """What the template must render in the prompt: of ``RENDERED_FIELDS``, ``tools`` and ``tool`` (the role)."""
    answer_fields: frozenset[str] = frozenset()
    """Likewise in the answer."""
    prompt_problem: str = ""
    """Why the row cannot be used at all; empty if it can."""
    response_problem: str = ""
    """Why its answer cannot be trained on."""
    notes: tuple[str, ...] = ()
    """What was left out of a row that is used."""

    @property
    def prompt(self) -> str:
        """What the user said, without the system message: the identity of a prompt when data are split."""
        return "\n\n".join(message["content"] for message in self.messages if message["role"] != "system")

    @property
    def system(self) -> str:
        """The system messages, empty if there is none."""
        return "\n\n".join(message["content"] for message in self.messages if message["role"] == "system")


def is_chat(cell: object) -> bool:
    """Return whether a cell is a list of messages, in either spelling."""
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in cell)
    )


def from_chat(chat: object, *, system: str = "", tools: object = None, where: str, column: str) -> Demonstration:
    """Return the last answer of a chat that is to be trained on, and the messages before it as its prompt.

    Args:
        chat: The cell; null counts as empty.
        system: Text of the row's own system column, put before the chat.
        tools: The row's functions.
        where: Row in words, for messages.
        column: Name of the column, for messages.

    Raises:
        UserError: The cell is no list of messages, or a message has an unknown role or content that is not text.
    """
    if chat is None:
        return Demonstration(messages=(), response="")
    messages, weights = _messages(chat, where=where, column=column)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    taught = [i for i in answers if weights[i] != 0]
    # A chat without an answer is a prompt alone; what follows the last answer has no demonstration.
    last = (taught or answers or [len(messages)])[-1]
    problem, notes = "", []
    if answers and not taught:
        problem = "every answer has weight 0"
    elif odd := [weights[i] for i in taught if weights[i] not in (None, 1)]:
        problem = f"answer of weight {odd[-1]!r:.20}, neither 0 nor 1"
    elif last + 1 < len(messages):
        notes.append(WEIGHT_ZERO if answers[-1] != last else TRAILING_TURN)
    answer = messages[last] if last < len(messages) else None
    prompt = messages[:last]
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        prompt = []
    return _demonstration(prompt, answer, system=system, tools=tools, response_problem=problem, notes=tuple(notes))


def from_prompt(
    chat: object, answer: Message | None, *, system: str = "", tools: object = None, where: str, column: str
) -> Demonstration:
    """Return a prompt, text or a chat all of which is asked, and its answer.

    Raises:
        UserError: See :func:`from_chat`.
    """
    if isinstance(chat, str):
        messages: list[Message] = [{"role": "user", "content": chat}]
    else:
        messages, _ = _messages(chat, where=where, column=column)
    problem = ""
    if messages and messages[-1]["role"] == "assistant":
        problem = f"{column!r} ends with the assistant's turn"
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        messages = []
    return _demonstration(messages, answer, system=system, tools=tools, prompt_problem=problem)


def answer_message(cell: object, *, where: str, column: str) -> Message:
    """Return the answer that a cell holds: text, or a list of one message of the assistant.

    Raises:
        UserError: It holds something else.
    """
    if is_chat(cell):
        messages, _ = _messages(cell, where=where, column=column)
        if [message["role"] for message in messages] == ["assistant"]:
            return messages[0]
    return {"role": "assistant", "content": text_of(cell, where=where, column=column)}


def text_of(value: object, *, where: str, column: str) -> str:
    """Return a cell's text; null counts as empty.

    Raises:
        UserError: It holds something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        raise UserError(
            f"{where}: column {column!r} holds {type(value).__name__} {shown}, not text; convert the column"
        )
    return value


def _demonstration(
    prompt: Sequence[Message], answer: Message | None, *, system: str, tools: object, **more: Any
) -> Demonstration:
    messages = list(prompt)
    if messages and system.strip() and messages[0] != {"role": "system", "content": system}:
        messages.insert(0, {"role": "system", "content": system})
    functions, is_readable = _functions(tools)
    if not is_readable:
        more["prompt_problem"] = "'tools' is no list of functions"
    fields = {name for message in messages for name in _fields(message)} | ({"tools"} if functions else set())
    answer_fields = frozenset(_fields(answer)) if answer is not None else frozenset()
    return Demonstration(
        messages=tuple(messages),
        response="" if answer is None else answer["content"],
        tools=functions,
        answer=answer if answer_fields else None,
        prompt_fields=frozenset(fields),
        answer_fields=answer_fields,
        **more,
    )


def _fields(message: Message) -> list[str]:
    found = [name for name in RENDERED_FIELDS if name in message]
    return [*found, "tool"] if message["role"] == "tool" else found


def _messages(chat: object, *, where: str, column: str) -> tuple[list[Message], list[float | object | None]]:
    """Return the messages without what is null, and the weight of each."""
    if not isinstance(chat, list):
        raise UserError(
            f"{where}: column {column!r} holds {type(chat).__name__}, not a list of messages; repair the row"
        )
    messages, weights = [], []
    for number, turn in enumerate(chat, start=1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (turn, None)
        if isinstance(turn, Mapping) and role is None and "from" in turn:
            role, content = turn["from"], turn.get("value")
            role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise UserError(
                f"{where}: message {number} in {column!r} has role {repr(role)[:40]}; use one of {', '.join(ROLES)}"
            )
        assert isinstance(turn, Mapping)
        message: Message = {
            "role": role,
            "content": text_of(content, where=where, column=f"{column}[{number}].content"),
        }
        given = [name for name in RENDERED_FIELDS if turn.get(name) not in (None, "", [], {})]
        message |= {name: _with_read_arguments(turn[name]) for name in given}
        message |= {name: turn[name] for name in LINKING_FIELDS if isinstance(turn.get(name), str)}
        messages.append(message)
        weights.append(turn.get("weight"))
    return messages, weights


def _with_read_arguments(value: Any) -> Any:
    """Return tool calls with arguments as objects: templates write them as JSON, so JSON text would be quoted twice."""
    if not isinstance(value, list):
        return value
    calls = []
    for call in value:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(arguments := function.get("arguments"), str):
            try:
                read = json.loads(arguments)
            except (ValueError, RecursionError):
                read = None
            if isinstance(read, dict):
                call = {**call, "function": {**function, "arguments": read}}
        calls.append(call)
    return calls


def _functions(tools: object) -> tuple[tuple[Any, ...] | None, bool]:
    """Return functions, given as a list or as its JSON text, and whether they could be read."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return None, False
    if tools in (None, "", [], {}) or (isinstance(tools, str) and not tools.strip()):
        return None, True
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return None, False
    return tuple(tools), True
