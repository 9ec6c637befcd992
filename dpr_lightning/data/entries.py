"""Files of responses and of prompts: which shapes of rows are understood, and reading them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time
from typing import Any

from dpr_lightning.data.chats import Demonstration, is_chat, text_of
from dpr_lightning.data.presets import PRESETS, build_demonstration
from dpr_lightning.data.readers import open_records
from dpr_lightning.errors import UserError

ID_COLUMNS = ("id", "question_id", "uid", "row", "index", "key")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "conversations")
RESPONSE_COLUMNS = ("response", "output", "answer")
CATEGORY_COLUMNS = ("category", "dataset")
MODEL_COLUMNS = ("model", "model_id", "generator")
_NO_PROMPT = Demonstration(messages=(), response="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of a file, in one shape for all."""

    where: str
    """File and line, for messages."""
    id: str | None
    turns: tuple[str, ...]
    """What the user says, earlier turns of a given chat left out; empty where the row does not tell."""
    answers: tuple[str, ...]
    """The answer to each turn; empty in a file of prompts, or where it is null."""
    category: str | None
    model: str | None
    row: Mapping[str, Any]
    item: Demonstration = _NO_PROMPT
    """The prompt of the first turn as training reads it: with system text, roles and functions."""

    @property
    def prompt(self) -> str | None:
        """What is said before the first answer, without system text."""
        if len(self.item.messages) > 1:
            return self.item.prompt
        return self.turns[0] if self.turns else None


def read_entries(source: str, *, key: str, with_answers: bool, columns: Mapping[str, str] | None = None) -> list[Entry]:
    """Read a file of responses, or of prompts.

    Understood are rows with a prompt (``prompt``, ``instruction``, ``question`` or LIMA's ``conversations``) and a
    ``response``, ``output`` or ``answer``; FastChat's ``turns`` and ``choices``; Arena-Hard's ``messages``. A prompt is
    read as the preset of its column reads it for training, from text or from messages.

    Args:
        source: JSON lines, JSON, CSV or Parquet.
        key: Option that names the file, for messages.
        with_answers: Whether the rows must have a response.
        columns: Column of each part in the data that the model was trained on: read so where a row has them.

    Raises:
        UserError: The file cannot be read, or a row has none of these shapes.
    """
    records = open_records(source, subset=None, hub_split="test", key=key)
    rows = records.read(range(len(records)))
    entries = []
    for number, row in enumerate(rows):
        where = f"{key}: {records.place(number)}"
        if not records.is_text:
            row = {name: _plain(cell, where, name) for name, cell in row.items()}
        elif not with_answers:
            _check_unicode(row, where)
        entries.append(_entry(row, where, with_answers=with_answers, trained=columns or {}))
    return entries


