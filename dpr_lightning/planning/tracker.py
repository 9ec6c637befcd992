"""Which tensors are alive at one time, what computing them costs, and of what kind they are.

Operations run on fake tensors, which have shapes and types and no contents, in the places where the program has
weights, activations and states; so a model of any size runs within seconds and megabytes. What is small and decides
shapes, token ids and masks, stays real, and so the very code of a training step can run: it may index by a mask and
ask whether a row is padded. Nothing is estimated of the memory: every storage counts from the operation that made it
until Python and autograd have let go of it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

_aten = torch.ops.aten
_MAX_REAL = 2**22
"""Elements of the largest tensor that is really computed; a mask of more is made as a fake."""
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_TWINS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
    _aten.addmm_: _aten.addmm,
}
"""Operations that torch's table of FLOPs leaves out, and their twins in it: on a CPU, and in place."""

WEIGHTS = "weights"
FROZEN = "frozen policies"
COPIES = "weight copies"
GRADIENTS = "gradients"
MOMENTS = "optimizer states"
CACHE = "key-value cache"
ACTIVATIONS = "activations"


@dataclass(slots=True)
class Stage:
    """One part of a step: what was alive when most was, and what was computed."""

    peak: Counter[str] = field(default_factory=Counter)
    """Bytes by kind of tensor at the moment of the stage's peak."""
    flops: float = 0.0
    """Of matrix products and attention."""
    num_bytes: float = 0.0
    """Bytes that operations read and wrote, each by itself."""
    num_kernels: float = 0.0
    """Operations that computed something, views left out."""
    seconds: float = 0.0
    """What they would take on the tracker's device, one after another."""


class Tracker(TorchDispatchMode):
    """Follows every storage that is made inside it; operations with a fake among their arguments give fakes.

    Args:
        fake: Of the model's weights; ``FakeTensorMode(allow_non_fake_inputs=True)``.
        seconds_of: Seconds of one operation on a device, given its FLOPs, the bytes that it moves, and whether its
            inputs are of 16 bits.
    """

    def __init__(self, fake: FakeTensorMode, seconds_of: Callable[[float, float, bool], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.seconds_of = seconds_of
        self.stages: dict[str, Stage] = {}
        self._stage = Stage()
        self._live: Counter[str] = Counter()
        self._total = 0
        self._peak = 0
        self._kinds: dict[int, tuple[str, int, Any]] = {}
        """Kind, bytes and weak reference of each live storage."""

    def begin(self, name: str) -> None:
        """Name what follows; a stage of the same name goes on, and its peak is the higher one."""
        self._stage = self.stages.setdefault(name, Stage())
        self._peak = self._stage.peak.total()
        self._note_peak()

    def tag(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say of what kind tensors are, whether they were seen before or not."""
        for tensor in tensors:
            self._follow(tensor, kind)
            storage = tensor.untyped_storage()
            before, size, reference = self._kinds[storage._cdata]
            self._live[before] -= size
            self._live[kind] += size
            self._kinds[storage._cdata] = (kind, size, reference)
        self._note_peak()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            out = self._run_fake(func, args, kwargs)
        elif prod(torch.broadcast_shapes(*_shapes(func, inputs))) > _MAX_REAL:
            with self.fake:
                args, kwargs = tree_map_only(Tensor, self.fake.from_tensor, (args, kwargs))
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        is_copy = func is _aten._to_copy.default and self._kind(inputs[0]) in (WEIGHTS, FROZEN)
        for tensor in outputs:
            self._follow(tensor, COPIES if is_copy else ACTIVATIONS)
        if not _is_view(func, inputs, outputs):
            self._count(func, args, kwargs, inputs, outputs, out)
        return out

    def _run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _INDEXING:
            # Where a mask is true decides the shape: its places are looked up in the real mask.
            places: list[Any] = []
            for index in args[1]:
                if index is not None and index.dtype == torch.bool:
                    places += list(_real_nonzero(index))
                else:
                    places.append(index)
            return func(args[0], places, *args[2:], **kwargs)
        if func is _aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        if func is _aten.exponential_.default:
            return args[0]  # its decomposition takes no generator; in place, it makes nothing
        return func(*args, **kwargs)

    def _kind(self, tensor: Tensor) -> str | None:
        found = self._kinds.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def _follow(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        size = storage.nbytes()

        def release(_: Any, key: int = key) -> None:
            kind, size, _reference = self._kinds.pop(key)
            self._live[kind] -= size
            self._total -= size

        self._kinds[key] = (kind, size, weakref.ref(storage, release))
        self._live[kind] += size
        self._total += size
        self._note_peak()

    def _note_peak(self) -> None:
        if self._total > self._peak:
            self._peak = self._total
            self._stage.peak = Counter({kind: size for kind, size in self._live.items() if size})

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], out: Any) -> None:
        stage = self._stage
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        packet = func._overloadpacket
        formula = flop_registry.get(_TWINS.get(packet, packet))
        if "scaled_dot_product" in str(packet):
            args = _with_equal_heads(args)
        flops = 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))
        is_half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in inputs)
        stage.num_kernels += 1
        stage.num_bytes += num_bytes
        stage.flops += flops
        stage.seconds += self.seconds_of(flops, num_bytes, is_half)


def _shapes(func: Any, inputs: list[Tensor]) -> list[torch.Size]:
    """Return shapes of which the output has the broadcast, for operations of elements; nothing for others."""
    return [tensor.shape for tensor in inputs] if torch.Tag.pointwise in func.tags else []


def _with_equal_heads(args: Sequence[Any]) -> list[Any]:
    """Return the arguments of attention with as many key and value heads as query heads, which costs the same.

    FLOP formulas of older torch (2.11) do not support grouped-query attention.
    """
    heads = max(arg.shape[1] for arg in args if isinstance(arg, Tensor) and arg.dim() == 4)
    return [
        torch.empty((arg.shape[0], heads, *arg.shape[2:]), device="meta")
        if isinstance(arg, Tensor) and arg.dim() == 4
        else arg
        for arg in args
    ]


def _real_nonzero(mask: Tensor) -> tuple[Tensor, ...]:
    assert not isinstance(mask, FakeTensor), "a mask that decides shapes has to be real"
    return mask.nonzero().unbind(1)


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    if not outputs or func.is_view:
        return True
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in known for tensor in outputs)
