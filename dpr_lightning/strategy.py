"""``trainer.strategy: fsdp``: sharded weights, gradients and optimizer states (FSDP2), on GPUs and on CPUs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import distributed
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from dpr_lightning.checkpoints import MANIFEST, META, checksum, partial_of, put_in_place, remove, resolve
from dpr_lightning.errors import UserError

_KEY = "trainer.strategy"


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with all ranks data-parallel; the module shards itself when it is made.

    A checkpoint holds what is trained: with adapters the frozen base is where the run found it. Sharded or whole, it
    resumes on any number of ranks.

    Args:
        save_distributed_checkpoint: Whether a checkpoint is a directory to which every rank writes its shards, or one
            file that the first rank gathers in its host's memory, as without sharding.
        process_group_backend: Of ``torch.distributed``; None is NCCL on GPUs and gloo on CPUs.
        timeout_minutes: How long a rank waits for the others before the run ends with an error.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: Literal["nccl", "gloo"] | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            data_parallel_size=1,  # of no meaning before the number of ranks is known
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    @property
    def mesh(self) -> DeviceMesh:
        """The data-parallel ranks, which weights are sharded over."""
        return self.device_mesh["data_parallel"]

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Type that weights are gathered in: half of their size in mixed precision; None is their own."""
        return torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._trained_weights(self._options(of_weights=True))

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # inside Lightning's wrapper
        state = get_optimizer_state_dict(self.model, optimizer, options=self._options())
        return state if self._save_distributed_checkpoint or not state else _by_number(state)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            if self.global_rank == 0:
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            self.barrier()
            return
        partial = partial_of(path)
        if self.global_rank == 0:
            remove(partial)
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        # Each rank reads its own shards again: what is on the disk is what counts.
        own = [
            *partial.glob(f"__{self.global_rank}_*"),
            *([partial / META, partial / ".metadata"] if self.global_rank == 0 else []),
        ]
        parts: list[Any] = [None] * self.world_size
        distributed.all_gather_object(parts, {file.name: checksum(file) for file in own})
        if self.global_rank == 0:
            sums = {name: found for part in parts for name, found in part.items()}
            (partial / MANIFEST).write_text(json.dumps(sums, indent=2), encoding="utf-8")
            put_in_place(partial, path)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = resolve(checkpoint_path)
        return self._load_sharded(path) if path.is_dir() else self._load_whole(path)

    def _load_sharded(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        keys = FileSystemReader(path).read_metadata().state_dict_metadata
        weights = self._trained_weights(StateDictOptions(ignore_frozen_params=True))
        _refuse_others(path, weights, [key.removeprefix("state_dict.") for key in keys])
        state: dict[str, Any] = {"state_dict": weights}
        for number, optimizer in enumerate(self.optimizers):
            state[f"optimizer_{number}"] = get_optimizer_state_dict(self.model, optimizer)
        load(state, checkpoint_id=path)
        set_model_state_dict(self.model, weights, options=StateDictOptions(strict=False))
        for number, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[f"optimizer_{number}"])
        meta: dict[str, Any] = torch.load(path / META, weights_only=True)
        return meta

    def _load_whole(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        found: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        weights = found.pop("state_dict")
        trained = self._trained_weights(StateDictOptions(ignore_frozen_params=True))
        _refuse_others(path, trained, weights)
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, {name: weights[name] for name in trained}, options=whole)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, found.pop("optimizer_states", []), strict=False):
            order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=_by_name(state, order), options=whole)
        return found

    def _trained_weights(self, options: StateDictOptions) -> dict[str, Any]:
        assert self.model is not None
        named = self.model.named_parameters(remove_duplicate=False)
        # torch leaves the second name of a tied weight in.
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        state = get_model_state_dict(self.model, options=options)
        return {name: value for name, value in state.items() if name not in frozen}

    def _options(self, *, of_weights: bool = False) -> StateDictOptions:
        return StateDictOptions(
            full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True, ignore_frozen_params=of_weights
        )


def _refuse_others(path: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    if missing := sorted(set(expected) - set(found)):
        raise UserError(
            f"ckpt_path: '{path}' lacks {len(missing)} weights that this run trains (first: {missing[0]}); resume with "
            "the run's own model.backbone"
        )


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state whose parameters go by number, as ``Optimizer.state_dict`` has them."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    return {
        "state": {number[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def _by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return what :func:`_by_number` was made of, given the names in the optimizer's order."""
    return {
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def check_strategy(strategy: Any) -> Any:
    """Return what ``trainer.strategy`` means: ``fsdp`` is :class:`FullyShardedStrategy`.

    Raises:
        UserError: It is another kind of sharding, which the modules do not apply.
    """
    if strategy in ("fsdp", f"{FullyShardedStrategy.__module__}.{FullyShardedStrategy.__name__}"):
        return FullyShardedStrategy()
    is_other = isinstance(strategy, FSDPStrategy) or type(strategy) is ModelParallelStrategy
    if is_other or (isinstance(strategy, str) and strategy.startswith(("fsdp", "deepspeed"))):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise UserError(
            f"{_KEY}: found {name}; weights are sharded by 'fsdp', which is class_path: "
            "dpr_lightning.strategy.FullyShardedStrategy, with its init_args where you change some"
        )
    return strategy
