from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dpr_lightning.data.batching import MicroBatchPlan
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.errors import UserError
from dpr_lightning.functional.losses import ClippedPolicyLoss, ReinforceLoss
from dpr_lightning.functional.returns import ExpectedReturns
from dpr_lightning.functional.rewards import DenseReward
from dpr_lightning.models.backbone import BackboneConfig, load_model
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import Experience, SamplingConfig


class Keep(Callback):
    """Keeps every epoch's experience and logged metrics."""

    def __init__(self) -> None:
        self.experiences: list[Experience] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.experiences.append(trainer.datamodule.experience)  # type: ignore[attr-defined]
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_frozen_policies_are_no_part_of_the_module(
    dpr: Callable[..., Any], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module, data = dpr()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    make_trainer(max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True).fit(module, data)

    num_actor = len(list(module.actor.parameters()))
    assert len(list(module.parameters())) == num_actor
    assert {id(parameter) for parameter in module.parameters()} == {id(p) for p in module.actor.parameters()}
    names = {name for name in module.state_dict() if not name.startswith("evaluation_metrics")}
    assert names == {f"policy.model.{name}" for name in module.actor.model.state_dict()}
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["state_dict"].keys() == module.state_dict().keys()
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == num_actor

    # Two epochs of training left both where they were, and moved the actor away from its teacher.
    for name, source in (("teacher", module.teacher), ("reference", module.reference)):
        policy = module.frozen[name]
        policy.assert_frozen()
        for key, value in load_model(source, module.backbone).state_dict().items():
            assert torch.equal(policy.model.state_dict()[key], value), key
        assert all(parameter.grad is None for parameter in policy.parameters())
    assert not torch.equal(module.actor.model.lm_head.weight, module.frozen["teacher"].model.lm_head.weight)


def test_references_are_averaged_and_counted(dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]) -> None:
    module, data = dpr(model={"returns": ExpectedReturns()})
    module.reference = [module.reference, module.teacher]
    keep = Keep()
    make_trainer(callbacks=[keep]).fit(module, data)
    single, single_data = dpr(model={"returns": ExpectedReturns()})
    alone = Keep()
    make_trainer(callbacks=[alone]).fit(single, single_data)
    (both,), (one,) = keep.experiences, alone.experiences
    # The teacher's own ratio is 0, so the mean is half of the other's.
    torch.testing.assert_close(both.reward_BT, one.reward_BT / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.return_BT, one.return_BT / 2, rtol=1e-4, atol=1e-5)
    tokens = int(one.rollouts.attention_mask_BT.sum())
    assert (module.token_counts["scored"], single.token_counts["scored"]) == (4 * tokens, 3 * tokens)


def test_the_policy_starts_as_the_teacher(dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]) -> None:
    module, data = dpr()
    keep = Keep()
    make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
    first, second = keep.experiences
    assert torch.equal(first.scores.old_logp_BT, first.scores.teacher_logp_BT)
    assert first.stats["policy/teacher_kl"] == 0.0
    assert not torch.equal(second.scores.old_logp_BT, second.scores.teacher_logp_BT)
    for experience in (first, second):
        assert experience.stats["rollout/sampler_gap"] < 1e-4


