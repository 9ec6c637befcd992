"""Replies that were paid for, on disk: one SQLite file, a row a request, written when the verdict is known."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from dpr_lightning.errors import UserError
from dpr_lightning.judging.chat import Reply

_SECONDS_TO_WAIT = 60.0
"""For another run that writes to the same file."""


class ReplyCache:
    """A map from request keys to replies that survives the process, SIGKILL included; several runs may share it.

    Args:
        path: The file; it and its directory are made when needed.

    Raises:
        UserError: The file cannot be opened, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_SECONDS_TO_WAIT, isolation_level=None)
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            self._connection.execute("SELECT key, reply FROM replies LIMIT 1")
            # A file that can only be read should be found out before the first reply is paid for.
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES ('', '')")
            self._connection.execute("ROLLBACK")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--cache: '{path}' cannot be used as a cache ({error}); choose another file") from error

    def get(self, key: str) -> Reply | None:
        """Return the reply to a request; None where there is none."""
        found = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        try:
            return None if found is None else Reply(**json.loads(found[0]))
        except (ValueError, TypeError):
            return None  # written by another version: ask again

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; when this returns, it is on disk.

        Raises:
            UserError: The disk is full, or another program holds the file.
        """
        try:
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(asdict(reply))))
        except sqlite3.Error as error:
            raise UserError(
                f"--cache: '{self.path}' cannot be written to ({error}); make room and run the same command again"
            ) from error

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM replies").fetchone()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
