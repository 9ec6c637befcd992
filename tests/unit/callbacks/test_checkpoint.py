from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from dpr_lightning.callbacks.checkpoint import RunCheckpoint


@pytest.mark.parametrize("interval", [2, 3, 50])
def test_last_checkpoint_is_of_the_last_step(tmp_path: Path, interval: int) -> None:
    callback = RunCheckpoint(tmp_path / "checkpoints", every_n_train_steps=interval, save_last=True)
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=3,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    assert [path.name for path in (tmp_path / "checkpoints").glob("last*")] == ["last.ckpt"]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in trainer.model.state_dict().items())
