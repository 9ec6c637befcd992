"""Loading a causal language model and its tokenizer, and reading the parts of it that log-probabilities need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpr_lightning.errors import UserError
from dpr_lightning.functional.logprobs import LMHead
from dpr_lightning.models.adapters import LoRASettings, Source, find_source, load_adapter, merge
from dpr_lightning.models.location import is_missing_directory, suggestion
from dpr_lightning.models.positions import guard_positions
from dpr_lightning.paths import is_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig:
    """Which pretrained model a run stands on, and how it is loaded."""

    name_or_path: str
    """Transformers directory or hub name; ``dpr_lightning/...`` lies in the installed package, wherever that is. SFT
    starts from it; DPR starts from its teacher instead and takes only the other settings from here."""
    model_class: type[PreTrainedModel] | None = None
    """Class to load; None is transformers' causal class, of the text model where a checkpoint is multimodal."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the stored weights. Mixed precision is the Trainer's business; keep float32 master weights with it."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name (``sdpa``, ``eager``, ``flash_attention_2``); None lets it choose."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights. Off unless you have read that code."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoRASettings | None = None
    """Train an adapter of this size on the frozen model; None trains all weights. Later stages go on with the adapter
    of their teacher, whatever size is written here, and share its base."""
    quantization: Literal["nf4"] | None = None
    """Keep the linear layers of the frozen base in 4 bits (NF4 with double quantization, arXiv 2305.14314); needs
    ``lora`` and the package bitsandbytes. Matrix products are in ``dtype``."""

    def __post_init__(self) -> None:
        """Refuse a base in 4 bits that would be trained."""
        if self.quantization is not None and self.lora is None:
            raise UserError(
                "model.backbone.quantization: weights in 4 bits cannot be trained; lay configs/lora.yaml over it, or "
                "leave it out"
            )

    def unquantized(self) -> BackboneConfig:
        """Return the same with the weights in ``dtype``."""
        return dataclasses.replace(self, quantization=None)


_PACKAGE = Path(__file__).resolve().parent.parent


def locate(name_or_path: str) -> str:
    """Return the path of what ships with the package (``dpr_lightning/...``); anything else as it is."""
    packaged = _PACKAGE.parent / name_or_path
    is_packaged = Path(name_or_path).parts[:1] == (_PACKAGE.name,) and is_directory(packaged)
    return str(packaged) if is_packaged else name_or_path


def _explain(what: str, name_or_path: str, error: Exception) -> UserError:
    lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
    # Validation errors name the value in their second line.
    reason = " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])
    return _refusal(what, name_or_path, reason)


def _refusal(what: str, name_or_path: str, reason: str) -> UserError:
    advice = "give a transformers directory or a hub name that this machine can reach"
    meant = suggestion(name_or_path) or name_or_path
    if is_directory(Path(meant) / "final"):
        # A run holds its model in one of its directories.
        meant = str(Path(meant) / "final")
    if meant != name_or_path:
        advice = f"did you mean '{meant}'?"
    return UserError(f"{what} '{name_or_path}' cannot be loaded ({reason}); {advice}")


def _refuse_missing(what: str, name_or_path: str) -> None:
    """Refuse at once what can only be a directory and is none: the hub would be tried, for most of a minute."""
    if is_missing_directory(locate(name_or_path)):
        raise _refusal(what, name_or_path, "there is no such directory")


