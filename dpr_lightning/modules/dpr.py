"""Dense-Path REINFORCE: the policy improves on its own samples under the reward that SFT left behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from dpr_lightning.data.batching import MicroBatchPlan
from dpr_lightning.errors import UserError
from dpr_lightning.functional.advantages import AdvantageEstimator, WhitenedAdvantage
from dpr_lightning.functional.importance import truncated_importance
from dpr_lightning.functional.kl import k1
from dpr_lightning.functional.losses import ClippedPolicyLoss, PolicyLoss
from dpr_lightning.functional.returns import DiscountedReturns, ReturnEstimator
from dpr_lightning.functional.rewards import ClippedReward, DenseReward, Reward
from dpr_lightning.models.policies import (
    CausalPolicy,
    FrozenPair,
    FrozenTeacher,
    check_same_vocabulary,
    find_frozen_pair,
    refuse_equal_weights,
    scatter_tokens,
)
from dpr_lightning.modules.on_policy import OnPolicyModule
from dpr_lightning.rollout.scoring import describe_rollouts, rollout_stats, score_tokens, trim
from dpr_lightning.types import DPRBatch, Experience, RolloutBatch, SamplingConfig, TokenScores


class DPRModule(OnPolicyModule):
    """REINFORCE on dense rewards read out of an SFT run (ALGORITHM.md sections 2 and 3; paper Eq. 5, Alg. 1).

    Args:
        teacher: A run of SFT of ours, or any transformers directory or hub name: pi_SFT, and the start of the policy.
        reference: pi_ref; None takes the snapshot at ``alpha`` from the teacher's run. Of several, log-probabilities
            are averaged, and with them r_hat; each is one more frozen model in memory and one more scoring forward.
        alpha: Which snapshot of the run is the reference, as a share of its optimizer steps, or which several.
        reward: Token reward; None is r_hat = log pi_SFT - log pi_ref.
        returns: Reward-to-go; None is the undiscounted sum.
        advantage: Baseline and scale; None whitens over all response tokens of the rollout batch.
        loss: Policy loss; None is the clipped ratio.
        kl_in_reward: beta of the k1 penalty towards the teacher inside the reward.
        importance_cap: C of the weights min(pi_old / pi_sampler, C) on each token's policy loss, which correct for a
            sampler whose probabilities are not the trainer's; None leaves them out. 2 is usual.
        old_logp: Where log pi_old comes from. ``trainer`` is a forward of the policy before the updates, and the
            method. ``sampler`` saves that forward: the sampler drew with the trainer's weights, and what it said is
            the same but for rounding. ``policy/entropy`` is then estimated from the samples, and
            ``rollout/sampler_*`` are not known. A sampler with weights of its own (vLLM) is still compared with the
            trainer, which is asked as before.
        kwargs: See ``OnPolicyModule``.
    """

    experience_type = Experience

    def __init__(
        self,
        teacher: str,
        reference: str | list[str] | None = None,
        alpha: float | list[float] = 0.5,
        reward: Reward | None = None,
        returns: ReturnEstimator | None = None,
        advantage: AdvantageEstimator | None = None,
        loss: PolicyLoss | None = None,
        kl_in_reward: float = 1e-5,
        importance_cap: float | None = None,
        old_logp: Literal["trainer", "sampler"] = "trainer",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if not all(0.0 < share < 1.0 for share in (alpha if isinstance(alpha, list) else [alpha])):
            raise UserError(f"model.alpha: found {alpha}; give a share of the SFT run between 0 and 1, both excluded")
        if not kl_in_reward >= 0.0:
            raise UserError(f"model.kl_in_reward: found {kl_in_reward}; give 0 or more")
        if importance_cap is not None and not importance_cap >= 1.0:
            raise UserError(f"model.importance_cap: found {importance_cap}; give 1 or more, or leave it out")
        self.reference = reference
        self.alpha = alpha
        self.reward: Reward = reward if reward is not None else DenseReward()
        self.returns: ReturnEstimator = returns if returns is not None else DiscountedReturns()
        self.advantage: AdvantageEstimator = advantage if advantage is not None else WhitenedAdvantage()
        self.loss: PolicyLoss = loss if loss is not None else ClippedPolicyLoss()
        self.kl_in_reward = kl_in_reward
        self.importance_cap = importance_cap
        self.old_logp = old_logp
        self._pair: FrozenPair | None = None
        self.evaluation_metrics["reward_sum"] = MeanMetric()

    @property
    def frozen_pair(self) -> FrozenPair:
        """Where teacher and reference lie; checked on first use, before any weights are read."""
        if self._pair is None:
            pair = find_frozen_pair(self.teacher, self.reference, alpha=self.alpha)
            check_same_vocabulary(pair, self.backbone)
            self._pair = pair
        return self._pair

    @property
    @override
    def found_teacher(self) -> FrozenTeacher:
        return self.frozen_pair

    @property
    @override
    def scoring_sources(self) -> dict[str, str]:
        return {
            "teacher": self.frozen_pair.teacher,
            **dict(zip(self.reference_names, self.frozen_pair.references, strict=True)),
        }

    @override
    def check_frozen(self, frozen: Mapping[str, CausalPolicy]) -> None:
        if frozen:
            refuse_equal_weights(frozen["teacher"], {name: frozen[name] for name in self.reference_names})

    @property
    def reference_names(self) -> list[str]:
        """Names of the references among the frozen policies."""
        num_references = len(self.frozen_pair.references)
        return ["reference"] if num_references == 1 else [f"reference_{number}" for number in range(num_references)]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.returns.needs_expected_reward and not isinstance(self.reward, DenseReward):
            raise UserError(
                f"model.returns: {type(self.returns).__name__} knows the expectation of DenseReward only, found "
                f"model.reward {type(self.reward).__name__}; change one of the two"
            )
        num_samples = getattr(self.trainer.datamodule, "samples_per_prompt", 1)  # type: ignore[attr-defined]
        if self.advantage.leave_one_out and num_samples < 2:
            raise UserError(
                f"data.samples_per_prompt: found {num_samples}, but model.advantage.leave_one_out compares a sample "
                "with the prompt's others; set it to 2 or more"
            )
        if self.old_logp == "sampler":
            self._check_sampler_logp()
        sampling = self._sampling()
        if not _is_untempered(sampling) and self.importance_cap is None:
            rank_zero_warn(
                f"data.sampling: temperature {sampling.temperature:g}, top_p {sampling.top_p:g} and top_k "
                f"{sampling.top_k} do not sample from the policy whose gradient is estimated, so the estimate is "
                "biased (at temperature 0.7 by 0.1 to 1.4 of the gradient's norm on small token MDPs); use temperature "
                "1, top_p 1 and top_k 0, or set model.importance_cap, which takes back part of the bias"
            )

    def _sampling(self) -> SamplingConfig:
        sampling = getattr(self.trainer.datamodule, "sampling", SamplingConfig())  # type: ignore[attr-defined]
        assert isinstance(sampling, SamplingConfig)
        return sampling

    def _check_sampler_logp(self) -> None:
        """Refuse what needs more of pi_old than the sampler says."""
        sampling = self._sampling()
        found = (sampling.temperature, sampling.top_p, sampling.top_k)
        reason = None
        if not _is_untempered(sampling):
            reason = (
                f"data.sampling has temperature, top_p and top_k {found}, and only at (1, 1, 0) does the sampler draw "
                "from pi_old itself"
            )
        elif self.returns.needs_expected_reward:
            reason = f"model.returns {type(self.returns).__name__} needs the whole of pi_old at each state"
        elif self.importance_cap is not None:
            reason = "model.importance_cap compares the sampler's log-probabilities with the trainer's"
        if reason is not None:
            raise UserError(f"model.old_logp: found sampler, but {reason}; set it to trainer, or change that")

    def known_old_logp(self, rollouts: RolloutBatch) -> Tensor | None:
        """Return [B, T] log pi_old where ``old_logp`` lets the sampler say it, else None."""
        has_own_weights = getattr(self.sampler, "has_own_weights", False)
        return rollouts.sampler_logp_BT if self.old_logp == "sampler" and not has_own_weights else None

    def score(self, rollouts: RolloutBatch, *, old_logp_BT: Tensor | None = None) -> TokenScores:
        """Score rollouts under actor, teacher and reference, in the precision of training.

        Args:
            rollouts: Samples.
            old_logp_BT: Log pi_old where it is known, so that the actor need not be asked.
        """
        with self.trainer.precision_plugin.forward_context(), self.frozen_policies() as frozen:
            return score_tokens(
                rollouts,
                actor=self.actor,
                teacher=frozen["teacher"],
                reference=[frozen[name] for name in self.reference_names],
                micro_batch_size=self.scoring_rows,
                needs_values=self.reward.needs_values,
                expectation_limits=self._expectation_limits(),
                old_logp_BT=old_logp_BT,
            )

    def build_experience(self, rollouts: RolloutBatch, *, rollout_seconds: float) -> Experience:
        """Return rollouts with reward, return and advantage, normalised once over the batch and all ranks."""
        start = time.perf_counter()
        self.token_counts["rolled_out"] += int(rollouts.attention_mask_BT.sum())
        old_logp_BT = self.known_old_logp(rollouts)
        scores = self.score(rollouts, old_logp_BT=old_logp_BT)
        num_asked = len(self.frozen) + (old_logp_BT is None)
        self.token_counts["scored"] += num_asked * int(rollouts.attention_mask_BT.sum())
        mask_BT = rollouts.response_mask_BT
        penalty_BT = self.kl_in_reward * k1(scores.old_logp_BT, scores.teacher_logp_BT)
        reward_BT = torch.where(mask_BT, self.reward(scores) - penalty_BT, 0.0)
        return_BT, value_BT = self.estimate_returns(rollouts, scores, reward_BT)
        advantages = self.advantage(
            return_BT if value_BT is None else return_BT - value_BT,
            mask_BT,
            rollouts.prompt_index_B,
            all_reduce=lambda value: self.reduce_sum(value),
        )
        sums_BK = describe_rollouts(rollouts, scores, reward_BT, return_BT)
        stats = rollout_stats(self._gather(sums_BK))
        if old_logp_BT is not None:
            stats = {name: value for name, value in stats.items() if not name.startswith("rollout/sampler_")}
        if isinstance(self.reward, ClippedReward) and self.reward.is_clipped:
            num_hit, num_values = self.reduce_sum(self.reward.clip_counts(scores)).tolist()
            stats["reward/clip_share"] = num_hit / num_values
        stats |= self._importance_stats(rollouts, scores)
        stats |= {"return/baseline": float(advantages.mean), "return/std": float(advantages.std)}
        return Experience(
            rollouts=rollouts,
            scores=scores,
            reward_BT=reward_BT,
            return_BT=return_BT,
            advantage_BT=advantages.advantage_BT,
            value_BT=value_BT,
            stats=stats,
            seconds={"rollout": rollout_seconds, "score": time.perf_counter() - start},
        )

    def estimate_returns(
        self, rollouts: RolloutBatch, scores: TokenScores, reward_BT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return [B, T] returns, and [B, T] values that advantages are measured from where there is a critic."""
        return self.returns(reward_BT, self._expected_reward(scores), scores.response_mask_BT), None

    def make_batch(self, experience: Experience, plan: MicroBatchPlan) -> DPRBatch:
        """Return the rows of one micro-batch of the epoch's experience, without columns that are padding in all."""
        rows_B = torch.tensor(plan.rows)
        tokens = trim(experience.rollouts, rows_B)
        width = tokens.input_ids_BT.shape[1]
        old_logp_BT = experience.scores.old_logp_BT[rows_B, :width]
        advantage_BT = experience.advantage_BT[rows_B, :width]
        if self.importance_cap is not None:
            # Every policy loss is linear in the advantage under a positive factor, so the weight may stand here.
            advantage_BT = (
                advantage_BT
                * truncated_importance(
                    old_logp_BT,
                    experience.rollouts.sampler_logp_BT[rows_B, :width],
                    tokens.response_mask_BT,
                    cap=self.importance_cap,
                ).weight_BT
            )
        return DPRBatch(
            input_ids_BT=tokens.input_ids_BT,
            attention_mask_BT=tokens.attention_mask_BT,
            response_mask_BT=tokens.response_mask_BT,
            old_logp_BT=old_logp_BT,
            teacher_logp_BT=experience.scores.teacher_logp_BT[rows_B, :width],
            advantage_BT=advantage_BT,
            num_tokens=plan.num_tokens,
            num_sequences=plan.num_sequences,
        )

    def _importance_stats(self, rollouts: RolloutBatch, scores: TokenScores) -> dict[str, float]:
        """Return the mean importance weight over all ranks' response tokens, and the share of capped ones."""
        if self.importance_cap is None:
            return {}
        mask_BT = rollouts.response_mask_BT
        found = truncated_importance(scores.old_logp_BT, rollouts.sampler_logp_BT, mask_BT, cap=self.importance_cap)
        sums = [values_BT.double().sum() for values_BT in (found.weight_BT, found.is_capped_BT, mask_BT)]
        weight, num_capped, num_tokens = self.reduce_sum(torch.stack(sums)).tolist()
        return {"rollout/importance_mean": weight / num_tokens, "rollout/importance_capped": num_capped / num_tokens}

    def _expectation_limits(self) -> tuple[float, float] | None:
        if not self.returns.needs_expected_reward:
            return None
        assert isinstance(self.reward, DenseReward), "refused in setup"
        return self.reward.low, self.reward.high

    def _expected_reward(self, scores: TokenScores) -> Tensor | None:
        """b(s) = E[r_hat] - beta KL(pi_old||pi_SFT): the expectation of r_hat - beta k1 at the state (section 4)."""
        if scores.expected_dense_BT is None or scores.teacher_kl_BT is None:
            return None
        return scores.expected_dense_BT - self.kl_in_reward * scores.teacher_kl_BT

    @override
    def training_step(self, batch: DPRBatch, batch_idx: int) -> Tensor:
        logp_BT = scatter_tokens(self.actor(batch).logp_N, batch.response_mask_BT)
        return self.finish_step(self.loss(logp_BT, batch), batch, batch_idx)

    @override
    def evaluation_scores(self, rollouts: RolloutBatch) -> dict[str, Tensor]:
        """Return the dense reward of each answer, and its distance to the teacher."""
        scores = self.score(rollouts)
        return {
            "reward_sum": (scores.teacher_logp_BT - scores.reference_logp_BT).sum(dim=1),
            "teacher_kl": (scores.old_logp_BT - scores.teacher_logp_BT).sum(dim=1),
        }


def _is_untempered(sampling: SamplingConfig) -> bool:
    """Return whether rollouts are drawn from the policy itself."""
    return (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
