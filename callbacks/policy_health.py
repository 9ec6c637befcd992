"""Guards against a policy that drifts: reward paid for length or collapsing, vanishing EOS or entropy, distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from dpr_lightning.callbacks.experience import log_now, running_experience
from dpr_lightning.errors import UserError

GUARDS = ("len_corr", "length", "eos", "entropy", "teacher_kl", "reward", "spread")
"""Kinds of trouble, as ``stop_on`` names them and ``guard/*`` logs them."""
_BOUNDS = {
    "len_corr": "max_len_corr",
    "length": "max_length_ratio",
    "eos": "max_eos_drop",
    "entropy": "min_entropy_ratio",
    "teacher_kl": "teacher_kl_budget",
    "reward": "max_reward_drop",
    "spread": "min_spread_ratio",
}
"""The setting that says how much is too much."""
_COMPARED = ("response/length_mean", "response/truncated_share", "policy/entropy", "reward/sum_mean", "reward/sum_std")
"""Figures whose first values are kept."""


class PolicyHealth(Callback):
    """Looks at each rollout batch, warns once per kind of trouble, and can stop the run.

    Compared with the run's first rollout are length, share of responses that end by EOS, entropy and reward; logged
    are ``response/length_ratio``, ``response/eos_share``, ``policy/entropy_ratio``, and for each kind of trouble
    ``guard/<kind>``: 1 while it lasts, 0 otherwise. All figures are of all ranks. A method without some figure, such as
    SPIN without rewards, goes without its guards.

    Args:
        max_len_corr: ``len_corr``: the reward of a response correlates with its length more than this, in either
            direction. Above it, longer (or shorter) answers are the easiest way to more reward.
        max_length_ratio: ``length``: the mean length is more than this many times the first rollout's, or less than
            one part in this many of it.
        max_eos_drop: ``eos``: the share of responses that end by EOS is this much below the first rollout's.
        min_entropy_ratio: ``entropy``: the entropy per token falls below this share of the first rollout's.
        teacher_kl_budget: ``teacher_kl``: the KL to the teacher exceeds this, in nats per response; None sets no bound.
        max_reward_drop: ``reward``: the mean reward of a response lies this many standard deviations of the first
            rollout's responses below the first rollout's mean. Training raises it, unless the steps are too large.
        min_spread_ratio: ``spread``: the standard deviation of the responses' reward falls below this share of the
            first rollout's; whitened advantages are then mostly noise.
        stop_on: Kinds of trouble on which the run stops, before any update on the rollout that shows it; none by
            default. Resumed, it goes on with that very rollout.
        patience: Rollouts in a row that must show it.
    """

    def __init__(
        self,
        max_len_corr: float = 0.5,
        max_length_ratio: float = 1.5,
        max_eos_drop: float = 0.1,
        min_entropy_ratio: float = 0.3,
        teacher_kl_budget: float | None = None,
        max_reward_drop: float = 1.0,
        min_spread_ratio: float = 0.1,
        stop_on: list[str] | None = None,
        patience: int = 1,
    ) -> None:
        super().__init__()
        bounds: dict[str, tuple[float | None, float, float]] = {
            "max_len_corr": (max_len_corr, 0.0, 1.0),
            "max_length_ratio": (max_length_ratio, 1.0, math.inf),
            "max_eos_drop": (max_eos_drop, 0.0, 1.0),
            "min_entropy_ratio": (min_entropy_ratio, 0.0, 1.0),
            "teacher_kl_budget": (teacher_kl_budget, 0.0, math.inf),
            "max_reward_drop": (max_reward_drop, 0.0, math.inf),
            "min_spread_ratio": (min_spread_ratio, 0.0, 1.0),
            "patience": (patience, 1, math.inf),
        }
        for name, (value, low, high) in bounds.items():
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"trainer.callbacks.PolicyHealth.{name}: found {value}; give a number from {low:g} to {high:g}"
                )
        for kind in stop_on or []:
            if kind not in GUARDS:
                raise UserError(
                    f"trainer.callbacks.PolicyHealth.stop_on: found '{kind}'; there are {', '.join(GUARDS)}"
                )
            if kind == "teacher_kl" and teacher_kl_budget is None:
                raise UserError(
                    "trainer.callbacks.PolicyHealth.stop_on: found 'teacher_kl' without a bound; set teacher_kl_budget"
                )
        self.max_len_corr = max_len_corr
        self.max_length_ratio = max_length_ratio
        self.max_eos_drop = max_eos_drop
        self.min_entropy_ratio = min_entropy_ratio
        self.teacher_kl_budget = teacher_kl_budget
        self.max_reward_drop = max_reward_drop
        self.min_spread_ratio = min_spread_ratio
        self.stop_on = list(stop_on or [])
        self.patience = patience
        self.first: dict[str, float] = {}
        """What the run's first rollout looked like, by log key."""
        self.warned: set[str] = set()
        self.in_a_row: dict[str, int] = {}
        """Rollouts in a row that showed each kind of trouble, the last one included."""
        self.before: dict[str, int] = {}
        """The same without the last one, which a resumed run looks at again."""
        self.epoch = -1
        """Whose rollout was the last one."""
        self.stop_reason: str | None = None
        """Why this callback stopped the run; for the run's record."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse bounds under which Lightning would train on where this callback stops."""
        self.stop_reason = None
        if stage == "fit" and self.stop_on and (trainer.min_epochs or trainer.min_steps):
            raise UserError(
                "trainer.min_epochs and trainer.min_steps: they keep a run going that PolicyHealth.stop_on stops; "
                "leave them out, or leave stop_on out"
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        experience = running_experience(trainer)
        if experience is None:
            return
        # The figures are gathered over all ranks, so every rank decides alike.
        stats = experience.stats
        if not self.first:
            self.first = {key: stats[key] for key in _COMPARED if key in stats}
        alarms = dict(self.alarms(stats))
        log_now(trainer, self.ratios(stats) | {f"guard/{kind}": float(kind in alarms) for kind in GUARDS})
        if self.epoch != trainer.current_epoch:
            self.before, self.epoch = self.in_a_row, trainer.current_epoch
        self.in_a_row = {kind: self.before.get(kind, 0) + 1 for kind in alarms}
        for kind, message in alarms.items():
            if kind not in self.warned:
                self.warned.add(kind)
                rank_zero_warn(f"Optimizer step {trainer.global_step}: {message}")
        lasting = [kind for kind in self.stop_on if self.in_a_row.get(kind, 0) >= self.patience]
        if lasting:
            kind, bound = lasting[0], _BOUNDS[lasting[0]]
            number = self.in_a_row[kind]
            self.stop_reason = (
                f"PolicyHealth.stop_on '{kind}' ({bound} {getattr(self, bound):g}) after "
                f"{number} rollout{'s in a row' if number > 1 else ''}: {alarms[kind]}"
            )
            rank_zero_warn(
                f"The run stops at optimizer step {trainer.global_step}: {self.stop_reason}; to go further, lower the "
                f"learning rate, in DPR raise model.kl_in_reward, change PolicyHealth.{bound}, or take '{kind}' out of "
                "PolicyHealth.stop_on, and resume with --ckpt_path last"
            )
            trainer.should_stop = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stop_reason is not None:
            # Lightning counts the epoch that was stopped before its first update; what is saved from here on says that
            # it is still to come.
            _uncount(trainer, "ready", "started", "processed")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stop_reason is not None:
            _uncount(trainer, "completed")

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
        if "reward/sum_mean" not in stats or "reward/sum_mean" not in self.first:
            return
        first_mean, first_std = self.first["reward/sum_mean"], self.first["reward/sum_std"]
        if not stats["reward/sum_mean"] >= first_mean - self.max_reward_drop * first_std:
            yield (
                "reward",
                f"responses get {stats['reward/sum_mean']:.3g} nats of reward on average; in the first rollout it was "
                f"{first_mean:.3g}, with a standard deviation of {first_std:.3g}",
            )
        if stats["reward/sum_std"] < self.min_spread_ratio * first_std:
            yield (
                "spread",
                f"the reward of responses spreads by {stats['reward/sum_std']:.3g} nats; in the first rollout it was "
                f"{first_std:.3g}: what is left to learn from is mostly noise",
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "first": dict(self.first),
            "warned": sorted(self.warned),
            "in_a_row": dict(self.in_a_row),
            "before": dict(self.before),
            "epoch": self.epoch,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first = dict(state_dict["first"])
        self.warned = set(state_dict["warned"])
        self.in_a_row = dict(state_dict["in_a_row"])
        self.before = dict(state_dict["before"])
        self.epoch = state_dict["epoch"]


def _uncount(trainer: Trainer, *names: str) -> None:
    """Take the running epoch out of these of Lightning's counts of epochs."""
    progress = trainer.fit_loop.epoch_progress
    for counts in (progress.current, progress.total):
        for name in names:
            setattr(counts, name, getattr(counts, name) - 1)


def _ratio(value: float, first: float) -> float:
    """Return ``value`` over ``first``; 1 where both are 0, as there is no change."""
    if first == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / first