def load_tokenizer(name_or_path: str, backbone: BackboneConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or hub name.

    Raises:
        UserError: It cannot be loaded, or it has no EOS token, without which no response can end.
    """
    _refuse_missing("tokenizer of", name_or_path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            locate(name_or_path), revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
        )
    except Exception as error:
        raise _explain("tokenizer of", name_or_path, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of '{name_or_path}' has no eos_token; set one in its tokenizer_config.json")
    return tokenizer


def load_config(name_or_path: str, backbone: BackboneConfig) -> Any:
    """Load the model's configuration alone: cheap, and enough to compare vocabularies before any weight is read."""
    _refuse_missing("model", name_or_path)
    if not is_whole(name_or_path):
        source = find_source(name_or_path)
        return load_config(source.base, of_base(source, backbone))
    try:
        return AutoConfig.from_pretrained(
            locate(name_or_path), revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
        )
    except Exception as error:
        # A value that an architecture refuses ends in an error of huggingface_hub's own.
        raise _explain("model", name_or_path, error) from error


def of_base(source: Source, backbone: BackboneConfig) -> BackboneConfig:
    """Return how an adapter's base is loaded: at the revision that the adapter records, if it records one.

    Raises:
        UserError: ``backbone`` asks for another revision.
    """
    if source.revision is None or Path(locate(source.base)).is_dir():
        return backbone
    if backbone.revision not in (None, source.revision):
        raise UserError(
            f"model.backbone.revision: found '{backbone.revision}', but the adapter '{source.adapter}' was trained on "
            f"revision '{source.revision}' of '{source.base}'; leave it out"
        )
    return dataclasses.replace(backbone, revision=source.revision)


def is_whole(name_or_path: str) -> bool:
    """Return whether a directory or hub name holds all of a model's weights, and not an adapter alone."""
    return find_source(name_or_path).adapter != Path(name_or_path)


_TEXT_MODEL_KEYS = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
"""From the names of a text model's weights inside a multimodal checkpoint, of either layout, to its own."""


def load_model(name_or_path: str, backbone: BackboneConfig) -> PreTrainedModel:
    """Load the weights on the CPU, with every dropout at zero; an adapter alone is loaded with its base, and merged.

    Dropout is off because the ratio pi / pi_old compares two forward passes of the same weights.

    Raises:
        UserError: The weights cannot be loaded, or some of the model's weights are missing from the files.
    """
    _refuse_missing("model", name_or_path)
    if not is_whole(name_or_path):
        source = find_source(name_or_path)
        assert source.adapter is not None
        model = load_model(source.base, of_base(source, backbone))
        load_adapter(model, "merged", source.adapter)
        return merge(model, "merged")
    config = load_config(name_or_path, backbone)
    model_class = backbone.model_class or _text_class(config)
    loader: Any = model_class or AutoModelForCausalLM
    key_mapping = None
    if model_class is not None and hasattr(config, "text_config"):
        expected = model_class.config_class
        if expected is not None and not isinstance(config, expected):
            # A text-only class on a multimodal checkpoint: the text model's configuration, and its weights' names.
            config = config.get_text_config()
            key_mapping = _TEXT_MODEL_KEYS
    try:
        model, report = loader.from_pretrained(
            locate(name_or_path),
            config=config,
            revision=backbone.revision,
            trust_remote_code=backbone.trust_remote_code,
            dtype=getattr(torch, backbone.dtype),
            attn_implementation=backbone.attn_implementation,
            quantization_config=_quantization(backbone),
            output_loading_info=True,
            key_mapping=key_mapping,
            # Refused below, where the weight is named.
            ignore_mismatched_sizes=True,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Readers of weight files (safetensors, pickle, zip) have errors of their own for what is damaged.
        raise _explain("model", name_or_path, error) from error
    if report["mismatched_keys"]:
        name, in_file, needed = sorted(report["mismatched_keys"], key=str)[0]
        raise UserError(
            f"model '{name_or_path}': weight {name} has shape {list(in_file)}, but its config.json makes it "
            f"{list(needed)}; the two are of different models: copy them again"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model '{name_or_path}' lacks {len(missing)} weights that {type(model).__name__} needs (first: "
            f"{missing[0]}); they would be random. Set model.backbone.model_class to the class that wrote it"
        )
    if key_mapping is not None:
        # Kept, it would give the saved weights their multimodal names back, beside a text model's configuration.
        model.__dict__.pop("_weight_conversions", None)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes rounds the scales of a layer in 4 bits further the first time that it runs in eval mode on
            # such a CPU, for good: the policy would be another after its first rollout.
            module.support_avx512bf16_for_cpu = False
    _refuse_non_finite(model, name_or_path)
    disable_dropout(model)
    guard_positions(model)
    if backbone.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def _refuse_non_finite(model: PreTrainedModel, name_or_path: str) -> None:
    for name, weight in model.named_parameters():
        # One sum tells of most that they are finite; where it overflows, each is asked.
        is_suspect = weight.is_floating_point() and not bool(weight.sum(dtype=torch.float32).isfinite())
        if is_suspect and not bool(weight.isfinite().all()):
            num_bad = int((~weight.isfinite()).sum())
            raise UserError(
                f"model '{name_or_path}': weight {name} has {num_bad} entries that are NaN or infinite; its training "
                "broke down or its file is damaged: take an earlier checkpoint"
            )


def check_token_ids(largest_id: int, config: Any, what: str) -> None:
    """Refuse ids that the model has no embedding for, before weights are loaded.

    Args:
        largest_id: Of those that are used.
        config: The model's configuration.
        what: Whose ids they are.

    Raises:
        UserError: ``largest_id`` is not below the number of rows.
    """
    num_rows = config.get_text_config().vocab_size
    if largest_id >= num_rows:
        raise UserError(
            f"{what} has token id {largest_id}, but the model's embedding has {num_rows} rows; take the tokenizer that "
            "belongs to the model, or resize its embedding (model.resize_token_embeddings)"
        )


def _text_class(config: Any) -> type[PreTrainedModel] | None:
    """Return the causal class of a multimodal checkpoint's text model; None where the checkpoint is of text alone.

    transformers would choose the multimodal class: a vision tower in memory, in the optimizer and in the export, of
    which text trains nothing.
    """
    text = config.get_text_config()
    if text is config:
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    assert not isinstance(found, tuple)
    return found


def _quantization(backbone: BackboneConfig) -> BitsAndBytesConfig | None:
    if backbone.quantization is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError("model.backbone.quantization: needs bitsandbytes; pip install 'dpr-lightning[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=backbone.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, backbone.dtype),
    )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of ``model`` to zero, in place, whatever its train or eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def lm_head(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> LMHead:
    """Return the output layer of ``model``: weight [V, D], bias, and what its family does to the logits after it.

    The weight is in ``dtype``, that of hidden states, which under autocast is not its own; None keeps it.

    Softcapping is Gemma 2's ``final_logit_softcapping``; ``logit_scale`` is Cohere's, ``logits_scaling`` Granite's.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear output layer, so its log-probabilities cannot be chunked"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return LMHead(
        weight_VD=layer.weight if dtype is None else layer.weight.to(dtype),
        bias_V=layer.bias,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(scale),
    )


@torch.no_grad()
def check_lm_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not what its decoder's hidden states times its output layer give.

    Two forward passes over four tokens. Without it a family that post-processes logits in a way that ``lm_head`` does
    not know would train on wrong log-probabilities without a word.

    Raises:
        UserError: The two differ by more than rounding.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids_BT = torch.arange(1, 5, device=model.device).unsqueeze(0) % vocabulary
    hidden_BTD: Tensor | None = getattr(
        model.get_decoder()(input_ids=ids_BT, use_cache=False), "last_hidden_state", None
    )
    if hidden_BTD is None:
        raise UserError(
            f"{type(model).__name__} does not say which of its parts is the decoder, so its hidden states cannot be "
            "read; this family is not supported"
        )
    ours = lm_head(model).logits(hidden_BTD[0]).float()
    theirs = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item()):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output layer in a way that dpr-lightning does not "
            f"know (largest difference {(ours - theirs).abs().max().item():.3g}); this family is not supported"
        )
