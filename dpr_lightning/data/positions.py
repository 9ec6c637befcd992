"""Sequences that are longer than what a model was trained on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn


def warn_beyond_positions(lengths: npt.NDArray[np.int64], limit: int | None, *, what: str, advice: str) -> None:
    """Warn of sequences with more tokens than a model has positions, with their count.

    Args:
        lengths: Tokens of each sequence.
        limit: Positions of the model; None where it names none.
        what: What the sequences are.
        advice: Which settings make them shorter.
    """
    if limit is None:
        return
    num_beyond = int((lengths > limit).sum())
    if num_beyond:
        rank_zero_warn(
            f"{num_beyond} of {len(lengths)} {what} are longer than the model's {limit} positions (the longest: "
            f"{int(lengths.max())} tokens), where it was not trained and may fail or answer badly; {advice}"
        )
