"""A loader that plans each epoch by itself and resumes at the exact next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from lightning import Trainer

from dpr_lightning.data.batching import accumulation
from dpr_lightning.errors import UserError

PlanT = TypeVar("PlanT")
BatchT = TypeVar("BatchT")


class MicroBatchLoader(Generic[PlanT, BatchT]):
    """Iterates over the batches of the current epoch.

    Lightning calls ``iter`` on a loader once before a run or a resumed epoch and again before every later one, so an
    iterator decides which epoch it serves, and where it begins, only when its first batch is asked for. Lightning
    fetches no batch ahead from a loader of known length: the state in a checkpoint counts the batches trained on.

    Args:
        plan: The plans of an epoch, given its number: a pure function, with equally many plans for each epoch that
            this loader serves.
        make_batch: Makes the batch of one plan.
        epoch: Number of the epoch that is running.
    """

    def __init__(
        self,
        plan: Callable[[int], Sequence[PlanT]],
        make_batch: Callable[[PlanT], BatchT],
        *,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self._plan = plan
        self._make_batch = make_batch
        self._epoch = epoch
        self._num_batches = len(plan(epoch()))
        self._state = {"epoch": -1, "position": 0}
        self._is_resuming = False

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[BatchT]:
        # A generator: nothing below runs before the first next().
        epoch = self._epoch()
        is_resumed_epoch = self._is_resuming and self._state["epoch"] == epoch
        self._is_resuming = False
        start = self._state["position"] if is_resumed_epoch else 0
        plans = self._plan(epoch)
        for position in range(start, len(plans)):
            batch = self._make_batch(plans[position])
            self._state = {"epoch": epoch, "position": position + 1}
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and how many of its batches were handed out."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that ``state_dict`` counts, if the same epoch is entered next."""
        self._state = {"epoch": int(state_dict["epoch"]), "position": int(state_dict["position"])}
        self._is_resuming = True


def running_epoch(trainer: Trainer) -> int:
    """Return the number of the epoch that is being fitted, resumed ones included; Lightning's samplers get the same."""
    # Declared as the wider class that lacks this counter.
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def data_parallel_rank(trainer: Trainer) -> tuple[int, int]:
    """Return the number of data-parallel ranks and this process's place among them.

    With tensor parallelism several processes share one place and must see the same data.
    """
    sampler_kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    if sampler_kwargs is None:
        return 1, 0
    return int(sampler_kwargs["num_replicas"]), int(sampler_kwargs["rank"])


def set_accumulation(trainer: Trainer, *, global_batch_size: int, micro_batch_size: int) -> None:
    """Make ``trainer`` accumulate as many micro-batches as one optimizer step has on each rank.

    Raises:
        UserError: The sizes do not divide, or the user asked for another number of micro-batches.
    """
    world_size, _ = data_parallel_rank(trainer)
    derived = accumulation(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
    )
    if trainer.accumulate_grad_batches not in (1, derived):
        raise UserError(
            f"trainer.accumulate_grad_batches: found {trainer.accumulate_grad_batches}, but data.global_batch_size "
            f"{global_batch_size} over {world_size} ranks of micro-batches of {micro_batch_size} makes {derived}; "
            "leave it out"
        )
    trainer.accumulate_grad_batches = derived
