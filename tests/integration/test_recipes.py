"""Every recipe that rewards tokens, from its own files: what it trains on is what its name says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dpr_lightning.main import main
from dpr_lightning.manifest import read_json, verify
from dpr_lightning.types import Experience, unpack

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS = {
    "dpr": ["dpr"],
    "sr": ["dpr", "sr"],
    "wo_baseline": ["dpr", "wo_baseline"],
    "with_v": ["dpr", "with_v"],
    "with_v_literal": ["dpr", "with_v"],
    "algorithm1": ["dpr", "algorithm1"],
    "ppo": ["ppo"],
}
"""Files of ``configs/recipe``, the later over the earlier."""
FLAGS = {"with_v_literal": ["--model.reward.init_args.relative=false"], "ppo": ["--model.critic_lr=0.018"]}
NUM_EPOCHS = 2
SCALE = 64
"""Rollouts and batches of the files are divided by this."""


@dataclass
class Run:
    """What a run left behind."""

    directory: Path
    experience: Experience
    """Of the last epoch, when the policy was no longer the teacher."""
    curves: dict[str, list[float]]
    record: dict[str, Any]
    num_steps: int
    """Optimizer steps of one rollout batch, by the files."""

    def rows(self, values_BT: Tensor | None) -> list[list[float]]:
        """Return the values of each response's tokens."""
        assert values_BT is not None
        mask_BT = self.experience.rollouts.response_mask_BT
        return [row[mask].double().tolist() for row, mask in zip(values_BT, mask_BT, strict=True)]


@pytest.fixture(scope="module", params=list(LAYERS))
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(
    recipe: str,
    frozen_dirs: tuple[str, str],
    demonstrations_file: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    files = ["base", *(f"recipe/{layer}" for layer in LAYERS[recipe]), "backbone/tiny", "hardware/cpu"]
    sizes: dict[str, int] = {}
    for layer in LAYERS[recipe]:
        sizes |= yaml.safe_load((CONFIGS / "recipe" / f"{layer}.yaml").read_text()).get("data", {}).get("init_args", {})
    num_prompts, batch_size = sizes["prompts_per_rollout"] // SCALE, sizes["global_batch_size"] // SCALE
    teacher, reference = frozen_dirs
    directory = tmp_path_factory.mktemp("recipe") / recipe
    main(
        [
            "fit",
            *(argument for file in files for argument in ("-c", str(CONFIGS / f"{file}.yaml"))),
            f"--model.teacher={teacher}",
            f"--model.reference={reference}",
            f"--data.demonstrations.source={demonstrations_file}",
            f"--data.prompts_per_rollout={num_prompts}",
            f"--data.global_batch_size={batch_size}",
            f"--data.micro_batch_size={batch_size // 2}",
            "--data.sampling.max_new_tokens=6",
            "--model.optimizer.lr=0.001",
            f"--trainer.max_epochs={NUM_EPOCHS}",
            f"--run_dir={directory}",
            *FLAGS.get(recipe, []),
        ]
    )
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    saved = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=False)
    return Run(
        directory=directory,
        experience=unpack(Experience, saved["RolloutDataModule"]),
        curves={tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]},
        record=read_json(directory / "run.json"),
        num_steps=num_prompts // batch_size,
    )


def rewards(recipe: str, run: Run) -> list[list[float]]:
    """Return the rewards that the recipe's name promises, by plain numbers."""
    scores = run.experience.scores
    found = []
    for row, teacher in enumerate(run.rows(scores.teacher_logp_BT)):
        reference, old = run.rows(scores.reference_logp_BT)[row], run.rows(scores.old_logp_BT)[row]
        r_hat = [t - r for t, r in zip(teacher, reference, strict=True)]
        reward = r_hat
        if recipe in ("sr", "ppo"):
            reward = [0.0] * (len(r_hat) - 1) + [sum(r_hat)]
        elif recipe == "wo_baseline":
            reward = teacher
        elif recipe.startswith("with_v"):
            v = [*run.rows(scores.teacher_value_BT)[row], 0.0]
            if recipe == "with_v":
                v = [a - b for a, b in zip(v, [*run.rows(scores.reference_value_BT)[row], 0.0], strict=True)]
            base = r_hat if recipe == "with_v" else teacher
            reward = [b + v[t] - v[t + 1] for t, b in enumerate(base)]
        beta = 0.0 if recipe == "algorithm1" else 1e-5
        found.append([r - beta * (o - t) for r, o, t in zip(reward, old, teacher, strict=True)])
    return found


