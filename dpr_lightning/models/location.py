"""Whether a name of a model can only mean a directory, so that one which is not there is refused at once."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from dpr_lightning.paths import exists


def is_missing_directory(name_or_path: str) -> bool:
    """Return whether a name is of a directory that is not here, and cannot be one of a model on the hub.

    The hub knows ``name`` and ``owner/name``. A path is absolute, begins with ``.`` or ``~``, has more than one slash,
    lies in a directory that is here, or holds what no hub name may.
    """
    path = Path(name_or_path)
    if exists(path):
        return False
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        return True
    if "/" in name_or_path and exists(path.parent):
        return True
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return True
    return False


def suggestion(name_or_path: str) -> str | None:
    """Return an existing path that was probably meant by one that does not exist; None where none is alike."""
    expanded = Path(os.path.expanduser(name_or_path))
    if exists(expanded):
        return None if expanded == Path(name_or_path) else str(expanded)
    if "/" not in name_or_path:
        return None
    missing, parent = expanded, expanded.parent
    while not exists(parent) and parent != parent.parent:
        missing, parent = parent, parent.parent
    try:
        names = [path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return None
    close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75)
    return str(parent / close[0]) if close else None
