"""SFT and DPR on random Llamas: tokens per second, peak memory, where the time goes, and where the device waits."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.gpu.cases import SFT_ALPHAS, Case, arguments, cases, fit_arguments, write_inputs
from benchmarks.gpu.profiling import Profile
from benchmarks.gpu.worker import Context
from benchmarks.meter import CudaMemory, HostMemory, PhaseMeter
from dpr_lightning.models import ragged
from dpr_lightning.types import TokenBatch

PEAKS = "peaks.json"
"""Measured bytes by case and phase, for the part that compares them with ``plan``; in the command's scratch folder."""
_SFT_STEPS, _DPR_ROLLOUTS = (3, 4), (1, 1)
"""Iterations that warm up, and those that are measured."""
_PROFILED_DECODE_STEP = 8


class FitProbe(Callback):
    """Measures optimizer steps of SFT, or rollouts of DPR with their optimizer steps; profiles while it warms up.

    Profiled are one decode step of the first rollout, and the last micro-batch of the second optimizer step, with
    that step.

    Args:
        rollouts: An iteration is an epoch (a rollout and its updates), and not an optimizer step.
        num_warm_up: Iterations before the first that is measured, with two optimizer steps or more.
        is_profiled: Make the profiles.
    """

    last: FitProbe | None = None
    """The probe of the run before: ``fit`` makes its callbacks itself."""

    def __init__(self, rollouts: bool, num_warm_up: int, is_profiled: bool) -> None:
        super().__init__()
        FitProbe.last = self
        self.rollouts = rollouts
        self.num_warm_up = num_warm_up
        self.is_profiled = is_profiled
        self.totals = {name: 0.0 for name in ("seconds", "tokens", "response_tokens", "rollout", "score")}
        """Sums over the measured iterations."""
        self.profiles: list[tuple[dict[str, Any], str]] = []
        self._num_iterations = 0
        self._num_steps = 0
        self._start = 0.0
        self._update: Profile | None = None
        self._decoding = contextlib.ExitStack()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rollouts and self.is_profiled:
            # The first rollout is next.
            self._decoding.enter_context(profiled_decode_step(self.profiles))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._decoding.close()
        self._start = _now()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.is_profiled and self._num_steps == 1 and is_last:
            self._update = Profile("last micro-batch of a step")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._update is not None:
            self.profiles.append(self._update.stop())
            self._update = None
        is_measured = self._num_iterations >= self.num_warm_up
        if is_measured:
            assert isinstance(batch, TokenBatch)
            self.totals["tokens"] += int(batch.attention_mask_BT.sum())
            self.totals["response_tokens"] += int(batch.response_mask_BT.sum())
        if trainer.global_step == self._num_steps:
            return
        self._num_steps = trainer.global_step
        if self.rollouts and not trainer.is_last_batch:
            return
        if is_measured:
            self.totals["seconds"] += _now() - self._start
            experience = getattr(trainer.datamodule, "experience", None)  # type: ignore[attr-defined]
            if experience is not None:
                for name in ("rollout", "score"):
                    self.totals[name] += experience.seconds[name]
        self._num_iterations += 1
        self._start = _now()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would copy all of it to the host's memory when it tears the strategy down.
        module: Any = pl_module
        module.policy = None
        module.frozen.clear()
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
            optimizer.param_groups.clear()
        gc.collect()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._decoding.close()
        if self._update is not None:
            self._update.cancel()
            self._update = None


@contextlib.contextmanager
def profiled_decode_step(profiles: list[tuple[dict[str, Any], str]]) -> Iterator[None]:
    """Profile one decode step of a sampler's run inside, from one forward to the next; add it to ``profiles``."""
    plain = ragged.run
    running: list[Profile] = []
    num_forwards = 0

    def stop() -> None:
        while running:
            profiles.append(running.pop().stop())

    def counted(*args: Any) -> Any:
        nonlocal num_forwards
        num_forwards += 1
        stop()
        if num_forwards == _PROFILED_DECODE_STEP:
            running.append(Profile("a decode step"))
        return plain(*args)

    ragged.run = counted
    try:
        yield
    finally:
        ragged.run = plain
        stop()


def run(context: Context) -> None:
    """Run every case, and keep the peaks for ``plan``."""
    from dpr_lightning.main import main

    folder = context.scratch_dir / "training"
    peaks: dict[str, dict[str, int]] = {}
    for case in cases(context):
        with context.step(case.name):
            write_inputs(context, case, folder)
            meter = PhaseMeter(CudaMemory() if context.is_cuda else HostMemory())
            meter.watch_fit()
            try:
                main(["fit", *arguments(context, case, folder), *fit_arguments(case, folder), *_probe(case)])
            finally:
                meter.release()
            probe = FitProbe.last
            assert probe is not None
            peaks[case.stem] = dict(meter.peaks)
            _report(context, case, probe, meter)
            (context.scratch_dir / PEAKS).write_text(json.dumps(peaks), encoding="utf-8")
        FitProbe.last = None


def _probe(case: Case) -> list[str]:
    """Return the arguments that put the probe in place of all callbacks but the snapshots, and bound the run."""
    is_dpr = case.stage == "dpr"
    num_warm_up, num_measured = _DPR_ROLLOUTS if is_dpr else _SFT_STEPS
    callbacks: list[dict[str, Any]] = []
    if case.stage == "sft" and case.is_lora:
        # Before the probe, which would count their time to the next step.
        snapshots = "dpr_lightning.callbacks.reference_snapshot.ReferenceSnapshot"
        callbacks.append({"class_path": snapshots, "init_args": {"alphas": list(SFT_ALPHAS)}})
    settings = {"rollouts": is_dpr, "num_warm_up": num_warm_up, "is_profiled": case.is_profiled}
    callbacks.append({"class_path": "benchmarks.gpu.training.FitProbe", "init_args": settings})
    num_iterations = num_warm_up + num_measured
    return [
        *([f"--trainer.max_epochs={num_iterations}"] if is_dpr else ["--trainer.max_epochs=-1"]),
        *([] if is_dpr else [f"--trainer.max_steps={num_iterations}"]),
        f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
    ]


def _report(context: Context, case: Case, probe: FitProbe, meter: PhaseMeter) -> None:
    totals = probe.totals
    seconds = totals["seconds"]
    row = {
        "run": case.name,
        "tokens/s": totals["tokens"] / seconds,
        "response tokens/s": totals["response_tokens"] / seconds,
        "seconds": seconds,
    }
    if case.stage == "dpr":
        training = seconds - totals["rollout"] - totals["score"]
        row |= {
            "rollout": f"{totals['rollout'] / seconds:.0%}",
            "scoring": f"{totals['score'] / seconds:.0%}",
            "training": f"{training / seconds:.0%}",
            "sampled tokens/s": totals["response_tokens"] / totals["rollout"],
        }
    row |= {f"peak GiB, {phase}": size / 2**30 for phase, size in meter.peaks.items()}
    if context.is_cuda:
        row["reserved GiB"] = torch.cuda.max_memory_reserved() / 2**30
        torch.cuda.reset_peak_memory_stats()
    context.row("Throughput and peak memory", **row)
    context.headline(f"{case.name} {row['tokens/s']:,.0f} tok/s")
    for summary, text in probe.profiles:
        context.row("Profiles", run=case.name, **summary)
        context.text(f"{case.name}: {summary['work']}", text)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
