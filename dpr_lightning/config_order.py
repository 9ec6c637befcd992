"""Which order of configuration files works, where a key came before the class that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpr_lightning.yaml_text import load_yaml

ORDER = "configs merge left to right: base, recipe, backbone, hardware"


def explain_order(key: str, files: Mapping[str, Path], args: Sequence[str]) -> str | None:
    """Return why ``key`` is unknown where the order of files is the reason; None where it is not.

    Args:
        key: What was refused, such as ``data.micro_batch_size``.
        files: Those of ``-c`` by what was written, in their order.
        args: The whole command line, which may name a class itself.
    """
    part = key.partition(".")[0]
    if part not in ("model", "data") or any(arg.split("=")[0] in (f"--{part}", f"--{part}.class_path") for arg in args):
        return None
    early: str | None = None
    for path, file in files.items():
        settings = _part(file, part)
        if "class_path" in settings:
            if early is None:
                return None
            return (
                f"it belongs to the class that '{path}' names, which comes after '{early}'; {ORDER}: put '{path}' first"
            )
        if settings and early is None:
            early = path
    if early is None:
        return None
    return (
        f"no file names the class of '{part}' that it belongs to; put one before '{early}', such as "
        f"-c configs/recipe/sft.yaml ({ORDER})"
    )


def _part(path: Path, part: str) -> dict[str, Any]:
    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    found = config.get(part) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}
