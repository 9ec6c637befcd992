"""Policies that share a base: against separate whole models, and as files against transformers and peft alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.models.adapters import (
    ACTOR,
    LoRASettings,
    add_adapter,
    find_source,
    load_adapter,
    merged_state,
    plain_weights,
    save_adapter,
    save_plain,
    train_only,
    using,
)
from dpr_lightning.models.backbone import BackboneConfig, load_config, load_model
from dpr_lightning.models.policies import AdapterPolicy, CausalPolicy, load_policies, load_policy
from dpr_lightning.types import TokenBatch

IDS = torch.tensor([[1, 7, 9, 23, 4], [1, 5, 6, 7, 8]])


def move(model: PreTrainedModel, name: str, seed: int) -> None:
    """Give an adapter weights other than a new one's, whose update is 0."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.fixture
def batch() -> TokenBatch:
    return collate([[1, 7], [1, 5, 6]], [[9, 23, 4], [7, 2]], pad_id=0)


@pytest.fixture
def base_dir(tmp_path: Path, tiny_model: Any) -> Path:
    tiny_model("llama", vocab_size=48).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter_dirs(base_dir: Path, tmp_path: Path) -> list[Path]:
    """Two different adapters of one base, as files."""
    directories = []
    for seed in (1, 2):
        model = load_model(str(base_dir), BackboneConfig(name_or_path=str(base_dir)))
        add_adapter(model, ACTOR, LoRASettings(rank=4, alpha=8.0))
        move(model, ACTOR, seed)
        directories.append(tmp_path / f"adapter_{seed}")
        save_adapter(model, ACTOR, model.state_dict(), directories[-1], base=str(base_dir))
    return directories


def lora(base_dir: Path) -> BackboneConfig:
    return BackboneConfig(name_or_path=str(base_dir), lora=LoRASettings(rank=4, alpha=8.0))


def test_a_new_adapter_changes_nothing_until_it_is_trained(family: str, tiny_model: Any) -> None:
    model = tiny_model(family)
    before = logits(model)
    add_adapter(model, ACTOR, LoRASettings(rank=4))
    assert torch.equal(logits(model), before)
    move(model, ACTOR, 1)
    assert (logits(model) - before).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_whatever_the_base(dtype: torch.dtype, tiny_model: Any) -> None:
    model = tiny_model("llama").to(dtype)
    add_adapter(model, ACTOR, LoRASettings(rank=4))
    train_only(model, ACTOR)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {dtype}


@pytest.mark.parametrize("is_tied", [False, True])
def test_merged_and_saved_it_is_a_plain_model_of_the_same_logits(
    family: str, is_tied: bool, tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=is_tied)
    add_adapter(model, ACTOR, LoRASettings(rank=4))
    move(model, ACTOR, 1)
    expected = logits(model)
    save_plain(model, merged_state(model, ACTOR), tmp_path)
    assert torch.equal(logits(model), expected)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is type(model)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == is_tied
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


def test_a_saved_adapter_loads_in_peft_and_in_transformers_alone(family: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    add_adapter(model, ACTOR, LoRASettings(rank=4))
    move(model, ACTOR, 1)
    save_adapter(model, ACTOR, model.state_dict(), tmp_path / "adapter", base=str(tmp_path / "base"))
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft), logits(model), rtol=1e-4, atol=1e-5)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(by_transformers), logits(model), rtol=1e-4, atol=1e-5)
    ours = load_model(str(tmp_path / "adapter"), BackboneConfig(name_or_path=""))
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-3, atol=1e-4)
    assert not any(".lora_" in key or "base_layer" in key for key in ours.state_dict())


def test_an_adapter_made_by_peft_alone_loads(base_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_dir),
        LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]),
    ).eval()
    move(theirs, "default", 3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(str(base_dir), BackboneConfig(name_or_path=""))
    load_adapter(model, ACTOR, tmp_path / "theirs")
    # Their dropout is left out: in training mode, too, the logits are those of theirs in eval mode.
    torch.testing.assert_close(logits(model.train()), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapters_that_are_more_than_an_update_are_refused(
    settings: dict[str, Any], base_dir: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
    theirs.save_pretrained(tmp_path / "theirs")
    (key,) = settings
    with pytest.raises(UserError, match=f"{key} is .*Merge it with peft"):
        load_model(str(tmp_path / "theirs"), BackboneConfig(name_or_path=""))


def test_ranks_scales_and_targets_may_differ_between_adapters_of_one_base(
    base_dir: Path, tmp_path: Path, batch: TokenBatch
) -> None:
    from peft import LoraConfig, get_peft_model

    kinds = {
        "teacher": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "up_proj"]),
        "reference": LoraConfig(
            r=2, lora_alpha=8, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5}, target_modules="all-linear"
        ),
    }
    expected = {}
    for seed, (name, config) in enumerate(kinds.items()):
        theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config).eval()
        move(theirs, "default", seed)
        theirs.save_pretrained(tmp_path / name)
        expected[name] = CausalPolicy(theirs.merge_and_unload())(batch).logp_N.detach()
    where = {name: str(tmp_path / name) for name in kinds}
    actor, frozen = load_policies(where["teacher"], where, lora(base_dir), chunk_size=8)
    for name, policy in {"teacher": actor, **frozen}.items():
        torch.testing.assert_close(policy(batch).logp_N.detach(), expected[name], rtol=1e-4, atol=1e-4)
        if name in where:
            alone = load_policy(where[name], BackboneConfig(name_or_path=""), chunk_size=8)
            torch.testing.assert_close(alone(batch).logp_N.detach(), expected[name], rtol=1e-4, atol=1e-4)


