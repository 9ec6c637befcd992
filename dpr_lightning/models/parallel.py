"""Sharding (FSDP2): every rank keeps a share of each weight, its gradient and its optimizer state.

A block's weights are gathered for its forward and its backward and let go again. Sampling would gather them once for
every token, so a rollout gathers the whole policy once, in the precision of the forward (:func:`gathered`): ranks then
draw without a word to each other, however different their responses' lengths are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpr_lightning.errors import UserError

FORWARD = "hidden_states"
"""The method of a sharded module, beside ``forward``, that runs blocks: it, too, must gather them."""
_ROOT = "_gather_root"
"""Name of a method that does nothing: as a forward of a sharded module it makes that one the root of its blocks."""


def shard(
    module: nn.Module,
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """Shard ``module`` over the ranks of ``mesh``, in place: each transformer block by itself, and what is left.

    Gradients are averaged over ranks in float32, whatever the dtype of the forward.

    Args:
        module: What is called: a policy or a critic around ``model``. Its weights may lie on any device.
        model: The transformers model inside; its class names its blocks.
        mesh: One dimension, the data-parallel ranks.
        compute_dtype: Type that weights are gathered in; None keeps their own.
        offload: Keep the shards in the host's memory, and move them to the device each time they are gathered.

    Raises:
        UserError: The model's class names no blocks, or has none of them.
    """
    names = set(model._no_split_modules or [])
    blocks = [block for block in model.modules() if type(block).__name__ in names]
    if not blocks:
        raise UserError(
            f"trainer.strategy: {type(model).__name__} does not say which modules are its blocks, so it cannot be "
            "sharded; use ddp, or another backbone"
        )
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=policy)
    setattr(module, _ROOT, MethodType(lambda self: None, module))
    for name in (FORWARD, _ROOT):
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def is_sharded(module: nn.Module) -> bool:
    """Return whether :func:`shard` has been called on ``module``."""
    return isinstance(module, FSDPModule)


def most(module: nn.Module, count: int, device: torch.device) -> int:
    """Return the largest ``count`` of all ranks where a module is sharded, and else this one's.

    Args:
        module: What the counted forwards are of; the ranks of a sharded one make them together.
        count: How many this rank has.
        device: Where the module runs.
    """
    if not isinstance(module, FSDPModule):
        return count
    value = torch.tensor(count, device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return int(value)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold all of a sharded module's weights on this rank, once, for as many forwards as there are inside.

    All ranks enter and leave together, and need not agree in between. Only for forwards without gradient. A module
    that is not sharded is as it is.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    getattr(module, _ROOT)()
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            # The root's weights stay until the backward: the output layer is used after the forward.
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def release(module: nn.Module) -> None:
    """Let go what a sharded module's last forward without a backward left gathered: what is in no block."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; all ranks must call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(model: nn.Module, *, is_writer: bool, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return a model's state by name, whole and on the CPU where it was sharded; tied weights are one tensor.

    All ranks must call it when the model is sharded; one tensor at a time is gathered.

    Args:
        model: Any module, sharded or not.
        is_writer: Whether this rank gets the state; the others get an empty one.
        only: Names to leave it at; None is all.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, value in model.state_dict().items():
        if only is not None and name not in only:
            continue
        parameter = parameters.get(name, value)
        if id(parameter) not in seen:
            tensor = whole(value.detach())
            seen[id(parameter)] = tensor.cpu() if isinstance(value, DTensor) and is_writer else tensor
        if is_writer:
            state[name] = seen[id(parameter)]
        else:
            seen[id(parameter)] = value.new_empty(0)
    return state