def test_the_first_mini_batch_is_on_policy(dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]) -> None:
    module, data = dpr(micro_batch_size=8)
    keep = Keep()
    make_trainer(callbacks=[keep]).fit(module, data)
    assert keep.metrics[0]["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert keep.metrics[0]["policy/clip_share"] == 0.0
    assert keep.metrics[0]["policy/old_kl"] == pytest.approx(0.0, abs=1e-6)
    # Plain SGD at 0.5 then moves it far.
    assert abs(keep.metrics[1]["policy/ratio_mean"] - 1.0) > 1e-3


def test_a_fused_optimizers_gradients_are_clipped_under_mixed_precision(
    dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    # Lightning refuses what says that it unscales by itself; configs/hardware/gpu*.yaml all are of this kind.
    moved = []
    for limit in (1e-3, 1e-6):
        module, data = dpr(model={"optimizer": partial(torch.optim.SGD, lr=1.0, fused=True)})
        trainer = make_trainer(max_steps=1, precision="bf16-mixed", gradient_clip_val=limit)
        trainer.fit(module, data)
        before = load_model(module.teacher, module.backbone)
        pairs = zip(module.actor.model.parameters(), before.parameters(), strict=True)
        moved.append(float(sum((new - old).detach().double().square().sum() for new, old in pairs)) ** 0.5)
    # One step of plain SGD goes as far as the clipped gradient is long.
    assert moved == pytest.approx([1e-3, 1e-6], rel=0.05)


def test_advantages_are_whitened_over_the_whole_rollout_batch(
    dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    module, data = dpr(micro_batch_size=2)
    keep = Keep()
    make_trainer(callbacks=[keep]).fit(module, data)
    (experience,) = keep.experiences
    mask_BT = experience.rollouts.response_mask_BT
    advantage_N = experience.advantage_BT[mask_BT].double()
    assert float(advantage_N.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantage_N.square().mean()) == pytest.approx(1.0, abs=1e-4)
    assert float(experience.advantage_BT[~mask_BT].abs().max()) == 0.0
    # The halves that the two optimizer steps see are not white by themselves.
    halves = [experience.advantage_BT[rows][mask_BT[rows]].mean() for rows in (slice(0, 8), slice(8, 16))]
    assert all(abs(float(mean)) > 1e-3 for mean in halves)
    # Reward to go by hand for each row, with the penalty inside (0 here: the policy is the teacher).
    reward_BT = DenseReward()(experience.scores)
    torch.testing.assert_close(experience.reward_BT, reward_BT)
    for row in range(len(mask_BT)):
        rewards = reward_BT[row][mask_BT[row]].tolist()
        expected = [sum(rewards[t:]) for t in range(len(rewards))]
        assert experience.return_BT[row][mask_BT[row]].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_kl_penalty_is_inside_the_reward(dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]) -> None:
    module, data = dpr(model={"kl_in_reward": 0.5})
    keep = Keep()
    make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
    scores = keep.experiences[1].scores
    expected_BT = (scores.teacher_logp_BT - scores.reference_logp_BT) - 0.5 * (
        scores.old_logp_BT - scores.teacher_logp_BT
    )
    torch.testing.assert_close(keep.experiences[1].reward_BT, expected_BT)
    assert float((scores.old_logp_BT - scores.teacher_logp_BT).abs().max()) > 1e-3


def test_expected_reward_is_the_expectation_over_all_actions(
    dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    module, data = dpr(model={"kl_in_reward": 0.5, "returns": ExpectedReturns()})
    keep = Keep()
    make_trainer(callbacks=[keep], max_epochs=2).fit(module, data)
    rollouts = keep.experiences[1].rollouts
    # Scored again under the weights as they are now; b = sum_a pi(a) [r_hat(a) - beta (log pi - log pi_SFT)(a)].
    scores = module.score(rollouts)
    found_BT = module._expected_reward(scores)
    assert found_BT is not None
    models = [module.actor.model, module.frozen["teacher"].model, module.frozen["reference"].model]
    for row in range(4):
        ids_T = rollouts.input_ids_BT[row][rollouts.attention_mask_BT[row]]
        with torch.no_grad():
            old, teacher, reference = (model(ids_T[None]).logits[0].log_softmax(dim=-1) for model in models)
        b_T = (old.exp() * (teacher - reference - 0.5 * (old - teacher))).sum(dim=-1)
        for t in rollouts.response_mask_BT[row].nonzero().flatten().tolist():
            assert float(found_BT[row, t]) == pytest.approx(float(b_T[t - 1]), abs=1e-4)


def test_prompts_come_once_before_any_comes_again(
    dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    module, data = dpr(prompts_per_rollout=8, samples_per_prompt=2)
    keep = Keep()
    make_trainer(max_epochs=3, callbacks=[keep]).fit(module, data)
    seen = [experience.rollouts.prompt_index_B for experience in keep.experiences]
    assert sorted(torch.cat(seen).tolist()) == sorted(2 * list(range(24)))
    for index_B in seen:
        # The samples of one prompt are adjacent and not the same.
        assert torch.equal(index_B[0::2], index_B[1::2])
    rows = keep.experiences[0].rollouts
    assert any(not torch.equal(rows.input_ids_BT[i], rows.input_ids_BT[i + 1]) for i in range(0, 16, 2))


class OtherSampler(TransformersSampler):
    """Says of every second token of a response that it was less likely than the trainer finds, or more."""

    shifts = (1.5, 0.0, -0.25, 0.0)

    def sample(self, *args: Any, **settings: Any) -> Samples:
        samples = super().sample(*args, **settings)
        logp = [[value - self.shifts[t % 4] for t, value in enumerate(row)] for row in samples.logp]
        return dataclasses.replace(samples, logp=logp)


@pytest.mark.parametrize("loss", [ClippedPolicyLoss(), ReinforceLoss()], ids=lambda loss: type(loss).__name__)
def test_importance_weights_stand_on_the_advantages(
    loss: Any, dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    module, data = dpr(model={"importance_cap": 2.0, "sampler": OtherSampler(), "loss": loss})
    keep = Keep()
    make_trainer(callbacks=[keep]).fit(module, data)
    (experience,) = keep.experiences
    plan = MicroBatchPlan(rows=list(range(16)), num_tokens=1, num_sequences=1)
    batch = module.make_batch(experience, plan)
    mask_BT = experience.rollouts.response_mask_BT
    place_BT = mask_BT.cumsum(dim=1) - 1
    # e^1.5 is above the cap.
    weight_4 = torch.tensor([2.0, 1.0, math.exp(-0.25), 1.0])
    expected_BT = torch.where(mask_BT, weight_4[place_BT % 4] * experience.advantage_BT, 0.0)
    torch.testing.assert_close(batch.advantage_BT, expected_BT, rtol=1e-3, atol=1e-5)
    weight_N = weight_4[place_BT % 4][mask_BT]
    stats = experience.stats
    assert stats["rollout/importance_mean"] == pytest.approx(float(weight_N.mean()), abs=1e-3)
    assert stats["rollout/importance_capped"] == pytest.approx(float((weight_N == 2.0).float().mean()))
    assert stats["rollout/sampler_gap_max"] == pytest.approx(1.5, abs=1e-4)
    # Without a cap nothing is weighted, and nothing is logged of weights.
    module.importance_cap = None
    assert torch.equal(module.make_batch(experience, plan).advantage_BT, experience.advantage_BT)
    plain, plain_data = dpr(model={"loss": loss})
    unweighted = Keep()
    make_trainer(callbacks=[unweighted]).fit(plain, plain_data)
    assert not [name for name in unweighted.experiences[0].stats if "importance" in name]


@pytest.mark.parametrize("loss", [ClippedPolicyLoss(), ReinforceLoss()], ids=lambda loss: type(loss).__name__)
def test_the_sampler_may_say_the_old_log_probs(
    loss: Any, dpr: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    runs = {}
    for source in ("trainer", "sampler"):
        module, data = dpr(model={"old_logp": source, "loss": loss, "kl_in_reward": 0.0})
        keep = Keep()
        make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
        runs[source] = module, keep.experiences
    (module, own), (other, said) = runs["trainer"], runs["sampler"]
    for one, two in zip(own, said, strict=True):
        assert torch.equal(two.scores.old_logp_BT, two.rollouts.sampler_logp_BT)
        torch.testing.assert_close(two.scores.old_logp_BT, one.scores.old_logp_BT, rtol=1e-4, atol=1e-4)
        # One sample of the entropy at each state: minus the log-probability of what was drawn there.
        num_tokens = int(two.rollouts.response_mask_BT.sum())
        assert two.stats["policy/entropy"] == pytest.approx(-float(two.rollouts.sampler_logp_BT.sum()) / num_tokens)
        assert {name for name in one.stats if name not in two.stats} == {
            *("rollout/sampler_gap", "rollout/sampler_gap_max", "rollout/sampler_kl")
        }
    tokens = sum(int(experience.rollouts.attention_mask_BT.sum()) for experience in said)
    assert (module.token_counts["scored"], other.token_counts["scored"]) == (3 * tokens, 2 * tokens)
    # Rounding in the ratio; where there is none the two runs are one.
    tolerance = 0.0 if isinstance(loss, ReinforceLoss) else 1e-3
    for (name, weight), same in zip(module.actor.named_parameters(), other.actor.parameters(), strict=True):
        torch.testing.assert_close(weight, same, rtol=tolerance, atol=tolerance / 10, msg=name)
    # A sampler with weights of its own is compared with the policy, as ever.
    assert other.known_old_logp(said[0].rollouts) is not None
    other.sampler.has_own_weights = True
    assert other.known_old_logp(said[0].rollouts) is None
    # A tempered answer's log-probabilities are not pi_old's: validation asks the policy.
    scores = other.score(said[0].rollouts)
    assert not torch.equal(scores.old_logp_BT, said[0].rollouts.sampler_logp_BT)


@pytest.mark.parametrize(
    ("model", "sampling", "message"),
    [
        ({"returns": ExpectedReturns()}, {}, r"found sampler, but model\.returns ExpectedReturns needs"),
        ({"importance_cap": 2.0}, {}, r"found sampler, but model\.importance_cap compares"),
        ({}, {"temperature": 0.5}, r"found sampler, but data\.sampling has .*\(0\.5, 1\.0, 0\)"),
        ({}, {"top_k": 3}, r"found sampler, but data\.sampling has .*\(1\.0, 1\.0, 3\)"),
    ],
)
def test_where_the_sampler_cannot_know_the_old_log_probs_it_is_not_asked(
    model: dict[str, Any],
    sampling: dict[str, Any],
    message: str,
    dpr: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    module, data = dpr(model={"old_logp": "sampler", **model})
    data.sampling = dataclasses.replace(data.sampling, **sampling)
    with pytest.raises(UserError, match=message):
        make_trainer().fit(module, data)
    assert module.policy is None


class FixedSampler:
    """Answers every prompt with two tokens and EOS, and every third one with four tokens without."""

    def sample(self, model: Any, prompts: Any, *, eos_token_id: int, **settings: Any) -> Samples:
        is_truncated = [number % 3 == 0 for number in range(len(prompts))]
        responses = [[20, 21, 22, 23] if cut else [20, 21, eos_token_id] for cut in is_truncated]
        return Samples(response_ids=responses, logp=[[0.0] * len(ids) for ids in responses], is_truncated=is_truncated)


def test_validation_reports_the_dense_reward(
    dpr: Callable[..., Any], demonstrations_file: str, make_trainer: Callable[..., Trainer]
) -> None:
    def verifier(row: dict[str, Any], response: str) -> bool:
        return str(row["prompt"]).startswith("1")

    module, data = dpr(model={"verifier": verifier, "sampler": FixedSampler()})
    data.demonstrations = DemonstrationConfig(source=demonstrations_file, validation_source=demonstrations_file)
    trainer = make_trainer()
    found = trainer.validate(module, data, verbose=False)[0]
    # Prompts "0 and 0" to "23 and 529" in this order: 8 of 24 are truncated, and an unfinished answer is no answer.
    # Of the eleven that start with a 1 (1, 10 to 19), 12, 15 and 18 are.
    assert found["val/accuracy"] == pytest.approx(8 / 24)
    assert found["val/length"] == pytest.approx((8 * 4 + 16 * 3) / 24)
    assert found["val/truncated_share"] == pytest.approx(8 / 24)
    # The policy is the teacher.
    assert found["val/teacher_kl"] == 0.0
    models = [load_model(source, module.backbone) for source in (module.teacher, module.reference)]
    rewards = []
    for number in range(24):
        prompt = data.prompts["validation"].prompt_ids(number)
        response = [20, 21, 22, 23] if number % 3 == 0 else [20, 21, module.tokenizer.eos_token_id]
        with torch.no_grad():
            logp = [
                model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
                for model in models
            ]
        rewards += [float(sum(logp[0][t, token] - logp[1][t, token] for t, token in enumerate(response)))]
    assert found["val/reward_sum"] == pytest.approx(sum(rewards) / 24, abs=1e-4)
    # fit after validate starts the averages anew.
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(8 / 24)


def test_predict_loads_no_frozen_policy(
    dpr: Callable[..., Any], demonstrations_file: str, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = dpr(model={"decoding": SamplingConfig(max_new_tokens=2)})
    data.demonstrations = DemonstrationConfig(source=demonstrations_file, validation_source=demonstrations_file)
    predictions = make_trainer().predict(module, data)
    assert predictions is not None
    assert sum(len(batch) for batch in predictions) == 24
    assert module.frozen == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, r"model\.alpha: found 0\.0"),
        ({"alpha": 1.0}, r"model\.alpha: found 1\.0"),
        ({"alpha": [0.5, 1.5]}, r"model\.alpha: found \[0\.5, 1\.5\]"),
        ({"kl_in_reward": -1.0}, r"model\.kl_in_reward: found -1\.0"),
        ({"kl_in_reward": float("nan")}, r"model\.kl_in_reward: found nan"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPRModule("teacher", backbone=BackboneConfig(name_or_path="unused"), **settings)  # type: ignore[arg-type]


def test_figures_of_each_rollout_are_logged_at_the_step_before_its_updates(
    dpr: Callable[..., Any], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module, data = dpr()
    keep = Keep()
    logger = CSVLogger(tmp_path, name="", version="logs")
    trainer = make_trainer(max_epochs=2, callbacks=[keep], logger=logger)
    trainer.fit(module, data)
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    # Two optimizer steps an epoch: the rollouts were drawn after 0 and 2 of them.
    assert [int(row["step"]) for row in rows] == [0, 2]
    for row, experience in zip(rows, keep.experiences, strict=True):
        for name, value in experience.stats.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-6, abs=1e-12), name
    assert float(trainer.callback_metrics["reward/mean"]) == pytest.approx(keep.experiences[1].stats["reward/mean"])
