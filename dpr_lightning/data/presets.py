"""How the columns of well-known data sets become a prompt and a response.

A record becomes messages (``{"role": ..., "content": ...}``, roles system, user and assistant) and the response to
them. Which columns are read is the preset's choice unless the user maps them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpr_lightning.errors import UserError

Message = dict[str, str]
"""One turn of a conversation: its ``role`` (system, user or assistant) and its ``content``."""

PresetName = Literal["prompt_response", "open_orca", "alpaca", "gsm8k", "messages"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The columns of a known layout. Keys of ``columns``: prompt, response, system, messages, input."""

    columns: Mapping[str, str]
    """What each part of a demonstration is called in the source."""
    optional: frozenset[str] = frozenset({"system"})
    """Parts whose column may be absent."""


PRESETS: dict[str, Preset] = {
    "prompt_response": Preset(columns={"prompt": "prompt", "response": "response", "system": "system"}),
    "open_orca": Preset(columns={"prompt": "question", "response": "response", "system": "system_prompt"}),
    "alpaca": Preset(
        columns={"prompt": "instruction", "input": "input", "response": "output"}, optional=frozenset({"input"})
    ),
    "gsm8k": Preset(columns={"prompt": "question", "response": "answer"}),
    "messages": Preset(columns={"messages": "messages"}),
}
assert set(PRESETS) == set(get_args(PresetName))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One prompt and its demonstrated response."""

    messages: tuple[Message, ...]
    """The prompt: an optional system message, then turns that end with the user's; empty if there is no prompt."""
    response: str
    """The demonstrated answer; empty if there is none."""

    @property
    def prompt(self) -> str:
        """What the user said, without the system message: the identity of a prompt when data are split."""
        return "\n\n".join(message["content"] for message in self.messages if message["role"] != "system")

    @property
    def system(self) -> str:
        """The system message, empty if there is none."""
        return next((message["content"] for message in self.messages if message["role"] == "system"), "")


def resolve_columns(
    preset: str,
    overrides: Mapping[str, str] | None,
    available: Sequence[str],
    *,
    key: str,
    needs_response: bool,
) -> dict[str, str]:
    """Return which column holds each part, checked against the columns that there are.

    Raises:
        UserError: An override names an unknown part, or a column that is needed or asked for does not exist.
    """
    parts = {"prompt", "response", "system", "messages"} | set(PRESETS[preset].columns)
    mapped = dict(overrides or {})
    for part in mapped:
        if part not in parts:
            raise UserError(f"{key}.columns: unknown key {part!r}{_nearest(part, sorted(parts))}; use {sorted(parts)}")
    if "messages" in mapped and preset != "messages":
        raise UserError(f"{key}.columns: messages needs preset: messages, found preset: {preset}; set the preset")
    if preset == "messages" and set(mapped) - {"messages"}:
        raise UserError(f"{key}.columns: preset messages reads the messages column only, found {sorted(mapped)}")
    columns = {**PRESETS[preset].columns, **mapped}
    for part, column in list(columns.items()):
        if column in available:
            continue
        is_optional = part in PRESETS[preset].optional or (part == "response" and not needs_response)
        if is_optional and part not in mapped:
            del columns[part]
            continue
        raise UserError(
            f"{key}.columns: no column {column!r} for {part}{_nearest(column, available)}; "
            f"the source has {', '.join(available)}: map one with {key}.columns.{part} or choose another preset"
        )
    return columns


def build_demonstration(record: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> Demonstration:
    """Return the demonstration in ``record``; an absent or null cell counts as empty.

    Args:
        record: Column values.
        columns: From :func:`resolve_columns`.
        where: Row in words, for messages.

    Raises:
        UserError: A cell is not text, or a chat is not a list of messages.
    """
    if "messages" in columns:
        return _from_chat(record.get(columns["messages"]), where=where, column=columns["messages"])
    text = {part: _text(record.get(column), where=where, column=column) for part, column in columns.items()}
    prompt = text["prompt"]
    if text.get("input", "").strip():
        prompt = f"{prompt}\n\n{text['input']}"
    if not prompt.strip():
        return Demonstration(messages=(), response=text.get("response", ""))
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if text.get("system", "").strip():
        messages.insert(0, {"role": "system", "content": text["system"]})
    return Demonstration(messages=tuple(messages), response=text.get("response", ""))


def _from_chat(chat: object, *, where: str, column: str) -> Demonstration:
    if chat is None:
        return Demonstration(messages=(), response="")
    if not isinstance(chat, list):
        raise UserError(
            f"{where}: column {column!r} holds {type(chat).__name__}, not a list of messages; repair the row"
        )
    messages: list[Message] = []
    for turn, message in enumerate(chat, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = message.get("role") if isinstance(message, dict) else message
            raise UserError(f"{where}: message {turn} in {column!r} has role {found!r}; use one of {', '.join(ROLES)}")
        content = _text(message.get("content"), where=where, column=f"{column}[{turn}].content")
        messages.append({"role": message["role"], "content": content})
    # A chat without an answer is a prompt alone; what follows the last answer has no demonstration and is left out.
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    prompt = messages[:last]
    response = messages[last]["content"] if last < len(messages) else ""
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        prompt = []
    return Demonstration(messages=tuple(prompt), response=response)


def _text(value: object, *, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        raise UserError(
            f"{where}: column {column!r} holds {type(value).__name__} {shown}, not text; convert the column"
        )
    return value


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {close[0]!r})" if close else ""
