"""Adapters from the command line: SFT trains one, its snapshot is one, and the methods after it train a third."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpr_lightning.main import main
from dpr_lightning.manifest import read_json, verify
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.models.policies import load_policy, scatter_tokens
from dpr_lightning.types import Experience, unpack

NUM_ROWS = 32


def files(recipe: str) -> list[str]:
    names = ("base", f"recipe/{recipe}", "backbone/tiny", "lora", "hardware/cpu")
    return [argument for name in names for argument in ("-c", f"configs/{name}.yaml")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short SFT run that trained an adapter on the embedded backbone."""
    root = tmp_path_factory.mktemp("lora")
    numbers = np.random.default_rng(0).integers(1000, size=NUM_ROWS).tolist()
    rows = [{"prompt": f"draw {i}.\n", "response": f"{number} it is"} for i, number in enumerate(numbers)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            "fit",
            *files("sft"),
            f"--run_dir={root / 'sft'}",
            f"--data.demonstrations.source={root / 'train.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.subsample=null",
            "--data.global_batch_size=8",
            "--data.micro_batch_size=8",
            "--trainer.max_epochs=4",
            "--model.optimizer.lr=1e-2",
        ]
    )
    return root


def arguments(root: Path, run_dir: str, *more: str, recipe: str = "dpr") -> list[str]:
    return [
        "fit",
        *files(recipe),
        f"--run_dir={root / run_dir}",
        f"--model.teacher={root / 'sft'}",
        "--data.prompts_per_rollout=16",
        "--data.global_batch_size=8",
        "--data.micro_batch_size=4",
        "--data.sampling.max_new_tokens=8",
        "--model.optimizer.lr=1e-2",
        "--trainer.max_epochs=2",
        *more,
    ]


@pytest.fixture(scope="module")
def dpr(root: Path) -> Path:
    main(arguments(root, "dpr"))
    return root / "dpr"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "adapter" / "adapter_model.safetensors")


def test_sft_leaves_a_merged_model_its_adapter_and_an_adapter_halfway(root: Path) -> None:
    final, reference = root / "sft" / "final", root / "sft" / "reference" / "alpha_0.5"
    verify(final)
    verify(reference)
    assert not (reference / "model.safetensors").exists()
    last, halfway = (load_file(path / "adapter_model.safetensors") for path in (final / "adapter", reference))
    assert last.keys() == halfway.keys()
    assert any(not torch.equal(last[key], halfway[key]) for key in last)
    ids = torch.arange(1, 12)[None]
    base = json.loads((reference / "adapter_config.json").read_text())["base_model_name_or_path"]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(final)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert (plain(ids).logits - merged).abs().max() > 0.01
        by_peft = PeftModel.from_pretrained(plain, final / "adapter")(ids).logits
    torch.testing.assert_close(by_peft, merged, rtol=1e-3, atol=1e-4)


def test_only_the_adapter_is_in_checkpoints(root: Path) -> None:
    saved = torch.load(root / "sft" / "checkpoints" / "last.ckpt", weights_only=False)
    names = [name for name in saved["state_dict"] if name.startswith("policy.")]
    assert names
    assert all(".lora_" in name for name in names)
    assert len(saved["optimizer_states"][0]["state"]) == len(names)


def test_rewards_are_those_of_the_merged_models(root: Path, dpr: Path) -> None:
    saved = torch.load(dpr / "checkpoints" / "last.ckpt", weights_only=False)
    experience = unpack(Experience, saved["RolloutDataModule"])
    mask_BT = experience.rollouts.response_mask_BT
    whole = {
        "teacher": root / "sft" / "final",
        "reference": root / "sft" / "reference" / "alpha_0.5",
    }
    for name, directory in whole.items():
        policy = load_policy(str(directory), BackboneConfig(name_or_path=""), chunk_size=64).freeze()
        with torch.no_grad():
            expected_BT = scatter_tokens(policy(experience.rollouts).logp_N, mask_BT)
        found_BT = getattr(experience.scores, f"{name}_logp_BT")
        torch.testing.assert_close(found_BT, expected_BT, rtol=1e-3, atol=1e-4)
    r_hat_BT = experience.scores.teacher_logp_BT - experience.scores.reference_logp_BT
    assert r_hat_BT.abs().max() > 0.01


