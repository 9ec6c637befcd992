"""Draws subsamples and splits rows by prompt, as functions of a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpr_lightning.errors import UserError

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Row numbers of each side, in source order."""

    train: IndexArray
    validation: IndexArray
    test: IndexArray


def subsample(num_rows: int, size: int | None, seed: int) -> IndexArray:
    """Return ``size`` distinct row numbers drawn by ``seed``, in source order; all rows if there are no more."""
    if size is None or size >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    drawn = np.random.default_rng([seed]).permutation(num_rows)[:size]
    return np.sort(drawn).astype(np.int64)


def prompt_hashes(prompts: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each prompt; equal prompts (up to surrounding space) have equal hashes."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = (
        hashlib.blake2b(prompt.strip().encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest()
        for prompt in prompts
    )
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def split_by_prompt(
    rows: IndexArray,
    hashes: npt.NDArray[np.uint64],
    *,
    validation_fraction: float,
    test_fraction: float,
    key: str,
) -> Splits:
    """Share ``rows`` out by the hashes of their prompts; one prompt is never on two sides.

    A prompt's side depends on its own text and the seed, not on the other rows, except that a split with a positive
    fraction gets at least one prompt.

    Args:
        rows: Row numbers.
        hashes: Of the prompt of each row, same length.
        validation_fraction: Share of prompts for validation.
        test_fraction: Share of prompts for test.
        key: Configuration key, for messages.

    Raises:
        UserError: Too few distinct prompts to give every split one.
    """
    distinct = np.unique(hashes)
    position = distinct.astype(np.float64) / 2.0**64
    num_test = max(int((position < test_fraction).sum()), int(test_fraction > 0))
    below_both = int((position < test_fraction + validation_fraction).sum())
    num_validation = max(below_both - num_test, int(validation_fraction > 0))
    if num_test + num_validation >= len(distinct):
        raise UserError(
            f"{key}: {len(distinct)} distinct prompts leave none for training after validation_fraction="
            f"{validation_fraction} and test_fraction={test_fraction}; lower them or give more rows"
        )
    rank = np.searchsorted(distinct, hashes)
    return Splits(
        test=rows[rank < num_test],
        validation=rows[(rank >= num_test) & (rank < num_test + num_validation)],
        train=rows[rank >= num_test + num_validation],
    )
