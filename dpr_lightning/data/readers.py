"""Opens a source of records: local files or a hub data set, memory-mapped through ``datasets``.

JSON and CSV records have no reliable types of their own (a column may hold numbers in one row and text in another),
so each is kept as its JSON text and parsed when it is read. Parquet files and hub data sets keep their own columns.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from dpr_lightning.data.text_rows import holds_an_array, text_rows
from dpr_lightning.errors import UserError
from dpr_lightning.models.location import is_missing_directory

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")

_TEXT_FEATURES = datasets.Features(
    {
        "record": datasets.Value("large_string"),
        "file": datasets.Value("int32"),
        "line": datasets.Value("int64"),
        "new_columns": datasets.Value("string"),
    }
)
_LARGE = 64 * 2**20
"""Bytes that take more than a moment to read."""


@dataclass(frozen=True, slots=True)
class Records:
    """Rows of one source, read from disk on demand."""

    dataset: datasets.Dataset
    """Either the source's own columns, or the columns of ``_TEXT_FEATURES``."""
    files: tuple[str, ...]
    """Local files in reading order; empty for a hub data set."""
    columns: tuple[str, ...]
    """Names of all columns: where rows have different keys, the union over every row of every file."""
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
        """Say where record ``index`` lies, as :meth:`place` does, but count the items of a JSON array as lines."""
        if not self.is_text:
            return self.place(index)
        row = self.dataset[int(index)]
        return f"{self.files[row['file']]} line {row['line']}"

    def place(self, index: int) -> str:
        """Say where record ``index`` lies, in words fit for an error message: file, and line or row."""
        if self.is_text:
            row = self.dataset[int(index)]
            file = self.files[row["file"]]
            return f"{file} {'row' if holds_an_array(file) else 'line'} {row['line']}"
        first = 0
        for file in self.files:
            num_rows = pq.ParquetFile(file).metadata.num_rows
            if index < first + num_rows:
                return f"{file} row {index - first + 1}"
            first += num_rows
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
    # What the hub cannot know is refused here: to try it would take most of a minute.
    is_local = path.suffix.lower() in FILE_KINDS or glob.has_magic(source) or is_missing_directory(source)
    if not files and is_local:
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
            dataset = datasets.load_dataset(
                "parquet", data_files=list(files), split="train", features=_union_of_columns(files)
            )
    except Exception as error:  # wrapped differently by every version of datasets and pyarrow
        raise UserError(f"{key}: {', '.join(files)} cannot be read as Parquet: {_first_line(error)}") from error
    if len(dataset) == 0:
        raise UserError(f"{key}: {', '.join(files)} holds no rows; give at least one")
    return Records(dataset, files, tuple(dataset.column_names), is_text=False)


def _union_of_columns(files: Sequence[str]) -> datasets.Features | None:
    """Return the columns of all files where they differ; None lets ``datasets`` read the one set that there is."""
    if len(files) == 1:
        return None
    schemas = [datasets.Features.from_arrow_schema(pq.read_schema(file)).arrow_schema for file in files]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return None
    return datasets.Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))


def _open_text(files: tuple[str, ...], key: str) -> Records:
    # Size and time are part of the arguments so that an edited file does not meet its own stale cache.
    # Tuples, not lists: datasets takes a list for shards and would call the generator once for each of its items.
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in (Path(file).stat() for file in files))
    absolute = tuple(str(Path(file).resolve()) for file in files)
    try:
        with _bars_for(files):
            dataset = datasets.Dataset.from_generator(
                text_rows, features=_TEXT_FEATURES, gen_kwargs={"files": absolute, "stamps": stamps, "key": key}
            )
    except Exception as error:  # datasets wraps what our generator raises; only the user's mistakes are unwrapped
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    # Each column is named once, in the row where it first occurs: its other cells are null and cost nothing to read.
    columns = [name for text in dataset.data.column("new_columns").drop_null().to_pylist() for name in json.loads(text)]
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


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause) or type(cause).__name__).splitlines()[0]