def test_a_recipe_is_what_its_name_says(recipe: str, run: Run) -> None:
    experience = run.experience
    assert (run.record["status"], run.record["optimizer_steps"]) == ("finished", NUM_EPOCHS * run.num_steps)
    assert len(run.curves["policy/loss"]) == NUM_EPOCHS * run.num_steps
    assert run.num_steps == (1 if recipe == "algorithm1" else 8)
    # The policy has left its teacher, so that a penalty would show.
    assert abs(experience.stats["policy/teacher_kl"]) > 1e-3

    expected = rewards(recipe, run)
    for found, wanted in zip(run.rows(experience.reward_BT), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6, abs=3e-6)
    returns = [[sum(row[t:]) for t in range(len(row))] for row in expected]
    for found, wanted in zip(run.rows(experience.return_BT), returns, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-4)

    assert (experience.value_BT is None) == (recipe != "ppo")
    if recipe == "algorithm1":
        # Not a penalty, a scale or a baseline between the reward and the loss.
        r_hat_BT = experience.scores.teacher_logp_BT - experience.scores.reference_logp_BT
        assert torch.equal(experience.reward_BT, r_hat_BT)
        assert torch.equal(experience.advantage_BT, experience.return_BT)
    else:
        raw_N = torch.tensor([value for row in returns for value in row], dtype=torch.float64)
        if recipe == "ppo":
            raw_N -= torch.tensor([value for row in run.rows(experience.value_BT) for value in row])
        white_N = (raw_N - raw_N.mean()) / raw_N.std(correction=0)
        found_N = torch.tensor([value for row in run.rows(experience.advantage_BT) for value in row])
        torch.testing.assert_close(found_N.double(), white_N, rtol=1e-3, atol=1e-3)

    # A ratio is there to be clipped, except in Algorithm 1; a critic in PPO alone.
    assert ("policy/ratio_mean" in run.curves) == (recipe != "algorithm1")
    assert ("value/loss" in run.curves) == (recipe == "ppo")
    tokens = run.record["tokens"]
    # By teacher and reference, the actor where its sampler is not believed, and a critic.
    num_scored = {"algorithm1": 2, "ppo": 4}.get(recipe, 3)
    assert tokens["scored"] == num_scored * tokens["rolled_out"]
    assert tokens["trained"] == (2 if recipe == "ppo" else 1) * tokens["rolled_out"]
    verify(run.directory / "final")


@pytest.mark.parametrize("recipe", ["ppo"], indirect=True)
def test_ppo_trains_a_critic_and_exports_the_actor(run: Run, frozen_dirs: tuple[str, str]) -> None:
    rates = list(zip(run.curves["policy/learning_rate"], run.curves["value/learning_rate"], strict=True))
    assert len(rates) == NUM_EPOCHS * run.num_steps
    assert all(critic == pytest.approx(18 * actor) for actor, critic in rates)
    for tag in ("value/loss", "value/clip_share", "value/grad_norm", "policy/grad_norm", "policy/clip_share"):
        assert len(run.curves[tag]) == NUM_EPOCHS * run.num_steps, tag
        assert all(value == value for value in run.curves[tag]), tag
    # A step whose few values are all clipped has no gradient; the first of each rollout batch is none of them.
    assert min(run.curves["value/grad_norm"][:: run.num_steps]) > 0.0
    # At each rollout, and the critic that begins it all knows nothing.
    for tag in ("value/mean", "value/explained_variance"):
        assert len(run.curves[tag]) == NUM_EPOCHS, tag
        assert run.curves[tag][0] == 0.0, tag
        assert run.curves[tag][-1] != 0.0, tag
    saved = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=False)
    assert float(saved["state_dict"]["value_model.head.weight"].abs().max()) > 0.0
    exported = load_file(run.directory / "final" / "model.safetensors")
    assert exported.keys() == load_file(Path(frozen_dirs[0]) / "model.safetensors").keys()
