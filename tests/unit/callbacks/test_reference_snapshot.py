from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from safetensors.torch import load_file

from dpr_lightning.callbacks.reference_snapshot import ReferenceSnapshot, snapshot_steps
from dpr_lightning.errors import UserError
from dpr_lightning.manifest import is_complete, read_manifest, verify


def weight_at(run_dir: Path, alpha: str = "0.5") -> float:
    return float(load_file(run_dir / "reference" / f"alpha_{alpha}" / "model.safetensors")["weight"])


@pytest.mark.parametrize(
    ("alpha", "num_planned", "step"),
    [(0.5, 390, 195), (0.5, 7, 3), (0.1, 10, 1), (0.99, 10, 9), (0.29, 100, 29), (0.7, 10, 7), (1 / 3, 9, 2)],
)
def test_step_is_the_floor_of_the_decimal_that_was_written(alpha: float, num_planned: int, step: int) -> None:
    # In binary 0.29 * 100 = 28.999999999999996. And 1 / 3 is the decimal 0.3333333333333333, below a third: floor 2.
    assert snapshot_steps([alpha], num_planned) == {step: alpha}


@pytest.mark.parametrize(
    ("accumulate", "settings", "planned", "step", "weight"),
    [
        # Batches 1..6 an epoch. N = 6, step 3: -(1 + 2 + 3).
        (1, {"max_epochs": 1}, 6, 3, -6.0),
        # Three batches a step: N = 2 an epoch, 3 epochs; step 3 ends epoch 2's first half: -(2 + 5 + 2).
        (3, {"max_epochs": 3}, 6, 3, -9.0),
        # max_steps bounds N before the epochs do: floor(5 / 2) = 2, -(2 + 5).
        (3, {"max_epochs": 9, "max_steps": 5}, 5, 2, -7.0),
        # Four batches a step: the epoch's last step has two, which Lightning still divides by 4: -(2.5 + 2.75).
        (4, {"max_steps": 4, "max_epochs": -1}, 4, 2, -5.25),
    ],
)
def test_holds_the_weights_right_after_the_step(
    accumulate: int,
    settings: dict[str, int],
    planned: int,
    step: int,
    weight: float,
    tmp_path: Path,
    toy: Any,
    toy_data: Any,
    trainer_in: Any,
) -> None:
    trainer = trainer_in(tmp_path, ReferenceSnapshot(0.5), accumulate_grad_batches=accumulate, **settings)
    trainer.fit(toy(), datamodule=toy_data(6))
    path = tmp_path / "reference" / "alpha_0.5"
    manifest = read_manifest(path)
    assert (manifest["kind"], manifest["alpha"]) == ("reference", 0.5)
    assert (manifest["step"], manifest["planned_steps"]) == (step, planned)
    assert manifest["tokenizer_fingerprint"] == "toy"
    assert weight_at(tmp_path) == weight
    verify(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["alpha_0.5"]


def test_several_alphas_in_one_run(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    trainer_in(tmp_path, ReferenceSnapshot([0.9, 0.1, 0.5]), max_epochs=1).fit(toy(), datamodule=toy_data(10))
    # After steps 1, 5 and 9: minus the triangular numbers.
    assert [weight_at(tmp_path, alpha) for alpha in ("0.1", "0.5", "0.9")] == [-1.0, -15.0, -45.0]


@pytest.mark.parametrize("killed_at", [3, 5, 6, 8])
def test_a_killed_and_resumed_run_takes_the_same_snapshot(
    killed_at: int, tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any
) -> None:
    # Checkpoints at steps 2, 4, 6, 8; the snapshot at step 5 lies before or after the kill.
    trainer = trainer_in(tmp_path, ReferenceSnapshot(0.5), kill_at(killed_at), checkpoint_every=2, max_epochs=1)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(toy(), datamodule=toy_data(10))
    assert is_complete(tmp_path / "reference" / "alpha_0.5") == (killed_at >= 5)
    checkpoint = max((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    module = toy()
    trainer = trainer_in(tmp_path, ReferenceSnapshot(0.5), checkpoint_every=2, max_epochs=1)
    trainer.fit(module, datamodule=toy_data(10), ckpt_path=str(checkpoint))
    assert weight_at(tmp_path) == -15.0
    assert read_manifest(tmp_path / "reference" / "alpha_0.5")["step"] == 5
    assert module.weight.item() == -55.0


def _killed_run(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any) -> Path:
    """A run of 10 steps, killed at step 7, with a checkpoint at every step."""
    trainer = trainer_in(tmp_path, ReferenceSnapshot(0.5), kill_at(7), checkpoint_every=1, max_epochs=1)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(toy(), datamodule=toy_data(10))
    return tmp_path / "checkpoints"


def test_resuming_past_the_step_needs_the_snapshot(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any
) -> None:
    checkpoints = _killed_run(tmp_path, toy, toy_data, trainer_in, kill_at)
    shutil.rmtree(tmp_path / "reference")
    module = toy()
    with pytest.raises(UserError, match=r"missing, but the run resumes at optimizer step 6, past step 5.*at or before"):
        trainer_in(tmp_path, ReferenceSnapshot(0.5), max_epochs=1).fit(
            module, datamodule=toy_data(10), ckpt_path=str(checkpoints / "epoch=0-step=6.ckpt")
        )
    assert module.seen == []


def test_resuming_at_the_very_step_takes_it(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any
) -> None:
    checkpoints = _killed_run(tmp_path, toy, toy_data, trainer_in, kill_at)
    shutil.rmtree(tmp_path / "reference")
    trainer_in(tmp_path, ReferenceSnapshot(0.5), max_epochs=1).fit(
        toy(), datamodule=toy_data(10), ckpt_path=str(checkpoints / "epoch=0-step=5.ckpt")
    )
    assert weight_at(tmp_path) == -15.0


def test_resuming_with_another_plan_is_refused(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any
) -> None:
    checkpoints = _killed_run(tmp_path, toy, toy_data, trainer_in, kill_at)
    with pytest.raises(UserError, match="step 5, not 10; planned_steps 10, not 20"):
        trainer_in(tmp_path, ReferenceSnapshot(0.5), max_epochs=2).fit(
            toy(), datamodule=toy_data(10), ckpt_path=str(checkpoints / "epoch=0-step=4.ckpt")
        )


def test_a_snapshot_of_another_run_is_refused(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, kill_at: Any
) -> None:
    checkpoints = _killed_run(tmp_path / "a", toy, toy_data, trainer_in, kill_at)
    trainer_in(tmp_path / "b", ReferenceSnapshot(0.5), max_epochs=1).fit(toy(), datamodule=toy_data(10))
    with pytest.raises(UserError, match="not the snapshot that this run takes"):
        trainer_in(tmp_path / "b", ReferenceSnapshot(0.5), max_epochs=1).fit(
            toy(), datamodule=toy_data(10), ckpt_path=str(checkpoints / "epoch=0-step=6.ckpt")
        )
    with pytest.raises(UserError, match="already there and complete"):
        trainer_in(tmp_path / "b", ReferenceSnapshot(0.5), max_epochs=1).fit(toy(), datamodule=toy_data(10))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_alpha_outside_the_run_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=f"found {alpha}; give shares of the run between 0 and 1"):
        ReferenceSnapshot([0.5, alpha])


def test_no_alpha_is_refused() -> None:
    with pytest.raises(UserError, match="empty list"):
        ReferenceSnapshot([])


@pytest.mark.parametrize(
    ("alphas", "settings", "message"),
    [
        (0.05, {"max_epochs": 1}, "0.05 of 10 planned optimizer steps is step 0"),
        ([0.5, 0.55], {"max_epochs": 1}, "0.5 and 0.55 both fall on step 5 of 10"),
        ([0.5, 0.5], {"max_epochs": 1}, "both fall on step 5"),
        (0.5, {"max_epochs": -1}, "both are unbounded"),
        (0.5, {"max_epochs": 1, "max_time": "00:01:00:00"}, "trainer.max_time"),
    ],
)
def test_refused_before_the_first_step(
    alphas: Any, settings: dict[str, Any], message: str, tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any
) -> None:
    module = toy()
    with pytest.raises(UserError, match=message):
        trainer_in(tmp_path, ReferenceSnapshot(alphas), **settings).fit(module, datamodule=toy_data(10))
    assert module.seen == []
    assert not (tmp_path / "reference").exists()


def test_a_timer_among_the_callbacks_is_refused_too(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_time"):
        trainer_in(tmp_path, ReferenceSnapshot(), Timer("00:01:00:00"), max_epochs=1).fit(
            toy(), datamodule=toy_data(10)
        )


def test_names_that_agree_are_refused(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    # Of 4,000,000 steps they fall on 2,000,000 and 2,000,001; both would be named alpha_0.5.
    alphas = [0.5000001, 0.5000004]
    with pytest.raises(UserError, match="first six digits"):
        trainer_in(tmp_path, ReferenceSnapshot(alphas), max_epochs=400_000).fit(toy(), datamodule=toy_data(10))


def test_a_plan_that_lightning_will_not_run_is_refused(
    tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "planned_optimizer_steps", lambda self: 10)
    module = toy()
    with pytest.raises(UserError, match=r"10 optimizer steps are planned, but Lightning will take 5.*limit_train"):
        trainer_in(tmp_path, ReferenceSnapshot(), max_epochs=1, limit_train_batches=5).fit(
            module, datamodule=toy_data(10)
        )
    assert module.seen == []


def test_says_so_when_the_run_ends_before_the_step(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    # The loss, w * batch, is 0 in the first step and falls: the threshold stops the run after its first epoch of 3.
    stopping = EarlyStopping("loss", divergence_threshold=-1.0, check_on_train_epoch_end=True, mode="max")
    trainer = trainer_in(tmp_path, ReferenceSnapshot(0.5), stopping, max_epochs=4)
    with pytest.warns(UserWarning, match="ended at optimizer step 3 of 12 planned, before step 6: there is no ref"):
        trainer.fit(toy(), datamodule=toy_data(3))
    assert not (tmp_path / "reference").exists()


def test_a_debugging_run_takes_none(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    trainer_in(tmp_path, ReferenceSnapshot(), fast_dev_run=True).fit(toy(), datamodule=toy_data(10))
    assert not (tmp_path / "reference").exists()


_TWO_PROCESSES = """
import importlib.util, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
sys.modules["toy"] = toy
spec.loader.exec_module(toy)
from dpr_lightning.callbacks.hf_export import HFExport
from dpr_lightning.callbacks.reference_snapshot import ReferenceSnapshot
run_dir = Path(sys.argv[2])
trainer = toy.make_trainer(
    run_dir, ReferenceSnapshot([0.5, 0.8]), HFExport(), devices=2, strategy="ddp", accumulate_grad_batches=2,
    max_epochs=1, use_distributed_sampler=False,
)
module = toy.ToyModule()
data = toy.ToyData(10)
# Rank 1 sees batches 11..20 where rank 0 sees 1..10.
data.train_dataloader = lambda: toy.MicroBatchLoader(
    lambda _: [float(n + 1 + 10 * trainer.global_rank) for n in range(10)], torch.tensor
)
trainer.fit(module, datamodule=data)
(run_dir / f"weight.{trainer.global_rank}").write_text(str(module.weight.item()))
"""


@pytest.mark.multiprocess
def test_two_processes_take_one_snapshot(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(_TWO_PROCESSES)
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).with_name("conftest.py")), str(run_dir)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Mean over ranks and batches of steps 1..5: 6.5, 8.5, 10.5, 12.5, 14.5. Step 2: -15; step 4: -38; step 5: -52.5.
    assert weight_at(run_dir, "0.5") == -15.0
    assert weight_at(run_dir, "0.8") == -38.0
    assert [(run_dir / f"weight.{rank}").read_text() for rank in (0, 1)] == ["-52.5", "-52.5"]
    assert torch.equal(load_file(run_dir / "final" / "model.safetensors")["weight"], torch.tensor([-52.5]))
    assert read_manifest(run_dir / "reference" / "alpha_0.5")["planned_steps"] == 5
