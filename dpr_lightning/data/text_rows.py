"""Reads JSON lines, JSON arrays and CSV row by row, each row as its JSON text with the place that it came from.

A row that later code could not hold (text that is no Unicode, nesting without end, numbers of thousands of digits) is
refused here or counted by the encoder, with its file and line, before any weights load.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpr_lightning.errors import UserError

# The csv module's default limit of 128 KiB a cell is below the length of real responses; a C long is the largest.
_CSV_CELL_LIMIT = 2**31 - 1
_DELIMITERS = {";": "';'", "\t": "a tab", "|": "'|'"}
"""Separators that files called CSV have in place of the comma, and their names in messages."""
_MAX_DEPTH = 200
"""Levels of nesting. Python's limit depends on how deep the caller is, so a row could be read here and fail later."""
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def text_rows(files: tuple[str, ...], stamps: tuple[tuple[int, int], ...], key: str) -> Iterator[dict[str, Any]]:
    """Yield every row: ``record`` (JSON text), ``file`` (its number), ``line``, and ``new_columns``.

    Args:
        files: Paths of one kind.
        stamps: Size and time of each; part of the arguments so that an edited file does not meet its own stale cache.
        key: Configuration key of the source, for messages.

    Raises:
        UserError: A file or row cannot be read; names it.
    """
    del stamps
    num_rows = 0
    columns: set[str] = set()
    for file_index, file in enumerate(files):
        suffix = Path(file).suffix.lower()
        try:
            rows = _csv_rows(file, key) if suffix == ".csv" else _json_rows(file, key)
            for line, record, names in rows:
                new_columns = None
                if not columns.issuperset(names):
                    # The keys that no row before has: the reader finds the union without another pass.
                    new_columns = json.dumps([name for name in names if name not in columns])
                    columns.update(names)
                yield {"record": record, "file": file_index, "line": line, "new_columns": new_columns}
                num_rows += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{key}: {file} is not UTF-8 text ({_undecodable(file)}); convert it") from error
    if num_rows == 0:
        raise UserError(f"{key}: {', '.join(files)} holds no rows; give at least one")


def holds_an_array(file: str) -> bool:
    """Return whether a JSON file is one array, whose rows are counted by item and not by line."""
    if Path(file).suffix.lower() == ".csv":
        return False
    with open(file, encoding="utf-8-sig") as stream:
        return _first_character(stream) == "["


def _first_character(stream: Any) -> str:
    head: str = stream.read(1)
    while head.isspace():
        head = stream.read(1)
    return head


def _undecodable(file: str) -> str:
    """Say where the first byte lies that is not UTF-8."""
    with open(file, "rb") as stream:
        for line, raw in enumerate(stream, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {line}, byte {error.start + 1} of the line"
    return "another encoding"


def _json_rows(file: str, key: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with open(file, encoding="utf-8-sig") as stream:
        head = _first_character(stream)
        stream.seek(0)
        if head == "[":
            yield from _json_array_rows(stream.read(), file, key)
            return
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{key}: {file} line {line}: broken JSON ({error.msg} at column {error.colno}); "
                    "repair or delete the line"
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{key}: {file} line {line}: {_beyond_limits(error)}; delete the line") from error
            _check(record, text, f"{key}: {file} line {line}")
            yield line, text, record


def _json_array_rows(text: str, file: str, key: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Decode item by item: one is in memory at a time, and a broken one is known by its number."""
    row = 0
    try:
        for record, item in _array_items(text):
            row += 1
            if not isinstance(record, dict):
                json.loads(text)  # a file that is no JSON at all is told first
            _check(record, item, f"{key}: {file} row {row}")
            yield row, item, record
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}: {file} line {error.lineno}: broken JSON ({error.msg} at column {error.colno}); repair the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {file} row {row + 1}: {_beyond_limits(error)}; delete the row") from error


def _array_items(text: str) -> Iterator[tuple[Any, str]]:
    def skip(at: int) -> int:
        match = _SPACE.match(text, at)
        assert match is not None
        return match.end()

    at = skip(text.index("[") + 1)
    if text[at : at + 1] != "]":
        while True:
            record, end = _DECODER.raw_decode(text, at)
            yield record, text[at:end]
            at = skip(end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = skip(at + 1)
    if (end := skip(at + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _beyond_limits(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return f"JSON nested more than {_MAX_DEPTH} deep"
    return "a whole number of thousands of digits" if "digits" in str(error) else f"unreadable JSON ({error})"


def _check(record: object, text: str, where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(
            f'{where} holds {type(record).__name__}, not an object; write one {{"column": value}} object a row'
        )
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += (match[1] is not None) - (match[2] is not None)
        if depth > _MAX_DEPTH:
            raise UserError(f"{where}: JSON nested more than {_MAX_DEPTH} deep; flatten or delete the row")


def _csv_rows(file: str, key: str) -> Iterator[tuple[int, str, dict[str, str]]]:
    csv.field_size_limit(_CSV_CELL_LIMIT)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            _check_header(header, file, key)
            start = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{key}: {file} line {start} has {len(cells)} cells, the header {len(header)}; quote the cells"
                    )
                if cells:
                    record = dict(zip(header, cells, strict=True))
                    yield start, json.dumps(record), record
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{key}: {file} line {reader.line_num}: broken CSV ({error}); repair the line") from error


def _check_header(header: list[str], file: str, key: str) -> None:
    if len(set(header)) != len(header):
        raise UserError(f"{key}: {file} names a column twice ({', '.join(header)}); rename one")
    delimiter = max(_DELIMITERS, key=",".join(header).count)
    # A comma within a name is rare; more of another separator than of commas is a file of that separator.
    if ",".join(header).count(delimiter) > len(header) - 1:
        raise UserError(
            f"{key}: {file} is separated by {_DELIMITERS[delimiter]} (its header is {','.join(header)!r:.80}), and CSV "
            "is read with ',' between cells; write it with commas, or as JSON lines"
        )
