"""A run's directory: whether it can be written to, whether a run is in it, and where that one goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from dpr_lightning.checkpoints import is_checkpoint, is_first_rank, resumable_in
from dpr_lightning.errors import RunIsFinished, UserError
from dpr_lightning.manifest import is_complete, read_json

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
_NOT_COMPARED = ("ckpt_path", "run_dir")
_SHOWN = 3
"""Differing keys that a refusal names."""


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger, which a resumed run tells from where on the killed one's points do not count."""

    def go_on_from(self, step: int) -> None:
        """Drop points at optimizer step ``step`` and beyond from what is shown: they are logged again."""
        self._kwargs["purge_step"] = step
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in ``run_dir`` for as long as this one does.

    Raises:
        UserError: One does already.
    """
    if not is_first_rank():
        # The first rank holds it for all.
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"run_dir: another process is training in '{run_dir}'; wait for it, end it, or choose another --run_dir"
        ) from error
    except (NotImplementedError, OSError):
        # A file system without locks: as if there were none.
        yield
        return
    try:
        yield
    finally:
        lock.release()
        if [path.name for path in run_dir.iterdir()] == [".lock"]:
            # Nothing was written.
            with suppress(OSError):
                (run_dir / ".lock").unlink()
                run_dir.rmdir()


def where_to_go_on(run_dir: Path, config: Mapping[str, Any]) -> str | None:
    """Return what ``fit`` resumes from when it is told nothing: its own run, if ``run_dir`` holds one.

    Args:
        run_dir: The run's directory.
        config: The command's merged configuration, as ``config.yaml`` would hold it.

    Returns:
        The directory of the run's checkpoints; None to begin.

    Raises:
        RunIsFinished: There is nothing left to train.
        UserError: ``run_dir`` holds a run with another configuration.
    """
    recorded, record = run_dir / "config.yaml", run_dir / "run.json"
    if not recorded.is_file() or _failed_at_once(record):
        return None
    before = yaml.safe_load(recorded.read_text(encoding="utf-8")) or {}
    differing = [found for found in _differing(before, config) if found.split(".")[0] not in _NOT_COMPARED]
    if differing:
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"run_dir: '{run_dir}' already holds a run with other settings ({', '.join(differing[:_SHOWN])}{more}); "
            "choose another --run_dir, or delete it; --ckpt_path last continues it with the new settings"
        )
    found = read_json(record) if record.is_file() else {}
    if found.get("status") == "finished" and is_complete(run_dir / "final"):
        raise RunIsFinished(
            f"run_dir: '{run_dir}' is finished (optimizer step {found.get('optimizer_steps')}), there is nothing left "
            "to train; choose another --run_dir, or delete it to train anew"
        )
    if resumable_in(run_dir / CHECKPOINTS):
        return str(run_dir / CHECKPOINTS)
    rank_zero_info(f"'{run_dir}' holds a run that ended before its first checkpoint; it begins anew")
    if is_first_rank():
        # All of it is made again, at the same steps.
        for name in (TENSORBOARD, "reference"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    return None


def check_checkpoint(ckpt_path: str | None, run_dir: Path) -> None:
    """Refuse a checkpoint that is not there; Lightning would begin anew without the last one.

    Raises:
        UserError: With what to do.
    """
    if ckpt_path in (None, "hpc") or str(ckpt_path).startswith("registry") or "://" in str(ckpt_path):
        return
    if ckpt_path in ("last", "best"):
        directory = run_dir / CHECKPOINTS
        found = resumable_in(directory) if ckpt_path == "last" else list(directory.glob("*.ckpt"))
        if not found:
            raise UserError(
                f"ckpt_path: found '{ckpt_path}', but '{directory}' holds no checkpoint; set run_dir to the run that "
                "you mean, or leave ckpt_path out and begin anew"
            )
    elif not is_checkpoint(Path(str(ckpt_path))):
        raise UserError(f"ckpt_path: no file '{ckpt_path}'; give an existing checkpoint, or 'last'")


def check_run_dir(run_dir: Path) -> None:
    """Refuse a directory that cannot be written to.

    Raises:
        UserError: With what to do.
    """
    if run_dir == Path():
        raise UserError("run_dir: found the working directory itself; give a directory of its own, such as runs/sft")
    try:
        existing = next(path for path in [run_dir.absolute(), *run_dir.absolute().parents] if path.exists())
    except OSError as error:
        raise UserError(f"run_dir: '{run_dir}' is no usable path ({error.strerror}); choose another") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run_dir: '{run_dir}' cannot be written to ('{existing}' forbids it); choose another")


def _differing(before: Any, now: Any, key: str = "") -> list[str]:
    """Return the keys at which two configurations differ, as users write them, with what is there and here."""
    if isinstance(before, dict) and isinstance(now, Mapping):
        names = [*before, *(name for name in now if name not in before)]
        return [
            found
            for name in names
            for found in _differing(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if before == now else [f"{key.replace('.init_args', '')} is {before} there and {now} here"]


def _failed_at_once(record: Path) -> bool:
    """Return whether a run ended before its first step: nothing of it is worth keeping."""
    if not record.exists():
        return False
    found = read_json(record)
    return found.get("status") == "failed" and found.get("optimizer_steps") == 0
