"""Alarms for a policy that drifts: reward paid for length, vanishing EOS or entropy, distance to the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from dpr_lightning.callbacks.experience import log_now, running_experience
from dpr_lightning.errors import UserError


class PolicyHealth(Callback):
    """Looks at each rollout batch, warns once per kind of trouble, and can stop the run.

    Compared with the run's first rollout are length, share of responses that end by EOS, and entropy; logged are
    ``response/length_ratio``, ``response/eos_share`` and ``policy/entropy_ratio``. All figures are of all ranks.

    Args:
        max_len_corr: Warn when the reward of a response correlates with its length more than this, in either
            direction. Above it, longer (or shorter) answers are the easiest way to more reward. Methods without a
            reward have no such figure.
        max_length_ratio: Warn when the mean length is more than this many times the first rollout's, or less than one
            part in this many of it.
        max_eos_drop: Warn when the share of responses that end by EOS is this much below the first rollout's.
        min_entropy_ratio: Warn when the entropy per token falls below this share of the first rollout's.
        teacher_kl_budget: Warn when the KL to the teacher, in nats per response, exceeds this; None leaves it out.
        max_teacher_kl: Stop the run, before any update on that rollout, when the KL exceeds this; None never does.
    """

    def __init__(
        self,
        max_len_corr: float = 0.5,
        max_length_ratio: float = 1.5,
        max_eos_drop: float = 0.1,
        min_entropy_ratio: float = 0.3,
        teacher_kl_budget: float | None = None,
        max_teacher_kl: float | None = None,
    ) -> None:
        super().__init__()
        bounds: dict[str, tuple[float | None, float, float]] = {
            "max_len_corr": (max_len_corr, 0.0, 1.0),
            "max_length_ratio": (max_length_ratio, 1.0, math.inf),
            "max_eos_drop": (max_eos_drop, 0.0, 1.0),
            "min_entropy_ratio": (min_entropy_ratio, 0.0, 1.0),
            "teacher_kl_budget": (teacher_kl_budget, 0.0, math.inf),
            "max_teacher_kl": (max_teacher_kl, 0.0, math.inf),
        }
        for name, (value, low, high) in bounds.items():
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"trainer.callbacks.PolicyHealth.{name}: found {value}; give a number from {low:g} to {high:g}"
                )
        self.max_len_corr = max_len_corr
        self.max_length_ratio = max_length_ratio
        self.max_eos_drop = max_eos_drop
        self.min_entropy_ratio = min_entropy_ratio
        self.teacher_kl_budget = teacher_kl_budget
        self.max_teacher_kl = max_teacher_kl
        self.first: dict[str, float] = {}
        """What the run's first rollout looked like, by log key."""
        self.warned: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse bounds under which Lightning would train on where this callback stops."""
        if stage == "fit" and self.max_teacher_kl is not None and (trainer.min_epochs or trainer.min_steps):
            raise UserError(
                "trainer.min_epochs and trainer.min_steps: they keep a run going that PolicyHealth.max_teacher_kl "
                "stops; leave them out, or leave max_teacher_kl out"
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        experience = running_experience(trainer)
        if experience is None:
            return
        # The figures are gathered over all ranks, so every rank decides alike.
        stats = experience.stats
        if not self.first:
            self.first = {
                key: stats[key] for key in ("response/length_mean", "response/truncated_share", "policy/entropy")
            }
        log_now(trainer, self.ratios(stats))
        for kind, message in self.alarms(stats):
            if kind not in self.warned:
                self.warned.add(kind)
                rank_zero_warn(f"Optimizer step {trainer.global_step}: {message}")
        if self.max_teacher_kl is not None and not stats["policy/teacher_kl"] <= self.max_teacher_kl:
            rank_zero_warn(
                f"The run stops at optimizer step {trainer.global_step}: the KL to the teacher is "
                f"{stats['policy/teacher_kl']:.3g} nats per response, above PolicyHealth.max_teacher_kl = "
                f"{self.max_teacher_kl:g}; lower the learning rate, or in DPR raise model.kl_in_reward, to go further"
            )
            trainer.should_stop = True

    def ratios(self, stats: Mapping[str, float]) -> dict[str, float]:
        """Return the comparisons with the first rollout, by log key."""
        return {
            "response/length_ratio": _ratio(stats["response/length_mean"], self.first["response/length_mean"]),
            "response/eos_share": 1.0 - stats["response/truncated_share"],
            "policy/entropy_ratio": _ratio(stats["policy/entropy"], self.first["policy/entropy"]),
        }

    def alarms(self, stats: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Yield the kind of each trouble in a rollout's figures, and a sentence on it."""
        ratios = self.ratios(stats)
        len_corr, length_ratio = stats.get("reward/len_corr", 0.0), ratios["response/length_ratio"]
        if abs(len_corr) > self.max_len_corr:
            yield (
                "len_corr",
                f"reward and length correlate by {len_corr:+.2f} (reward/len_corr): the reward pays for "
                f"{'long' if len_corr > 0 else 'short'} responses as such",
            )
        if not 1.0 / self.max_length_ratio <= length_ratio <= self.max_length_ratio:
            yield (
                "length",
                f"responses have {stats['response/length_mean']:.1f} tokens on average, {length_ratio:.2f} times the "
                f"first rollout's {self.first['response/length_mean']:.1f}",
            )
        eos_share, first_eos_share = ratios["response/eos_share"], 1.0 - self.first["response/truncated_share"]
        if eos_share < first_eos_share - self.max_eos_drop:
            yield "eos", f"only {eos_share:.0%} of responses end by EOS; in the first rollout {first_eos_share:.0%} did"
        if ratios["policy/entropy_ratio"] < self.min_entropy_ratio:
            yield (
                "entropy",
                f"entropy is {stats['policy/entropy']:.3g} nats per token, {ratios['policy/entropy_ratio']:.2f} times "
                f"the first rollout's {self.first['policy/entropy']:.3g}: the policy stops exploring",
            )
        if self.teacher_kl_budget is not None and not stats["policy/teacher_kl"] <= self.teacher_kl_budget:
            yield (
                "teacher_kl",
                f"the KL to the teacher is {stats['policy/teacher_kl']:.3g} nats per response, above "
                f"PolicyHealth.teacher_kl_budget = {self.teacher_kl_budget:g}",
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self.first), "warned": sorted(self.warned)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first = dict(state_dict["first"])
        self.warned = set(state_dict["warned"])


def _ratio(value: float, first: float) -> float:
    """Return ``value`` over ``first``; 1 where both are 0, as there is no change."""
    if first == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / first
