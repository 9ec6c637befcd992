"""A run's place: what Lightning keeps of it, translated for other numbers of ranks, and every rank's random state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from dpr_lightning.errors import UserError

_MORE_THAN_ANY = 2**60
"""Batches that no epoch has."""


def finish_epoch(checkpoint: dict[str, Any]) -> None:
    """Make Lightning take the epoch of a checkpoint of its last batch for finished, however many batches it counts.

    Lightning compares the batches that are done with those of the loader that is there when the run resumes.
    """
    progress = _batch_progress(checkpoint)
    current = progress["current"]
    if progress["is_last_batch"] and current["completed"] < current["processed"]:
        progress["current"] = dict.fromkeys(current, _MORE_THAN_ANY) | {"completed": _MORE_THAN_ANY - 1}


def rescale_progress(checkpoint: dict[str, Any], *, before: int, now: int) -> None:
    """Translate a place that counts ``before`` micro-batches to an optimizer step into one that counts ``now``.

    A run that resumes with another number of ranks, or another micro-batch size, makes its optimizer steps of another
    number of micro-batches on each rank.

    Args:
        checkpoint: Lightning's, changed in place.
        before: Micro-batches of one rank in an optimizer step, when the checkpoint was written.
        now: The same in the run that resumes.

    Raises:
        UserError: The checkpoint lies inside an optimizer step.
    """
    if before == now:
        return
    fit_loop = checkpoint["loops"]["fit_loop"]
    progress = _batch_progress(checkpoint)
    done = progress["current"]["processed"]
    if done % before and not progress["is_last_batch"]:
        raise UserError(
            f"ckpt_path: the checkpoint lies inside an optimizer step ({done % before} of {before} micro-batches), so "
            "it resumes only with the number of ranks and the data.micro_batch_size that it was written with"
        )
    for part in ("current", "total"):
        counts = progress[part]
        scaled = counts["processed"] * now // before
        progress[part] = {name: scaled - (counts["processed"] - count) for name, count in counts.items()}
    finish_epoch(checkpoint)
    for state in fit_loop["state_dict"].get("combined_loader", []):
        if isinstance(state, dict) and "position" in state:
            state["position"] = state["position"] * now // before


def _batch_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    progress: dict[str, Any] = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress


def random_states() -> list[dict[str, Any]]:
    """Return the state of every rank's global random generators, as tensors and plain values; all ranks must call it.

    Rollouts and orders of rows have seeds of their own. This is for what else may draw.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    own = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, own)
    return states


def restore_random_state(states: list[dict[str, Any]], *, rank: int, world_size: int) -> None:
    """Take this rank's state back; with another number of ranks than wrote them, none is."""
    if len(states) != world_size:
        return
    own = states[rank]
    version, words, gauss = own["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = own["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(own["torch"].cpu())
    if isinstance(own["cuda"], Tensor) and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"].cpu())
