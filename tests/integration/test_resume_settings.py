"""A run that resumes by ``ckpt_path`` with other settings: they are applied, and every row is trained on once."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dpr_lightning.callbacks.checkpoint import RunCheckpoint
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.errors import UserError
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import SamplingConfig

NUM_ROWS = 24


class Watch(Callback):
    """Keeps the learning rate of each optimizer step, and which rows each epoch was trained on."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.rows: dict[int, Counter[tuple[int, ...]]] = {}
        self.sizes: dict[int, list[int]] = {}
        """Rows of each optimizer step, by epoch."""
        self.settings: dict[str, Any] = {}
        self._num_steps = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rows = self.rows.setdefault(trainer.current_epoch, Counter())
        sizes = self.sizes.setdefault(trainer.current_epoch, [])
        if trainer.global_step != self._num_steps:
            sizes.append(0)
        sizes[-1] += int(batch.response_mask_BT.any(dim=1).sum())
        for ids_T, mask_T, response_T in zip(
            batch.input_ids_BT, batch.attention_mask_BT, batch.response_mask_BT, strict=True
        ):
            # A padding row has no response.
            if response_T.any():
                rows[tuple(ids_T[mask_T].tolist())] += 1
        if trainer.global_step != self._num_steps:
            self._num_steps = trainer.global_step
            group = trainer.optimizers[0].param_groups[0]
            self.rates.append(group["lr"])
            self.settings = {name: value for name, value in group.items() if name != "params"}


def sft(
    model: Path, rows: str, *, size: int, micro: int = 2, held_out: float = 0.0, **optimizer: Any
) -> tuple[SFTModule, SFTDataModule]:
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0} | optimizer
    module = SFTModule(
        backbone=BackboneConfig(name_or_path=str(model)),
        optimizer=partial(torch.optim.AdamW, **settings),
        warmup_ratio=0.25,
    )
    demonstrations = DemonstrationConfig(source=rows, validation_fraction=held_out)
    data = SFTDataModule(demonstrations, global_batch_size=size, micro_batch_size=micro)
    return module, data


def fit(
    make_trainer: Any,
    parts: tuple[Any, Any],
    directory: Path,
    resume: Path | None = None,
    kind: type[ModelCheckpoint] = ModelCheckpoint,
    **more: Any,
) -> Watch:
    watch = Watch()
    keep: Any = {"keep": 100} if kind is RunCheckpoint else {"filename": "{step}", "save_top_k": -1}
    saving = kind(dirpath=directory, every_n_train_steps=1, **keep)
    settings = {"max_epochs": 3, "enable_checkpointing": True, "limit_val_batches": 0} | more
    make_trainer(callbacks=[watch, saving], **settings).fit(*parts, ckpt_path=resume)
    return watch


