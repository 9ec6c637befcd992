"""SPIN and GSIL: the policy learns to tell demonstrations from its own samples (ALGORITHM.md section 5)."""

from __future__ import annotations

import time
from bisect import bisect_right
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from dpr_lightning.data.pair_datamodule import PairDataModule
from dpr_lightning.errors import UserError
from dpr_lightning.functional.pair_losses import PairLoss, SPINLoss
from dpr_lightning.models.policies import CausalPolicy, scatter_tokens
from dpr_lightning.modules.on_policy import OnPolicyModule
from dpr_lightning.modules.resume import finish_epoch
from dpr_lightning.rollout.scoring import describe_samples, policy_logprobs, sample_stats
from dpr_lightning.types import PairBatch, PairExperience, RolloutBatch, TokenBatch


class PairModule(OnPolicyModule):
    """Iterations of sampling and of training on pairs; an epoch of the Trainer is an iteration.

    pi_k, the policy as iteration k begins, draws the samples and is the reference of the loss. Its log-probabilities
    are taken before the first update, so no copy of it is kept. The learning rate rises and falls in each iteration
    anew, and the optimizer forgets: upstream each iteration is a training run of its own.

    The frozen teacher is there to measure the distance to it; ``token_counts`` leave these forwards out, which no
    update needs, as they do those of validation.

    Args:
        teacher: A run of SFT of ours, or any transformers directory or hub name: pi_0.
        loss: Loss over pairs; None is SPIN's.
        iteration_rates: Learning rate of each iteration as a share of the optimizer's; None is 1 in all.
        kwargs: See ``OnPolicyModule``. ``warmup_ratio`` is a share of each iteration's optimizer steps; from there the
            learning rate falls linearly to ``min_lr_ratio`` of its peak.
    """

    experience_type = PairExperience

    def __init__(
        self, teacher: str, loss: PairLoss | None = None, iteration_rates: list[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(teacher, **kwargs)
        if iteration_rates is not None and not (iteration_rates and min(iteration_rates) > 0.0):
            raise UserError(f"model.iteration_rates: found {iteration_rates}; give numbers above 0")
        self.loss: PairLoss = loss if loss is not None else SPINLoss()
        self.iteration_rates = iteration_rates

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit" or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        max_epochs = self.trainer.max_epochs
        is_bounded = max_epochs is not None and max_epochs >= 0
        num_iterations = max_epochs if is_bounded else len(self.iteration_steps())
        rates = None if self.iteration_rates is None else len(self.iteration_rates)
        for key, found in (("model.iteration_rates", rates), ("model.loss.beta", self.loss.num_iterations)):
            if found not in (None, num_iterations):
                raise UserError(
                    f"{key}: found {found} values, but trainer.max_epochs plans {num_iterations} iterations; give one "
                    "for each, or a single one for all"
                )

    @property
    def _data(self) -> PairDataModule:
        return cast("PairDataModule", self.trainer.datamodule)  # type: ignore[attr-defined]

    def iteration_steps(self) -> list[int]:
        """Return the optimizer steps of each planned iteration.

        Raises:
            UserError: Neither ``trainer.max_steps`` nor ``trainer.max_epochs`` bounds the run.
        """
        max_epochs, max_steps = self.trainer.max_epochs, self.trainer.max_steps
        is_endless = max_epochs is None or max_epochs < 0
        if is_endless and max_steps < 0:
            super().planned_optimizer_steps()  # refuses
        steps: list[int] = []
        while (is_endless or len(steps) < cast("int", max_epochs)) and (max_steps < 0 or sum(steps) < max_steps):
            planned = self._data.steps_of_epoch(len(steps))
            steps.append(planned if max_steps < 0 else min(planned, max_steps - sum(steps)))
        return steps

    @override
    def planned_optimizer_steps(self) -> int:
        return sum(self.iteration_steps())

    @override
    def make_schedule(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        """Return the learning rate of each step: in each iteration a warm-up from 0 and a linear fall."""
        steps = self.iteration_steps()
        starts = [0, *accumulate(steps)][:-1]
        rates = self.iteration_rates if self.iteration_rates is not None else [1.0] * len(steps)

        def share(step: int) -> float:
            iteration = bisect_right(starts, step) - 1
            done, planned = step - starts[iteration], steps[iteration]
            num_warmup = round(self.warmup_ratio * planned)
            if done < num_warmup:
                return rates[iteration] * done / num_warmup
            left = (planned - done) / max(planned - num_warmup, 1)
            return rates[iteration] * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left)

        return LambdaLR(optimizer, share)

    @override
    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        # Not when the epoch starts: Lightning leaves that hook out where a run resumes from an epoch's last step.
        if batch_idx == 0:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        # Epochs differ in length, and the first batches of a longer one would be left out.
        finish_epoch(checkpoint)

    def logprobs(
        self, policy: CausalPolicy, batch: TokenBatch, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Score a right-padded batch under one policy, in the precision of training; see ``policy_logprobs``."""
        with self.trainer.precision_plugin.forward_context():
            return policy_logprobs(batch, policy, micro_batch_size=self.scoring_rows, with_entropy=with_entropy)

    def teacher_logprobs(self, batch: TokenBatch) -> Tensor:
        """Return [B, T] log-probabilities of response tokens under the teacher; see :meth:`logprobs`."""
        with self.frozen_policies() as frozen:
            return self.logprobs(frozen["teacher"], batch)[0]

    def build_pairs(
        self,
        rollouts: RolloutBatch,
        previous: RolloutBatch | None,
        *,
        demonstrations: TokenBatch,
        demonstration_P: Tensor,
        rollout_seconds: float,
    ) -> PairExperience:
        """Score demonstrations and samples under the policy as it is now, which is pi_k.

        Args:
            rollouts: Its samples.
            previous: Samples of the iteration before, to be trained on once more; their pairs follow the others.
            demonstrations: The demonstrations of all prompts that were sampled from, each once.
            demonstration_P: [P] int64, which of them belongs to each pair.
            rollout_seconds: Wall time of the sampling.
        """
        start = time.perf_counter()
        old_logp_BT, old_entropy_BT = self.logprobs(self.actor, rollouts, with_entropy=True)
        assert old_entropy_BT is not None
        demonstration_logp_B = self.logprobs(self.actor, demonstrations)[0].double().sum(dim=1)
        sample_logps = [old_logp_BT.double().sum(dim=1)]
        if previous is not None:
            sample_logps.append(self.logprobs(self.actor, previous)[0].double().sum(dim=1))
        self.token_counts["rolled_out"] += int(rollouts.attention_mask_BT.sum())
        scored = [batch for batch in (rollouts, demonstrations, previous) if batch is not None]
        self.token_counts["scored"] += sum(int(batch.attention_mask_BT.sum()) for batch in scored)
        own_P = demonstration_P[: len(rollouts.prompt_index_B)]
        figures = {
            "pairs/demonstration_logp": demonstration_logp_B[own_P],
            "pairs/sample_logp": sample_logps[0],
            "pairs/demonstration_length": demonstrations.response_mask_BT.sum(dim=1)[own_P].double(),
            "pairs/identical_share": _are_equal(demonstrations, rollouts, own_P).double(),
        }
        means = self._gather(torch.stack(list(figures.values()), dim=1)).mean(dim=0).tolist()
        samples_BK = describe_samples(
            rollouts,
            old_logp_BT=old_logp_BT,
            teacher_logp_BT=self.teacher_logprobs(rollouts),
            old_entropy_BT=old_entropy_BT,
        )
        return PairExperience(
            rollouts=rollouts,
            previous=previous,
            demonstration_logp_P=demonstration_logp_B[demonstration_P],
            sample_logp_P=torch.cat(sample_logps),
            stats=sample_stats(self._gather(samples_BK)) | dict(zip(figures, means, strict=True)),
            seconds={"rollout": rollout_seconds, "score": time.perf_counter() - start},
        )

    @override
    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        logp_BT = scatter_tokens(self.actor(batch).logp_N, batch.response_mask_BT)
        # Two sums of hundreds of nats: float64 keeps the digits of their difference.
        log_ratio_B = (logp_BT.double().sum(dim=1) - batch.old_logp_B).float()
        log_ratio_B = log_ratio_B[batch.response_mask_BT.any(dim=1)]
        num_pairs = len(log_ratio_B) // 2
        out = self.loss(
            log_ratio_B[:num_pairs], log_ratio_B[num_pairs:], num_pairs=batch.num_pairs, iteration=batch.iteration
        )
        return self.finish_step(out, batch, batch_idx)

    @override
    def evaluation_scores(self, rollouts: RolloutBatch) -> dict[str, Tensor]:
        """Return the distance of each answer to the teacher."""
        logp_BT, _ = self.logprobs(self.actor, rollouts)
        return {"teacher_kl": (logp_BT - self.teacher_logprobs(rollouts)).sum(dim=1)}


def _are_equal(demonstrations: TokenBatch, rollouts: RolloutBatch, demonstration_P: Tensor) -> Tensor:
    """Return [P] bool, True where the sample is the demonstration, token by token."""
    width = max(demonstrations.input_ids_BT.shape[1], rollouts.input_ids_BT.shape[1])
    tokens = []
    for batch in (demonstrations, rollouts):
        ids_BT = torch.where(batch.attention_mask_BT, batch.input_ids_BT, -1)
        tokens.append(pad(ids_BT, (0, width - ids_BT.shape[1]), value=-1))
    return (tokens[0][demonstration_P] == tokens[1]).all(dim=1)
