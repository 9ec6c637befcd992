"""Runs short SFT, DPR and SPIN fits and keeps what must not depend on the number of processes; as one of them, or not.

As a script it is one rank: torchrun's environment says which. Arguments: output file, teacher, reference, data.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.pair_datamodule import PairDataModule
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.errors import NonFiniteError
from dpr_lightning.models.adapters import LoRASettings
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.models.parallel import whole
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.pairs import PairModule
from dpr_lightning.modules.ppo import PPOModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.rollout.sampler import Sampler, Samples
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.strategy import check_strategy
from dpr_lightning.types import Experience, SamplingConfig


class PromptSampler:
    """Responses that depend on the prompt alone, so that ranks draw what one process draws."""

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        config: SamplingConfig,
        eos_token_id: int,
        seed: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> Samples:
        responses = []
        for prompt in prompts:
            rng = random.Random(str(list(prompt)))
            responses.append([*(rng.randrange(3, 200) for _ in range(rng.randrange(9))), eos_token_id])
        return Samples(
            response_ids=responses,
            logp=[[0.0] * len(response) for response in responses],
            is_truncated=[False] * len(responses),
        )


class Keep(Callback):
    """Keeps the counts of every micro-batch, and the metrics of every optimizer step."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts.append((getattr(batch, "num_tokens", 0), getattr(batch, "num_sequences", 0)))
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Poison(Callback):
    """Spoils the second rank's weights before its second optimizer step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            next(pl_module.parameters()).data.fill_(float("nan"))


def make_trainer(root: Path, world_size: int, strategy: str, *callbacks: Callback, max_epochs: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=check_strategy(strategy),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=max_epochs,
        default_root_dir=root,
        callbacks=list(callbacks),
    )


def num_local(module: Any) -> int:
    """Count the weights that lie on this rank."""
    weights = [value for policy in (module, *module.frozen.values()) for value in policy.state_dict().values()]
    return sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in weights)


def fit(module: Any, data: Any, *, root: Path, world_size: int, strategy: str, max_epochs: int = 1) -> dict[str, Any]:
    keep = Keep()
    trainer = make_trainer(root, world_size, strategy, keep, max_epochs=max_epochs)
    torch.manual_seed(0)  # draws new adapters
    trainer.fit(module, data)
    experience = getattr(data, "experience", None)
    found: dict[str, Any] = {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "accumulation": trainer.accumulate_grad_batches,
        "loss_scale": module.loss_scale,
        "counts": keep.counts,
        "num_local": num_local(module),
        "metrics": keep.metrics,
        "weights": {name: whole(value).clone() for name, value in module.state_dict().items()},
    }
    if experience is not None:
        mask_BT = experience.rollouts.response_mask_BT
        found |= {
            "prompts": experience.rollouts.prompt_index_B.tolist(),
            "stats": experience.stats,
        }
        if isinstance(experience, Experience):
            found["advantages"] = [row[mask] for row, mask in zip(experience.advantage_BT, mask_BT, strict=True)]
    return found


def run(
    root: Path, strategy: str, teacher: str, reference: str, source: str, *, world_size: int
) -> dict[str, dict[str, Any]]:
    """Return what the stages of training did, and how two ranks stopped at a NaN."""
    sgd = {"optimizer": partial(torch.optim.SGD, lr=0.1), "warmup_ratio": 0.0}
    demonstrations = DemonstrationConfig(source=source)

    def dpr(global_batch_size: int, sampler: Sampler | None = None, **backbone: Any) -> dict[str, Any]:
        module = DPRModule(
            teacher,
            reference,
            backbone=BackboneConfig(name_or_path="unused", **backbone),
            sampler=sampler or PromptSampler(),
            offload_frozen=bool(backbone),
            **sgd,
        )
        data = RolloutDataModule(
            demonstrations,
            sampling=SamplingConfig(temperature=0.0, max_new_tokens=12, batch_size=3),
            prompts_per_rollout=16,
            global_batch_size=global_batch_size,
            micro_batch_size=4,
        )
        return fit(module, data, root=root, world_size=world_size, strategy=strategy)

    # The second rollout batch is measured against a critic that has learnt something.
    def ppo() -> dict[str, Any]:
        module = PPOModule(
            teacher,
            reference=reference,
            backbone=BackboneConfig(name_or_path="unused"),
            sampler=PromptSampler(),
            critic_lr=1e-3,
            gae_lambda=0.9,
            **sgd,
        )
        data = RolloutDataModule(demonstrations, prompts_per_rollout=12, global_batch_size=12, micro_batch_size=6)
        return fit(module, data, root=root, world_size=world_size, strategy=strategy, max_epochs=2)

    def pairs() -> dict[str, Any]:
        module = PairModule(teacher, backbone=BackboneConfig(name_or_path="unused"), sampler=PromptSampler(), **sgd)
        data = PairDataModule(
            demonstrations=demonstrations,
            prompts_per_rollout=16,
            keep_previous=True,
            global_batch_size=16,
            micro_batch_size=4,
        )
        return fit(module, data, root=root, world_size=world_size, strategy=strategy, max_epochs=2) | {
            "tokens": module.total_token_counts()
        }

    # 24 rows in steps of 10: the last step is incomplete, and one rank gets more of it than the other.
    def sft() -> tuple[SFTModule, SFTDataModule]:
        module = SFTModule(backbone=BackboneConfig(name_or_path=teacher), **sgd)
        return module, SFTDataModule(demonstrations, global_batch_size=10, micro_batch_size=5)

    found = {
        "sft": fit(*sft(), root=root, world_size=world_size, strategy=strategy),
        "dpr_one_step": dpr(16),
        "dpr_two_steps": dpr(8),
        # Teacher and actor share a base, the reference is a model of its own.
        "dpr_lora": dpr(16, lora=LoRASettings(rank=4), gradient_checkpointing=True),
        "dpr_greedy": dpr(16, TransformersSampler(), gradient_checkpointing=True),
        "ppo": ppo(),
        "pairs": pairs(),
    }
    if world_size > 1:
        try:
            make_trainer(root, world_size, strategy, Poison()).fit(*sft())
        except NonFiniteError as error:
            found["poisoned"] = {"message": str(error)}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, *sources = sys.argv[1:]
    torch.save({name: run(Path(out).parent, name, *sources, world_size=2) for name in ("ddp", "fsdp")}, out)
