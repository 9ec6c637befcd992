"""Tiny random models of many transformers classes: sampled with exact log-probabilities, or refused in one line."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.models import ragged
from dpr_lightning.models.backbone import check_lm_head
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.rollout.decoding import find_decoding
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import SamplingConfig

SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 32, "d_model": 32, "n_embd": 32, "word_embed_proj_dim": 32},
    **{"intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2},
    **{"num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "rotary_dim": 4},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"state_size": 8, "conv_kernel": 4},
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        **{"intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"]},
        "attention_chunk_size": 16,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "minimax": _LINEAR,
    "qwen3_5_text": {**_LINEAR, **_DELTA},
    "qwen3_next": {**_LINEAR, **_DELTA, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "zamba2": {
        **{"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_hidden_layers": 3},
        **{"layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1, "attention_head_dim": 16},
    },
}
SAMPLED = [
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "bloom", "falcon", "opt", "mpt", "phi", "phi3", "gemma"),
    *("gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3", "mixtral", "olmo2", "cohere", "granite", "stablelm"),
    *("starcoder2", "glm", "nemotron", "doge", "mamba", "mamba2", "falcon_mamba", "lfm2", "bamba"),
    *("qwen3_next", "qwen3_5_text", "falcon_h1", "granitemoehybrid", "jamba", "zamba2"),
]
REFUSED = {"minimax": "MiniMaxForCausalLM cannot be sampled", "recurrent_gemma": "RecurrentGemmaForCausalLM cannot be"}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [5, 6, 7]]


def tiny(model_type: str) -> PreTrainedModel:
    config_class, model_class = next(
        (config, model) for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items() if config.model_type == model_type
    )
    known = set(inspect.signature(config_class).parameters)
    known |= {name for kind in config_class.__mro__ for name in getattr(kind, "__annotations__", {})}
    sizes = {name: value for name, value in SIZES.items() if name in known} | OWN.get(model_type, {})
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**sizes)).eval()
    assert model.num_parameters() < 2e6
    return model


def logp_of_rows(model: PreTrainedModel, responses: list[list[int]]) -> list[list[float]]:
    """Return what a forward over each row alone says of its response."""
    found = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        with torch.no_grad():
            logp_TV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].log_softmax(-1)
        found.append([logp_TV[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)])
    return found


@pytest.mark.parametrize("model_type", SAMPLED)
def test_sampler_and_trainer_say_what_a_forward_over_each_row_says(model_type: str) -> None:
    model = tiny(model_type)
    check_lm_head(model)
    policy = CausalPolicy(model)
    ragged.verify(model)
    config = SamplingConfig(max_new_tokens=6, batch_size=4)
    samples = TransformersSampler().sample(model, PROMPTS, config=config, eos_token_id=2, seed=0)
    expected = [value for row in logp_of_rows(model, samples.response_ids) for value in row]
    found = [value for row in samples.logp for value in row]
    # Zamba 2's scan in chunks differs from its steps by up to 7e-4.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=2e-3)
    with torch.no_grad():
        trained_N = policy(collate(PROMPTS, samples.response_ids, pad_id=0)).logp_N
    torch.testing.assert_close(trained_N, torch.tensor(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("model_type", list(REFUSED))
def test_a_cache_that_cannot_be_used_is_refused_by_the_models_name(model_type: str) -> None:
    with pytest.raises(UserError, match=REFUSED[model_type]) as caught:
        TransformersSampler().check_model(tiny(model_type))
    assert "\n" not in str(caught.value)


def test_a_class_that_hides_its_decoder_is_refused_for_training_and_sampled() -> None:
    model = tiny("llama4_text")
    with pytest.raises(UserError, match="Llama4ForCausalLM does not say which of its parts is the decoder"):
        check_lm_head(model)
    samples = TransformersSampler().sample(
        model, PROMPTS, config=SamplingConfig(max_new_tokens=4), eos_token_id=2, seed=0
    )
    for found, right in zip(samples.logp, logp_of_rows(model, samples.response_ids), strict=True):
        assert found == pytest.approx(right, abs=1e-4)


class _Forgetful:
    """Hides a model's cache from it, as a cache by another argument's name would be."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.forward = model.forward

    def __call__(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return self.forward(*args, **{**kwargs, "use_cache": False})


def test_a_cache_that_is_not_read_is_found_and_refused() -> None:
    model = tiny("qwen2")
    model.set_attn_implementation("eager")
    model.forward = _Forgetful(model)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM cannot be sampled here.*\d nats away"):
        TransformersSampler().check_model(model)
    assert not model.training


def test_packed_decoding_that_differs_gives_way_to_padded_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "_REFUSED", set())
    model = tiny("qwen2")
    assert ragged.enable(model)
    plain, run = TransformersSampler(), ragged.run
    monkeypatch.setattr(ragged, "run", lambda *args: run(*args) * torch.tensor([-1.0] + [1.0] * 31))
    config = SamplingConfig(max_new_tokens=4)
    samples = plain.sample(model, PROMPTS, config=config, eos_token_id=2, seed=0)
    assert not ragged.is_enabled(model)
    expected = logp_of_rows(model, samples.response_ids)
    for found, right in zip(samples.logp, expected, strict=True):
        assert found == pytest.approx(right, abs=1e-4)


def test_a_model_is_checked_once() -> None:
    model = tiny("qwen2")
    forwards = []
    model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    first = find_decoding(model)
    num_forwards = len(forwards)
    assert num_forwards < 16
    assert find_decoding(model) is first
    assert len(forwards) == num_forwards
