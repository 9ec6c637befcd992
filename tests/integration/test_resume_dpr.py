"""A run that is killed and resumed ends in the very weights of one that was not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.ppo import PPOModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import SamplingConfig

NUM_EPOCHS = 3
"""Of two optimizer steps each, of two micro-batches each."""


class PowerCutError(RuntimeError):
    """Nothing of the package knows this error."""


class PowerCut(Callback):
    """Kills the run before a micro-batch, or when an epoch starts."""

    def __init__(self, *, epoch: int, batch: int | None) -> None:
        self.epoch = epoch
        self.batch = batch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.batch is None and trainer.current_epoch == self.epoch:
            raise PowerCutError

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise PowerCutError


class Watch(Callback):
    """Keeps what each optimizer step saw: ids, loss and learning rate."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, Tensor, Tensor, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rate = sum(group["lr"] for group in trainer.optimizers[0].param_groups)
        self.steps.append((trainer.current_epoch, batch_idx, batch.input_ids_BT, outputs["loss"].detach(), rate))


@pytest.fixture
def parts(
    tiny_model_dir: Path, frozen_dirs: tuple[str, str], demonstrations_file: str
) -> Callable[[str], tuple[Any, Any]]:
    def make(stage: str) -> tuple[Any, Any]:
        # Adam's moments and a schedule that moves at every step have to come back too.
        settings = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "warmup_ratio": 0.4}
        demonstrations = DemonstrationConfig(source=demonstrations_file, validation_fraction=0.3)
        if stage == "sft":
            sft = SFTModule(backbone=BackboneConfig(name_or_path=str(tiny_model_dir)), **settings)
            return sft, SFTDataModule(demonstrations, global_batch_size=10, micro_batch_size=5)
        if stage == "ppo":
            # A critic, its moments and its rate, and values that were taken before the updates.
            settings |= {"critic_lr": 2e-2, "gae_lambda": 0.9}
        dpr = {"dpr": DPRModule, "ppo": PPOModule}[stage](
            frozen_dirs[0],
            reference=frozen_dirs[1],
            backbone=BackboneConfig(name_or_path="unused"),
            decoding=SamplingConfig(max_new_tokens=4),
            **settings,
        )
        return dpr, RolloutDataModule(
            demonstrations,
            sampling=SamplingConfig(max_new_tokens=6),
            prompts_per_rollout=8,
            global_batch_size=4,
            micro_batch_size=2,
        )

    return make


def weights(module: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("stage", ["sft", "dpr", "ppo"])
@pytest.mark.parametrize(
    ("saving", "epoch", "batch", "done"),
    [
        # Killed between two optimizer steps of an epoch, inside one, and before the first one of all.
        ({"every_n_train_steps": 1}, 1, 2, 3),
        ({"every_n_train_steps": 1}, 1, 3, 3),
        # The checkpoint at an epoch's last step is written before the epoch ends.
        ({"every_n_train_steps": 1}, 1, None, 2),
        ({"every_n_train_steps": 1}, 2, 0, 4),
        # The checkpoint at an epoch's end.
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 1, None, 2),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 2, 3, 4),
        # An older one: everything after it is done again.
        ({"every_n_train_steps": 3}, 2, 2, 3),
    ],
    ids=["between_steps", "inside_a_step", "epoch_start", "first_batch", "epoch_end", "redone_epoch", "older"],
)
def test_a_killed_run_ends_in_the_same_weights(
    stage: str,
    saving: dict[str, Any],
    epoch: int,
    batch: int | None,
    done: int,
    parts: Callable[[str], tuple[Any, Any]],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    whole, data = parts(stage)
    expected = Watch()
    make_trainer(max_epochs=NUM_EPOCHS, callbacks=[expected]).fit(whole, data)
    assert len(expected.steps) == 4 * NUM_EPOCHS

    killed, data = parts(stage)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, **saving)
    before = Watch()
    callbacks = [before, PowerCut(epoch=epoch, batch=batch), checkpoint]
    with pytest.raises(PowerCutError):
        make_trainer(max_epochs=NUM_EPOCHS, callbacks=callbacks, enable_checkpointing=True).fit(killed, data)

    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=False)["global_step"] == done
    torch.manual_seed(4321)  # a new process has another state of the global generator
    resumed, data = parts(stage)
    after = Watch()
    trainer = make_trainer(max_epochs=NUM_EPOCHS, callbacks=[after])
    trainer.fit(resumed, data, ckpt_path=last)

    assert trainer.global_step == 2 * NUM_EPOCHS
    # What is left is done once, in the same order, on the same data, from the same place on.
    assert len(after.steps) == len(expected.steps) - 2 * done
    for found, wanted in zip(after.steps, expected.steps[2 * done :], strict=True):
        assert found[:2] == wanted[:2]
        assert torch.equal(found[2], wanted[2])
        assert torch.equal(found[3], wanted[3])
        assert found[4] == wanted[4]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