def test_shared_policies_say_what_whole_models_say(base_dir: Path, adapter_dirs: list[Path], batch: TokenBatch) -> None:
    sources = {"teacher": str(adapter_dirs[0]), "reference": str(adapter_dirs[1]), "base": str(base_dir)}
    actor, frozen = load_policies(sources["teacher"], sources, lora(base_dir), chunk_size=64)
    assert all(policy.model is actor.model for policy in frozen.values())
    for name, source in sources.items():
        whole = load_policy(source, BackboneConfig(name_or_path=""), chunk_size=64).freeze()
        torch.testing.assert_close(frozen[name](batch).logp_N, whole(batch).logp_N, rtol=1e-3, atol=1e-4)
    # The actor starts as the teacher.
    assert torch.equal(actor(batch).logp_N, frozen["teacher"](batch).logp_N)
    assert (frozen["teacher"](batch).logp_N - frozen["reference"](batch).logp_N).abs().max() > 0.1


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_scoring_under_frozen_adapters_leaves_the_actors_gradients_alone(
    is_checkpointed: bool, base_dir: Path, adapter_dirs: list[Path], batch: TokenBatch
) -> None:
    teacher, reference = map(str, adapter_dirs)
    backbone = dataclasses.replace(lora(base_dir), gradient_checkpointing=is_checkpointed)
    actor, frozen = load_policies(teacher, {"reference": reference}, backbone, chunk_size=64)
    actor.train()

    def gradients(*, with_scoring: bool) -> dict[str, Tensor]:
        actor.zero_grad()
        out = actor(batch).logp_N
        if with_scoring:
            # Between the forward and its backward: the worst place.
            assert not frozen["reference"](batch).logp_N.requires_grad
        out.sum().backward()
        return {key: parameter.grad for key, parameter in actor.named_parameters() if parameter.grad is not None}

    alone, between = gradients(with_scoring=False), gradients(with_scoring=True)
    assert set(alone) == {key for key, _ in actor.named_parameters() if f".{ACTOR}." in key}
    assert all(torch.equal(alone[key], between[key]) for key in alone)
    assert sum(float(value.abs().sum()) for value in alone.values()) > 0
    frozen["reference"].assert_frozen()


def test_a_frozen_adapter_that_was_given_gradients_is_noticed(base_dir: Path, adapter_dirs: list[Path]) -> None:
    teacher, reference = map(str, adapter_dirs)
    actor, frozen = load_policies(teacher, {"reference": reference}, lora(base_dir), chunk_size=64)
    actor.requires_grad_(True)
    with pytest.raises(AssertionError, match="gradients on"):
        frozen["reference"].assert_frozen()


