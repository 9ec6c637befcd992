"""Deep models from shallow ones must equal deep models."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from dpr_lightning.models.adapters import LoRASettings
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.planning.batches import Shape
from dpr_lightning.planning.depth import Stages, are_alike, extrapolate, kinds_of_layers, with_layers
from dpr_lightning.planning.simulation import Policies, Simulation
from dpr_lightning.types import SamplingConfig

SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=7)
GEMMA = Gemma3TextConfig(
    **SIZES,
    num_hidden_layers=7,
    head_dim=16,
    sliding_window=8,
    layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"],
)


def run(config: Any, phase: str, lora: LoRASettings | None, checkpointing: bool) -> Stages:
    backbone = BackboneConfig(name_or_path="none", lora=lora, gradient_checkpointing=checkpointing)
    frozen = dict.fromkeys(("teacher", "reference"), "adapter" if lora else "model")
    policies = Policies(config=config, backbone=backbone, frozen=frozen, precision="bf16-mixed", is_foreach=True)
    simulation = Simulation(DPRModule(teacher="none", backbone=backbone), policies, lambda flops, size, _: flops + size)
    shape = Shape(rows=3, prompt_tokens=20, response_tokens=12)
    if phase == "training":
        return simulation.train(shape, accumulates=True)
    return simulation.score(shape) if phase == "scoring" else simulation.roll_out(shape, SamplingConfig())


@pytest.mark.parametrize(
    ("config", "lora", "checkpointing", "phase"),
    [
        (LLAMA, None, True, "training"),
        (LLAMA, LoRASettings(rank=2), False, "rollout"),
        (GEMMA, LoRASettings(rank=2), True, "training"),
        (GEMMA, None, False, "scoring"),
        (GEMMA, None, False, "rollout"),
    ],
)
def test_extrapolated_equals_the_whole_depth(
    config: Any, lora: LoRASettings | None, checkpointing: bool, phase: str
) -> None:
    whole = run(config, phase, lora, checkpointing)
    found = extrapolate(config, are_alike=True, run=lambda shallow: run(shallow, phase, lora, checkpointing))
    assert found.keys() == whole.keys()
    highest = max(stage.peak.total() for stage in whole.values())
    assert max(stage.peak.total() for stage in found.values()) == pytest.approx(highest, rel=1e-3)
    for name in ("flops", "num_bytes", "num_kernels", "seconds"):
        total = sum(getattr(stage, name) for stage in whole.values())
        assert sum(getattr(stage, name) for stage in found.values()) == pytest.approx(total, rel=1e-6)


def test_blocks_of_other_shapes_are_noticed(tiny_model: Any) -> None:
    model = tiny_model("llama")
    kinds = kinds_of_layers(model.config)
    assert are_alike(model, kinds)
    wider = LlamaForCausalLM(with_layers(LLAMA, ["block"] * 1))
    model.model.layers[1] = wider.model.layers[0]
    assert not are_alike(model, kinds)
