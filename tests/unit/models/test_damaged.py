"""Model directories that are damaged or do not fit together: one line, never a traceback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpr_lightning.errors import UserError
from dpr_lightning.main import main
from dpr_lightning.models.adapters import ACTOR, LoRASettings, add_adapter, load_adapter, save_adapter
from dpr_lightning.models.backbone import BackboneConfig, check_token_ids, load_model
from dpr_lightning.models.patterns import time_limit
from dpr_lightning.models.policies import FrozenPair, check_same_vocabulary

WEIGHT = "model.layers.0.mlp.up_proj.weight"
Change = Callable[[Path], None]


def bytes_of(change: Callable[[bytes], bytes]) -> Change:
    def write(directory: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return write


def weights_of(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def write(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return write


def config_of(**values: Any) -> Change:
    def write(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | values))

    return write


def instead(name: str, content: bytes) -> Change:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(content)

    return write


def set_to(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights[WEIGHT].view(-1)[5:7].fill_(value)


DAMAGED: dict[str, tuple[Change, str]] = {
    "truncated": (bytes_of(lambda data: data[: len(data) // 2]), "cannot be loaded"),
    "header alone": (bytes_of(lambda data: data[:20]), "cannot be loaded"),
    "empty": (bytes_of(lambda data: b""), "cannot be loaded"),
    "garbage": (bytes_of(lambda data: b"\xff" * 999), "cannot be loaded"),
    "wrong shape": (
        weights_of(lambda weights: weights.update({WEIGHT: weights[WEIGHT][:, :4].contiguous()})),
        rf"weight {WEIGHT} has shape \[48, 4\], but its config.json makes it \[48, 32\]",
    ),
    "not a number": (weights_of(set_to(float("nan"))), f"weight {WEIGHT} has 2 entries that are NaN"),
    "infinite": (weights_of(set_to(float("-inf"))), f"weight {WEIGHT} has 2 entries that are NaN or infinite"),
    "no weights": (instead("readme", b""), "cannot be loaded"),
    "empty pickle": (instead("pytorch_model.bin", b""), "cannot be loaded"),
    "pickle that is none": (instead("pytorch_model.bin", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."), "cannot"),
    "index to nowhere": (
        instead("model.safetensors.index.json", b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}'),
        "cannot be loaded",
    ),
    "heads do not divide": (config_of(num_attention_heads=5), "number of attention heads"),
    "text for a number": (config_of(hidden_size="big"), "expected int, got str"),
    "unknown function": (config_of(hidden_act="none_such"), "cannot be loaded"),
    "other size": (config_of(intermediate_size=40), "but its config.json makes it"),
}


@pytest.mark.parametrize("name", list(DAMAGED))
def test_a_damaged_directory_is_refused_in_one_line(
    name: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    change, expected = DAMAGED[name]
    change(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        load_model(str(tmp_path), BackboneConfig(name_or_path=""))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_large_finite_weights_are_loaded(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("llama")
    # Their sum overflows, they do not.
    model.get_parameter(WEIGHT).data.fill_(3e38)
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path), BackboneConfig(name_or_path=""))


def test_ids_without_an_embedding_are_refused(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    check_token_ids(47, model.config, "the tokenizer")
    with pytest.raises(UserError, match="the tokenizer has token id 48, but the model's embedding has 48 rows"):
        check_token_ids(48, model.config, "the tokenizer")
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    pair = FrozenPair(teacher=str(tmp_path), references=(str(tmp_path),), manifest=None)
    with pytest.raises(UserError, match="embedding has 48 rows"):
        check_same_vocabulary(pair, BackboneConfig(name_or_path=""))


def adapter_config_of(**values: Any) -> Change:
    def write(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return write


def adapter_weights_of(change: Callable[[Path], object]) -> Change:
    def write(directory: Path) -> None:
        change(directory / "adapter_model.safetensors")

    return write


def spoil(file: Path) -> None:
    save_file({key: value * torch.nan for key, value in load_file(file).items()}, file)


BACKTRACKS = r"([a-z_.0-9]+)+!"
ADAPTERS: dict[str, tuple[Change, str]] = {
    "garbage": (adapter_weights_of(lambda file: file.write_bytes(b"\x01" * 40)), "safetensors' cannot be read"),
    "not a number": (adapter_weights_of(spoil), "NaN or infinite"),
    "wrong size": (adapter_config_of(r=3), "does not fit LlamaForCausalLM"),
    "no expression": (adapter_config_of(target_modules="(q_proj"), r"expression '\(q_proj' cannot be used"),
    "backtracks": (adapter_config_of(target_modules=BACKTRACKS), "takes more than 0.2 s"),
    "backtracks in a rank": (adapter_config_of(rank_pattern={BACKTRACKS: 4}), "takes more than 0.2 s"),
    "backtracks in what is left out": (adapter_config_of(exclude_modules=BACKTRACKS), "takes more than 0.2 s"),
}


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_a_damaged_adapter_is_refused_in_one_line(
    name: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpr_lightning.models.patterns._PATTERN_SECONDS", 0.2)
    model = tiny_model("llama")
    add_adapter(model, ACTOR, LoRASettings(rank=2, target_modules=["q_proj"]))
    save_adapter(model, ACTOR, model.state_dict(), tmp_path, base="unused")
    load_adapter(tiny_model("llama"), "whole", tmp_path)
    change, expected = ADAPTERS[name]
    change(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        load_adapter(tiny_model("llama"), "other", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_time_limit_ends_with_its_block() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeoutError), time_limit(0.05):
        time.sleep(1.0)


def test_fit_refuses_ids_without_an_embedding_before_weights_load(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    demonstrations_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    configs = Path(__file__).parents[3] / "configs"
    files = [configs / "base.yaml", configs / "recipe" / "sft.yaml", configs / "hardware" / "cpu.yaml"]
    arguments = [
        *("fit", *(part for file in files for part in ("-c", str(file)))),
        f"--model.backbone.name_or_path={tmp_path / 'model'}",
        f"--data.demonstrations.source={demonstrations_file}",
        "--data.demonstrations.preset=prompt_response",
        f"--run_dir={tmp_path / 'run'}",
    ]
    with pytest.raises((UserError, SystemExit)) as caught:
        main(arguments)
    assert "but the model's embedding has 48 rows" in str(caught.value) + capsys.readouterr().err