def test_new_optimizer_settings_are_applied_and_said(
    tiny_model_dir: Path, demonstrations_file: str, make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Three epochs of three steps; the schedule is a share of the rate, so ten times the rate is ten times each step's.
    caplog.set_level("INFO")
    whole = fit(make_trainer, sft(tiny_model_dir, demonstrations_file, size=8), tmp_path / "whole")
    changed = sft(tiny_model_dir, demonstrations_file, size=8, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    resumed = fit(make_trainer, changed, tmp_path / "resumed", tmp_path / "whole" / "step=4.ckpt")
    assert resumed.rates == pytest.approx([10 * rate for rate in whole.rates[4:]])
    assert (resumed.settings["betas"], resumed.settings["weight_decay"]) == ((0.8, 0.9), 0.1)
    for text in ("lr 0.01 (was 0.001)", "betas (0.8, 0.9) (was (0.9, 0.95))", "weight_decay 0.1 (was 0.0)"):
        assert text in caplog.text
    # What a moment has gathered is kept: at its first step a fresh Adam would move every weight by the whole rate.
    saved = torch.load(tmp_path / "whole" / "step=4.ckpt", weights_only=False)["optimizer_states"][0]
    later = torch.load(tmp_path / "resumed" / "step=5.ckpt", weights_only=False)["optimizer_states"][0]
    assert float(later["state"][0]["step"]) == float(saved["state"][0]["step"]) + 1


def test_the_same_settings_touch_nothing(
    tiny_model_dir: Path, demonstrations_file: str, make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = fit(make_trainer, sft(tiny_model_dir, demonstrations_file, size=8), tmp_path / "whole")
    again = sft(tiny_model_dir, demonstrations_file, size=8)
    resumed = fit(make_trainer, again, tmp_path / "resumed", tmp_path / "whole" / "step=4.ckpt")
    assert resumed.rates == whole.rates[4:]
    assert "new optimizer settings" not in caplog.text


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(("size", "micro"), [(4, 1), (6, 2), (12, 4), (10, 5), (24, 2)])
def test_every_row_is_trained_on_once_with_steps_of_another_size(
    step: int, size: int, micro: int, tiny_model_dir: Path, demonstrations_file: str, make_trainer: Any, tmp_path: Path
) -> None:
    before = fit(make_trainer, sft(tiny_model_dir, demonstrations_file, size=8), tmp_path / "before", max_steps=step)
    changed = sft(tiny_model_dir, demonstrations_file, size=size, micro=micro)
    after = fit(make_trainer, changed, tmp_path / "after", tmp_path / "before" / f"step={step}.ckpt")
    assert set(before.rows) | set(after.rows) == {0, 1, 2}
    for epoch in range(3):
        rows = before.rows.get(epoch, Counter()) + after.rows.get(epoch, Counter())
        assert len(rows) == NUM_ROWS
        assert set(rows.values()) == {1}
        left = NUM_ROWS - sum(before.sizes.get(epoch, []))
        assert after.sizes.get(epoch, []) == [min(size, left - done) for done in range(0, left, size)]


@pytest.mark.parametrize("kind", [ModelCheckpoint, RunCheckpoint])
def test_the_epoch_after_one_that_was_carried_over_is_whole(
    kind: type[ModelCheckpoint], tiny_model_dir: Path, demonstrations_file: str, make_trainer: Any, tmp_path: Path
) -> None:
    # Steps of 8, then of 10 from row 8 on: 10 and 6 rows end the epoch at step 3, from where a third run resumes.
    parts = sft(tiny_model_dir, demonstrations_file, size=8)
    fit(make_trainer, parts, tmp_path / "1", kind=kind, max_steps=1)
    for number, (start, sizes) in enumerate(((1, {0: [10, 6], 1: [10, 10, 4]}), (3, {1: [10, 10, 4]}))):
        parts = sft(tiny_model_dir, demonstrations_file, size=10)
        checkpoint = tmp_path / str(number + 1) / f"step={start}.ckpt"
        watch = fit(make_trainer, parts, tmp_path / str(number + 2), checkpoint, kind=kind, max_epochs=2)
        assert watch.sizes == sizes


@pytest.mark.parametrize("step", [1, 2, 3])
def test_validation_between_changes_nothing(
    step: int, tiny_model_dir: Path, demonstrations_file: str, make_trainer: Any, tmp_path: Path
) -> None:
    settings = {"limit_val_batches": 1.0}
    parts = sft(tiny_model_dir, demonstrations_file, size=4, held_out=0.25)
    before = fit(make_trainer, parts, tmp_path / "before", max_steps=step, **settings)
    parts = sft(tiny_model_dir, demonstrations_file, size=6, held_out=0.25)
    after = fit(make_trainer, parts, tmp_path / "after", tmp_path / "before" / f"step={step}.ckpt", **settings)
    num_rows = len(parts[1].encoded["train"])
    expected = {0: num_rows - 4 * step, 1: num_rows, 2: num_rows}
    assert {epoch: sum(sizes) for epoch, sizes in after.sizes.items()} == expected
    assert set((before.rows[0] + after.rows[0]).values()) == {1}


def test_sizes_may_change_twice_in_one_epoch(
    tiny_model_dir: Path, demonstrations_file: str, make_trainer: Any, tmp_path: Path
) -> None:
    # 4 rows, then 6, then the rest in steps of 10; resumed once more with the same size.
    first = fit(make_trainer, sft(tiny_model_dir, demonstrations_file, size=4), tmp_path / "1", max_steps=1)
    parts = sft(tiny_model_dir, demonstrations_file, size=6)
    second = fit(make_trainer, parts, tmp_path / "2", tmp_path / "1" / "step=1.ckpt", max_steps=2)
    parts = sft(tiny_model_dir, demonstrations_file, size=10)
    third = fit(make_trainer, parts, tmp_path / "3", tmp_path / "2" / "step=2.ckpt", max_steps=3)
    parts = sft(tiny_model_dir, demonstrations_file, size=10)
    last = fit(make_trainer, parts, tmp_path / "4", tmp_path / "3" / "step=3.ckpt", max_epochs=1)
    sizes = [sum(watch.rows.get(0, Counter()).values()) for watch in (first, second, third, last)]
    assert sizes == [4, 6, 10, 4]
    assert set((first.rows[0] + second.rows[0] + third.rows[0] + last.rows[0]).values()) == {1}


def test_a_rollouts_updates_keep_their_size(
    frozen_dirs: tuple[str, str], demonstrations_file: str, make_trainer: Any, tmp_path: Path
) -> None:
    def parts(size: int) -> tuple[DPRModule, RolloutDataModule]:
        module = DPRModule(
            frozen_dirs[0],
            reference=frozen_dirs[1],
            backbone=BackboneConfig(name_or_path="unused"),
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
        )
        return module, RolloutDataModule(
            DemonstrationConfig(source=demonstrations_file),
            sampling=SamplingConfig(max_new_tokens=4),
            prompts_per_rollout=8,
            global_batch_size=size,
            micro_batch_size=2,
        )

    fit(make_trainer, parts(4), tmp_path / "before")
    with pytest.raises(UserError, match="inside an epoch of steps of 4 rows, which cannot be continued with 8"):
        fit(make_trainer, parts(8), tmp_path / "after", tmp_path / "before" / "step=3.ckpt")
    after = fit(make_trainer, parts(8), tmp_path / "after", tmp_path / "before" / "step=4.ckpt")
    assert [sum(rows.values()) for rows in after.rows.values()] == [8]
