"""Progress in optimizer steps: a bar on a terminal, a few lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from dpr_lightning.errors import UserError

if TYPE_CHECKING:
    from dpr_lightning.modules.base import CausalLMModule


class Progress(TQDMProgressBar):
    """One bar over the optimizer steps of the whole run, with the time left; rollouts have a bar of their own.

    Where standard output is no terminal, a line is printed now and then instead.

    Args:
        num_lines: Lines printed over a whole run where standard output is no terminal; 0 prints none.
        refresh_rate: Steps or batches after which a bar on a terminal is redrawn; 0 draws none.
    """

    def __init__(self, num_lines: int = 20, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if num_lines < 0:
            raise UserError(f"trainer.callbacks.Progress.num_lines: found {num_lines}; give 0 or more")
        self.num_lines = num_lines
        self._is_terminal = sys.stdout.isatty()
        if not self._is_terminal:
            self.disable()
        self._num_planned = 0
        self._first_step = 0
        self._last_step = 0
        self._start = 0.0

    @override
    def enable(self) -> None:
        if self._is_terminal:
            super().enable()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_planned = cast("CausalLMModule", pl_module).planned_optimizer_steps()
        self._first_step = self._last_step = trainer.global_step
        self._start = time.perf_counter()
        self.train_progress_bar = Tqdm(
            desc="Training",
            total=self._num_planned,
            initial=trainer.global_step,
            unit="step",
            # Averaged over the whole run: rollouts come in bursts, and the time left has to include them.
            smoothing=0,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
        )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        if self._should_update(step, self._num_planned):
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))
        if not self._is_terminal and trainer.is_global_zero and self._num_due(step) > self._num_due(self._last_step):
            print(self._line(trainer, pl_module), flush=True)
        self._last_step = step

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what modules log for the bar, without the logger's version number."""
        return {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}

    @contextmanager
    def rollout_bar(self, total: int, description: str = "Rollout") -> Iterator[Callable[[int], None]]:
        """Show on a terminal how far sampling is.

        Args:
            total: Responses to be drawn.
            description: Left of the bar.

        Yields:
            A function to call with the number of responses finished since its last call.
        """
        bar = Tqdm(
            desc=description,
            total=total,
            unit="response",
            position=1,
            leave=False,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
        )

        def advance(num_finished: int) -> None:
            bar.update(num_finished)

        try:
            yield advance
        finally:
            bar.close()

    def _num_due(self, step: int) -> int:
        """Return how many lines are due up to ``step``: evenly spaced, the last one with the last step."""
        return (step - self._first_step) * self.num_lines // max(1, self._num_planned - self._first_step)

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> str:
        step, num_planned = trainer.global_step, self._num_planned
        elapsed = time.perf_counter() - self._start
        left = elapsed / (step - self._first_step) * (num_planned - step)
        times = f"{Tqdm.format_interval(elapsed)} gone, {Tqdm.format_interval(left)} left"
        metrics = [
            f"{key} {value:.4g}" if isinstance(value, int | float) else f"{key} {value}"
            for key, value in self.get_metrics(trainer, pl_module).items()
        ]
        return ", ".join([f"step {step}/{num_planned} ({step / num_planned:.0%})", times, *metrics])
