"""Llamas of real shapes with random weights, drawn on the device when they are loaded: no hub, and no disk.

Speed and memory do not depend on the values of weights. What depends on them is when responses end: by default never
before the length limit; with ``mean_response_tokens`` in the configuration after so many tokens on average.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from benchmarks.inputs import embedded_model

SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B.
    "1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # Llama-3.1-8B.
    "8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
"""Settings of ``LlamaConfig``."""
TOY_SHAPES: dict[str, dict[str, Any]] = {
    name: shape
    | {
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    for name, shape in SHAPES.items()
}
"""Those of a rehearsal."""
_OFFSET_NORM = 256.0
"""Length of the vector that all embeddings share where responses are to end: far above what the blocks add to it."""


def load_device() -> torch.device:
    """Return the device that weights are initialised on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class RandomLlama(LlamaForCausalLM):
    """A Llama that :meth:`from_pretrained` draws from the seed in its configuration, in place of reading weights."""

    @classmethod
    @override
    def from_pretrained(  # type: ignore[override]
        cls,
        directory: str | Path,
        *args: Any,
        config: LlamaConfig | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the model, and with ``output_loading_info`` an empty report; see ``PreTrainedModel``."""
        if config is None:
            config = LlamaConfig.from_pretrained(directory)
        torch.manual_seed(config.random_seed)
        with load_device():
            settings = {"attn_implementation": attn_implementation or "sdpa"}
            model = cls._from_config(config, dtype=dtype or torch.float32, **settings)
        if config.mean_response_tokens is not None:
            _set_eos_rate(model, config.mean_response_tokens)
        model.eval()
        report = {name: set() for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return (model, report) if output_loading_info else model


@torch.no_grad()
def _set_eos_rate(model: LlamaForCausalLM, mean_response_tokens: int) -> None:
    """Let every state end the response with a probability of about 1 / ``mean_response_tokens``.

    All embeddings get a vector in common, so long that last hidden states are the same whatever the tokens were; the
    output layer's row of EOS is a multiple of that state.
    """
    embedding_VD, weight_VD = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    # Tied, every logit would hold the common vector, far beyond what 16 bits resolve.
    assert weight_VD is not embedding_VD, "the output layer must not be tied to the embedding"
    embedding_VD += _OFFSET_NORM / math.sqrt(embedding_VD.shape[1])
    ids_BT = torch.arange(3, 19, device=embedding_VD.device)[None]
    state_D = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state[0].float().mean(dim=0)
    logits_V = weight_VD.float() @ state_D
    logits_V[model.config.eos_token_id] = -torch.inf
    eos_logit = logits_V.logsumexp(dim=0) - math.log(mean_response_tokens - 1)
    weight_VD[model.config.eos_token_id] = (state_D * eos_logit / state_D.square().sum()).to(weight_VD.dtype)


def write_model(
    directory: Path,
    shape: str,
    *,
    is_toy: bool,
    seed: int,
    mean_response_tokens: int | None = None,
    max_length: int = 4096,
) -> Path:
    """Write configuration and tokenizer of a :class:`RandomLlama`; the embedded tokenizer's ids are its first.

    Args:
        directory: Where to.
        shape: Key of :data:`SHAPES`.
        is_toy: Take the shape of the same name in :data:`TOY_SHAPES`.
        seed: Of its weights.
        mean_response_tokens: Tokens after which a response ends on average, with an untied output layer; None is never.
        max_length: Positions.
    """
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model())
    settings = (TOY_SHAPES if is_toy else SHAPES)[shape]
    if mean_response_tokens is not None:
        settings = settings | {"tie_word_embeddings": False}
    config = LlamaConfig(
        **settings,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        random_seed=seed,
        mean_response_tokens=mean_response_tokens,
    )
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
