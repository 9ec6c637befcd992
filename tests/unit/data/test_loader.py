from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dpr_lightning.data.loader import MicroBatchLoader, data_parallel_rank, running_epoch

# Resumed runs write to a directory of their own here, which Lightning remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

NUM_BATCHES = 6
ACCUMULATE = 2
NUM_EPOCHS = 3


def permuted(epoch: int) -> list[int]:
    return [int(i) for i in np.random.default_rng([7, epoch]).permutation(NUM_BATCHES)]


class Toy(LightningModule):
    """Linear model whose weights depend on the order of its batches; remembers what it was served."""

    def __init__(self, validates: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.fill_(0.5)
        self.served: list[tuple[int, int]] = []
        self.validates = validates

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.served.append((self.current_epoch, int(batch[0, 0])))
        return self.layer(torch.sin(batch)).pow(3).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/x", batch.mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self) -> MicroBatchLoader[int, Tensor]:
        return MicroBatchLoader(permuted, make, epoch=lambda: running_epoch(self.trainer))

    def val_dataloader(self) -> Any:
        return MicroBatchLoader(lambda _: [0, 1], make) if self.validates else []


def make(plan: int) -> Tensor:
    return torch.tensor([[plan, plan + 0.5, 2.0 * plan]])


def fit(root: Path, *, resume: str | None = None, validates: bool = False, **kwargs: Any) -> Toy:
    torch.set_num_threads(1)
    module = Toy(validates)
    checkpoint = ModelCheckpoint(
        dirpath=root, filename="{step}", save_top_k=-1, every_n_train_steps=kwargs.pop("every", 1)
    )
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"accumulate_grad_batches": ACCUMULATE, "max_epochs": NUM_EPOCHS, **kwargs},
    )
    trainer.fit(module, ckpt_path=resume)
    return module


def test_epochs_follow_the_plan_and_iter_twice_changes_nothing(tmp_path: Path) -> None:
    module = fit(tmp_path)
    assert module.served == [(epoch, row) for epoch in range(NUM_EPOCHS) for row in permuted(epoch)]


# Three optimizer steps an epoch: steps 3 and 6 lie on an epoch's last batch.
@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("validates", [False, True])
def test_resume_gives_the_same_weights_bit_for_bit(tmp_path: Path, step: int, validates: bool) -> None:
    whole = fit(tmp_path / "whole", validates=validates)
    fit(tmp_path / "killed", validates=validates, max_steps=step)
    resumed = fit(tmp_path / "resumed", validates=validates, resume=str(tmp_path / "killed" / f"step={step}.ckpt"))
    assert resumed.served == whole.served[step * ACCUMULATE :]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resume_with_a_limit_on_batches(tmp_path: Path) -> None:
    # Epochs of four of the six batches: two optimizer steps each, step 2 ends the first epoch.
    whole = fit(tmp_path / "whole", limit_train_batches=4)
    for step in (1, 2, 3):
        checkpoint = str(tmp_path / "whole" / f"step={step}.ckpt")
        resumed = fit(tmp_path / f"resumed{step}", limit_train_batches=4, resume=checkpoint)
        assert resumed.served == whole.served[step * ACCUMULATE :]
        assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_resume_of_a_run_counted_in_steps_and_with_reloads(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": -1, "max_steps": 8, "reload_dataloaders_every_n_epochs": 1}
    whole = fit(tmp_path / "whole", **settings)
    for step in (2, 3, 4, 6, 7):
        checkpoint = str(tmp_path / "whole" / f"step={step}.ckpt")
        resumed = fit(tmp_path / f"resumed{step}", resume=checkpoint, **settings)
        assert resumed.served == whole.served[step * ACCUMULATE :]
        assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_state_counts_what_was_handed_out_and_is_used_once() -> None:
    loader = MicroBatchLoader(lambda epoch: ["a", "b", "c"], str.upper, epoch=lambda: 4)
    assert len(loader) == 3
    iterator = iter(loader)
    assert [next(iterator), next(iterator)] == ["A", "B"]
    assert loader.state_dict() == {"epoch": 4, "position": 2}
    other = MicroBatchLoader(lambda epoch: ["a", "b", "c"], str.upper, epoch=lambda: 4)
    other.load_state_dict(loader.state_dict())
    assert list(other) == ["C"]
    assert list(other) == ["A", "B", "C"]


def test_state_of_another_epoch_is_not_used() -> None:
    loader = MicroBatchLoader(lambda epoch: ["a", "b"], str.upper, epoch=lambda: 5)
    loader.load_state_dict({"epoch": 4, "position": 2})
    assert list(loader) == ["A", "B"]


def test_one_process_is_one_data_parallel_rank() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert data_parallel_rank(trainer) == (1, 0)
