"""What the running epoch's rollouts are, for callbacks that look at them."""

from __future__ import annotations

from lightning import Trainer

from dpr_lightning.types import SampledExperience


def running_experience(trainer: Trainer) -> SampledExperience | None:
    """Return the running epoch's experience on this rank; None where the data are no rollouts.

    Lightning calls ``on_train_epoch_start`` once an epoch, after the rollout, and not again when a run resumes inside
    the epoch: there the experience is fresh.
    """
    experience = getattr(trainer.datamodule, "experience", None)  # type: ignore[attr-defined]
    assert experience is None or isinstance(experience, SampledExperience)
    return experience


def log_now(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Send figures of the rollout to every logger, at x = optimizer steps taken so far."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
