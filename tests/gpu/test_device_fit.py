"""Training on the device by the command line: against the CPU, in mixed precision, with adapters, and sharded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.main import main
from dpr_lightning.manifest import read_json, verify
from dpr_lightning.models.backbone import BackboneConfig, locate
from dpr_lightning.models.policies import load_policy
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import Experience, SamplingConfig, unpack

pytestmark = pytest.mark.gpu

FP32 = "--trainer.precision=32-true"


def weights(directory: Path) -> dict[str, Tensor]:
    verify(directory)
    return load_file(directory / "model.safetensors")


def adapter_of(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "final" / "adapter" / "adapter_model.safetensors")


def curve(run_dir: Path, name: str) -> list[float]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [point.value for point in events.Scalars(name)]


def experience(run_dir: Path) -> Experience:
    """Return the last rollout with its scores."""
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=False, map_location="cpu")
    return unpack(Experience, saved["RolloutDataModule"])


def assert_trained_alike(found: Path, expected: Path, start: Path, limit: float) -> None:
    """Check that weights moved from ``start`` as they did on the CPU, up to ``limit`` of the distance."""
    ours, theirs, first = (weights(path) for path in (found, expected, start))
    assert ours.keys() == theirs.keys()
    moved, off = (
        torch.cat([(left[name].double() - right[name].double()).flatten() for name in theirs]).norm()
        for left, right in ((theirs, first), (ours, theirs))
    )
    assert moved > 0
    assert off < limit * moved


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, fit: Any) -> dict[str, Path]:
    """SFT on the CPU, and on the device in float32 and in mixed precision."""
    root = tmp_path_factory.mktemp("sft")
    return {
        "cpu": fit("sft", root / "cpu", FP32, on="cpu"),
        "float32": fit("sft", root / "float32", FP32),
        "mixed": fit("sft", root / "mixed", "--trainer.precision=bf16-mixed"),
    }


@pytest.mark.parametrize(("precision", "limit"), [("float32", 0.01), ("mixed", 0.4)])
def test_sft_and_its_snapshot_match_cpu(precision: str, limit: float, sft: dict[str, Path]) -> None:
    loss, expected = (curve(sft[name], "train/loss") for name in (precision, "cpu"))
    assert loss == pytest.approx(expected, rel=1e-4 if precision == "float32" else 0.02)
    for directory in ("final", "reference/alpha_0.5"):
        found = weights(sft[precision] / directory)
        # Master weights, whatever the precision of the forward.
        assert {value.dtype for value in found.values()} == {torch.float32}
    snapshot, final = (sft[precision] / name for name in ("reference/alpha_0.5", "final"))
    reference = sft["cpu"] / "reference/alpha_0.5"
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(snapshot)[name], value, rtol=0, atol=1e-2 if precision == "mixed" else 1e-4)
    # Adam makes a whole step of the sign of a small gradient, which bfloat16 turns round now and then.
    assert_trained_alike(final, sft["cpu"] / "final", reference, limit)


def test_export_matches_trained_weights(sft: dict[str, Path], device: torch.device) -> None:
    # In transformers on the CPU, and as a policy on the device.
    final = sft["mixed"] / "final"
    ids_BT = torch.arange(3, 19)[None]
    model = AutoModelForCausalLM.from_pretrained(final)
    policy = load_policy(str(final), BackboneConfig(name_or_path=str(final)), chunk_size=64).to(device)
    with torch.no_grad():
        expected = model(ids_BT).logits
        torch.testing.assert_close(policy.model(ids_BT.to(device)).logits.cpu(), expected, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def dpr(tmp_path_factory: pytest.TempPathFactory, fit: Any, sft: dict[str, Path]) -> dict[str, Path]:
    """One rollout of DPR from the CPU's teacher: on the CPU, and on the device in float32 and in mixed precision.

    One, because policies that differ by rounding may sample other tokens in the next.
    """
    root = tmp_path_factory.mktemp("dpr")
    shared = (f"--model.teacher={sft['cpu']}", "--trainer.max_epochs=1")
    return {
        "cpu": fit("dpr", root / "cpu", *shared, FP32, on="cpu"),
        "float32": fit("dpr", root / "float32", *shared, FP32),
        "mixed": fit("dpr", root / "mixed", *shared, "--trainer.precision=bf16-mixed"),
    }


def test_dpr_in_float32_matches_cpu(sft: dict[str, Path], dpr: dict[str, Path]) -> None:
    found, expected = (experience(dpr[name]) for name in ("float32", "cpu"))
    assert torch.equal(found.rollouts.input_ids_BT, expected.rollouts.input_ids_BT)
    mask_BT = expected.rollouts.response_mask_BT
    for name in ("old_logp_BT", "teacher_logp_BT", "reference_logp_BT", "old_entropy_BT"):
        ours, theirs = (getattr(run.scores, name) for run in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3, msg=name)
        assert (ours[~mask_BT] == 0).all()
    torch.testing.assert_close(found.advantage_BT, expected.advantage_BT, rtol=0, atol=0.02)
    assert_trained_alike(dpr["float32"] / "final", dpr["cpu"] / "final", sft["cpu"] / "final", 0.05)


def test_dpr_in_mixed_precision(dpr: dict[str, Path]) -> None:
    # Sampler and trainer forward in shapes of their own, so bfloat16 rounds them otherwise.
    assert max(curve(dpr["mixed"], "rollout/sampler_gap")) < 0.05
    assert read_json(dpr["mixed"] / "run.json")["optimizer_steps"] == 2
    run = experience(dpr["mixed"])
    scores = run.scores
    for name in ("old_logp_BT", "teacher_logp_BT", "reference_logp_BT"):
        assert getattr(scores, name).dtype == torch.float32
    dense_BT = scores.teacher_logp_BT - scores.reference_logp_BT
    # beta is 1e-5: the reward is r_hat.
    torch.testing.assert_close(run.reward_BT, dense_BT, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, fit: Any) -> tuple[Path, Path]:
    """SFT with an adapter and DPR from it, in mixed precision."""
    root = tmp_path_factory.mktemp("lora")
    mixed = ("--trainer.precision=bf16-mixed", "--model.optimizer.lr=1e-2")
    fit("sft", root / "sft", *mixed, overlays=("lora",))
    fit("dpr", root / "dpr", f"--model.teacher={root / 'sft'}", *mixed, overlays=("lora",))
    return root / "sft", root / "dpr"


def test_adapters(lora: tuple[Path, Path]) -> None:
    ids_BT = torch.arange(3, 19)[None]
    for run in lora:
        verify(run / "final")
        adapter = adapter_of(run)
        assert any((value != 0).any() for name, value in adapter.items() if "lora_B" in name)
        merged = AutoModelForCausalLM.from_pretrained(run / "final")
        base = AutoModelForCausalLM.from_pretrained(locate("dpr_lightning/demo/backbone"))
        with torch.no_grad():
            plain = base(ids_BT).logits
            by_peft = PeftModel.from_pretrained(base, run / "final" / "adapter")(ids_BT).logits
            torch.testing.assert_close(by_peft, merged(ids_BT).logits, rtol=1e-3, atol=1e-3)
        assert (by_peft - plain).abs().max() > 0.01
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False, map_location="cpu")
        names = [name for name in saved["state_dict"] if name.startswith("policy.")]
        assert names
        assert all(".lora_" in name for name in names)
    teacher, policy = (adapter_of(run) for run in lora)
    assert any(not torch.equal(policy[name], teacher[name]) for name in teacher)


@pytest.mark.parametrize(
    ("recipe", "flags", "overlays"),
    [
        ("ppo", [], ()),
        ("spin", ["--model.loss.beta=0.1", "--model.iteration_rates=null"], ()),
        ("gsil", [], ()),
        ("dpr", ["--model.returns=dpr_lightning.functional.returns.ExpectedReturns"], ()),
        ("dpr", [], ("recipe/with_v",)),
        ("dpr", ["--data.prompts_per_rollout=8"], ("recipe/algorithm1",)),
        ("dpr", ["--model.offload_frozen=true"], ("recipe/sr",)),
    ],
    ids=["ppo", "spin", "gsil", "expected", "with_v", "algorithm1", "sr"],
)
def test_the_other_methods_run(
    recipe: str, flags: list[str], overlays: tuple[str, ...], tmp_path: Path, fit: Any, sft: dict[str, Path]
) -> None:
    run = fit(
        recipe,
        tmp_path / "run",
        f"--model.teacher={sft['cpu']}",
        "--trainer.precision=bf16-mixed",
        *flags,
        "--trainer.max_epochs=1",
        overlays=overlays,
    )
    teacher = weights(sft["cpu"] / "final")
    final = weights(run / "final")
    assert any(not torch.equal(final[name], teacher[name]) for name in teacher)
    assert all(torch.isfinite(value).all() for value in final.values())


def parts(stage: str, tiny_model_dir: Path, frozen_dirs: tuple[str, str], demonstrations: str) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=True), "warmup_ratio": 0.4}
    data = DemonstrationConfig(source=demonstrations, validation_fraction=0.3)
    if stage == "sft":
        sft = SFTModule(backbone=BackboneConfig(name_or_path=str(tiny_model_dir)), **settings)
        return sft, SFTDataModule(data, global_batch_size=8, micro_batch_size=4)
    module = DPRModule(
        frozen_dirs[0], reference=frozen_dirs[1], backbone=BackboneConfig(name_or_path="unused"), **settings
    )
    sampling = SamplingConfig(max_new_tokens=6)
    return module, RolloutDataModule(
        data, sampling=sampling, prompts_per_rollout=8, global_batch_size=4, micro_batch_size=2
    )


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask for the order of sums that CPUs have anyway."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stage", ["sft", "dpr"])
def test_resume_matches_uninterrupted_run(
    stage: str,
    tmp_path: Path,
    device: torch.device,
    tiny_model_dir: Path,
    frozen_dirs: tuple[str, str],
    demonstrations_file: str,
    make_trainer: Any,
) -> None:
    settings = {
        "accelerator": "cuda" if device.type == "cuda" else "cpu",
        "max_epochs": 3,
        "enable_checkpointing": True,
        "limit_val_batches": 0,
    }
    ends = []
    for name in ("whole", "resumed"):
        module, data = parts(stage, tiny_model_dir, frozen_dirs, demonstrations_file)
        saving = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer: Trainer = make_trainer(callbacks=[saving], **settings)
        # In the middle of an epoch.
        trainer.fit(module, data, ckpt_path=tmp_path / "whole" / "step=3.ckpt" if name == "resumed" else None)
        assert trainer.global_step == (9 if stage == "sft" else 6)
        ends.append({key: value.detach().cpu() for key, value in module.actor.model.state_dict().items()})
    if device.type == "cpu":
        assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
        return
    # A few sums have no fixed order there, and Adam makes a whole step of a gradient that is nothing but rounding.
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir if stage == "sft" else frozen_dirs[0]).state_dict()
    moved, off = (
        torch.cat([(left[name] - right[name]).flatten() for name in start]).norm()
        for left, right in ((ends[0], start), (ends[1], ends[0]))
    )
    assert off < 0.01 * moved


@pytest.fixture
def own_process_group() -> Iterator[None]:
    """Let a test make a process group, and forget it and its environment afterwards."""
    with mock.patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("own_process_group")
def test_sharding_over_one_device(
    tmp_path: Path, device: torch.device, fit: Any, sft: dict[str, Path], dpr: dict[str, Path]
) -> None:
    sharded = ("--trainer.strategy=fsdp", FP32)
    fit("sft", tmp_path / "sft", *sharded)
    fit("dpr", tmp_path / "dpr", f"--model.teacher={sft['cpu']}", "--trainer.max_epochs=1", *sharded)
    assert_trained_alike(tmp_path / "sft/final", sft["cpu"] / "final", sft["cpu"] / "reference/alpha_0.5", 0.01)
    assert_trained_alike(tmp_path / "dpr/final", dpr["cpu"] / "final", sft["cpu"] / "final", 0.05)


def test_generate_and_score_run_on_the_device(tmp_path: Path, rows_file: Path, sft: dict[str, Path]) -> None:
    # Their default device is the GPU where there is one.
    out = tmp_path / "answers.jsonl"
    main(["generate", "--model", str(sft["cpu"]), "--prompts", str(rows_file), "--out", str(out)])
    assert len(out.read_text().splitlines()) == 32
    main(["score", "--teacher", str(sft["cpu"]), "--data", str(rows_file), "--out", str(tmp_path / "scores")])
    assert (tmp_path / "scores").is_dir()
