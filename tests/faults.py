"""Commands in forked processes that have imported everything, and deaths at chosen moments of them."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PRELOAD = [
    "dpr_lightning.application",
    "dpr_lightning.modules",
    "dpr_lightning.data.sft_datamodule",
    "dpr_lightning.data.rollout_datamodule",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
]
_POINTS = {
    "rollout": "dpr_lightning.rollout.continuous:draw",
    "scoring": "dpr_lightning.rollout.scoring:_score_micro_batch",
    "micro-batch": "dpr_lightning.modules.base:CausalLMModule.finish_step",
    "update": "torch.optim:AdamW.step",
    "validation": "lightning.pytorch.loops.evaluation_loop:_EvaluationLoop.run",
    "rename": "os:replace",
    "link": "os:symlink",
    "removal": "dpr_lightning.checkpoints:remove",
    "snapshot": "dpr_lightning.modules.base:CausalLMModule.save_snapshot",
    "export": "dpr_lightning.modules.base:CausalLMModule.save_pretrained",
    "checksum": "dpr_lightning.manifest:sha256_of_files",
    "record": "dpr_lightning.callbacks.run_recorder:RunRecorder._record_end",
}
"""What a death is in the middle of, or near: a function that is called there."""


@dataclass(frozen=True)
class Death:
    """When a process kills itself: as it enters (or leaves) a point's function for the n-th time.

    Of the point "write" half of a checkpoint is on the disk.
    """

    point: str
    count: int = 1
    after: bool = False


@dataclass(frozen=True)
class Job:
    """One process: its arguments for ``main``, its environment, when it dies, and where it prints to."""

    args: list[str]
    log: Path
    environment: Mapping[str, str]
    death: Death | None = None


class Forks:
    """Starts processes from a server that has imported the package, so that each costs no more than its own work."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)

    def start(self, job: Job) -> Any:
        """Return the running process."""
        process = self._context.Process(target=_run, args=(job,))
        process.start()
        return process

    def run(self, job: Job, *, seconds: float | None = None) -> int:
        """Return the exit status; after ``seconds`` the process is killed. A negative one is the signal."""
        process = self.start(job)
        try:
            process.join(seconds)
        finally:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return int(process.exitcode)


def _run(job: Job) -> None:
    output = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(job.environment)

    import datasets
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from dpr_lightning.main import main

    torch.set_num_threads(1)
    rank_zero_only.rank = int(os.environ.get("RANK", "0"))  # was read when it was imported
    datasets.config.HF_DATASETS_CACHE = job.log.parent / "datasets_cache"
    if job.death is not None:
        _arrange(job.death)
    main(job.args)


def _die() -> None:
    with suppress(ValueError, OSError):
        sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _arrange(death: Death) -> None:
    if death.point == "write":
        _replace("torch:save", lambda save: _half_written(save, death.count))
        return
    left = death.count

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not death.after:
                _die()
            found = function(*args, **kwargs)
            if left == 0:
                _die()
            return found

        return counted

    _replace(_POINTS[death.point], wrap)


def _half_written(save: Callable[..., Any], count: int) -> Callable[..., Any]:
    left = count

    def counted(value: Any, path: Any, **kwargs: Any) -> None:
        nonlocal left
        # Tensors that are sent to another rank come by here too, into memory.
        left -= isinstance(path, Path)
        if left or not isinstance(path, Path):
            save(value, path, **kwargs)
            return
        whole = io.BytesIO()
        save(value, whole)
        Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
        _die()

    return counted


def _replace(place: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, names = place.partition(":")
    owner = importlib.import_module(module)
    *inner, name = names.split(".")
    for part in inner:
        owner = getattr(owner, part)
    setattr(owner, name, wrap(getattr(owner, name)))
