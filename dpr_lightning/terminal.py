"""Consoles and tables that print text as it is: names of methods, prompts and errors may hold ``[/b]`` or ``:x:``."""

from __future__ import annotations

import sys
from typing import Any

import rich.table
from rich.console import Console, RenderableType
from rich.text import Text
from typing_extensions import override


def make_console(width: int) -> Console:
    """Return a console on standard output that reads neither markup nor emoji codes, ``width`` wide in a file."""
    return Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False)


def headline(text: str) -> Text:
    """Return the title of a rule."""
    return Text(text, style="bold")


class Table(rich.table.Table):
    """A table whose cells, headers and title are text as it is, on whichever console."""

    def __init__(self, *headers: str, title: str | None = None, **kwargs: Any) -> None:
        super().__init__(*headers, title=None if title is None else Text(title, style="table.title"), **kwargs)

    @override
    def add_column(self, header: RenderableType = "", *args: Any, **kwargs: Any) -> None:
        super().add_column(_verbatim(header), *args, **kwargs)

    @override
    def add_row(self, *cells: RenderableType | None, **kwargs: Any) -> None:
        super().add_row(*map(_verbatim, cells), **kwargs)


def _verbatim(cell: Any) -> Any:
    return Text(cell) if isinstance(cell, str) else cell
