"""Verifiers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Verifier(ABC):
    """Judges a response to a row."""

    @abstractmethod
    def __call__(self, row: Mapping[str, Any], response: str) -> bool:
        """Return whether the response is right."""
