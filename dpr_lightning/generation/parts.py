"""Blocks of rows on disk: each complete or absent, put together in one file when the last one is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpr_lightning.errors import UserError
from dpr_lightning.manifest import atomic_write_json, atomic_write_text, read_json

_SETTINGS = "settings.json"


class Parts:
    """Rows of one output file, block by block.

    While the file is not whole its blocks lie in ``<file>.parts/``; then the file is written by one rename, its record
    beside it in ``<file>.manifest.json``, and the blocks are removed.

    Args:
        path: The output file.
        settings: Everything that the rows depend on, as plain JSON values.

    Raises:
        UserError: The file or its blocks are of other settings, or another program's.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        if path.suffix not in (".jsonl", ".json"):
            raise UserError(f"--out: found '{path.name}'; give a name that ends in .jsonl, or in .json for one array")
        self.path = path
        self.manifest_path = path.with_name(f"{path.name}.manifest.json")
        self.directory = path.with_name(f"{path.name}.parts")
        self.settings = settings
        if path.exists() and not self.manifest_path.is_file():
            raise UserError(f"--out: '{path}' is there and was not written by generate; choose another, or delete it")
        if self.is_complete:
            self._compare(read_json(self.manifest_path).get("settings", {}))
        elif (self.directory / _SETTINGS).is_file():
            self._compare(read_json(self.directory / _SETTINGS))

    @property
    def is_complete(self) -> bool:
        """Whether the file is there and whole."""
        return self.path.is_file() and self.manifest_path.is_file()

    def has(self, number: int) -> bool:
        """Return whether block ``number`` is on disk."""
        return self._part(number).is_file()

    def write(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the rows of block ``number``; when this returns, they are on disk."""
        if not (self.directory / _SETTINGS).is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self.directory / _SETTINGS, self.settings)
        _write_lines(self._part(number), rows)

    def rows(self, num_blocks: int) -> list[dict[str, Any]]:
        """Return the rows of all blocks."""
        return [
            json.loads(line)
            for number in range(num_blocks)
            for line in self._part(number).read_text(encoding="utf-8").splitlines()
        ]

    def finish(self, rows: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
        """Write the file and its record, and remove the blocks."""
        # The record of an older file goes first: a file without one is never taken for whole.
        self.manifest_path.unlink(missing_ok=True)
        if self.path.suffix == ".json":
            atomic_write_text(self.path, json.dumps(list(rows), indent=1) + "\n")
        else:
            _write_lines(self.path, rows)
        atomic_write_json(self.manifest_path, {**record, "settings": self.settings})
        shutil.rmtree(self.directory, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.directory / f"block-{number:05d}.jsonl"

    def _compare(self, recorded: dict[str, Any]) -> None:
        changed = sorted(name for name in {*recorded, *self.settings} if recorded.get(name) != self.settings.get(name))
        if changed:
            found = ", ".join(f"{name} (was {recorded.get(name)}, is {self.settings.get(name)})" for name in changed)
            raise UserError(f"--out: '{self.path}' was begun with other input: {found}; choose another, or delete it")


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    # ASCII only: no character of a response can then break a line.
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
