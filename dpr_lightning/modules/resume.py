"""A run's place: what Lightning keeps of it, translated for other numbers of ranks, and every rank's random state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
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
    for state in _loader_states(checkpoint):
        state["position"] = state["position"] * now // before


def restore_place(checkpoint: dict[str, Any], data: Any, *, before: dict[str, int], now: dict[str, int]) -> None:
    """Translate a checkpoint's place in the epoch for the sizes of the run that resumes.

    With steps of as many rows as before, a place counts optimizer steps: see :func:`rescale_progress`. With others it
    counts rows, and what is left of the epoch becomes an epoch that has not begun, so that every row is trained on
    once. A checkpoint between two epochs has no place to translate.

    Args:
        checkpoint: Lightning's, changed in place.
        data: The DataModule, set up.
        before: When the checkpoint was written: ``global_batch_size``; ``accumulate_grad_batches``, the micro-batches
            of one rank in an optimizer step; and where rows were counted before, ``resumed_epoch`` and ``first_row``.
        now: The same of the run that resumes.

    Raises:
        UserError: The DataModule cannot resume inside an epoch with other steps, or the checkpoint lies in a step.
    """
    progress = _batch_progress(checkpoint)
    epoch, done = _epoch_progress(checkpoint)["current"]["processed"], progress["current"]["processed"]
    first_row = before["first_row"] if before["resumed_epoch"] == epoch else 0
    is_same = before["global_batch_size"] == now["global_batch_size"] and not first_row
    if is_same or progress["is_last_batch"] or (done == 0 and not first_row):
        rescale_progress(checkpoint, before=before["accumulate_grad_batches"], now=now["accumulate_grad_batches"])
        if not is_same:
            finish_epoch(checkpoint)
        return
    num_steps, rest = divmod(done, before["accumulate_grad_batches"])
    resume_at = getattr(data, "resume_at", None)
    if rest or resume_at is None:
        raise UserError(
            f"data.global_batch_size: the checkpoint lies inside an epoch of steps of {before['global_batch_size']} "
            f"rows, which cannot be continued with {now['global_batch_size']}; resume with "
            f"{before['global_batch_size']}, or from a checkpoint at the end of an epoch"
        )
    first_row += num_steps * before["global_batch_size"]
    resume_at(epoch, first_row)
    rank_zero_info(f"The run resumes at row {first_row} of epoch {epoch}, {now['global_batch_size']} rows a step")
    _leave_epoch(checkpoint)
    # All that was begun is done: else Lightning completes a batch of the new epoch in its place.
    progress["total"] = dict.fromkeys(progress["total"], progress["total"]["processed"])
    for state in _loader_states(checkpoint):
        state["position"] = 0


def settle_place(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint that is taken between two optimizer steps one that resumes with all that is left, and no more.

    It may be taken where the next step's first batch has been fetched, at an epoch's end or after it, or where a run
    stops inside an epoch. Lightning resumes exactly from two of its own states: that in which it hands a batch to
    callbacks that ends an optimizer step (the loop counts it as completed, skips the validation that may follow, and
    goes on with the next batch), and that of an epoch that has not begun. The place is written as one of these.

    Args:
        checkpoint: Lightning's, changed in place.
    """
    batches, epochs = _batch_progress(checkpoint), _epoch_progress(checkpoint)
    num_done = batches["current"]["completed"]
    is_next_fetched = batches["current"]["ready"] > num_done
    if num_done == 0 or (batches["is_last_batch"] and not is_next_fetched):
        _leave_epoch(checkpoint)
    else:
        for part in ("current", "total"):
            begun = epochs[part]["ready"]
            epochs[part] = dict.fromkeys(epochs[part], begun) | {"processed": begun - 1, "completed": begun - 1}
            done = batches[part]["completed"]
            batches[part] = dict.fromkeys(batches[part], done) | {"completed": done - 1}
        checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        for state in _loader_states(checkpoint):
            state["position"] = num_done
    batches["is_last_batch"] = False


def _batch_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    progress: dict[str, Any] = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress


def _epoch_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    progress: dict[str, Any] = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    return progress


def _loader_states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of the training loaders that keep a place."""
    states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    return [state for state in states if isinstance(state, dict) and "position" in state]


def _leave_epoch(checkpoint: dict[str, Any]) -> None:
    """Write the place as that of an epoch that has not begun."""
    epochs, batches = _epoch_progress(checkpoint), _batch_progress(checkpoint)
    for part in ("current", "total"):
        epochs[part] = dict.fromkeys(epochs[part], epochs[part]["processed"])
    batches["current"] = dict.fromkeys(batches["current"], 0)


def random_states() -> list[dict[str, Any]]:
    """Return the state of every rank's global random generators, as tensors and plain values; all ranks must call it.

    Rollouts and orders of rows have seeds of their own. This is for what else may draw, such as dropout.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    own = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    if _num_ranks() == 1:
        return [own]
    states: list[Any] = [None] * _num_ranks()
    distributed.all_gather_object(states, own)
    return states


def restore_random_state(states: list[dict[str, Any]], *, rank: int, step: int) -> None:
    """Take this rank's state back; where another number of ranks wrote them, seed it anew and say so.

    Args:
        states: Of every rank, see :func:`random_states`.
        rank: This one.
        step: Optimizer steps that the run has taken, which with the rank decides a new seed.
    """
    if len(states) != _num_ranks():
        rank_zero_info(
            f"The checkpoint was written by {len(states)} rank{'s' if len(states) != 1 else ''} and goes on with "
            f"{_num_ranks()}: samples and rounding are not those of an uninterrupted run from here on, and random "
            f"states are seeded by optimizer step {step} and rank"
        )
        seed = int(np.random.SeedSequence([step, rank]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return
    own = states[rank]
    version, words, gauss = own["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = own["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(own["torch"].cpu())
    if isinstance(own["cuda"], Tensor) and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"].cpu())


def _num_ranks() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
