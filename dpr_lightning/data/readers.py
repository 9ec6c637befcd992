"""Opens a source of records: local files or a hub data set, memory-mapped through ``datasets``.

JSON and CSV records have no reliable types of their own (a column may hold numbers in one row and text in another),
so each is kept as its JSON text and parsed when it is read. Parquet files and hub data sets keep their own columns.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]

from dpr_lightning.errors import UserError

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")

_TEXT_FEATURES = datasets.Features(
    {"record": datasets.Value("large_string"), "file": datasets.Value("int32"), "line": datasets.Value("int64")}
)
_NUM_ROWS_FOR_COLUMNS = 100
_LARGE = 64 * 2**20
"""Bytes that take more than a moment to read."""
# The csv module's default limit of 128 KiB a cell is below the length of real responses; a C long is the largest.
_CSV_CELL_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Records:
    """Rows of one source, read from disk on demand."""

    dataset: datasets.Dataset
    """Either the source's own columns, or the columns of ``_TEXT_FEATURES``."""
    files: tuple[str, ...]
    """Local files in reading order; empty for a hub data set."""
    columns: tuple[str, ...]
    """Names of the source's columns (of its first rows, where each row may have its own)."""
    is_text: bool
    """True where each row is stored as JSON text."""

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the records at ``indices`` (0-based), in that order."""
        if self.is_text:
            return [json.loads(text) for text in self.dataset[list(indices)]["record"]]
        chunk = self.dataset[list(indices)]
        return [{name: chunk[name][i] for name in self.columns} for i in range(len(indices))]

    def locate(self, index: int) -> str:
        """Say where record ``index`` lies, in words fit for an error message."""
        if self.is_text:
            row = self.dataset[int(index)]
            return f"{self.files[row['file']]} line {row['line']}"
        return f"row {index + 1}"


def open_records(source: str, *, subset: str | None, hub_split: str, key: str) -> Records:
    """Open local files (one path or a glob pattern) or, where no such file exists, a hub data set.

    Args:
        source: Path, glob pattern, or hub name.
        subset: Configuration of a hub data set.
        hub_split: Split of a hub data set.
        key: Configuration key of ``source``, for messages.

    Raises:
        UserError: Nothing is found, a file is empty, of an unknown kind, or broken (with file and line).
    """
    files = local_files(source, key)
    if not files:
        return _open_hub(source, subset, hub_split, key)
    kinds = {Path(file).suffix.lower() for file in files}
    if len(kinds) > 1:
        raise UserError(f"{key}: {source!r} mixes {', '.join(sorted(kinds))} files; give files of one kind")
    for file in files:
        if Path(file).stat().st_size == 0:
            raise UserError(f"{key}: {file} is empty; give a file with at least one row")
    kind = kinds.pop()
    return _open_parquet(files, key) if kind == ".parquet" else _open_text(files, key)


def local_files(source: str, key: str) -> tuple[str, ...]:
    """Return the local files that ``source`` names; none where it can only be a hub data set.

    Raises:
        UserError: It names a file that is not there, or of an unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(
            f"{key}: {source} is a directory; give a file or a pattern such as {source.rstrip('/')}/*.jsonl"
        )
    files = (str(path),) if path.is_file() else tuple(sorted(glob.glob(str(path), recursive=True)))
    if not files and (path.suffix.lower() in FILE_KINDS or glob.has_magic(source) or path.is_absolute()):
        raise UserError(f"{key}: no file {source} (looked from {Path.cwd()}); give an existing path")
    for file in files:
        if Path(file).suffix.lower() not in FILE_KINDS:
            raise UserError(f"{key}: {file} is not one of {', '.join(FILE_KINDS)}; convert it or rename it")
    return files


def _open_hub(source: str, subset: str | None, hub_split: str, key: str) -> Records:
    try:
        dataset = datasets.load_dataset(source, subset, split=hub_split)
    except Exception as error:  # the hub client raises a different type for every way of being unreachable
        reason = _first_line(error)
        raise UserError(f"{key}: {source!r} is no local file, and the hub did not give it: {reason}") from error
    return Records(dataset, (), tuple(dataset.column_names), is_text=False)


