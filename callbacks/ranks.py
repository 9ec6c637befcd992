"""Refusals that every rank makes together."""

from __future__ import annotations

from collections.abc import Callable

from lightning import Trainer

from dpr_lightning.errors import UserError


def refuse_together(trainer: Trainer, check: Callable[[], None]) -> None:
    """Run ``check`` on rank zero, which alone is sure to see the run's directory, and raise its refusal on all ranks.

    One broadcast: every rank must call it, or the others wait for ever.

    Args:
        trainer: The running trainer, after its strategy has set up communication.
        check: Raises ``UserError`` to refuse.

    Raises:
        UserError: ``check`` refused.
    """
    message: str | None = None
    if trainer.is_global_zero:
        try:
            check()
        except UserError as error:
            message = str(error)
    message = trainer.strategy.broadcast(message)
    if message is not None:
        raise UserError(message)
