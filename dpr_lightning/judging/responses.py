"""Files of responses and of prompts: which shapes of rows are understood, and reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpr_lightning.data.readers import open_records
from dpr_lightning.errors import UserError

ID_COLUMNS = ("id", "question_id", "uid", "row", "index", "key")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "conversations")
RESPONSE_COLUMNS = ("response", "output", "answer")
CATEGORY_COLUMNS = ("category", "dataset")
MODEL_COLUMNS = ("model", "model_id", "generator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of a file, in one shape for all."""

    where: str
    """File and line, for messages."""
    id: str | None
    turns: tuple[str, ...]
    """What the user says; empty where the row does not tell."""
    answers: tuple[str, ...]
    """The answer to each turn; empty in a file of prompts, or where it is null."""
    category: str | None
    model: str | None
    row: Mapping[str, Any]

    @property
    def prompt(self) -> str | None:
        """The first turn."""
        return self.turns[0] if self.turns else None


def read_entries(source: str, *, key: str, with_answers: bool) -> list[Entry]:
    """Read a file of responses, or of prompts.

    Understood are rows with a prompt (``prompt``, ``instruction``, ``question`` or LIMA's ``conversations``) and a
    ``response``, ``output`` or ``answer``; FastChat's ``turns`` and ``choices``; Arena-Hard's ``messages``.

    Args:
        source: JSON lines, JSON, CSV or Parquet.
        key: Option that names the file, for messages.
        with_answers: Whether the rows must have a response.

    Raises:
        UserError: The file cannot be read, or a row has none of these shapes.
    """
    records = open_records(source, subset=None, hub_split="test", key=key)
    rows = records.read(range(len(records)))
    return [
        _entry(row, f"{key}: {records.locate(number)}", with_answers=with_answers) for number, row in enumerate(rows)
    ]


def _entry(row: Mapping[str, Any], where: str, *, with_answers: bool) -> Entry:
    identifier = _first(row, ID_COLUMNS)
    if identifier is not None and (isinstance(identifier, bool) or not isinstance(identifier, str | int)):
        raise UserError(f"{where}: an id should be text or a whole number, found {identifier!r:.40}; change it")
    turns = _turns(row, where)
    answers = _answers(row, where) if with_answers else ()
    if not with_answers and not turns:
        raise UserError(f"{where}: no prompt; needs one of the columns {', '.join(PROMPT_COLUMNS)} or 'turns'")
    category, model = _first(row, CATEGORY_COLUMNS), _first(row, MODEL_COLUMNS)
    return Entry(
        where=where,
        id=None if identifier is None else str(identifier),
        turns=turns,
        answers=answers,
        category=None if category is None else str(category),
        model=None if model is None else str(model),
        row=row,
    )


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)


def _turns(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "choices" in row or _is_conversation(row.get("messages")):
        return ()
    found = row.get("turns") if row.get("turns") is not None else _first(row, PROMPT_COLUMNS)
    if found is None:
        return ()
    turns = [found] if isinstance(found, str) else found
    if not isinstance(turns, list | tuple) or not turns:
        raise UserError(f"{where}: a prompt should be text or a list of texts, found {found!r:.40}; change it")
    texts = [_content(turn) for turn in turns]
    if any(text is None for text in texts):
        raise UserError(f"{where}: a turn should be text, found {turns!r:.60}; change it")
    return tuple(text for text in texts if text is not None)


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
