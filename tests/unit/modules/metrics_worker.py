"""Validates DPR and SFT with a metric of answers, as one process or as one of two; see ``ddp_worker``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ddp_worker import PromptSampler, make_trainer

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.evaluation import VerifierAccuracy
from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import SamplingConfig


class IsEven(Verifier):
    def __call__(self, row: Mapping[str, Any], response: str) -> bool:
        return len(response) % 2 == 0


def run(root: Path, teacher: str, reference: str, source: str, *, world_size: int) -> dict[str, float]:
    held_out = DemonstrationConfig(source=source, validation_fraction=0.5)
    shared: dict[str, Any] = {"sampler": PromptSampler(), "metrics": [VerifierAccuracy(IsEven(), name="even")]}
    # 24 prompts in batches of 5: three for each rank, and one of them has been served before. The last has 4, which is
    # one scoring forward less than 5.
    decoding = SamplingConfig(batch_size=5)
    dpr = DPRModule(
        teacher, reference, backbone=BackboneConfig(name_or_path="unused"), score_micro_batch_size=2, **shared
    )
    sft = SFTModule(backbone=BackboneConfig(name_or_path=teacher), decoding=decoding, **shared)
    own = {"evaluation_prompts": DemonstrationConfig(source=source)}
    rollouts = RolloutDataModule(held_out, sampling=decoding, **own)  # type: ignore[arg-type]
    found = {}
    for name, module, data in (("dpr", dpr, rollouts), ("sft", sft, SFTDataModule(held_out, **own))):  # type: ignore[arg-type]
        trainer = make_trainer(root, world_size, "fsdp" if world_size > 1 else "auto")
        trainer.validate(module, data, verbose=False)
        found[name] = float(trainer.callback_metrics["val/even"])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, *sources = sys.argv[1:]
    torch.save(run(Path(out).parent, *sources, world_size=2), out)
