"""Position encodings that change with the longest row of a forward, and the length up to which they do not.

Dynamic NTK and LongRoPE take other frequencies as soon as any row of a forward is longer than the model was first
trained on: its neighbours' log-probabilities then change with it, and a sampler's cache mixes both. Rows up to that
length are the same in every batch; longer ones are refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dpr_lightning.errors import UserError


def position_limit(config: Any) -> int | None:
    """Return the longest row whose positions are encoded alike in every batch; None where that is any."""
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some families have parameters for each kind of layer.
    limits = [_limit(config, part) for part in (found, *found.values()) if isinstance(part, dict)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(config: Any, parameters: dict[str, Any]) -> int | None:
    kind = str(parameters.get("rope_type", parameters.get("type")))
    # What transformers compares the longest row with.
    if "dynamic" in kind:
        return int(config.max_position_embeddings)
    if kind == "longrope":
        original = parameters.get("original_max_position_embeddings")
        return int(original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
    return None


def check_row_length(num_tokens: int, config: Any, settings: str) -> None:
    """Refuse rows whose positions would depend on their neighbours', before weights are loaded.

    Args:
        num_tokens: Longest prompt and response together.
        config: The model's configuration.
        settings: What the user can lower.

    Raises:
        UserError: They are longer than :func:`position_limit`.
    """
    limit = position_limit(config)
    if limit is not None and num_tokens > limit:
        raise UserError(
            f"{settings}: the longest row may have {num_tokens} tokens, but beyond {limit} this model's position "
            "encoding (dynamic NTK or LongRoPE) changes for all rows of a batch; lower it"
        )


def guard_positions(model: PreTrainedModel) -> None:
    """Let a model refuse longer rows than :func:`position_limit` wherever they come from."""
    limit = position_limit(model.config)
    if limit is None:
        return

    def refuse(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position_ids: Tensor | None = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if position_ids is not None:
            check_row_length(int(position_ids.max()) + 1, model.config, type(model).__name__)

    for module in model.modules():
        if hasattr(module, "rope_type") and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(refuse, with_kwargs=True)
