"""A module of one weight whose value after every optimizer step can be worked out by hand, and rollouts for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from dpr_lightning.data.loader import MicroBatchLoader, running_epoch
from dpr_lightning.errors import UserError
from dpr_lightning.types import Experience, RolloutBatch, TokenBatch, TokenScores


class ToyTokenizer:
    """Ids are code points."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))


class ToyModule(LightningModule):
    """w starts at 0 and falls by the mean of a step's batches: SGD with rate 1 on the loss w * batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = ToyTokenizer()
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        value = batch.input_ids_BT.float().mean() if isinstance(batch, TokenBatch) else batch
        self.seen.append((self.trainer.global_step, float(value)))
        loss = self.weight * value
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def first_learning_rate(self, num_steps: int) -> float:
        return 1.0

    def planned_optimizer_steps(self) -> int:
        # Not Lightning's estimate: it sets the loader up before a checkpoint could restore its place.
        trainer = self.trainer
        per_epoch = math.ceil(trainer.datamodule.num_batches / trainer.accumulate_grad_batches)
        bounds = [trainer.max_epochs * per_epoch] if trainer.max_epochs >= 0 else []
        bounds += [trainer.max_steps] if trainer.max_steps >= 0 else []
        if not bounds:
            raise UserError("trainer.max_epochs and trainer.max_steps: both are unbounded; set one of them")
        return min(bounds)

    def save_pretrained(self, directory: Path) -> None:
        if self.trainer.is_global_zero:
            save_file({"weight": self.weight.detach().reshape(1)}, directory / "model.safetensors")

    save_snapshot = save_pretrained

    def model_manifest(self) -> dict[str, Any]:
        return {"tokenizer_fingerprint": "toy"}


class ToyData(LightningDataModule):
    """Batches 1, 2, ..., num_batches in every epoch, resumable inside it."""

    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.num_batches = num_batches

    def train_dataloader(self) -> MicroBatchLoader[float, torch.Tensor]:
        numbers = [float(number + 1) for number in range(self.num_batches)]
        return MicroBatchLoader(lambda _: numbers, torch.tensor, epoch=lambda: running_epoch(self.trainer))


class ToyRollouts(LightningDataModule):
    """Serves one experience an epoch from a list, two batches of it each."""

    def __init__(self, experiences: list[Experience]) -> None:
        super().__init__()
        self.experiences = experiences
        self.num_batches = 2
        self.experience: Experience | None = None

    def setup(self, stage: str) -> None:
        self.trainer.reload_dataloaders_every_n_epochs = 1

    def train_dataloader(self) -> MicroBatchLoader[int, TokenBatch]:
        epoch = running_epoch(self.trainer)
        self.experience = self.experiences[epoch]
        rollouts = self.experience.rollouts
        batch = TokenBatch(
            input_ids_BT=rollouts.input_ids_BT,
            attention_mask_BT=rollouts.attention_mask_BT,
            response_mask_BT=rollouts.response_mask_BT,
        )
        return MicroBatchLoader(lambda _: [0, 1], lambda _: batch, epoch=lambda: running_epoch(self.trainer))


class KillAt(Callback):
    """Raises right after an optimizer step, as a crash would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def make_trainer(run_dir: Path, *callbacks: Callback, checkpoint_every: int | None = None, **kwargs: Any) -> Trainer:
    checkpointing = (
        [ModelCheckpoint(run_dir / "checkpoints", save_top_k=-1, every_n_train_steps=checkpoint_every)]
        if checkpoint_every
        else []
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": bool(checkpointing),
    }
    return Trainer(
        default_root_dir=run_dir,
        callbacks=[*callbacks, *checkpointing],
        **(settings | kwargs),
    )


def make_experience(
    prompts: list[str],
    responses: list[str],
    rewards: list[float],
    *,
    seconds: dict[str, float] | None = None,
    **stats: float,
) -> Experience:
    """Each response's reward lies on its last token; returns are then the same at every token (gamma 1)."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    shape = (len(prompts), max(lengths))
    ids_BT = torch.zeros(shape, dtype=torch.long)
    attention_BT = torch.zeros(shape, dtype=torch.bool)
    response_BT = torch.zeros(shape, dtype=torch.bool)
    reward_BT = torch.zeros(shape)
    for row, (prompt, response, reward) in enumerate(zip(prompts, responses, rewards, strict=True)):
        ids_BT[row, : lengths[row]] = torch.tensor([ord(character) for character in prompt + response])
        attention_BT[row, : lengths[row]] = True
        response_BT[row, len(prompt) : lengths[row]] = True
        reward_BT[row, lengths[row] - 1] = reward
    zero_BT = torch.zeros(shape)
    return_BT = torch.where(response_BT, reward_BT.sum(dim=1, keepdim=True), 0.0)
    healthy = {
        "reward/len_corr": 0.0,
        "reward/sum_mean": 1.0,
        "reward/sum_std": 0.5,
        "response/length_mean": 10.0,
        "response/truncated_share": 0.0,
        "policy/entropy": 1.0,
        "policy/teacher_kl": 0.0,
        "rollout/num_tokens": float(response_BT.sum()),
    }
    return Experience(
        rollouts=RolloutBatch(
            input_ids_BT=ids_BT,
            attention_mask_BT=attention_BT,
            response_mask_BT=response_BT,
            prompt_index_B=torch.arange(len(prompts)),
            is_truncated_B=torch.tensor([not response.endswith("$") for response in responses]),
            sampler_logp_BT=zero_BT,
        ),
        scores=TokenScores(
            response_mask_BT=response_BT,
            old_logp_BT=zero_BT,
            teacher_logp_BT=zero_BT,
            reference_logp_BT=zero_BT,
            old_entropy_BT=zero_BT,
        ),
        reward_BT=reward_BT,
        return_BT=return_BT,
        advantage_BT=zero_BT,
        stats=healthy | {key.replace("__", "/"): value for key, value in stats.items()},
        seconds=seconds or {"rollout": 2.0, "score": 1.0},
    )


@pytest.fixture
def toy() -> type[ToyModule]:
    return ToyModule


@pytest.fixture
def toy_data() -> type[ToyData]:
    return ToyData


@pytest.fixture
def toy_rollouts() -> type[ToyRollouts]:
    return ToyRollouts


@pytest.fixture
def kill_at() -> type[KillAt]:
    return KillAt


@pytest.fixture
def trainer_in() -> Callable[..., Trainer]:
    return make_trainer


@pytest.fixture
def experience_of() -> Callable[..., Experience]:
    return make_experience
