"""DPR learns: the dense reward of its own samples rises, on-policy, without drifting out of sight of the teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from dpr_lightning.callbacks.hf_export import HFExport
from dpr_lightning.callbacks.reference_snapshot import ReferenceSnapshot
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import SamplingConfig

ANSWER = " yes"


class Curves(Callback):
    """Keeps the figures of every rollout batch."""

    def __init__(self) -> None:
        self.stats: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stats.append(trainer.datamodule.experience.stats)  # type: ignore[attr-defined]


@pytest.fixture
def sft_run(tiny_model_dir: Path, make_trainer: Callable[..., Trainer], tmp_path: Path) -> Path:
    """SFT of random weights on one repeated answer, stopped while teacher and reference still differ."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q {n}", "response": ANSWER}) + "\n" for n in range(64)))
    trainer = make_trainer(
        default_root_dir=tmp_path / "sft", max_epochs=6, callbacks=[ReferenceSnapshot(0.5), HFExport()]
    )
    module = SFTModule(
        backbone=BackboneConfig(name_or_path=str(tiny_model_dir)), optimizer=partial(torch.optim.AdamW, lr=0.01)
    )
    trainer.fit(module, SFTDataModule(DemonstrationConfig(source=str(data)), global_batch_size=16, micro_batch_size=16))
    (tmp_path / "sft" / "config.yaml").write_text("")
    return tmp_path / "sft"


def test_the_dense_reward_of_samples_rises(sft_run: Path, make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    curves = Curves()
    trainer = make_trainer(max_epochs=12, callbacks=[curves])
    module = DPRModule(
        str(sft_run),
        backbone=BackboneConfig(name_or_path="unused"),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        warmup_ratio=0.0,
    )
    data = RolloutDataModule(
        sampling=SamplingConfig(max_new_tokens=8),
        prompts_per_rollout=64,
        samples_per_prompt=2,
        global_batch_size=32,
        micro_batch_size=32,
    )
    trainer.fit(module, data)

    first, last = curves.stats[0], curves.stats[-1]
    assert len(curves.stats) == 12
    # Over six seeds the rise was 1.4 to 1.9; half of the smallest is four standard errors of a difference of two means
    # of 128 responses whose summed rewards spread by 1.2 and 1.5.
    assert last["reward/sum_mean"] > first["reward/sum_mean"] + 0.7
    # Twice the largest distance of those seeds, and a third of the first entropy: a policy that collapsed is beyond.
    assert first["policy/teacher_kl"] == 0.0
    assert 0.0 < last["policy/teacher_kl"] < 20.0
    assert last["policy/entropy"] > first["policy/entropy"] / 3
    assert max(stats["rollout/sampler_gap"] for stats in curves.stats) < 1e-3
