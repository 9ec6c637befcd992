"""PPO: what DPR does, with a critic that learns what is to be expected of each state (ALGORITHM.md section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from dpr_lightning.data.batching import MicroBatchPlan
from dpr_lightning.errors import UserError
from dpr_lightning.functional.advantages import moments
from dpr_lightning.functional.gae import explained_variance, lambda_returns
from dpr_lightning.functional.losses import LossOutput, value_loss
from dpr_lightning.functional.rewards import Reward, SentenceReward
from dpr_lightning.models.critic import ValueModel, load_critic
from dpr_lightning.models.policies import scatter_tokens
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.rollout.scoring import token_values
from dpr_lightning.types import DPRBatch, Experience, PPOBatch, RolloutBatch, TokenScores


class PPOModule(DPRModule):
    """Actor and critic, both started from pi_SFT, with advantages by generalized advantage estimation.

    One optimizer holds both as two parameter groups, which share its settings and the schedule's shape; gradients are
    clipped in each group by itself. ``token_counts`` count a token that both are trained on twice, and the critic's
    forward over the rollouts as one more scoring. The critic lies in checkpoints and is not exported: no later stage
    asks for it.

    Args:
        teacher: A run of SFT of ours, or any transformers directory or hub name: pi_SFT, and the start of both.
        reward: Token reward; None is r_hat summed up at the last token.
        gamma: Discount in [0, 1].
        gae_lambda: 1 measures sampled returns against the critic, 0 only the next reward and the next state's value.
        critic_lr: Peak learning rate of the critic; the optimizer's own is the actor's.
        value_clip: How far a value may move in the updates on one rollout batch and still be drawn to its return;
            .inf sets no limit.
        kwargs: See ``DPRModule``.
    """

    def __init__(
        self,
        teacher: str,
        reward: Reward | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        critic_lr: float = 9e-6,
        value_clip: float = 0.2,
        **kwargs: Any,
    ) -> None:
        # Generalized advantage estimation stands in for the returns.
        super().__init__(teacher, reward=reward if reward is not None else SentenceReward(), returns=None, **kwargs)
        for name, share in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0.0 <= share <= 1.0:
                raise UserError(f"model.{name}: found {share}; give a number between 0 and 1")
        for name, value in (("critic_lr", critic_lr), ("value_clip", value_clip)):
            if not value > 0.0:
                raise UserError(f"model.{name}: found {value}; give a number above 0")
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.critic_lr = critic_lr
        self.value_clip = value_clip
        self.value_model: ValueModel | None = None

    @property
    def critic(self) -> ValueModel:
        """The critic, which is trained beside the actor."""
        assert self.value_model is not None, "configure_model has not run for fit"
        return self.value_model

    @override
    def configure_model(self) -> None:
        super().configure_model()
        if self.value_model is not None or self.trainer.state.fn != "fit":
            return
        self.value_model = load_critic(self.initial_weights, self.loading)
        num_parameters = sum(parameter.numel() for parameter in self.value_model.parameters())
        rank_zero_info(f"Critic from '{self.initial_weights}': {num_parameters / 1e6:,.2f}M parameters")
        self.shard(self.value_model)
        self.value_model.train()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.value_model is None:
            # validate, test and predict have no use for the critic.
            weights = checkpoint.get("state_dict", {})  # of sharded ones only what there is a place for was read
            checkpoint["state_dict"] = {name: weights[name] for name in weights if not name.startswith("value_model.")}

    @override
    def trained_parameters(self) -> Iterable[Any]:
        return [
            {"params": self.actor_parameters()},
            {"params": list(self.critic.parameters()), "lr": self.critic_lr},
        ]

    @override
    def estimate_returns(
        self, rollouts: RolloutBatch, scores: TokenScores, reward_BT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with self.trainer.precision_plugin.forward_context():
            value_BT = token_values(rollouts, self.critic, micro_batch_size=self.scoring_rows)
        self.token_counts["scored"] += int(rollouts.attention_mask_BT.sum())
        mask_BT = scores.response_mask_BT
        return lambda_returns(reward_BT, value_BT, mask_BT, gamma=self.gamma, gae_lambda=self.gae_lambda), value_BT

    @override
    def build_experience(self, rollouts: RolloutBatch, *, rollout_seconds: float) -> Experience:
        experience = super().build_experience(rollouts, rollout_seconds=rollout_seconds)
        assert experience.value_BT is not None
        mask_BT = rollouts.response_mask_BT
        mean, _ = moments(experience.value_BT, mask_BT, all_reduce=self.reduce_sum)
        explained = explained_variance(experience.value_BT, experience.return_BT, mask_BT, all_reduce=self.reduce_sum)
        stats = {"value/mean": float(mean), "value/explained_variance": explained}
        return dataclasses.replace(experience, stats=experience.stats | stats)

    @override
    def make_batch(self, experience: Experience, plan: MicroBatchPlan) -> PPOBatch:
        batch = super().make_batch(experience, plan)
        assert experience.value_BT is not None
        rows_B, width = torch.tensor(plan.rows), batch.input_ids_BT.shape[1]
        return PPOBatch(
            **{field.name: getattr(batch, field.name) for field in dataclasses.fields(DPRBatch)},
            old_value_BT=experience.value_BT[rows_B, :width],
            return_BT=experience.return_BT[rows_B, :width],
        )

    @override
    def training_step(self, batch: DPRBatch, batch_idx: int) -> Tensor:
        assert isinstance(batch, PPOBatch)
        mask_BT = batch.response_mask_BT
        policy = self.loss(scatter_tokens(self.actor(batch).logp_N, mask_BT), batch)
        value = value_loss(
            scatter_tokens(self.critic(batch), mask_BT),
            batch.old_value_BT,
            batch.return_BT,
            mask_BT,
            num_tokens=batch.num_tokens,
            clip=self.value_clip,
        )
        self.token_counts["trained"] += int(batch.attention_mask_BT.sum())
        # No weight between the two: they share no parameter.
        out = LossOutput(loss=policy.loss + value.loss, metrics=policy.metrics | value.metrics)
        return self.finish_step(out, batch, batch_idx)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.log_gradients("value", self.critic, rate=optimizer.param_groups[1]["lr"])

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norms of actor and critic apart: the actor's step must not depend on the critic's gradient."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)
