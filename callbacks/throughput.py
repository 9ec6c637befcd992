"""Where the time of an optimizer step goes, tokens per second, and peak memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from dpr_lightning.callbacks.experience import running_experience
from dpr_lightning.types import TokenBatch

_GIB = 2**30


class Throughput(Callback):
    """Logs the cost of every optimizer step, at the step's own x.

    ``time/train`` is seconds from the start of the step's first micro-batch to its end. ``time/rollout`` and
    ``time/score`` are the epoch's seconds divided by its optimizer steps, so the three add up to what a step of DPR
    costs. ``perf/train_tokens_per_second`` counts prompt and response tokens over all ranks;
    ``perf/rollout_tokens_per_second`` counts sampled tokens over all ranks. ``perf/peak_memory_gib`` is this rank's
    peak: allocated on its CUDA device, or else resident in its process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step_start: float | None = None
        self._num_steps_before = 0
        self._num_tokens = torch.zeros((), dtype=torch.int64)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step_start is None:
            self._step_start = time.perf_counter()
            self._num_steps_before = trainer.global_step
            self._num_tokens = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        if isinstance(batch, TokenBatch):
            self._num_tokens += batch.attention_mask_BT.sum()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step_start is None or trainer.global_step == self._num_steps_before:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._step_start
        self._step_start = None
        metrics = {"time/train": seconds, "perf/peak_memory_gib": peak_memory_bytes(pl_module.device) / _GIB}
        metrics |= _rollout_costs(trainer)
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, rank_zero_only=True)
        if isinstance(batch, TokenBatch):
            num_tokens = trainer.strategy.reduce(self._num_tokens, reduce_op="sum")
            pl_module.log(
                "perf/train_tokens_per_second",
                float(num_tokens) / seconds,
                on_step=True,
                on_epoch=False,
                rank_zero_only=True,
            )


def _rollout_costs(trainer: Trainer) -> dict[str, float]:
    experience = running_experience(trainer)
    if experience is None:
        return {}
    num_steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    rollout_seconds = experience.seconds["rollout"]
    return {
        "time/rollout": rollout_seconds / num_steps,
        "time/score": experience.seconds["score"] / num_steps,
        "perf/rollout_tokens_per_second": experience.stats["rollout/num_tokens"] / rollout_seconds,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory ever allocated on a CUDA device, or ever resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
