"""One of two data-parallel processes, each with a vLLM engine of its own; as a program, by torch's launcher."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.rollout import VLLMSampler
from dpr_lightning.types import SamplingConfig


class Keeping(RolloutDataModule):
    """Keeps the figures of every rollout batch, and this rank's samples."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.kept: list[dict[str, Any]] = []

    def _roll_out(self, epoch: int) -> Any:
        experience = super()._roll_out(epoch)
        rollouts = experience.rollouts
        ids = [row[mask].tolist() for row, mask in zip(rollouts.input_ids_BT, rollouts.response_mask_BT, strict=True)]
        self.kept.append({"stats": experience.stats, "responses": ids})
        return experience


def main(teacher: str, reference: str, source: str, out: str) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )
    module = DPRModule(
        teacher,
        reference,
        backbone=BackboneConfig(name_or_path="unused"),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        warmup_ratio=0.0,
        sampler=VLLMSampler(max_model_len=64, enforce_eager=True, kv_cache_gib=0.05),
    )
    data = Keeping(
        demonstrations=DemonstrationConfig(source=source),
        sampling=SamplingConfig(max_new_tokens=8),
        prompts_per_rollout=8,
        global_batch_size=8,
        micro_batch_size=4,
    )
    trainer.fit(module, data)
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(data.kept))


if __name__ == "__main__":
    main(*sys.argv[1:])
