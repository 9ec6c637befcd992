"""``trainer.precision: bf16-true`` and its kin train every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Trainer

from dpr_lightning.models.adapters import LoRASettings
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.types import SamplingConfig

TYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize("precision", list(TYPES))
@pytest.mark.parametrize("method", ["sft", "dpr"])
def test_weights_are_of_the_type_and_figures_are_not(
    method: str, precision: Any, request: pytest.FixtureRequest, make_trainer: Callable[..., Trainer]
) -> None:
    make: Callable[..., Any] = request.getfixturevalue(method)
    module, data = make(model={"decoding": SamplingConfig(max_new_tokens=4)})
    seen: list[torch.dtype] = []
    step = module.training_step

    def record(batch: Any, batch_idx: int) -> Any:
        seen.append(torch.get_default_dtype())
        if method == "dpr":
            seen.extend((batch.old_logp_BT.dtype, batch.advantage_BT.dtype))
        return step(batch, batch_idx)

    module.training_step = record
    trainer = make_trainer(precision=precision, max_epochs=2)
    trainer.fit(module, data)
    assert set(seen) == {torch.float32}
    policies = [module.actor, *module.frozen.values()]
    assert {parameter.dtype for policy in policies for parameter in policy.parameters()} == {TYPES[precision]}
    assert trainer.precision == precision
    gap = trainer.callback_metrics.get("rollout/sampler_gap")
    # Sampler and trainer round the same products in bfloat16 in another order.
    assert gap is None or gap < 0.1
    start = type(module.actor.model).from_pretrained(module.initial_weights, dtype=TYPES[precision])
    moved = [
        not torch.equal(ours, theirs)
        for ours, theirs in zip(module.actor.model.parameters(), start.parameters(), strict=True)
    ]
    assert any(moved)


def test_an_adapter_on_weights_in_bfloat16_is_trained_in_float32(
    sft: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    module, data = sft()
    module.backbone = BackboneConfig(name_or_path=module.backbone.name_or_path, lora=LoRASettings(rank=2))
    make_trainer(precision="bf16-true").fit(module, data)
    types = {name.rpartition(".lora_")[1]: parameter.dtype for name, parameter in module.named_parameters()}
    assert types == {".lora_": torch.float32, "": torch.bfloat16}
    # B starts at 0.
    assert any(parameter.abs().max() > 0 for name, parameter in module.named_parameters() if ".lora_B." in name)
