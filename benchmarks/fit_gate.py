"""Stops our own ``fit`` between optimizer steps, or between rollouts, until the driver asks for a round."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.floor import count_forwards
from benchmarks.gate import running
from dpr_lightning.types import TokenBatch


class FitGate(Callback):
    """One piece of work is one optimizer step; with ``per_epoch`` it is all steps of one rollout batch.

    Everything between two pieces counts: batches, sampling, scoring, logging. Of the frozen policies' forwards the
    seconds are added up by themselves.

    Args:
        per_epoch: Stop after the last step of each epoch only.
    """

    def __init__(self, per_epoch: bool = False) -> None:
        super().__init__()
        self.per_epoch = per_epoch
        self._num_steps = 0
        self._entered: float | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen: dict[str, Any] = getattr(pl_module, "frozen", {})
        if not frozen:
            return
        self._watch(pl_module, "score", begins=False, ends=True)
        self._watch(pl_module.actor, "hidden_states", begins=False)
        for policy in frozen.values():
            self._watch(policy, "hidden_states", begins=True)

    def _watch(self, owner: Any, name: str, *, begins: bool, ends: bool = False) -> None:
        """Let a call of ``owner.name`` end the frozen forward before it, and begin one of its own.

        Scoring asks one policy after the other, so a frozen policy's share lasts from its hidden states to the next
        policy's, its log-probabilities included, or to the end of scoring.
        """
        call = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._turn(begins)
            found = call(*args, **kwargs)
            if ends:
                self._turn(False)
            return found

        setattr(owner, name, watched)

    def _turn(self, begins: bool) -> None:
        if running().is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._entered is not None:
            running().add(frozen_seconds=now - self._entered)
        self._entered = now if begins else None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        gate = running()
        assert isinstance(batch, TokenBatch)
        gate.add(
            tokens=int(batch.attention_mask_BT.sum()),
            response_tokens=int(batch.response_mask_BT.sum()),
            responses=len(batch.input_ids_BT),
        )
        if trainer.global_step == self._num_steps or (self.per_epoch and not trainer.is_last_batch):
            return
        self._num_steps = trainer.global_step
        experience = getattr(trainer.datamodule, "experience", None)  # type: ignore[attr-defined]
        if experience is not None and (trainer.is_last_batch or not self.per_epoch):
            gate.add(**{f"{stage}_seconds": value for stage, value in experience.seconds.items()})
        gate.piece_done()


def fit(recipe: str, settings: dict[str, Any], *more: str) -> None:
    """Run our command line's ``fit`` under the gate, without checkpoints and exports, which no peer writes either."""
    from dpr_lightning.main import main

    count_forwards(running())
    folder = settings["folder"]
    overlay = os.path.join(folder, "gate.yaml")
    with open(overlay, "w") as file:
        file.write(
            "trainer:\n  callbacks:\n    - class_path: benchmarks.fit_gate.FitGate\n      init_args:\n"
            f"        per_epoch: {str(recipe != 'sft').lower()}\n  enable_checkpointing: false\n"
        )
    files = ["configs/base.yaml", f"configs/recipe/{recipe}.yaml"]
    files += [*settings.get("overlays", []), f"configs/hardware/{settings.get('hardware', 'cpu')}.yaml", overlay]
    arguments = [argument for file in files for argument in ("-c", file)]
    run_dir = os.path.join(folder, f"run-{time.time_ns()}")
    more = (*more, *settings.get("fit_arguments", []))
    main(["fit", *arguments, f"--run_dir={run_dir}", "--trainer.enable_progress_bar=false", *more])
