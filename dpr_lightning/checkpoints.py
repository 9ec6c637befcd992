"""Checkpoints that are whole or noticed not to be: written under another name first, and verified before they are used.

A checkpoint is one file (torch's archive, whose entries carry a CRC-32 each) or, of sharded weights, a directory with
a manifest of its files' sizes and CRC-32s. Both appear by one rename, so a run that is killed while it writes leaves
only a hidden sibling. Checksums find what happens later: disks that fill up or fail, copies that break off.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import distributed
from typing_extensions import override

from dpr_lightning.errors import CheckpointError, UserError

MANIFEST = "checksums.json"
META = "meta.pt"
"""Lightning's name of the file in a sharded checkpoint's directory that holds all but weights and optimizer states."""
_NAME = re.compile(r"step=(\d+)\.ckpt")
_BLOCK = 1 << 22
_PARTIAL = ".partial"


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and reads them safely: tensors and plain values only.

    ``load_checkpoint`` of a directory of checkpoints takes the newest whole one in it.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        try:
            torch.save(checkpoint, partial)
            put_in_place(partial, path)
        except (OSError, RuntimeError) as error:
            # torch's writer says no more than that it could not write.
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free / 2**30
            raise CheckpointError(
                f"'{path}' could not be written ({error}; {free:.1f} GiB are free there); checkpoints from before are "
                "good: make room, and the same command goes on from the last"
            ) from error

    @override
    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        found = resolve(path)
        if found.is_dir():
            raise UserError(f"ckpt_path: '{found}' is of sharded weights; resume it with --trainer.strategy fsdp")
        checkpoint: dict[str, Any] = super().load_checkpoint(found, map_location or "cpu", weights_only=True)  # type: ignore[arg-type]
        return checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


def partial_of(path: Path) -> Path:
    """Return the name under which ``path`` is written."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def put_in_place(partial: Path, path: Path) -> None:
    """Give what was written its final name, in one step, once it is on the disk."""
    for file in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
        _sync(file)
    if path.is_dir() and not path.is_symlink():
        # A directory cannot be renamed over a full one.
        remove(path)
    os.replace(partial, path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint so that nothing ever sees half of it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        aside = path.with_name(f".{path.name}.removed{_PARTIAL}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Remove what processes that were killed while they wrote or removed checkpoints left behind."""
    for path in directory.glob(f".*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def checkpoints_in(directory: Path) -> list[Path]:
    """Return ``RunCheckpoint``'s checkpoints in a directory, the one that was written last first."""
    found = [path for path in directory.glob("step=*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, step_of(path)), reverse=True)


def step_of(path: Path) -> int:
    """Return the optimizer steps that one of ``RunCheckpoint``'s checkpoints is named by."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def resumable_in(directory: Path) -> list[Path]:
    """Return all checkpoints in a directory that hold more than weights, the one that was written last first."""
    found = [path for path in directory.glob("*.ckpt") if not path.is_symlink() and not _is_of_weights_only(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _is_of_weights_only(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path / META if path.is_dir() else path) as archive:
            (record,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            # The pickled names of its parts.
            return b"lr_schedulers" not in archive.read(record)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error):
        return False  # damaged, which is for others to say


def problem_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; reads all of it."""
    try:
        return _problem_of_directory(path) if path.is_dir() else _problem_of_file(path)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        return f"{type(error).__name__}: {error}"


def checksum(path: Path) -> dict[str, int]:
    """Return size in bytes and CRC-32 of a file."""
    value = size = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            value, size = zlib.crc32(block, value), size + len(block)
    return {"bytes": size, "crc32": value}


def resolve(path: Any) -> Path:
    """Return the checkpoint that ``path`` names; of a directory of checkpoints the newest whole one, on all ranks.

    The first rank verifies, names what is damaged in a warning and sets it aside as ``*.damaged``.

    Raises:
        UserError: The checkpoint is damaged, or no checkpoint of the directory is whole.
    """
    path = Path(path)
    answer: list[Any] = [None, None]
    if is_first_rank():
        try:
            answer[0] = str(_newest_whole(path) if _is_folder(path) else _verified(path))
        except UserError as error:
            answer[1] = str(error)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    found = Path(answer[0])
    if _is_folder(path):
        rank_zero_info(f"Going on from {found}")
    return found


def is_first_rank() -> bool:
    """Return whether this process is rank 0, also before the ranks have found each other."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def is_checkpoint(path: Path) -> bool:
    """Return whether there is a checkpoint, or a directory of them, at ``path``; nothing is verified."""
    return path.is_file() or (path / META).is_file() or bool(resumable_in(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not (path / META).is_file() and not path.name.endswith(".ckpt")


def _verified(path: Path) -> Path:
    problem = problem_of(path)
    if problem is not None:
        raise UserError(f"ckpt_path: '{path}' is damaged ({problem}); give another, or 'last' for the newest whole one")
    return path


def _newest_whole(directory: Path) -> Path:
    damaged = 0
    for path in resumable_in(directory):
        problem = problem_of(path)
        if problem is None:
            return path
        damaged += 1
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.replace(aside)
        rank_zero_warn(f"'{path}' is damaged ({problem}); it is now '{aside.name}', and the one before it is taken")
    raise UserError(
        f"ckpt_path: '{directory}' holds no whole checkpoint ({damaged} damaged, set aside as *.damaged); put one "
        "back, or delete the run's directory and begin anew"
    )


def _problem_of_file(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        entry = archive.testzip()
    return None if entry is None else f"its entry {entry} does not have the checksum that it was written with"


def _problem_of_directory(path: Path) -> str | None:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    for name, expected in json.loads(manifest.read_text(encoding="utf-8")).items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if checksum(path / name) != expected:
            return f"{name} is not the file that was written"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
