"""LoRA adapters: several policies on one base model that differ by an adapter each (arXiv 2106.09685).

peft makes, loads and merges them. Which adapter a forward uses is ours: peft's ``set_adapter`` also turns gradients on
for the adapter that it selects and off for all others, so that one scoring forward under a frozen adapter would end
the actor's training without a word. :func:`using` touches no gradient, and puts the actor's adapter back.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dpr_lightning.errors import UserError
from dpr_lightning.models.parallel import whole
from dpr_lightning.models.patterns import check_patterns

ACTOR = "actor"
"""Name of the adapter that is trained."""
FOLDER = "adapter"
"""Where a merged model's adapter lies inside the model's directory."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CHANGES_BASE = ("pissa", "corda", "olora", "mica", "loftq", "lora_ga")
"""Initialisations after which the base is another model than the one that the adapter names."""
_OTHER_UPDATES = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""Settings of peft's under which an adapter is more, or other, than an update B A of linear layers' weights."""
_PREFIX = "base_model.model."
"""Of the names in an adapter's file: those of peft's own wrapper, which this package does without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRASettings:
    """A new adapter. Its dropout is 0, because the ratio pi / pi_old compares two forward passes of one policy."""

    rank: int = 16
    """r, the inner dimension of each update B A."""
    alpha: float = 32.0
    """The update's scale is alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that are adapted; ``all-linear`` is every one but the output layer."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a policy's weights come from."""

    base: str
    """Transformers directory or hub name of a whole model."""
    adapter: Path | None
    """Directory of the adapter on it; None where the base is the policy."""
    revision: str | None = None
    """Revision of the base that the adapter was trained on, where it is recorded."""


def find_source(name_or_path: str) -> Source:
    """Resolve a directory or hub name: an adapter in peft's format, a merged model that kept its adapter, or a model.

    Raises:
        UserError: An adapter's configuration cannot be read, or is none of LoRA.
    """
    directory = Path(name_or_path)
    for adapter in (directory, directory / FOLDER):
        if (adapter / _CONFIG).is_file() and not (adapter / "config.json").is_file():
            try:
                config = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"'{adapter / _CONFIG}' is not JSON ({error}); write the adapter again") from error
            base = config.get("base_model_name_or_path")
            if config.get("peft_type") != "LORA" or not isinstance(base, str):
                raise UserError(
                    f"'{adapter / _CONFIG}' is of type {config.get('peft_type')} on base {base!r}; only LoRA adapters "
                    "that name their base are understood. Merge it with peft, and give the merged model"
                )
            revision = config.get("revision")
            return Source(base, adapter, revision if isinstance(revision, str) else None)
    return Source(name_or_path, None)


