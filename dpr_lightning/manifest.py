"""Directories that are complete or absent, and say what they are.

A directory is complete when its ``manifest.json`` stands in it: it is written last, into a temporary sibling that one
rename then puts in place. A run killed in between leaves a sibling named ``.<name>.partial`` that the next attempt
removes, and nothing under the final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpr_lightning.errors import UserError

MANIFEST = "manifest.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_PACKAGES = ("dpr-lightning", "torch", "lightning", "transformers", "datasets", "torchmetrics", "peft")


def write_directory(path: Path, write: Callable[[Path], None], manifest: Mapping[str, Any]) -> None:
    """Make ``path`` a complete directory, atomically; a complete one of that name is replaced.

    Call it on one process.

    Args:
        path: Final name.
        write: Fills the directory that it is given.
        manifest: Plain JSON values; time, versions and the weights' checksums are added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    record = {
        **manifest,
        "created": now(),
        "environment": environment(),
        "weights_sha256": {name: sha256_of_file(partial / name) for name in _weight_files(partial)},
    }
    atomic_write_json(partial / MANIFEST, record)
    for file in partial.rglob("*"):
        if file.is_file():
            _sync(file)
    _sync(partial)
    if path.exists():
        # A directory cannot be renamed over a full one; the old one steps aside first and is removed last.
        replaced = path.with_name(f".{path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced)
    else:
        partial.rename(path)
    _sync(path.parent)


def is_complete(path: Path) -> bool:
    """Return whether ``path`` is a directory that :func:`write_directory` finished."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a complete directory.

    Raises:
        UserError: There is none, or it is no JSON object.
    """
    if not is_complete(path):
        raise UserError(f"'{path}' has no {MANIFEST}, so it is not complete; write it again")
    return read_json(path / MANIFEST)


def verify(path: Path) -> None:
    """Check every weight file of a complete directory against its manifest.

    Raises:
        UserError: A file is missing or differs.
    """
    for name, expected in read_manifest(path)["weights_sha256"].items():
        file = path / name
        if not file.is_file() or sha256_of_file(file) != expected:
            raise UserError(f"'{file}' is missing or damaged (checksum differs from {MANIFEST}); write it again")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        UserError: It is no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not JSON ({error}); delete it and write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds {type(value).__name__} where an object should be; write it again")
    return value


def atomic_write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` to ``path`` by rename: readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n")
    _sync(partial)
    partial.rename(path)


def sha256_of_file(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hexadecimal digits of what ids mean to a model: every token with its id, and the special ids.

    Chat template, padding side and the like are left out: they change no log-probability.
    """
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = json.dumps([sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])), specials])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment() -> dict[str, str]:
    """Return the versions that a result depends on, and the commit of the checkout that is in use, if it is one."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        if git.returncode == 0:
            found["commit"] = git.stdout.strip()
    return found


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _weight_files(directory: Path) -> list[str]:
    return sorted(file.name for pattern in _WEIGHTS for file in directory.glob(pattern))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
