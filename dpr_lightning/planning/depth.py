"""Deep models from shallow ones: what a few blocks need and cost says exactly what many of the same kind do.

In every stage of a step, bytes and operations are affine in the number of blocks of each kind (full or sliding
attention), as the stages part at the places where the peak could move from one block to another.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dpr_lightning.planning.simulation import find_layers
from dpr_lightning.planning.tracker import Stage

Stages = dict[str, Stage]
_FEWEST = 3
"""Blocks that a shallow model has at least: a first, a middle and a last one."""


def kinds_of_layers(config: Any) -> list[str]:
    """Return the kind of each block of a text model's configuration, in order."""
    found = getattr(config, "layer_types", None)
    return list(found) if found else ["block"] * config.num_hidden_layers


def with_layers(config: Any, kinds: Sequence[str]) -> Any:
    """Return a copy of a text model's configuration with blocks of these kinds."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = len(kinds)
    if getattr(config, "layer_types", None):
        shallow.layer_types = list(kinds)
    return shallow


def are_alike(model: nn.Module, kinds: Sequence[str]) -> bool:
    """Return whether all blocks of each kind have weights of the same shapes and types."""
    shapes: dict[str, set[tuple[Any, ...]]] = {}
    for kind, layer in zip(kinds, find_layers(model), strict=True):
        signature = tuple((name, tuple(weight.shape), weight.dtype) for name, weight in layer.named_parameters())
        shapes.setdefault(kind, set()).add(signature)
    return all(len(found) == 1 for found in shapes.values())


def extrapolate(config: Any, *, are_alike: bool, run: Callable[[Any], Stages]) -> Stages:
    """Return the stages of a model of full depth.

    Args:
        config: Of the whole text model.
        are_alike: See :func:`are_alike`; if not, the whole depth is run.
        run: Runs a configuration.
    """
    kinds = kinds_of_layers(config)
    wanted = Counter(kinds)
    fewest = max(2, -(-_FEWEST // len(wanted)))
    base = dict.fromkeys(wanted, fewest)
    if not are_alike or sum(base.values()) + 1 >= len(kinds) or min(wanted.values()) < fewest:
        return run(config)
    bottom = run(with_layers(config, _spread(base, kinds)))
    total = copy.deepcopy(bottom)
    for kind, count in wanted.items():
        above = run(with_layers(config, _spread(base | {kind: fewest + 1}, kinds)))
        for name, stage in total.items():
            _add(stage, bottom[name], above[name], count - fewest)
    return total


def _spread(counts: dict[str, int], kinds: Sequence[str]) -> list[str]:
    """Return the kinds in turn, as models mix them, between the first and the last kind of ``kinds``."""
    left = dict(counts)
    left[kinds[0]] -= 1
    left[kinds[-1]] -= 1
    inner = [kind for number in range(max(left.values())) for kind, count in left.items() if number < count]
    return [kinds[0], *inner, kinds[-1]]


def _add(stage: Stage, bottom: Stage, above: Stage, times: int) -> None:
    """Add to ``stage`` what one block more added, ``times`` times."""
    for kind in set(bottom.peak) | set(above.peak):
        stage.peak[kind] += times * (above.peak[kind] - bottom.peak[kind])
    for name in ("flops", "num_bytes", "num_kernels", "seconds"):
        step = getattr(above, name) - getattr(bottom, name)
        setattr(stage, name, getattr(stage, name) + times * step)