def recorded_columns(manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the column of each part in the data that a run recorded; empty without a record."""
    recorded = ((manifest or {}).get("data") or {}).get("demonstrations") or {}
    if recorded.get("preset") not in PRESETS:
        return {}
    return {**PRESETS[recorded["preset"]].columns, **(recorded.get("columns") or {})}


def _entry(row: Mapping[str, Any], where: str, *, with_answers: bool, trained: Mapping[str, str]) -> Entry:
    identifier = _first(row, ID_COLUMNS)
    if identifier is not None and (isinstance(identifier, bool) or not isinstance(identifier, str | int)):
        raise UserError(f"{where}: an id should be text or a whole number, found {identifier!r:.40}; change it")
    turns, item = _prompt(row, where, with_answers=with_answers, trained=trained)
    answers = _answers(row, where) if with_answers else ()
    if not with_answers and not turns:
        raise UserError(
            f"{where}: no prompt; needs one of the columns {', '.join(PROMPT_COLUMNS)}, 'turns' or 'messages'"
        )
    if not with_answers and item.prompt_problem:
        raise UserError(f"{where}: {item.prompt_problem}; repair or delete the row")
    category, model = _first(row, CATEGORY_COLUMNS), _first(row, MODEL_COLUMNS)
    return Entry(
        where=where,
        id=None if identifier is None else str(identifier),
        turns=turns,
        answers=answers,
        category=None if category is None else str(category),
        model=None if model is None else str(model),
        row=row,
        item=item,
    )


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)


def _prompt(
    row: Mapping[str, Any], where: str, *, with_answers: bool, trained: Mapping[str, str]
) -> tuple[tuple[str, ...], Demonstration]:
    """Return what the user says in turn, and the prompt of the first turn."""
    if "choices" in row or (with_answers and _is_conversation(row.get("messages"))):
        return (), _NO_PROMPT
    if row.get("turns") is not None:
        return _several(row["turns"], row, where)
    columns = _columns(row, trained)
    if not columns:
        return (), _NO_PROMPT
    cell = row[columns.get("messages", columns.get("prompt", ""))]
    if not isinstance(cell, str) and not is_chat(cell):
        return _several(cell, row, where)
    if "messages" in columns and isinstance(cell, str):  # LIMA's conversations of one turn
        columns = {**PRESETS["prompt_response"].columns, "prompt": columns["messages"]}
    item = build_demonstration(row, {part: name for part, name in columns.items() if part != "response"}, where=where)
    if not item.messages and isinstance(cell, str):  # nothing to train on, but it can be asked
        item = replace(item, messages=({"role": "user", "content": cell},))
    last = next((message["content"] for message in reversed(item.messages) if message["role"] == "user"), None)
    return () if last is None else (last,), item


def _columns(row: Mapping[str, Any], trained: Mapping[str, str]) -> Mapping[str, str]:
    """Return the column of each part of a row: the training data's, else those of the preset that fits its prompt."""
    if row.get(trained.get("messages", trained.get("prompt", ""))) is not None:
        return trained
    prompt = next((column for column in (*PROMPT_COLUMNS, "messages") if row.get(column) is not None), None)
    if prompt is None:
        return {}
    layouts = [preset.columns for preset in PRESETS.values()]
    fitting = [columns for columns in layouts if prompt in (columns.get("messages"), columns.get("prompt"))]
    # Of two presets with one name for the prompt, the one whose system column is there.
    return min(fitting, key=lambda columns: columns["system"] not in row)


def _several(found: object, row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], Demonstration]:
    """Read several turns of the user, which the model answers one after the other."""
    turns = [found] if isinstance(found, str) else found
    if not isinstance(turns, list | tuple) or not turns:
        raise UserError(f"{where}: a prompt should be text or a list of texts, found {found!r:.40}; change it")
    texts = [text for turn in turns if (text := _content(turn)) is not None]
    if len(texts) < len(turns):
        raise UserError(f"{where}: a turn should be text, found {turns!r:.60}; change it")
    messages = [{"role": "user", "content": texts[0]}]
    if (system := text_of(row.get("system"), where=where, column="system")).strip():
        messages.insert(0, {"role": "system", "content": system})
    return tuple(texts), Demonstration(messages=tuple(messages), response="")


def _answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "choices" in row:
        try:
            found: Any = row["choices"][0]["turns"]
        except (LookupError, TypeError):
            raise UserError(f"{where}: 'choices' should hold 'turns', as FastChat writes them; change it") from None
    elif _is_conversation(row.get("messages")):
        found = [message for message in row["messages"] if message.get("role") == "assistant"]
    elif any(column in row for column in RESPONSE_COLUMNS):
        found = _first(row, RESPONSE_COLUMNS)
    else:
        raise UserError(
            f"{where}: no response; needs one of the columns {', '.join(RESPONSE_COLUMNS)}, or FastChat's 'choices', "
            f"and has {', '.join(sorted(map(str, row)))}"
        )
    if found is None:
        return ()
    answers = [found] if isinstance(found, str) else found
    texts = [_content(answer) for answer in answers] if isinstance(answers, list | tuple) else [None]
    if any(text is None for text in texts):
        raise UserError(f"{where}: a response should be text or a list of texts, found {found!r:.60}; change it")
    return tuple(text for text in texts if text is not None)


def _is_conversation(messages: object) -> bool:
    return isinstance(messages, list) and bool(messages) and all(isinstance(message, dict) for message in messages)


def _content(turn: object) -> str | None:
    """Return the text of a turn: text itself, or ``content``, which Arena-Hard 2 puts below ``answer``."""
    while isinstance(turn, Mapping):
        turn = turn.get("content", turn.get("answer"))
    return turn if isinstance(turn, str) else None


def _check_unicode(row: Mapping[str, Any], where: str) -> None:
    for name, cell in row.items():
        try:
            json.dumps({name: cell}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"{where}: {shown!r} holds half a surrogate pair; repair or delete the row") from None


def _plain(value: Any, where: str, column: str) -> Any:
    """Return a cell of Parquet as what JSON can hold: responses are written beside their rows."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(cell, where, column) for name, cell in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(cell, where, column) for cell in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        raise UserError(f"{where}: column {column!r} holds bytes, not text; convert or drop the column")
    return str(value)
