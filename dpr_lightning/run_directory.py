"""A run's directory: whether it can be written to, whether a run is in it, and where that one goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

from dpr_lightning.checkpoints import is_checkpoint, is_first_rank, resumable_in
from dpr_lightning.errors import RunIsFinished, UserError
from dpr_lightning.manifest import is_complete, read_run_record
from dpr_lightning.yaml_text import load_yaml

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
INITIAL = "initial"
"""As ``ckpt_path``: the weights that a run starts from."""
_NOT_TRAINING = (
    "ckpt_path",
    "run_dir",
    "weights_only",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.max_time",
    "trainer.profiler",
)
"""Settings that a run may go on without: they watch it, or say where it lies."""
_ROUNDING = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "data.micro_batch_size",
    "model.score_micro_batch_size",
    "model.logprob_chunk_size",
    "model.offload_frozen",
    "model.backbone.gradient_checkpointing",
)
"""Settings that a run may go on with others of: the same steps by exact arithmetic, on other machines."""
_SHOWN = 3
"""Differing keys that a refusal names."""


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger, which tells where a run resumes: what a killed one logged beyond does not count."""

    @rank_zero_only
    def begin_at(self, step: int) -> None:
        """Drop points at ``step`` and beyond from what is shown: they are logged again.

        TensorBoard takes the first such mark of a directory for the run's beginning, so a new run sets one too.
        """
        start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        self.experiment.file_writer.add_event(start)


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
    if not recorded.is_file() or _failed_at_once(run_dir):
        return None
    before = _recorded(recorded)
    differing = dict(_differing(before, config))
    other = [text for key, text in differing.items() if not _is_below(key, (*_NOT_TRAINING, *_ROUNDING))]
    if other:
        more = f", and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise UserError(
            f"run_dir: '{run_dir}' already holds a run with other settings ({', '.join(other[:_SHOWN])}{more}); "
            "choose another --run_dir, or delete it; --ckpt_path last continues it with the new settings"
        )
    found = read_run_record(record) if record.is_file() else {}
    if found.get("status") == "finished" and is_complete(run_dir / "final"):
        raise RunIsFinished(
            f"run_dir: '{run_dir}' is finished (optimizer step {found.get('optimizer_steps')}), there is nothing left "
            "to train; choose another --run_dir, or delete it to train anew"
        )
    directory = run_dir / CHECKPOINTS
    if resumable_in(directory):
        rounding = [text for key, text in differing.items() if _is_below(key, _ROUNDING)]
        if rounding:
            rank_zero_info(f"The run goes on with {', '.join(rounding)}: not bit for bit as it would have before")
        return str(directory)
    if others := sorted(path.name for path in directory.glob("[!.]*.ckpt*")):
        raise UserError(
            f"run_dir: '{directory}' holds no whole checkpoint that the run could go on from, but {', '.join(others)}; "
            f"name one by --ckpt_path, put one back, or delete '{run_dir}' and begin anew"
        )
    rank_zero_info(f"'{run_dir}' holds a run that ended before its first checkpoint; it begins anew")
    return None


def find_trained_weights(run_dir: Path) -> str:
    """Return the finished model of a run, which ``validate``, ``test`` and ``predict`` measure if told nothing else.

    Raises:
        UserError: There is none.
    """
    final = run_dir / "final"
    if is_complete(final):
        rank_zero_info(f"Evaluating the trained model '{final}'")
        return str(final)
    if resumable_in(run_dir / CHECKPOINTS):
        found, advice = "an unfinished run", "--ckpt_path last takes its newest checkpoint; "
    else:
        found, advice = "no trained model", ""
    raise UserError(
        f"run_dir: '{run_dir}' holds {found}, so there are no final weights to evaluate; set run_dir to a finished "
        f"run; {advice}--ckpt_path initial evaluates the weights that the run starts from"
    )


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


def _recorded(path: Path) -> dict[str, Any]:
    """Return the configuration that a run recorded.

    Raises:
        UserError: The file is none.
    """
    try:
        found = load_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"run_dir: '{path}' is no valid YAML ({error}); repair it, or choose another --run_dir"
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"run_dir: '{path}' holds a {type(found).__name__}, not a mapping of keys to values; repair it, or choose "
            "another --run_dir"
        )
    return found


def _differing(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys at which two configurations differ, as users write them, each with what is there and here."""
    if isinstance(before, dict) and isinstance(now, Mapping):
        for name in [*before, *(name for name in now if name not in before)]:
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from _differing(before.get(name), now.get(name), inner)
    elif before != now:
        yield key, f"{key} is {before} there and {now} here"


def _is_below(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _failed_at_once(run_dir: Path) -> bool:
    """Return whether a run ended before its first step: nothing of it is worth keeping."""
    record = run_dir / "run.json"
    # One that failed as it resumed has checkpoints of the time before.
    if not record.exists() or any((run_dir / CHECKPOINTS).glob("[!.]*.ckpt*")):
        return False
    found = read_run_record(record)
    return found.get("status") == "failed" and found.get("optimizer_steps") == 0
