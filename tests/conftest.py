"""Two-layer random models of the real transformers classes, and a directory that a run can start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning import Trainer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpr_lightning.demo.tokenizer import build_tokenizer

ModelFactory = Callable[..., PreTrainedModel]

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough that a random model's distributions differ from state to state.
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama() -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=rope)


def _qwen2() -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    return Qwen2ForCausalLM, Qwen2Config(**SIZES)


def _mistral() -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    return MistralForCausalLM, MistralConfig(**SIZES, sliding_window=4)


def _gemma3() -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    sizes = SIZES | {"pad_token_id": 0}
    return Gemma3ForCausalLM, Gemma3TextConfig(
        **sizes, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )


_FAMILIES = {"llama": _llama, "qwen2": _qwen2, "mistral": _mistral, "gemma3": _gemma3}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets_cache")


@pytest.fixture(params=list(_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each of the four families in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_model() -> ModelFactory:
    """Make a random model: ``tiny_model(family, seed=0, **changes to its configuration)``."""

    def make(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
        model_class, config = _FAMILIES[family]()
        for name, value in changes.items():
            assert hasattr(config, name), name
            setattr(config, name, value)
        torch.manual_seed(seed)
        model = model_class(config)
        # Norm weights start at 1 or 0 whatever the family; moved, they count in the comparison.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter.data, mean=float(parameter.data.mean()), std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded tokenizer, trained on little: all bytes, BOS in front, a padding token."""
    return build_tokenizer(seed=0, num_documents=50)


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory, tiny_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A transformers directory with a random two-layer Llama and its tokenizer."""
    directory = tmp_path_factory.mktemp("tiny_model")
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer), initializer_range=0.02)
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def frozen_dirs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory, tiny_tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Teacher and reference: transformers directories of two different random Llamas with one tokenizer."""
    names = []
    for seed, name in ((1, "teacher"), (2, "reference")):
        directory = tmp_path_factory.mktemp(name)
        tiny_model("llama", seed=seed, vocab_size=len(tiny_tokenizer), initializer_range=0.1).save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        names.append(str(directory))
    return names[0], names[1]


@pytest.fixture(scope="session")
def demonstrations_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 demonstrations of unequal length, as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    rows = [{"prompt": f"{n} and {n * n}", "response": " ".join(["ok"] * (1 + n % 5)) + f" {n}"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Make a quiet Trainer on one CPU process; settings go on top."""

    def make(**settings: Any) -> Trainer:
        quiet: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "max_epochs": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(**(quiet | settings))

    return make
