from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from dpr_lightning.errors import UserError
from dpr_lightning.models.backbone import (
    BackboneConfig,
    check_lm_head,
    disable_dropout,
    lm_head,
    load_config,
    load_model,
    load_tokenizer,
)


def backbone(path: Path, **settings: object) -> BackboneConfig:
    return BackboneConfig(name_or_path=str(path), **settings)  # type: ignore[arg-type]


def test_load_model_returns_the_saved_weights(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), backbone(tiny_model_dir))
    saved = load_file(tiny_model_dir / "model.safetensors")
    loaded = model.state_dict()
    assert saved.keys() <= loaded.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
        assert loaded[name].dtype == torch.float32
    check_lm_head(model)


def test_load_model_casts_to_the_named_type(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), backbone(tiny_model_dir, dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    check_lm_head(model)


def test_load_model_refuses_missing_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 2 weights.*first: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path / "model"), backbone(tmp_path / "model"))


@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
def test_a_directory_that_is_not_there_is_named(load: Callable[..., object], tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(UserError, match="nothing' cannot be loaded") as caught:
        load(str(missing), backbone(missing))
    assert "\n" not in str(caught.value)


def test_load_tokenizer_refuses_one_without_eos(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no eos_token"):
        load_tokenizer(str(tmp_path), backbone(tmp_path))


def test_dropout_is_off_in_train_mode(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tiny_model("llama", attention_dropout=0.5).save_pretrained(tmp_path)
    ids_BT = torch.arange(3, 15).unsqueeze(0)

    raw = LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert not torch.equal(raw(ids_BT).logits, raw(ids_BT).logits), "the test's own dropout does nothing"

    model = load_model(str(tmp_path), backbone(tmp_path)).train()
    assert torch.equal(model(ids_BT).logits, model(ids_BT).logits)


def test_disable_dropout_zeroes_modules_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    disable_dropout(model)
    x_ND = torch.randn(3, 4)
    assert torch.equal(model(x_ND), model[0](x_ND))


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model_dir: Path) -> None:
    ids_BT = torch.arange(3, 15).reshape(2, 6)
    gradients: list[dict[str, Tensor]] = []
    for is_on in (False, True):
        model = load_model(str(tiny_model_dir), backbone(tiny_model_dir, gradient_checkpointing=is_on)).train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) is is_on
        model(ids_BT).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-6, atol=1e-9)


class PostProcessing(LlamaForCausalLM):
    """A family that changes its logits in a way of its own."""

    def forward(self, *args: object, **kwargs: object) -> CausalLMOutputWithPast:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits - 0.5 * out.logits.roll(1, dims=-1)
        return out


def test_check_lm_head_refuses_logits_that_it_cannot_explain(tiny_model: Callable[..., PreTrainedModel]) -> None:
    plain = tiny_model("llama")
    check_lm_head(plain)
    model = PostProcessing(plain.config)
    model.load_state_dict(plain.state_dict())
    with pytest.raises(UserError, match="PostProcessing changes its logits after the output layer"):
        check_lm_head(model)


def test_lm_head_refuses_an_output_layer_that_is_not_linear(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 48)))
    with pytest.raises(UserError, match="no linear output layer"):
        lm_head(model)


@pytest.mark.parametrize(
    ("is_first_layout", "model_class"), [(True, Gemma3ForCausalLM), (False, Gemma3ForCausalLM), (False, None)]
)
def test_text_only_class_reads_a_multimodal_checkpoint(
    is_first_layout: bool,
    model_class: type[PreTrainedModel] | None,
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    text = tiny_model("gemma3").config
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(1)
    multimodal = Gemma3ForConditionalGeneration(config).eval()
    multimodal.save_pretrained(tmp_path, save_original_format=is_first_layout)
    prefix = "language_model.model." if is_first_layout else "model.language_model."
    assert f"{prefix}embed_tokens.weight" in load_file(tmp_path / "model.safetensors")

    model = load_model(str(tmp_path), backbone(tmp_path, model_class=model_class))
    assert type(model) is Gemma3ForCausalLM
    assert not any("vision" in name for name, _ in model.named_parameters())
    language = multimodal.model.language_model.state_dict()
    assert model.model.state_dict().keys() == language.keys()
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, language[name]), name
    ids_BT = torch.arange(3, 15).unsqueeze(0)
    torch.testing.assert_close(model.eval()(ids_BT).logits, multimodal(ids_BT).logits, rtol=1e-5, atol=1e-5)

    # What is saved is a text model for good: it loads without the class being named.
    model.save_pretrained(tmp_path / "text")
    again = load_model(str(tmp_path / "text"), backbone(tmp_path / "text"))
    assert type(again) is Gemma3ForCausalLM
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
