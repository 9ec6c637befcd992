"""Where things are kept that can be made again at any time."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "DPR_LIGHTNING_CACHE"
"""Environment variable that names another directory."""


def cache_directory() -> Path:
    """Return the directory, which need not exist: ``$DPR_LIGHTNING_CACHE``, else below the user's cache directory."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpr_lightning"