def add_adapter(model: PreTrainedModel, name: str, settings: LoRASettings) -> None:
    """Add a new adapter, whose update is 0; the base's gradients are off from here on.

    Args:
        model: The base, in place.
        name: The adapter's name; the last one that was added is active.
        settings: Its size and place.

    Raises:
        UserError: The settings do not fit the model.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=settings.target_modules,
    )
    _inject(model, name, config)


def load_adapter(model: PreTrainedModel, name: str, directory: Path) -> None:
    """Add the adapter that lies in ``directory``, in peft's format.

    Args:
        model: The base, in place.
        name: What it is to be called.
        directory: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        UserError: It does not fit the model.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (TypeError, ValueError) as error:
        raise UserError(f"'{directory / _CONFIG}' is none of this version of peft ({error}); save it again") from error
    assert isinstance(config, LoraConfig)
    _refuse_other_kinds(config, directory)
    # The ratio pi / pi_old compares two forward passes.
    config.lora_dropout = 0.0
    _inject(model, name, config)
    if not (directory / _WEIGHTS).is_file():
        raise UserError(f"'{directory}' has no {_WEIGHTS}; save the adapter as safetensors")
    try:
        weights = {key.removeprefix(_PREFIX): value for key, value in load_file(directory / _WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{directory / _WEIGHTS}' cannot be read ({error}); copy the adapter again") from error
    if bad := [key for key, value in weights.items() if not bool(value.isfinite().all())]:
        raise UserError(f"'{directory / _WEIGHTS}': {bad[0]} has entries that are NaN or infinite; take an earlier one")
    expected = get_peft_model_state_dict(model, adapter_name=name)
    if differing := set(weights) ^ set(expected):
        raise UserError(
            f"'{directory}' is no adapter of this {type(model).__name__}: {len(differing)} of its weights have no "
            f"place or are missing (first: {min(differing)}); give the base that it was trained on"
        )
    try:
        set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{directory}' does not fit {type(model).__name__}: {reason}") from error


def _refuse_other_kinds(config: LoraConfig, directory: Path) -> None:
    found = [key for key in _OTHER_UPDATES if getattr(config, key, None)]
    found += [] if config.bias == "none" else ["bias"]
    start = config.init_lora_weights
    found += ["init_lora_weights"] if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE) else []
    if found:
        key = found[0]
        raise UserError(
            f"'{directory / _CONFIG}': {key} is {getattr(config, key)!r}; several policies share one base here, so an "
            "adapter must be nothing but an update B A of linear layers. Merge it with peft, and give the merged model"
        )


def _inject(model: PreTrainedModel, name: str, config: LoraConfig) -> None:
    texts = [config.target_modules, config.exclude_modules, *(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    check_patterns(model, [text for text in texts if isinstance(text, str)])
    try:
        with warnings.catch_warnings():
            # Several adapters are what is wanted, and tied weights are looked at below.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            inject_adapter_in_model(config, model, adapter_name=name)
    except ValueError as error:
        raise UserError(f"model.backbone.lora: {error}; change it") from error
    tied = model.get_input_embeddings().weight
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if not isinstance(base, torch.nn.Linear):
            raise UserError(
                f"model.backbone.lora.target_modules: '{path}' is a {type(base).__name__}; name linear layers only"
            )
        if base.weight is tied:
            raise UserError(
                f"model.backbone.lora.target_modules: '{path}' shares its weight with the input embedding, which an "
                "adapter of one of them would part; leave it out"
            )
        for parameter in _parameters(layer, name):
            # Updates of a bfloat16 weight by a learning rate of 1e-6 would round away.
            parameter.data = parameter.data.float()


@contextmanager
def using(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Let forwards use the adapter called ``name``, or none, and the one before again afterwards; no gradient changes.

    Only for forwards without gradient: a backward that recomputes activations would use another adapter.
    """
    layers = list(_layers(model))
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [] if name is None else [name]
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def adapter_parameters(model: PreTrainedModel, name: str) -> list[torch.nn.Parameter]:
    """Return the weights of one adapter."""
    return [parameter for layer in _layers(model) for parameter in _parameters(layer, name)]


def adapter_updates(model: PreTrainedModel, name: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer the factors B and A of an adapter's update, those layers left out whose update is 0.

    Args:
        model: The base with its adapters.
        name: Which adapter; None is the bare base.
    """
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name is not None and name in layer.lora_B:
            up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
            assert isinstance(up, Tensor)
            assert isinstance(down, Tensor)
            if torch.count_nonzero(up):
                updates[path] = (up, down)
    return updates


def train_only(model: PreTrainedModel, name: str) -> None:
    """Make one adapter active, and turn its gradients on and all others' off."""
    model.requires_grad_(False)
    for layer in _layers(model):
        layer._active_adapter = [name]
        for parameter in _parameters(layer, name):
            parameter.requires_grad_(True)


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether a model holds any adapter."""
    return any(True for _ in _layers(model))


def adapter_names(model: PreTrainedModel, name: str) -> set[str]:
    """Return the names, in the model's state, of one adapter's weights."""
    own = {id(parameter) for parameter in adapter_parameters(model, name)}
    return {key for key, parameter in model.named_parameters() if id(parameter) in own}


def lora_rank(model: PreTrainedModel, name: str) -> int:
    """Return the inner dimension of one adapter's updates."""
    return _config(model, name).r


def save_adapter(
    model: PreTrainedModel,
    name: str,
    state: Mapping[str, Tensor],
    directory: Path,
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Write one adapter in peft's format, which transformers and peft load by themselves.

    Args:
        model: Its base and it.
        name: Which adapter.
        state: The model's weights by name, whole; the adapter's are enough.
        directory: Made when needed.
        base: Where its base lies, for those who load it.
        revision: Of the base; None is the hub's default.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(model, name)
    before = config.base_model_name_or_path, config.revision, config.inference_mode
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    try:
        config.save_pretrained(str(directory))
    finally:
        config.base_model_name_or_path, config.revision, config.inference_mode = before
    weights = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=name)
    save_file(
        {_PREFIX + key: value.detach().cpu().contiguous() for key, value in weights.items()},
        directory / _WEIGHTS,
        metadata={"format": "pt"},
    )


def save_plain(
    model: PreTrainedModel, state: Mapping[str, Tensor], directory: Path, generation: GenerationConfig | None = None
) -> None:
    """Write weights as a transformers model of the kind of ``model``, which may be sharded or carry adapters.

    Tied weights are written once.

    Args:
        model: Its class and configuration count.
        state: The weights by name.
        directory: Made when needed.
        generation: How others are to generate with it; None is the model's own.
    """
    config = copy.deepcopy(model.config)
    # The weights that are written are whole.
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config).to(model.dtype)  # type: ignore[arg-type]
    if "_weight_conversions" in model.__dict__:
        # How the names of a checkpoint that was loaded differ from the model's: written as it was read.
        plain.__dict__["_weight_conversions"] = model.__dict__["_weight_conversions"]
    plain.generation_config = generation if generation is not None else model.generation_config
    plain.save_pretrained(directory, state_dict=dict(state))


def merged_state(model: PreTrainedModel, name: str, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what :func:`plain_weights` yields."""
    return dict(plain_weights(model, name, state))


@torch.no_grad()
def plain_weights(
    model: PreTrainedModel, name: str | None, state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and weight of the plain model that equals ``model``, one at a time: no second copy is ever held.

    Tied weights stay tied: an adapted layer that shares its weight with another is refused when it is made.

    Args:
        model: With adapters or without.
        name: The adapter that is added to the base's weights, in the base's types; None yields the base's own.
        state: The model's weights by name, whole; None takes the model's own, and gathers those that are sharded, so
            that every rank must go through all of them.
    """
    state = model.state_dict() if state is None else state
    layers: dict[str, Any] = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    in_4_bits = {f"{path}.weight": module for path, module in model.named_modules() if is_in_4_bits(module)}
    for key, value in state.items():
        weight, is_of_weight, _ = key.partition(".weight.")
        if ".lora_" in key or (is_of_weight and f"{weight}.weight" in in_4_bits):
            continue  # an adapter's, or what a weight in 4 bits is scaled by
        value = dequantized(in_4_bits[key]) if key in in_4_bits else whole(value)
        path = key.removesuffix(".base_layer.weight")
        if path != key and name is not None and name in layers[path].lora_A:
            up, down = (whole(state[f"{path}.lora_{letter}.{name}.weight"]).float() for letter in "BA")
            value = (value.float() + layers[path].scaling[name] * (up @ down)).to(value.dtype)
        yield key.replace(".base_layer.", "."), value


def is_in_4_bits(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer that bitsandbytes keeps in 4 bits."""
    return isinstance(module, torch.nn.Linear) and getattr(module.weight, "quant_state", None) is not None


def dequantized(layer: Any) -> Tensor:
    """Return the weight that a layer in 4 bits stands for: that of the policy which was trained."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def merge(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return ``model`` without adapters, one of them added to its weights, in place."""
    state = merged_state(model, name)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.load_state_dict(state, assign=False)
    del model.peft_config
    return model


def _config(model: PreTrainedModel, name: str) -> LoraConfig:
    config = model.peft_config[name]
    assert isinstance(config, LoraConfig)
    return config


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _parameters(layer: Any, name: str) -> Iterator[torch.nn.Parameter]:
    for group in layer.adapter_layer_names:
        found = getattr(layer, group)
        if name in found:
            item = found[name]
            yield from [item] if isinstance(item, torch.nn.Parameter) else item.parameters()
