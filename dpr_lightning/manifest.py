"""Directories that are complete or absent, and say what they are.

A directory is complete when its ``manifest.json`` stands in it: it is written last, into a hidden sibling that one
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
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpr_lightning import __version__
from dpr_lightning.errors import UserError

MANIFEST = "manifest.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "peft")


def write_directory(
    path: Path,
    write: Callable[[Path], None],
    manifest: Mapping[str, Any],
    *,
    is_writer: bool = True,
    exist_ok: bool = False,
) -> None:
    """Make ``path`` a complete directory, atomically.

    With several processes all call it, because gathering sharded weights takes all of them; one is the writer. The
    others return once ``write`` has: a barrier after the call is the caller's business.

    Args:
        path: Final name.
        write: Fills the directory that it is given; on processes other than the writer it must write nothing.
        manifest: Plain JSON values; the time, the environment and the weights' checksums are added.
        is_writer: Whether this process makes the directory.
        exist_ok: Replace a complete directory of that name.

    Raises:
        UserError: ``path`` is taken, see :func:`refuse_taken`; on the writer only.
    """
    partial, replaced = _sibling(path, "partial"), _sibling(path, "replaced")
    if not is_writer:
        write(partial)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    refuse_taken(path, exist_ok=exist_ok)
    try:
        partial.mkdir()
        write(partial)
        record = {
            **manifest,
            "created": now(),
            "environment": environment(),
            "weights_sha256": sha256_of_files(partial),
        }
        for file in partial.rglob("*"):
            _sync(file)
        atomic_write_json(partial / MANIFEST, record)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if is_complete(path):
        # A directory cannot be renamed over a full one: the old one steps aside first and is removed last.
        path.rename(replaced)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def refuse_taken(path: Path, *, exist_ok: bool) -> None:
    """Refuse a name under which :func:`write_directory` could not, or should not, put a directory.

    Args:
        path: Final name.
        exist_ok: Whether a complete directory may be replaced. One without a manifest is not ours and never is.

    Raises:
        UserError: The name is taken.
    """
    if is_complete(path):
        if not exist_ok:
            raise UserError(f"'{path}' is already there and complete; delete it or choose another run directory")
    elif path.is_dir():
        if any(path.iterdir()):
            raise UserError(f"'{path}' holds files but no {MANIFEST}, so no finished run wrote it; move it away")
    elif path.exists():
        raise UserError(f"'{path}' is a file where a directory should be written; move it away")


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
    """Check every weight file of a complete directory against its manifest; reads all of them.

    Raises:
        UserError: The directory is not complete, or a weight file is missing, changed, or was added.
    """
    expected = read_manifest(path).get("weights_sha256", {})
    found = sha256_of_files(path)
    for name in sorted({*expected, *found}):
        if name not in found:
            raise UserError(f"'{path / name}' is missing, but {MANIFEST} lists it; write the directory again")
        if found[name] != expected.get(name):
            raise UserError(f"'{path / name}' is not the file that {MANIFEST} lists (SHA-256); write it again")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        UserError: It is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON ({error}); delete it and write it again") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); put it back or delete it") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds a {type(value).__name__} where an object should be; write it again")
    return value


_RUN_RECORD: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "run_id": str,
    "status": str,
    "reason": str,
    "started": str,
    "ended": str,
    "command": str,
    "module": str,
    "environment": dict,
    "world_size": int,
    "optimizer_steps": int,
    "tokens": dict,
    "data": dict,
}
"""What ``run.json`` holds; anything but ``status`` may be missing or null."""


def read_run_record(path: Path) -> dict[str, Any]:
    """Return the content of a ``run.json``.

    Raises:
        UserError: It is no JSON object, or holds something else than a run records.
    """
    record = read_json(path)
    advice = "put the file back, or delete it and the run begins anew"
    for key, kind in _RUN_RECORD.items():
        value = record.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"'{path}': '{key}' is {value!r:.40}, which no run records; {advice}")
    splits = (record.get("data") or {}).get("splits")
    is_known = isinstance(splits, dict) and all(isinstance(split, dict) for split in splits.values())
    if splits is not None and not is_known:
        raise UserError(f"'{path}': 'data.splits' is {splits!r:.40}, which no run records; {advice}")
    return record


def atomic_write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` to ``path`` by rename: readers see the old file or the new one.

    Values that JSON does not know (paths, types) become their ``str``.
    """
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8 by rename; what UTF-8 cannot hold (lone surrogates) becomes "?"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path, "partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def sha256_of_files(directory: Path) -> dict[str, str]:
    """Return the SHA-256, in hexadecimal digits, of every weight file below ``directory``, by relative name."""
    found: dict[str, str] = {}
    for file in sorted(file for pattern in _WEIGHTS for file in directory.rglob(pattern)):
        with file.open("rb") as stream:
            found[file.relative_to(directory).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def weights_fingerprint(name_or_path: str) -> str:
    """Return 16 hexadecimal digits that tell weights from others; a hub name is its own.

    Directories of ours go by the checksums in their manifest, others by the names, sizes and times of their files: no
    weight is read.
    """
    directory = Path(name_or_path)
    if not directory.is_dir():
        return name_or_path
    found: Any = read_manifest(directory).get("weights_sha256") if is_complete(directory) else None
    if not found:
        files = sorted(file for pattern in _WEIGHTS for file in directory.glob(pattern))
        found = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hexadecimal digits of what a tokenizer's ids mean: tokens, merges, and the ids of BOS and EOS.

    Chat template, padding and truncation settings are left out: they change no log-probability.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    # A tokenizer in pure Python has no backend, and its merges, if any, follow from its vocabulary.
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges", []) if hasattr(backend, "to_str") else []
    text = json.dumps([vocabulary, merges, tokenizer.bos_token_id, tokenizer.eos_token_id])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment() -> dict[str, str]:
    """Return the versions that a result depends on, and the commit of the checkout that is in use, if it is one."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "dpr-lightning": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists() and shutil.which("git") is not None:
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
        if git.returncode == 0:
            found["commit"] = git.stdout.strip()
    return found


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def recorded_run_id(run_dir: Path) -> str | None:
    """Return what tells the products of the run in a directory from those of others; None where no run is recorded."""
    record = run_dir / "run.json"
    return read_run_record(record).get("run_id") if record.is_file() else None


def is_of_run(path: Path, run_id: str | None) -> bool:
    """Return whether ``path`` is a complete directory that the run of this id wrote."""
    return run_id is not None and is_complete(path) and read_manifest(path).get("run_id") == run_id


def clear_leftovers(directory: Path) -> None:
    """Undo what processes that were killed while they wrote into ``directory`` left behind."""
    for leftover in [*directory.glob(".*.partial"), *directory.glob(".*.replaced")]:
        if leftover.is_dir():
            _clear_leftovers(directory / leftover.name[1:].rpartition(".")[0])
        else:
            leftover.unlink(missing_ok=True)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _clear_leftovers(path: Path) -> None:
    """Undo what a process killed inside :func:`write_directory` left behind."""
    shutil.rmtree(_sibling(path, "partial"), ignore_errors=True)
    replaced = _sibling(path, "replaced")
    if replaced.is_dir() and not path.exists():
        replaced.rename(path)  # killed between the two renames of a replacement
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
