"""How the columns of well-known data sets become a prompt and a response.

A record becomes messages (``{"role": ..., "content": ...}``, roles system, user and assistant) and the response to
them. Which columns are read is the preset's choice unless the user maps them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dpr_lightning.data.chats import Demonstration, answer_message, from_chat, from_prompt, text_of
from dpr_lightning.errors import UserError

PresetName = Literal["prompt_response", "open_orca", "alpaca", "gsm8k", "messages", "sharegpt"]
_NUM_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The columns of a known layout. Keys of ``columns``: prompt, response, system, messages, input, tools."""

    columns: Mapping[str, str]
    """What each part of a demonstration is called in the source."""
    optional: frozenset[str] = frozenset({"system", "input", "tools"})
    """Parts whose column may be absent."""


PRESETS: dict[str, Preset] = {
    "prompt_response": Preset(
        columns={"prompt": "prompt", "response": "response", "system": "system", "tools": "tools"}
    ),
    "open_orca": Preset(columns={"prompt": "question", "response": "response", "system": "system_prompt"}),
    "alpaca": Preset(columns={"prompt": "instruction", "input": "input", "response": "output", "system": "system"}),
    "gsm8k": Preset(columns={"prompt": "question", "response": "answer", "system": "system"}),
    "messages": Preset(columns={"messages": "messages", "system": "system", "tools": "tools"}),
    "sharegpt": Preset(columns={"messages": "conversations", "system": "system", "tools": "tools"}),
}
assert set(PRESETS) == set(get_args(PresetName))


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
    is_chat_preset = "messages" in PRESETS[preset].columns
    if "messages" in mapped and not is_chat_preset:
        raise UserError(f"{key}.columns: messages needs preset: messages, found preset: {preset}; set the preset")
    if is_chat_preset and (foreign := set(mapped) - set(PRESETS[preset].columns)):
        raise UserError(
            f"{key}.columns: preset {preset} reads {', '.join(PRESETS[preset].columns)} only, found {sorted(foreign)}"
        )
    columns = {**PRESETS[preset].columns, **mapped}
    for part, column in list(columns.items()):
        if column in available:
            continue
        is_optional = part in PRESETS[preset].optional or (part == "response" and not needs_response)
        if is_optional and part not in mapped:
            del columns[part]
            continue
        shown = ", ".join([*available[:_NUM_SHOWN], *(["..."] if len(available) > _NUM_SHOWN else [])])
        raise UserError(
            f"{key}.columns: no column {column!r} for {part}{_nearest(column, available)}; "
            f"the source has {shown}: {_advice(part, preset, available, key)}"
        )
    return columns


def _advice(part: str, preset: str, available: Sequence[str], key: str) -> str:
    chats = (("messages", "messages"), ("sharegpt", "conversations"))
    fitting = next((name for name, column in chats if column in available and name != preset), None)
    if fitting is not None and part in ("prompt", "response", "messages"):
        return f"set preset: {fitting}, or map one with {key}.columns.{part}"
    return f"map one with {key}.columns.{part} or choose another preset"


def build_demonstration(record: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> Demonstration:
    """Return the demonstration in ``record``; an absent or null cell counts as empty.

    Args:
        record: Column values.
        columns: From :func:`resolve_columns`.
        where: Row in words, for messages.

    Raises:
        UserError: A cell is not text, or a chat is not a list of messages.
    """
    if (found := _plain(record, columns)) is not None:
        return found

    def text(part: str) -> str:
        column = columns.get(part)
        return "" if column is None else text_of(record.get(column), where=where, column=column)

    def missing(part: str) -> str:
        column = columns.get(part)
        return "" if column is None or column in record else f"field {column!r} is missing"

    shared: dict[str, Any] = {"system": text("system"), "tools": record.get(columns.get("tools", "")), "where": where}
    column = columns.get("messages", columns.get("prompt", ""))
    if "messages" in columns:
        found = from_chat(record.get(column), column=column, **shared)
        return replace(found, prompt_problem=found.prompt_problem or missing("messages"))
    response = columns.get("response", "")
    answer = answer_message(record.get(response), where=where, column=response)
    prompt, more = record.get(column), text("input")
    if not isinstance(prompt, list):
        prompt = text("prompt")
        prompt = f"{prompt}\n\n{more}" if more.strip() else prompt
    elif more.strip():
        raise UserError(f"{where}: column {column!r} holds messages beside an input; put its text into them")
    found = from_prompt(prompt, answer, column=column, **shared)
    return replace(
        found,
        prompt_problem=found.prompt_problem or missing("prompt"),
        response_problem=found.response_problem or missing("response"),
    )


def _plain(record: Mapping[str, Any], columns: Mapping[str, str]) -> Demonstration | None:
    """Return a row of text cells alone, the common case, without the checks that others need; None for others."""
    cells = {part: record.get(column) for part, column in columns.items()}
    prompt, response, more = cells.get("prompt"), cells.get("response"), cells.get("input")
    system = cells.get("system") or ""
    if more or cells.get("tools") or not (type(prompt) is type(response) is type(system) is str and prompt.strip()):
        return None
    message = {"role": "user", "content": prompt}
    messages = ({"role": "system", "content": system}, message) if system.strip() else (message,)
    return Demonstration(messages=messages, response=response)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {close[0]!r})" if close else ""
