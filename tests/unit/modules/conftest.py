"""Modules and data that a Trainer can fit in a moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import SamplingConfig

# Plain SGD: Adam divides by the gradient's own size and would hide a wrong scale.
SGD = partial(torch.optim.SGD, lr=0.5)


@pytest.fixture
def sft(tiny_model_dir: Path, demonstrations_file: str) -> Callable[..., tuple[SFTModule, SFTDataModule]]:
    def make(
        *, micro_batch_size: int = 8, model: dict[str, Any] | None = None, **data: Any
    ) -> tuple[SFTModule, SFTDataModule]:
        settings = {"optimizer": SGD, "warmup_ratio": 0.0} | (model or {})
        module = SFTModule(backbone=BackboneConfig(name_or_path=str(tiny_model_dir)), **settings)
        return module, SFTDataModule(
            DemonstrationConfig(source=demonstrations_file),
            micro_batch_size=micro_batch_size,
            **({"global_batch_size": 8} | data),
        )

    return make


@pytest.fixture
def dpr(frozen_dirs: tuple[str, str], demonstrations_file: str) -> Callable[..., tuple[DPRModule, RolloutDataModule]]:
    def make(
        *, micro_batch_size: int = 8, model: dict[str, Any] | None = None, **data: Any
    ) -> tuple[DPRModule, RolloutDataModule]:
        teacher, reference = frozen_dirs
        settings = {"optimizer": SGD, "warmup_ratio": 0.0} | (model or {})
        module = DPRModule(teacher, reference, backbone=BackboneConfig(name_or_path="unused"), **settings)
        return module, RolloutDataModule(
            DemonstrationConfig(source=demonstrations_file),
            sampling=SamplingConfig(max_new_tokens=8),
            micro_batch_size=micro_batch_size,
            **({"prompts_per_rollout": 16, "global_batch_size": 8} | data),
        )

    return make