def test_the_actors_adapter_is_back_after_an_error(base_dir: Path, adapter_dirs: list[Path]) -> None:
    actor, _ = load_policies(str(adapter_dirs[0]), {}, lora(base_dir), chunk_size=64)
    before = logits(actor.model)

    def fail() -> None:
        with using(actor.model, None):
            assert not torch.equal(logits(actor.model), before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(logits(actor.model), before)


def test_a_frozen_policy_on_another_base_is_a_model_of_its_own(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path, tiny_model: Any, batch: TokenBatch
) -> None:
    tiny_model("llama", seed=9, vocab_size=48).save_pretrained(tmp_path / "other")
    actor, frozen = load_policies(
        str(adapter_dirs[0]), {"reference": str(tmp_path / "other")}, lora(base_dir), chunk_size=64
    )
    assert frozen["reference"].model is not actor.model
    assert type(frozen["reference"]) is CausalPolicy
    whole = load_policy(str(tmp_path / "other"), BackboneConfig(name_or_path=""), chunk_size=64).freeze()
    assert torch.equal(frozen["reference"](batch).logp_N, whole(batch).logp_N)


def test_without_an_adapter_the_trained_policy_starts_as_the_base(base_dir: Path, batch: TokenBatch) -> None:
    actor, frozen = load_policies(str(base_dir), {"teacher": str(base_dir)}, lora(base_dir), chunk_size=64)
    assert isinstance(frozen["teacher"], AdapterPolicy)
    assert torch.equal(actor(batch).logp_N, frozen["teacher"](batch).logp_N)
    move(actor.model, ACTOR, 1)
    whole = load_policy(str(base_dir), BackboneConfig(name_or_path=""), chunk_size=64).freeze()
    assert torch.equal(frozen["teacher"](batch).logp_N, whole(batch).logp_N)


def test_frozen_adapters_add_only_their_own_weights(base_dir: Path, adapter_dirs: list[Path]) -> None:
    teacher, reference = map(str, adapter_dirs)
    alone, _ = load_policies(teacher, {}, lora(base_dir), chunk_size=64)
    shared, _ = load_policies(teacher, {"teacher": teacher, "reference": reference}, lora(base_dir), chunk_size=64)
    size = sum(value.numel() for value in alone.model.parameters() if value.requires_grad)
    total = [sum(value.numel() for value in policy.model.parameters()) for policy in (alone, shared)]
    assert total[1] - total[0] == 2 * size
    assert sum(value.numel() for value in shared.model.parameters() if value.requires_grad) == size


def test_sources(base_dir: Path, adapter_dirs: list[Path], tmp_path: Path) -> None:
    assert find_source("some/hub-name").base == "some/hub-name"
    assert find_source(str(base_dir)).adapter is None
    found = find_source(str(adapter_dirs[0]))
    assert (found.base, found.adapter) == (str(base_dir), adapter_dirs[0])
    merged = tmp_path / "final"
    model = load_model(str(base_dir), BackboneConfig(name_or_path=""))
    load_adapter(model, ACTOR, adapter_dirs[0])
    save_plain(model, merged_state(model, ACTOR), merged)
    save_adapter(model, ACTOR, model.state_dict(), merged / "adapter", base=str(base_dir))
    found = find_source(str(merged))
    assert (found.base, found.adapter) == (str(base_dir), merged / "adapter")
    # By itself it is a whole model, which needs no base.
    assert load_config(str(merged), BackboneConfig(name_or_path="")).vocab_size == 48
    torch.testing.assert_close(
        logits(load_model(str(merged), BackboneConfig(name_or_path=""))), logits(model), rtol=1e-3, atol=1e-4
    )


def test_mistakes_are_named(base_dir: Path, adapter_dirs: list[Path], tmp_path: Path, tiny_model: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"model.backbone.lora: .*nowhere"):
        add_adapter(model, ACTOR, LoRASettings(target_modules=["nowhere"]))
    tied = tiny_model("llama", tie_word_embeddings=True)
    tied.tie_weights()
    with pytest.raises(UserError, match="'lm_head' shares its weight"):
        add_adapter(tied, ACTOR, LoRASettings(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"'model.embed_tokens' is a Embedding; name linear layers only"):
        add_adapter(tiny_model("llama"), ACTOR, LoRASettings(target_modules=["embed_tokens"]))
    other = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(UserError, match="is no adapter of this LlamaForCausalLM"):
        load_adapter(other, ACTOR, adapter_dirs[0])
    wide = tiny_model("llama", hidden_size=64)
    with pytest.raises(UserError, match="does not fit LlamaForCausalLM"):
        load_adapter(wide, ACTOR, adapter_dirs[0])
    config = json.loads((adapter_dirs[0] / "adapter_config.json").read_text())
    (adapter_dirs[0] / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="is of type IA3 on base"):
        find_source(str(adapter_dirs[0]))
    (adapter_dirs[0] / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        find_source(str(adapter_dirs[0]))


def test_weights_come_one_at_a_time_plain_or_merged(tiny_model: Any) -> None:
    plain = tiny_model("llama", tie_word_embeddings=False)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    add_adapter(plain, ACTOR, LoRASettings(rank=2))
    move(plain, ACTOR, 3)
    assert all(torch.equal(value, weights[name]) for name, value in plain_weights(plain, None))
    assert {name for name, _ in plain_weights(plain, None)} == weights.keys()
    merged = merged_state(plain, ACTOR)
    moved = {name for name, value in merged.items() if not torch.equal(value, weights[name])}
    assert moved == {name for name in weights if "proj" in name}
    found = plain_weights(plain, ACTOR)
    # Nothing is merged before it is asked for.
    first, _ = next(found)
    plain.get_submodule("model.layers.1.mlp.down_proj").base_layer.weight.data.zero_()
    later = dict(found)
    name = "model.layers.1.mlp.down_proj.weight"
    assert first != name
    torch.testing.assert_close(later[name], merged[name] - weights[name], rtol=1e-5, atol=1e-6)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [None, ACTOR])
def test_sharded_weights_are_gathered(name: str | None, mesh: DeviceMesh, tiny_model: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    add_adapter(model, ACTOR, LoRASettings(rank=2))
    move(model, ACTOR, 3)
    expected = dict(plain_weights(model, name))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(isinstance(value, DTensor) for value in model.state_dict().values())
    found = dict(plain_weights(model, name))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert not isinstance(value, DTensor)
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
