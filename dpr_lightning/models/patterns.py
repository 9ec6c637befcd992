"""Regular expressions that come with an adapter's configuration, tried before peft matches with them."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from dpr_lightning.errors import UserError

_PATTERN_SECONDS = 5.0


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse regular expressions that are none, or that take too long on the names of a model's modules.

    Raises:
        UserError: Naming the first.
    """
    for pattern in patterns:
        try:
            with time_limit(_PATTERN_SECONDS):
                for path, _ in model.named_modules():
                    re.fullmatch(pattern, path)
        except (re.error, TimeoutError) as error:
            reason = str(error) or f"it takes more than {_PATTERN_SECONDS} s on this model's module names"
            raise UserError(
                f"model.backbone.lora: the regular expression {pattern!r} cannot be used ({reason}); name the linear "
                "layers in a list"
            ) from error


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer; outside the main thread, where none can be set, let it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    before, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # pytest-timeout, say, has one of its own.
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, handler)
