"""A response while it is being written, the same for every way of decoding."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Response:
    """What one row of a rollout has drawn so far."""

    row: int
    prompt: tuple[int, ...]
    uniforms: list[float]
    """One random number for each token that it may have: their count is its length limit."""
    ends: frozenset[int]
    """Ids that end it."""
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the token that the next forward takes: the last one drawn, or of the prompt where none is."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def last_id(self) -> int:
        """That token."""
        return self.ids[-1] if self.ids else self.prompt[-1]

    @property
    def is_truncated(self) -> bool:
        """Whether the length limit came before an end."""
        return self.ids[-1] not in self.ends

    @property
    def is_finished(self) -> bool:
        """Whether nothing is drawn any more."""
        return len(self.ids) == len(self.uniforms) or not self.is_truncated
