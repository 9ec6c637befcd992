"""What a run is to be, read from the same files and flags as ``fit``: objects without weights, data or devices."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Trainer
from typing_extensions import override

from dpr_lightning.application import CommandLine, command_line
from dpr_lightning.data.loader import set_accumulation
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.errors import UserError
from dpr_lightning.main import packaged_configs
from dpr_lightning.models.adapters import LoRASettings, find_source
from dpr_lightning.models.policies import find_frozen_pair, find_teacher
from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.on_policy import OnPolicyModule
from dpr_lightning.planning.architecture import find_architecture
from dpr_lightning.planning.simulation import PRECISIONS, Kind, Policies

_NO_TEACHER = "model.teacher: it is required"
_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


class _PlanLine(CommandLine):
    """Builds the module and the data's settings, and neither a Trainer nor anything on the disk."""

    @override
    def before_instantiate_classes(self) -> None:
        self.parser.add_instantiator(self._construct, object, subclasses=True)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return None  # type: ignore[return-value]

    @override
    def _run_subcommand(self, subcommand: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a run is spread over devices."""

    strategy: str
    """single, ddp or sharded."""
    num_devices: int = 1
    """Of all nodes together."""
    devices_per_node: int = 1
    has_bucket_views: bool = False
    """DDP's gradients live in its buckets, instead of a copy there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run of ``fit``."""

    module: CausalLMModule
    data: Any
    """Its DataModule, of whichever kind."""
    policies: Policies
    parallel: Parallel
    is_cuda: bool
    clips: bool
    keeps_gradients: bool
    """Gradients live on while the next epoch samples: Lightning gives them up only where it looks at validation."""
    max_epochs: int | None
    """None for no limit."""
    max_steps: int | None
    start: str
    """Directory or hub name of the weights that the trained policy starts from."""
    architecture: str
    """Where the model's shapes were found."""
    offloads_frozen: bool
    """Frozen policies wait in the host's memory and come to the device to score."""
    assumptions: tuple[str, ...]

    @property
    def is_on_policy(self) -> bool:
        """Whether the run samples."""
        return isinstance(self.module, OnPolicyModule)


def read_run(args: Sequence[str]) -> PlannedRun:
    """Read what ``fit`` would be given; without ``model.teacher`` one on the named backbone is assumed.

    Raises:
        UserError: ``fit`` would refuse it, or it is something that cannot be planned.
    """
    assumptions = []
    given = ["fit", *packaged_configs(args)]
    try:
        line = command_line(given, kind=_PlanLine)
    except UserError as error:
        if not str(error).startswith(_NO_TEACHER):
            raise
        line = command_line([*given, "--model.teacher=planned"], kind=_PlanLine)
        assumptions.append("no model.teacher was given: one of SFT on model.backbone, with a reference at each alpha")
    module, trainer = line.model, line.config["fit"].trainer
    assert isinstance(module, CausalLMModule)
    source, kinds, note = _find_policies(module, is_planned=bool(assumptions))
    assumptions += note
    backbone = module.backbone
    if backbone.quantization is not None:
        raise UserError(
            "model.backbone.quantization: plan does not know bases in 4 bits; plan without it, which needs more"
        )
    if backbone.lora is not None:
        backbone = dataclasses.replace(backbone, lora=_true_lora(source, backbone.lora))
    config, where = find_architecture(source, backbone)
    precision = str(trainer.precision or "32-true")
    precision = _ALIASES.get(precision, precision)
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision: plan knows {', '.join(PRECISIONS)}, found '{precision}'")
    is_cuda = trainer.accelerator in ("cuda", "gpu") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    if trainer.accelerator not in ("cuda", "gpu", "auto", "cpu"):
        raise UserError(f"trainer.accelerator: plan knows cuda and cpu, found '{trainer.accelerator}'")
    parallel = _find_parallel(trainer)
    check_sizes(line.datamodule, parallel, int(trainer.accumulate_grad_batches))
    return PlannedRun(
        module=module,
        data=line.datamodule,
        policies=Policies(config=config, backbone=backbone, frozen=kinds, precision=precision, is_foreach=is_cuda),
        parallel=parallel,
        is_cuda=is_cuda,
        clips=bool(trainer.gradient_clip_val),
        keeps_gradients=trainer.check_val_every_n_epoch != 1 or trainer.limit_val_batches == 0,
        max_epochs=trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None,
        max_steps=trainer.max_steps if trainer.max_steps >= 0 else None,
        start=source,
        architecture=where,
        offloads_frozen=offloads_frozen(module),
        assumptions=tuple(assumptions),
    )


def check_sizes(data: Any, parallel: Parallel, accumulate_grad_batches: int) -> None:
    """Refuse sizes as ``fit`` does in its set-up.

    Raises:
        UserError: They do not divide.
    """
    ranks = {"num_replicas": parallel.num_devices, "rank": 0}
    stand_in: Any = SimpleNamespace(
        strategy=SimpleNamespace(distributed_sampler_kwargs=ranks), accumulate_grad_batches=accumulate_grad_batches
    )
    if isinstance(data, RolloutDataModule):
        data.trainer = stand_in
        data.check_sizes()
        data.trainer = None
    else:
        set_accumulation(stand_in, global_batch_size=data.global_batch_size, micro_batch_size=data.micro_batch_size)


def offloads_frozen(module: CausalLMModule) -> bool:
    """Return whether a module keeps its frozen policies in the host's memory while they do not score."""
    return bool(getattr(module, "offload_frozen", False))


def _find_policies(module: CausalLMModule, *, is_planned: bool) -> tuple[str, dict[str, Kind], list[str]]:
    """Return where the trained policy starts, the frozen ones, and what had to be assumed of them."""
    if not isinstance(module, OnPolicyModule):
        return module.initial_weights, {}, []
    is_lora = module.backbone.lora is not None
    expected: Kind = "adapter" if is_lora else "model"
    names = ["teacher"]
    if isinstance(module, DPRModule):
        wanted: Any = module.reference if module.reference is not None else module.alpha
        count = len(wanted) if isinstance(wanted, list) else 1
        names += ["reference"] if count == 1 else [f"reference_{number}" for number in range(count)]
    try:
        if is_planned:
            raise UserError("planned")
        if isinstance(module, DPRModule):
            pair = find_frozen_pair(module.teacher, module.reference, alpha=module.alpha)
            places = [pair.teacher, *pair.references]
        else:
            places = [find_teacher(module.teacher).teacher]
    except UserError:
        note = [] if is_planned else [f"'{module.teacher}' is not finished: what it would leave, on model.backbone"]
        return module.backbone.name_or_path, dict.fromkeys(names, expected), note
    if not is_lora:
        return places[0], dict.fromkeys(names, "model"), []
    start = find_source(places[0])
    kinds: dict[str, Kind] = {}
    for name, place in zip(names, places, strict=True):
        found = find_source(place)
        kinds[name] = "model" if found.base != start.base else "base" if found.adapter is None else "adapter"
    return places[0], kinds, []


def _true_lora(source: str, written: LoRASettings) -> LoRASettings:
    """Return the settings of the adapter that a run goes on with, where there is one, in place of those written."""
    adapter = find_source(source).adapter
    if adapter is None:
        return written
    found = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return LoRASettings(rank=found["r"], alpha=found["lora_alpha"], target_modules=found["target_modules"])


def _find_parallel(trainer: Any) -> Parallel:
    devices, num_nodes = trainer.devices, int(trainer.num_nodes)
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        per_node = torch.cuda.device_count() or 1
    else:
        per_node = devices if isinstance(devices, int) else len(str(devices).strip("[]").split(","))
    count = per_node * num_nodes
    strategy = trainer.strategy
    name = str(strategy if isinstance(strategy, str) else strategy.get("class_path", "")).rpartition(".")[2]
    settings = {} if isinstance(strategy, str) else vars(strategy.get("init_args") or {})
    plain = name.lower()
    if "fsdp" in plain or "modelparallel" in plain:
        parts = settings.get("tensor_parallel_size", 1)
        if parts not in (1, "auto"):
            raise UserError(f"trainer.strategy.tensor_parallel_size: plan knows 1 only, found {parts}")
        return Parallel(strategy="sharded", num_devices=count, devices_per_node=per_node)
    if plain.startswith("ddp") or (plain == "auto" and count > 1):
        views = bool(settings.get("gradient_as_bucket_view", False))
        return Parallel(strategy="ddp", num_devices=count, devices_per_node=per_node, has_bucket_views=views)
    if plain in ("auto", "singledevicestrategy", "single_device"):
        return Parallel(strategy="single")
    raise UserError(
        f"trainer.strategy: plan knows auto, ddp, fsdp and ModelParallelStrategy, found '{name}'; plan with one of them"
    )


def micro_rows(run: PlannedRun, micro_batch_size: int) -> int:
    """Return the sequences of one forward: a pair is two."""
    return micro_batch_size * (2 if hasattr(run.data, "passes_per_rollout") else 1)


def num_micro_batches(run: PlannedRun, micro_batch_size: int) -> int:
    """Return how many micro-batches one device accumulates for an optimizer step."""
    return math.ceil(int(run.data.global_batch_size) / (micro_batch_size * run.parallel.num_devices))
