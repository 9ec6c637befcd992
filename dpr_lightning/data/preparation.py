"""Data that an experiment makes for itself, one set for each seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class DataPreparation(ABC):
    """Writes one seed's files; a subclass can be named in an experiment's YAML by its ``class_path``."""

    @abstractmethod
    def __call__(self, directory: Path, seed: int) -> dict[str, Path]:
        """Write into ``directory``, which is empty, and return each file under the name that ``{name}`` stands for."""
