"""Memory and time of each phase of a run on one device: simulated, then spread over devices."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.planning.batches import Shape
from dpr_lightning.planning.depth import Stages, are_alike, extrapolate, kinds_of_layers
from dpr_lightning.planning.devices import Device
from dpr_lightning.planning.settings import PlannedRun, micro_rows, num_micro_batches
from dpr_lightning.planning.simulation import PRECISIONS, Simulation, find_layers
from dpr_lightning.planning.sizes import Sizes
from dpr_lightning.planning.tracker import ACTIVATIONS, CACHE, COPIES, FROZEN, GRADIENTS, MOMENTS, WEIGHTS
from dpr_lightning.rollout.packed import packed_bytes
from dpr_lightning.types import SamplingConfig

PhaseName = Literal["sft", "rollout", "scoring", "training"]
BUCKETS = "DDP buckets"
GATHERED = "gathered blocks"
STORAGE = "rollout storage"
ORDER = (WEIGHTS, FROZEN, GRADIENTS, MOMENTS, BUCKETS, COPIES, GATHERED, CACHE, STORAGE, ACTIVATIONS)
_STORED = 8 + 3 * 1 + 4 * 8
"""Bytes per token of an epoch's samples: ids, masks, and float32 scores, rewards, returns and advantages."""
_DESCRIBED = 8 * 13
"""Bytes per token while their figures are taken, in float64."""
_SECOND_ROWS = 4
_MAX_TRIES = 10
_MOST_TIMES = 16
"""Of the configured rows: more are not looked for."""
_PREFETCHED = 2
"""Blocks that are whole at one time when weights are sharded: the one that runs and the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What one phase needs on one device."""

    name: PhaseName
    rows: int
    """Sequences of one forward."""
    stage: str
    """Where in the phase the peak is."""
    parts: dict[str, float]
    """Bytes at the peak, by part."""

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of the model, in bytes of its stored types where not said otherwise."""

    class_name: str
    num_parameters: int
    num_trained: int
    weights: float
    """Of one whole model with its adapters."""
    block: float
    """Of its largest block."""
    root: float
    """Of what belongs to no block: embeddings, last norm, output layer."""
    num_own: int
    """Frozen policies that are whole models."""
    packed: float
    """What a rollout on a CPU holds twice."""


class Planner:
    """Simulates one run; what was simulated is kept.

    Args:
        run: What is to be run.
        sizes: Its data.
        device: One of its devices.
        memo: What was simulated of the same run on another number of devices.
    """

    def __init__(self, run: PlannedRun, sizes: Sizes, device: Device, memo: dict[Any, Stages] | None = None) -> None:
        self.run = run
        self.sizes = sizes
        self.device = device
        self.memo: dict[Any, Stages] = {} if memo is None else memo
        simulation = self._simulation(run.policies.config, "training")
        actor = simulation.module.actor.model
        self.are_alike = are_alike(actor, kinds_of_layers(run.policies.config))
        blocks = [_num_bytes(layer) for layer in find_layers(actor)]
        weights = _num_bytes(actor)
        self.model = Model(
            class_name=type(actor).__name__,
            num_parameters=simulation.num_parameters,
            num_trained=simulation.num_trained,
            weights=weights,
            block=max(blocks),
            root=weights - sum(blocks),
            num_own=sum(kind == "model" for kind in run.policies.frozen.values()),
            packed=packed_bytes(actor),
        )

    @property
    def phases(self) -> tuple[PhaseName, ...]:
        """Which phases there are; before DPR and the like stands the SFT of the teacher, at the same sizes."""
        return ("sft", "rollout", "scoring", "training") if self.run.is_on_policy else ("training",)

    def rows(self, name: PhaseName) -> int:
        """Return the sequences of one forward of a phase, as they are configured."""
        run, data = self.run, self.run.data
        micro = int(data.micro_batch_size)
        if name == "rollout":
            return min(self._sampling.batch_size, self.most_rows(name))
        if name == "scoring":
            wanted: Any = run.module.score_micro_batch_size
            return min(2 * micro if wanted is None else int(wanted), self.most_rows(name))
        return micro_rows(run, micro) if name == "training" else micro

    def most_rows(self, name: PhaseName) -> int:
        """Return the most sequences that a forward of a phase could have on one device."""
        num_devices = self.run.parallel.num_devices
        if name in ("rollout", "scoring"):
            return max(1, self.num_samples // num_devices)
        return max(1, micro_rows(self.run, int(self.run.data.global_batch_size) // num_devices))

    @property
    def num_samples(self) -> int:
        """Responses of one rollout over all devices."""
        data: Any = self.run.data
        prompts = data.prompts_per_rollout or self.sizes.num_rows or data.global_batch_size
        return int(prompts * data.samples_per_prompt)

    @property
    def _sampling(self) -> SamplingConfig:
        sampling: SamplingConfig = self.run.data.sampling
        return sampling

    def plan(self, name: PhaseName, rows: int | None = None) -> Phase:
        """Return what a phase needs on one device, at its longest batch.

        Args:
            name: Which phase.
            rows: Sequences of one forward; None takes the configured number.
        """
        rows = self.rows(name) if rows is None else rows
        stages = self.stages(name, rows, self.sizes.longest_prompt, self.sizes.longest_response)
        held = {} if name in ("sft", "training") else self._held()
        peaks = {stage: self._spread(stage, {**found.peak, **held}, name) for stage, found in stages.items()}
        stage = max(peaks, key=lambda stage: sum(peaks[stage].values()))
        parts = {part: float(peaks[stage][part]) for part in ORDER if peaks[stage].get(part)}
        return Phase(name=name, rows=rows, stage=stage, parts=parts)

    def _after_step(self) -> dict[str, float]:
        """Return what there is while an optimizer step ends."""
        stages = self.stages("training", self.rows("training"), self.sizes.longest_prompt, self.sizes.longest_response)
        return {**dict.fromkeys(ORDER, 0.0), **stages["gradient norms"].peak}

    def _held(self) -> dict[str, float]:
        """Return what training leaves on the device while the next epoch samples and scores."""
        peak = self._after_step()
        return {kind: peak[kind] for kind in ((GRADIENTS, MOMENTS) if self.run.keeps_gradients else (MOMENTS,))}

    def _spread(self, stage: str, peak: dict[str, float], name: PhaseName) -> dict[str, float]:
        """Return what of a stage's peak lies on one device."""
        run, parallel = self.run, self.run.parallel
        parts: dict[str, float] = {**dict.fromkeys(ORDER, 0.0), **peak}
        if name == "sft":
            parts[FROZEN] = 0.0
        if run.offloads_frozen and (name != "scoring" or parallel.strategy == "sharded"):
            # Whole ones come to the device to score; of shards, a block at a time.
            parts[FROZEN] = 0.0
        if parallel.strategy == "ddp" and not parallel.has_bucket_views:
            parts[BUCKETS] = self._after_step()[GRADIENTS]
        if parallel.strategy == "sharded":
            self._shard(stage, parts, name)
        if name == "rollout" and not run.is_cuda and PRECISIONS[run.policies.precision][1] is None:
            parts[COPIES] += self.model.packed
        if run.is_on_policy and not run.is_cuda and name != "sft":
            per_token = _STORED + (_DESCRIBED if name == "scoring" else 0)
            width = self.sizes.longest_prompt + self.sizes.longest_response
            parts[STORAGE] = per_token * width * self.num_samples / parallel.num_devices if name != "rollout" else 0.0
        return parts

    def _shard(self, stage: str, parts: dict[str, float], name: PhaseName) -> None:
        num_devices = self.run.parallel.num_devices
        model = self.model
        for part in (WEIGHTS, FROZEN, GRADIENTS, MOMENTS):
            parts[part] /= num_devices
        policies = self.run.policies
        stored = getattr(torch, policies.backbone.dtype).itemsize
        # Mixed precision gathers weights in 16 bits, and autocast then finds nothing to copy.
        scale = 2 / stored if policies.precision == "bf16-mixed" else 1.0
        if policies.precision == "bf16-mixed":
            parts[COPIES] = 0.0
        if name == "rollout":
            parts[GATHERED] = scale * model.weights
            return
        if stage in ("optimizer", "gradient norms"):
            parts[ACTIVATIONS] /= num_devices
            return
        share = (model.root + _PREFETCHED * model.block) / model.weights
        parts[COPIES] = min(parts[COPIES], share * model.weights)
        whole = model.root + _PREFETCHED * model.block
        # In the backward a block's gradients are whole too, until they are scattered.
        is_backward = stage.startswith("backward") and model.num_trained == model.num_parameters
        parts[GATHERED] = scale * whole * (2 if is_backward else 1)

    def stages(self, name: PhaseName, rows: int, prompt_tokens: int, response_tokens: int) -> Stages:
        """Return the stages of a phase at full depth, of a model that lies on one device as a whole."""
        accumulates = num_micro_batches(self.run, int(self.run.data.micro_batch_size)) > 1
        key = (name, rows, prompt_tokens, response_tokens, accumulates)
        if key not in self.memo:
            shape = Shape(rows=rows, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
            self.memo[key] = extrapolate(
                self.run.policies.config,
                are_alike=self.are_alike,
                run=lambda config: self._run(self._simulation(config, name), name, shape, accumulates),
            )
        return self.memo[key]

    def _run(self, simulation: Simulation, name: PhaseName, shape: Shape, accumulates: bool) -> Stages:
        if name == "rollout":
            return simulation.roll_out(shape, self._sampling)
        if name == "scoring":
            return simulation.score(shape)
        return simulation.train(shape, accumulates=accumulates, clips=self.run.clips)

    def _simulation(self, config: Any, name: PhaseName) -> Simulation:
        run = self.run
        policies = dataclasses.replace(run.policies, config=config)
        module = copy.deepcopy(run.module)
        if name == "sft":
            policies = dataclasses.replace(policies, frozen={})
            module = SFTModule(
                backbone=module.backbone,
                optimizer=module.optimizer,
                logprob_chunk_size=module.logprob_chunk_size,
            )
        return Simulation(module, policies, self.device.seconds_of)

    def largest_rows(self, name: PhaseName) -> int:
        """Return the most sequences of one forward that fit, up to ``_MOST_TIMES`` the configured; 0 if not one does.

        Memory is close to affine in rows, so a straight line through two numbers of rows finds the place at once.
        """
        capacity = self.device.usable
        step = micro_rows(self.run, 1) if name == "training" else 1
        low, at_low = step, self.plan(name, step).peak
        if at_low > capacity:
            return 0
        high = most = self.searched_rows(name)
        second = min(most, _SECOND_ROWS * step)
        slope = max((self.plan(name, second).peak - at_low) / max(second - low, 1), 1.0)
        for _ in range(_MAX_TRIES):
            if high <= low:
                break
            rows = low + int((capacity - at_low) / slope) // step * step
            rows = min(max(rows, low + step), high)
            found = self.plan(name, rows).peak
            slope = max((found - at_low) / (rows - low), 1.0)
            if found <= capacity:
                low, at_low = rows, found
            else:
                high = rows - step
        return low

    def searched_rows(self, name: PhaseName) -> int:
        """Return the most sequences of one forward that are looked at."""
        step = micro_rows(self.run, 1) if name == "training" else 1
        return max(step, min(self.most_rows(name), _MOST_TIMES * self.rows(name)))

    def host_bytes(self) -> float:
        """Return the host's memory, on one node, while every process there has just loaded its models."""
        models = 1 + self.model.num_own + int(hasattr(self.run.module, "critic_lr"))
        element = getattr(torch, self.run.policies.backbone.dtype).itemsize
        weight_type = PRECISIONS[self.run.policies.precision][0]
        scale = 1.0 if weight_type is None else element / weight_type.itemsize
        return models * self.model.weights * scale * self.run.parallel.devices_per_node


def _num_bytes(module: nn.Module) -> float:
    return float(sum(weight.numel() * weight.element_size() for weight in module.parameters()))