def test_the_policy_starts_as_the_teacher_and_moves(root: Path, dpr: Path) -> None:
    before, after = weights(root / "sft" / "final"), weights(dpr / "final")
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "proj" in key}
    taught, trained = (
        load_file(path / "final" / "adapter" / "adapter_model.safetensors") for path in (root / "sft", dpr)
    )
    assert max(float((taught[key] - trained[key]).abs().max()) for key in taught) < 0.1
    assert read_json(dpr / "run.json")["status"] == "finished"


def test_a_run_that_is_resumed_ends_in_the_same_adapter(root: Path, dpr: Path) -> None:
    # The schedule is of four steps; the first run stops after three, inside the second epoch.
    every_step = "--trainer.callbacks+=dpr_lightning.callbacks.checkpoint.RunCheckpoint"
    settings = [every_step, "--trainer.callbacks.keep=100", "--trainer.callbacks.every_n_train_steps=1"]
    main(arguments(root, "killed", *settings))
    (found,) = (root / "killed" / "checkpoints").glob("*step=3.ckpt")
    main(arguments(root, "resumed", f"--ckpt_path={found}"))
    for name in ("killed", "resumed"):
        ours, expected = adapter_of(root / name), adapter_of(dpr)
        assert all(torch.equal(ours[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("recipe", ["spin", "gsil", "ppo"])
def test_other_methods_train_the_teachers_adapter(recipe: str, root: Path, tmp_path: Path) -> None:
    more = ["--trainer.max_epochs=1"]
    if recipe != "ppo":
        more += ["--data.prompts_per_rollout=null", "--data.passes_per_rollout=1"]
    if recipe == "spin":
        more += ["--model.iteration_rates=null", "--model.loss.beta=0.1"]
    main(arguments(root, str(tmp_path / recipe), *more, recipe=recipe))
    before, after = adapter_of(root / "sft"), adapter_of(tmp_path / recipe)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_checkpoint_of_another_adapter_is_refused(
    root: Path, dpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = dpr / "checkpoints" / "last.ckpt"
    saved: dict[str, Any] = torch.load(checkpoint, weights_only=False)
    name = next(key for key in saved["state_dict"] if ".lora_A." in key)
    saved["state_dict"][name.replace("lora_A", "lora_X")] = saved["state_dict"].pop(name)
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match="2"):
        main(arguments(root, str(tmp_path / "run"), f"--ckpt_path={tmp_path / 'other.ckpt'}", "--trainer.max_epochs=3"))
    assert "do not fit this run's adapter" in capsys.readouterr().err


def test_full_fine_tuning_of_a_teacher_with_an_adapter_uses_the_merged_model(root: Path, tmp_path: Path) -> None:
    # Without its 'adapter' folder the merged model is as any other; with it, 'all weights' would be a surprise.
    teacher, reference = tmp_path / "merged", root / "sft" / "reference" / "alpha_0.5"
    shutil.copytree(root / "sft" / "final", teacher, ignore=shutil.ignore_patterns("adapter"))
    more = (f"--model.teacher={teacher}", f"--model.reference={reference}")
    run = [argument for argument in arguments(root, str(tmp_path / "full"), *more) if argument != "configs/lora.yaml"]
    place = run.index("configs/backbone/tiny.yaml") + 1
    assert run.pop(place) == "-c"
    main([*run, "--trainer.max_epochs=1", "--model.optimizer.lr=1e-4"])
    before, after = weights(root / "sft" / "final"), weights(tmp_path / "full" / "final")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before if "proj" not in key)
    assert not (tmp_path / "full" / "final" / "adapter").exists()
