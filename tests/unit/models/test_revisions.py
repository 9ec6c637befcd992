"""Adapters keep the revision of their base: two revisions of one model in a hub cache, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpr_lightning.errors import UserError
from dpr_lightning.models.adapters import ACTOR, LoRASettings, find_source, save_adapter
from dpr_lightning.models.backbone import BackboneConfig, load_config, load_model
from dpr_lightning.models.policies import AdapterPolicy, load_policies
from dpr_lightning.modules.export import Export

NAME = "someone/tiny"


@pytest.fixture
def hub(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> dict[str, PreTrainedModel]:
    """The model of each revision."""
    folder = tmp_path / "hub" / "models--someone--tiny"
    models = {}
    for seed, revision in enumerate(("main", "v1")):
        commit = f"{seed}" * 40
        models[revision] = tiny_model("llama", seed=seed)
        models[revision].save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return models


def is_of(model: PreTrainedModel, expected: PreTrainedModel) -> bool:
    return torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)


def test_later_stages_stand_on_the_revision_that_the_first_was_given(
    hub: dict[str, PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    settings = LoRASettings(rank=2)
    first = BackboneConfig(name_or_path=NAME, revision="v1", lora=settings)
    actor, _ = load_policies(NAME, {}, first, chunk_size=8)
    assert is_of(actor.model, hub["v1"])
    export = Export(model=actor.model, tokenizer=tiny_tokenizer, template=None, base=NAME, revision="v1")
    export.save_snapshot(tmp_path / "snapshot", is_writer=True)
    export.save_model(tmp_path / "final", is_writer=True)
    for adapter in (tmp_path / "snapshot", tmp_path / "final" / "adapter"):
        assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == "v1"

    later = BackboneConfig(name_or_path="unused", lora=settings)
    frozen = {"teacher": str(tmp_path / "final"), "reference": str(tmp_path / "snapshot"), "base": NAME}
    actor, policies = load_policies(str(tmp_path / "final"), frozen, later, chunk_size=8)
    assert is_of(actor.model, hub["v1"])
    assert [isinstance(policy, AdapterPolicy) for policy in policies.values()] == [True, True, False]
    # Named without a revision, it is the hub's default: another model than the adapters' base.
    assert is_of(policies["base"].model, hub["main"])
    assert is_of(load_model(str(tmp_path / "snapshot"), BackboneConfig(name_or_path="")), hub["v1"])


def test_a_revision_that_peft_recorded_is_honoured(hub: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(NAME, revision="v1")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], revision="v1")
    theirs = get_peft_model(base, config)
    theirs.peft_config["default"].revision = "v1"
    theirs.save_pretrained(tmp_path / "adapter")
    assert find_source(str(tmp_path / "adapter")).revision == "v1"
    assert is_of(load_model(str(tmp_path / "adapter"), BackboneConfig(name_or_path="")), hub["v1"])


def test_another_revision_than_the_recorded_one_is_refused(hub: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    actor, _ = load_policies(
        NAME, {}, BackboneConfig(name_or_path=NAME, revision="v1", lora=LoRASettings(rank=2)), chunk_size=8
    )
    save_adapter(actor.model, ACTOR, actor.model.state_dict(), tmp_path, base=NAME, revision="v1")
    for revision in (None, "v1"):
        load_config(str(tmp_path), BackboneConfig(name_or_path="", revision=revision))
    with pytest.raises(UserError, match=r"model.backbone.revision: found 'main', but the adapter .* revision 'v1'"):
        load_config(str(tmp_path), BackboneConfig(name_or_path="", revision="main"))
    # A directory has no revisions.
    hub["main"].save_pretrained(tmp_path / "local")
    save_adapter(actor.model, ACTOR, actor.model.state_dict(), tmp_path, base=str(tmp_path / "local"), revision="v1")
    load_config(str(tmp_path), BackboneConfig(name_or_path="", revision="main"))
