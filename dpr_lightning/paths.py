"""Questions to the file system that have an answer for every text, names past its limit included."""

from __future__ import annotations

from pathlib import Path


def exists(path: Path) -> bool:
    """Return whether ``path`` exists; False for what can be the name of nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a file; False for what can be the name of nothing."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """Return whether ``path`` is a directory; False for what can be the name of nothing."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
