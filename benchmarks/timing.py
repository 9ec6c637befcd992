"""Times of several ways of doing the same, taken in turns, so that a busy machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def in_turns(
    ways: Mapping[str, Callable[[], object]], *, rounds: int = 5, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Return the least seconds of each by ``clock``; a round before the others warms up."""
    least = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, work in ways.items():
            start = clock()
            work()
            if number:
                least[name] = min(least[name], clock() - start)
    return least
