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
from benchmarks.gpu.worker import Context, free_memory
from benchmarks.meter import CudaMemory, HostMemory, PhaseMeter
from dpr_lightning.models import ragged
from dpr_lightning.types import TokenBatch

PEAKS = "peaks.json"
"""Measured bytes by case and phase, for the part that compares them with ``plan``."""
_SFT_STEPS, _DPR_ROLLOUTS = (2, 4), (1, 1)
"""Pieces of work that warm up, and those that count. The second optimizer step of a run is profiled."""
_PROFILED_DECODE_STEP = 8


class FitProbe(Callback):
    """Measures optimizer steps of SFT, or rollouts of DPR with their optimizer steps, and profiles while it warms up.

    Args:
        rollouts: A piece of work is an epoch (a rollout and its updates), and not an optimizer step.
        num_warm_up: Pieces before the first that counts, of two optimizer steps or more.
    """

    last: FitProbe | None = None
    """The probe of the run before: ``fit`` makes its callbacks itself."""

    def __init__(self, rollouts: bool, num_warm_up: int) -> None:
        super().__init__()
        FitProbe.last = self
        self.rollouts = rollouts
        self.num_warm_up = num_warm_up
        self.facts = {name: 0.0 for name in ("seconds", "tokens", "response_tokens", "rollout", "score")}
        """Sums over the pieces that count."""
        self.profiles: list[tuple[dict[str, Any], str]] = []
        self._num_pieces = 0
        self._num_steps = 0
        self._start = 0.0
        self._update: Profile | None = None
        self._decoding = contextlib.ExitStack()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rollouts:
            # The first rollout is next.
            self._decoding.enter_context(profiled_decode_step(self.profiles))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._decoding.close()
        self._start = _now()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._num_steps == 1 and self._update is None:
            self._update = Profile("an optimizer step")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        counts = self._num_pieces >= self.num_warm_up
        if counts:
            assert isinstance(batch, TokenBatch)
            self.facts["tokens"] += int(batch.attention_mask_BT.sum())
            self.facts["response_tokens"] += int(batch.response_mask_BT.sum())
        if trainer.global_step == self._num_steps:
            return
        self._num_steps = trainer.global_step
        if self._update is not None:
            self.profiles.append(self._update.stop())
            self._update = None
        if self.rollouts and not trainer.is_last_batch:
            return
        if counts:
            self.facts["seconds"] += _now() - self._start
            experience = getattr(trainer.datamodule, "experience", None)  # type: ignore[attr-defined]
            if experience is not None:
                for name in ("rollout", "score"):
                    self.facts[name] += experience.seconds[name]
        self._num_pieces += 1
        self._start = _now()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning would move all of it to the host's memory first.
        module: Any = pl_module
        module.policy = None
        module.frozen.clear()
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
            optimizer.param_groups.clear()
        gc.collect()


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
                main(["fit", *arguments(context, case, folder), *fit_arguments(case, folder), *_probe(context, case)])
            finally:
                meter.release()
            probe = FitProbe.last
            assert probe is not None
            peaks[case.stem] = dict(meter.peaks)
            _report(context, case, probe, meter)
            (context.work_dir / PEAKS).write_text(json.dumps(peaks), encoding="utf-8")
        FitProbe.last = None
        free_memory()


def _probe(context: Context, case: Case) -> list[str]:
    """Return the arguments that put the probe in place of all callbacks but the snapshots, and bound the run."""
    is_dpr = case.stage == "dpr"
    num_warm_up, num_measured = _DPR_ROLLOUTS if is_dpr else _SFT_STEPS
    num_pieces = num_warm_up + (1 if context.rehearse else num_measured)
    settings = {"rollouts": is_dpr, "num_warm_up": num_warm_up}
    callbacks: list[dict[str, Any]] = [{"class_path": "benchmarks.gpu.training.FitProbe", "init_args": settings}]
    if case.stage == "sft" and case.is_lora:
        snapshots = "dpr_lightning.callbacks.reference_snapshot.ReferenceSnapshot"
        callbacks.append({"class_path": snapshots, "init_args": {"alphas": list(SFT_ALPHAS)}})
    return [
        *([f"--trainer.max_epochs={num_pieces}"] if is_dpr else ["--trainer.max_epochs=-1"]),
        *([] if is_dpr else [f"--trainer.max_steps={num_pieces}"]),
        f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
    ]


def _report(context: Context, case: Case, probe: FitProbe, meter: PhaseMeter) -> None:
    facts = probe.facts
    training = facts["seconds"] - facts["rollout"] - facts["score"]
    row = {
        "run": case.name,
        "tokens/s": facts["tokens"] / facts["seconds"],
        "response tokens/s": facts["response_tokens"] / facts["seconds"],
        "seconds": facts["seconds"],
    }
    if case.stage == "dpr":
        row |= {
            "rollout": f"{facts['rollout'] / facts['seconds']:.0%}",
            "scoring": f"{facts['score'] / facts['seconds']:.0%}",
            "training": f"{training / facts['seconds']:.0%}",
            "sampled tokens/s": facts["response_tokens"] / facts["rollout"],
        }
    row |= {f"peak GiB, {phase}": size / 2**30 for phase, size in meter.peaks.items()}
    if context.is_cuda:
        row["reserved GiB"] = torch.cuda.max_memory_reserved() / 2**30
        torch.cuda.reset_peak_memory_stats()
    context.row("Throughput and peak memory", **row)
    context.headline(f"{case.name} {row['tokens/s']:,.0f} tok/s")
    for summary, text in probe.profiles:
        context.row("Profiles of single steps", run=case.name, **summary)
        context.text(f"{case.name}: {summary['work']}", text)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
