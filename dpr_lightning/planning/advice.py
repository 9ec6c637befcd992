"""What would make a run fit that does not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dpr_lightning.models.adapters import LoRASettings
from dpr_lightning.planning.depth import Stages
from dpr_lightning.planning.devices import Device
from dpr_lightning.planning.phases import Planner
from dpr_lightning.planning.settings import Parallel, PlannedRun
from dpr_lightning.planning.simulation import Kind
from dpr_lightning.planning.sizes import Sizes

_SHARDS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change, and the peak that the run would have with it."""

    change: str
    peak: float
    fits: bool


def advise(planner: Planner) -> list[Advice]:
    """Return changes that were simulated, each alone unless said otherwise.

    Args:
        planner: Of a run that does not fit.
    """
    run, sizes, device = planner.run, planner.sizes, planner.device
    changes: list[tuple[str, PlannedRun]] = []
    backbone = run.policies.backbone
    if not backbone.gradient_checkpointing:
        changes.append(("--model.backbone.gradient_checkpointing true", with_checkpointing(run)))
    if backbone.lora is None:
        changes.append(("-c configs/lora.yaml", with_lora(run)))
        if not backbone.gradient_checkpointing:
            changes.append(("both of these", with_checkpointing(with_lora(run))))
    found = [_try(change, changed, sizes, device) for change, changed in changes]
    found += _smaller(planner)
    if run.is_cuda:
        found += _shards(planner)
    return found


def with_checkpointing(run: PlannedRun) -> PlannedRun:
    """Return ``run`` with activations recomputed."""
    return _with_backbone(run, gradient_checkpointing=True)


def with_lora(run: PlannedRun) -> PlannedRun:
    """Return ``run`` with an adapter of the default size in place of all weights, also those of its teacher."""
    changed = _with_backbone(run, lora=LoRASettings())
    kinds: dict[str, Kind] = dict.fromkeys(changed.policies.frozen, "adapter")
    return dataclasses.replace(changed, policies=dataclasses.replace(changed.policies, frozen=kinds))


def _with_backbone(run: PlannedRun, **changes: object) -> PlannedRun:
    backbone = dataclasses.replace(run.policies.backbone, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(run, policies=dataclasses.replace(run.policies, backbone=backbone))


def _try(change: str, run: PlannedRun, sizes: Sizes, device: Device, memo: dict[Any, Stages] | None = None) -> Advice:
    planner = Planner(run, sizes, device, memo)
    peak = max(planner.plan(name).peak for name in planner.phases)
    return Advice(change=change, peak=peak, fits=peak <= device.usable)


def _smaller(planner: Planner) -> list[Advice]:
    """Return the peak with the fewest rows in each forward, where that is fewer than now."""
    if all(planner.rows(name) <= 1 for name in planner.phases):
        return []
    peak = max(planner.plan(name, min(planner.rows(name), _fewest(planner, name))).peak for name in planner.phases)
    change = "data.micro_batch_size 1"
    if planner.run.is_on_policy:
        change += ", model.score_micro_batch_size 1 and data.sampling.batch_size 1"
    return [Advice(change=change, peak=peak, fits=peak <= planner.device.usable)]


def _fewest(planner: Planner, name: str) -> int:
    return 2 if name == "training" and hasattr(planner.run.data, "passes_per_rollout") else 1


def _shards(planner: Planner) -> list[Advice]:
    """Return the fewest devices over which the sharded run fits, or the most that were tried."""
    run = planner.run
    found = []
    for num_devices in (count for count in _SHARDS if count >= run.parallel.num_devices):
        parallel = Parallel(strategy="sharded", num_devices=num_devices, devices_per_node=min(num_devices, 8))
        sharded = dataclasses.replace(run, parallel=parallel)
        change = f"sharded (FSDP) over {num_devices} devices"
        found = [_try(change, sharded, planner.sizes, planner.device, planner.memo)]
        if found[0].fits:
            break
    return found
