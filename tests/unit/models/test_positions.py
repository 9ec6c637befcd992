from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.main import main
from dpr_lightning.models.backbone import BackboneConfig, load_model
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.models.positions import check_row_length, position_limit
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import SamplingConfig

SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16},
    **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "longrope": (
        Phi3ForCausalLM,
        Phi3Config(**SIZES, max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=LONGROPE),
    ),
    "dynamic": (LlamaForCausalLM, LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=DYNAMIC)),
}


@pytest.fixture(params=list(MODELS))
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose frequencies change beyond 16 tokens."""
    model_class, config = MODELS[request.param]
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_limits_are_what_the_configuration_says() -> None:
    assert [position_limit(config) for _, config in MODELS.values()] == [16, 16]
    assert position_limit(LlamaConfig(**SIZES)) is None
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert position_limit(LlamaConfig(**SIZES, rope_parameters=linear)) is None
    kinds = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    assert position_limit(Gemma3TextConfig(max_position_embeddings=32, rope_parameters=kinds)) == 32
    assert position_limit(PreTrainedConfig()) is None


def test_up_to_the_limit_rows_do_not_depend_on_their_neighbours(directory: Path) -> None:
    model = load_model(str(directory), BackboneConfig(name_or_path="")).eval()
    policy = CausalPolicy(model)
    prompts, config = [[5, 6, 7], [8, 9, 10, 11, 12, 13]], SamplingConfig(max_new_tokens=10)
    samples = TransformersSampler().sample(model, prompts * 4, config=config, eos_token_id=63, seed=0)
    with torch.no_grad():
        together_N = policy(collate(prompts * 4, samples.response_ids, pad_id=0)).logp_N
        alone = [
            policy(collate([prompt], [response], pad_id=0)).logp_N
            for prompt, response in zip(prompts * 4, samples.response_ids, strict=True)
        ]
    torch.testing.assert_close(together_N, torch.cat(alone), rtol=0, atol=1e-5)
    said_N = torch.tensor([logp for row in samples.logp for logp in row])
    torch.testing.assert_close(said_N, together_N, rtol=0, atol=1e-5)


def test_longer_rows_are_refused_by_model_and_sampler(directory: Path) -> None:
    model = load_model(str(directory), BackboneConfig(name_or_path="")).eval()
    policy = CausalPolicy(model)
    row = list(range(3, 17))
    policy(collate([row], [[5, 6]], pad_id=0))
    with pytest.raises(UserError, match="may have 17 tokens, but beyond 16"):
        policy(collate([row, [5]], [[5, 6, 7], [6]], pad_id=0))
    with pytest.raises(UserError, match="beyond 16"):
        TransformersSampler().sample(model, [row], config=SamplingConfig(max_new_tokens=9), eos_token_id=63, seed=0)
    with pytest.raises(UserError, match="the setting: the longest row may have 17 tokens, but beyond 16"):
        check_row_length(17, model.config, "the setting")


def test_fit_refuses_longer_rows_before_weights_load(
    directory: Path, tiny_tokenizer: PreTrainedTokenizerBase, demonstrations_file: str, tmp_path: Path, capsys: Any
) -> None:
    tiny_tokenizer.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": len(tiny_tokenizer)}))
    configs = Path(__file__).parents[3] / "configs"
    files = [configs / "base.yaml", configs / "recipe" / "sft.yaml", configs / "hardware" / "cpu.yaml"]
    with pytest.raises((UserError, SystemExit)) as caught:
        main(
            [
                *("fit", *(part for file in files for part in ("-c", str(file)))),
                f"--model.backbone.name_or_path={directory}",
                f"--data.demonstrations.source={demonstrations_file}",
                "--data.demonstrations.preset=prompt_response",
                f"--run_dir={tmp_path / 'run'}",
            ]
        )
    said = str(caught.value) + capsys.readouterr().err
    assert "data.demonstrations.max_prompt_tokens and max_response_tokens: the longest row may have" in said
