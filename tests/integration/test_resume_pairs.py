"""A SPIN run that is killed and resumed ends in the very weights of one that was not."""

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
from dpr_lightning.data.pair_datamodule import PairDataModule
from dpr_lightning.functional.pair_losses import SPINLoss
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.pairs import PairModule
from dpr_lightning.types import SamplingConfig

NUM_EPOCHS = 3
STEPS = [2, 4, 4]
"""Optimizer steps of each iteration; each has two micro-batches. From the second on there are twice as many pairs."""


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
    """Keeps what each micro-batch saw: ids, reference, loss and learning rate."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, Tensor, Tensor, Tensor, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append(
            (trainer.current_epoch, batch_idx, batch.input_ids_BT, batch.old_logp_B, outputs["loss"].detach(), rate)
        )


Make = Callable[[], tuple[PairModule, PairDataModule]]


@pytest.fixture(scope="module")
def parts(frozen_dirs: tuple[str, str], demonstrations_file: str) -> Make:
    def make() -> tuple[PairModule, PairDataModule]:
        module = PairModule(
            frozen_dirs[0],
            loss=SPINLoss([0.1, 0.1, 5.0]),
            iteration_rates=[1.0, 0.5, 0.2],
            backbone=BackboneConfig(name_or_path="unused"),
            # Its running squares have to come back too, where an iteration goes on, and only there.
            optimizer=partial(torch.optim.RMSprop, lr=1e-3),
            warmup_ratio=0.3,
            decoding=SamplingConfig(max_new_tokens=4),
        )
        return module, PairDataModule(
            demonstrations=DemonstrationConfig(source=demonstrations_file, validation_fraction=0.3),
            sampling=SamplingConfig(max_new_tokens=6),
            prompts_per_rollout=4,
            passes_per_rollout=2,
            keep_previous=True,
            global_batch_size=4,
            micro_batch_size=2,
        )

    return make


def make_trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": NUM_EPOCHS,
    }
    is_saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        default_root_dir=root, callbacks=list(callbacks), enable_checkpointing=is_saving, **(quiet | settings)
    )


@pytest.fixture(scope="module")
def whole(parts: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[PairModule, Watch]:
    """The run that nothing interrupts."""
    module, data = parts()
    watch = Watch()
    make_trainer(tmp_path_factory.mktemp("whole"), watch).fit(module, data)
    assert len(watch.steps) == 2 * sum(STEPS)
    return module, watch


def weights(module: PairModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.actor.model.state_dict().items()}


@pytest.mark.parametrize(
    ("saving", "epoch", "batch", "done"),
    [
        # Killed between two optimizer steps of an iteration, inside one, and before the first one of an iteration.
        ({"every_n_train_steps": 1}, 1, 4, 4),
        ({"every_n_train_steps": 1}, 1, 5, 4),
        ({"every_n_train_steps": 1}, 2, 0, 6),
        # The checkpoint at an iteration's last step is written before the epoch ends.
        ({"every_n_train_steps": 1}, 1, None, 2),
        # The checkpoint at an iteration's end: the next one needs the samples of this one.
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 1, None, 2),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 2, 3, 6),
        # An older one: the iteration's end and the rollout after it are done again.
        ({"every_n_train_steps": 5}, 2, 2, 5),
    ],
    ids=["between_steps", "inside_a_step", "first_batch", "epoch_start", "epoch_end", "redone_epoch", "older"],
)
def test_a_killed_run_ends_in_the_same_weights(
    saving: dict[str, Any],
    epoch: int,
    batch: int | None,
    done: int,
    whole: tuple[PairModule, Watch],
    parts: Make,
    tmp_path: Path,
) -> None:
    module, expected = whole
    killed, data = parts()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, **saving)
    with pytest.raises(PowerCutError):
        make_trainer(tmp_path, PowerCut(epoch=epoch, batch=batch), checkpoint).fit(killed, data)

    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=False)["global_step"] == done
    torch.manual_seed(4321)  # a new process has another state of the global generator
    resumed, data = parts()
    after = Watch()
    trainer = make_trainer(tmp_path, after)
    trainer.fit(resumed, data, ckpt_path=last)

    assert trainer.global_step == sum(STEPS)
    assert len(after.steps) == len(expected.steps) - 2 * done
    for found, wanted in zip(after.steps, expected.steps[2 * done :], strict=True):
        assert found[:2] == wanted[:2]
        assert all(torch.equal(found[part], wanted[part]) for part in (2, 3, 4))
        assert found[5] == wanted[5]
    for name, value in weights(module).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed.token_counts == module.token_counts