def _open_parquet(files: tuple[str, ...], key: str) -> Records:
    try:
        with _bars_for(files):
            dataset = datasets.load_dataset("parquet", data_files=list(files), split="train")
    except Exception as error:  # wrapped differently by every version of datasets and pyarrow
        raise UserError(f"{key}: {', '.join(files)} cannot be read as Parquet: {_first_line(error)}") from error
    if len(dataset) == 0:
        raise UserError(f"{key}: {', '.join(files)} holds no rows; give at least one")
    return Records(dataset, files, tuple(dataset.column_names), is_text=False)


def _open_text(files: tuple[str, ...], key: str) -> Records:
    # Size and time are part of the arguments so that an edited file does not meet its own stale cache.
    # Tuples, not lists: datasets takes a list for shards and would call the generator once for each of its items.
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in (Path(file).stat() for file in files))
    absolute = tuple(str(Path(file).resolve()) for file in files)
    try:
        with _bars_for(files):
            dataset = datasets.Dataset.from_generator(
                _text_rows, features=_TEXT_FEATURES, gen_kwargs={"files": absolute, "stamps": stamps, "key": key}
            )
    except Exception as error:  # datasets wraps what our generator raises; only the user's mistakes are unwrapped
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    columns: dict[str, None] = {}
    for text in dataset[:_NUM_ROWS_FOR_COLUMNS]["record"]:
        columns.update(dict.fromkeys(json.loads(text)))
    return Records(dataset, files, tuple(columns), is_text=True)


@contextmanager
def _bars_for(files: Sequence[str]) -> Iterator[None]:
    """Let ``datasets`` show a progress bar while it reads, unless the files are read in a moment."""
    is_large = sum(Path(file).stat().st_size for file in files) >= _LARGE
    if is_large or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _text_rows(files: tuple[str, ...], stamps: tuple[tuple[int, int], ...], key: str) -> Iterator[dict[str, Any]]:
    del stamps  # see _open_text
    num_rows = 0
    for file_index, file in enumerate(files):
        suffix = Path(file).suffix.lower()
        try:
            rows = _csv_rows(file, key) if suffix == ".csv" else _json_rows(file, key)
            for line, record in rows:
                yield {"record": record, "file": file_index, "line": line}
                num_rows += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{key}: {file} is not UTF-8 text (byte {error.start}); convert it") from error
    if num_rows == 0:
        raise UserError(f"{key}: {', '.join(files)} holds no rows; give at least one")


def _json_rows(file: str, key: str) -> Iterator[tuple[int, str]]:
    with open(file, encoding="utf-8-sig") as stream:
        head = stream.read(1)
        while head.isspace():
            head = stream.read(1)
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
            _check_object(record, file, line, key)
            yield line, text


def _json_array_rows(text: str, file: str, key: str) -> Iterator[tuple[int, str]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}: {file} line {error.lineno}: broken JSON ({error.msg} at column {error.colno}); repair the file"
        ) from error
    for row, record in enumerate(records, start=1):
        _check_object(record, file, row, key)
        yield row, json.dumps(record)


def _check_object(record: object, file: str, line: int, key: str) -> None:
    if not isinstance(record, dict):
        raise UserError(
            f"{key}: {file} line {line} holds {type(record).__name__}, not an object; "
            'write one {"column": value} object a row'
        )


def _csv_rows(file: str, key: str) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(_CSV_CELL_LIMIT)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(f"{key}: {file} names a column twice ({', '.join(header)}); rename one")
            start = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{key}: {file} line {start} has {len(cells)} cells, the header {len(header)}; quote the cells"
                    )
                if cells:
                    yield start, json.dumps(dict(zip(header, cells, strict=True)))
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{key}: {file} line {reader.line_num}: broken CSV ({error}); repair the line") from error


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause) or type(cause).__name__).splitlines()[0]
