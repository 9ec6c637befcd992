from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.errors import NonFiniteError, UserError
from dpr_lightning.functional import SentenceReward
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.ppo import PPOModule
from dpr_lightning.rollout.scoring import token_values
from dpr_lightning.types import Experience, SamplingConfig

SGD = partial(torch.optim.SGD, lr=0.05)
CRITIC_LR = 0.02
Parts = Callable[..., tuple[PPOModule, RolloutDataModule]]


@pytest.fixture
def ppo(frozen_dirs: tuple[str, str], demonstrations_file: str) -> Parts:
    def make(
        *, micro_batch_size: int = 8, model: dict[str, Any] | None = None, **data: Any
    ) -> tuple[PPOModule, RolloutDataModule]:
        teacher, reference = frozen_dirs
        settings = {"optimizer": SGD, "critic_lr": CRITIC_LR, "warmup_ratio": 0.0} | (model or {})
        module = PPOModule(teacher, reference=reference, backbone=BackboneConfig(name_or_path="unused"), **settings)
        return module, RolloutDataModule(
            DemonstrationConfig(source=demonstrations_file),
            sampling=SamplingConfig(max_new_tokens=8),
            micro_batch_size=micro_batch_size,
            **({"prompts_per_rollout": 16, "global_batch_size": 8} | data),
        )

    return make


class Keep(Callback):
    """Keeps every epoch's experience, and what was logged of each optimizer step."""

    def __init__(self) -> None:
        self.experiences: list[Experience] = []
        self.metrics: list[dict[str, float]] = []
        self.critics: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.experiences.append(trainer.datamodule.experience)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.critics.append(weights(pl_module.critic))  # type: ignore[arg-type]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_the_first_rollout_is_measured_against_nothing(ppo: Parts, make_trainer: Callable[..., Trainer]) -> None:
    module, data = ppo()
    keep = Keep()
    make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
    first, second = keep.experiences
    mask_BT = first.rollouts.response_mask_BT
    assert first.value_BT is not None
    assert float(first.value_BT.abs().max()) == 0.0
    assert (first.stats["value/mean"], first.stats["value/explained_variance"]) == (0.0, 0.0)
    # The policy is the teacher, so there is no penalty: every token is credited with the sum of r_hat.
    sum_B = (first.scores.teacher_logp_BT - first.scores.reference_logp_BT).sum(dim=1)
    torch.testing.assert_close(first.return_BT, torch.where(mask_BT, sum_B[:, None], 0.0))
    assert second.value_BT is not None
    assert float(second.value_BT[second.rollouts.response_mask_BT].abs().min()) > 0.0
    assert float(second.value_BT[~second.rollouts.response_mask_BT].abs().max()) == 0.0
    assert second.stats["value/mean"] == pytest.approx(
        float(second.value_BT[second.rollouts.response_mask_BT].mean()), rel=1e-5
    )


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8)])
def test_advantages_are_whitened_gae(
    gamma: float, gae_lambda: float, ppo: Parts, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = ppo(micro_batch_size=2, model={"gamma": gamma, "gae_lambda": gae_lambda, "kl_in_reward": 0.3})
    keep = Keep()
    make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
    experience = keep.experiences[1]
    mask_BT, value_BT = experience.rollouts.response_mask_BT, experience.value_BT
    assert value_BT is not None
    scores = experience.scores
    raw: list[float] = []
    returns: list[float] = []
    for row in range(len(mask_BT)):
        teacher, reference, old = (
            logp_BT[row][mask_BT[row]].double().tolist()
            for logp_BT in (scores.teacher_logp_BT, scores.reference_logp_BT, scores.old_logp_BT)
        )
        v = [*value_BT[row][mask_BT[row]].double().tolist(), 0.0]
        r = [-0.3 * (o - t) for o, t in zip(old, teacher, strict=True)]
        r[-1] += sum(teacher) - sum(reference)
        for t in range(len(r)):
            advantage = sum(
                (gamma * gae_lambda) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, len(r))
            )
            raw.append(advantage)
            returns.append(advantage + v[t])
    torch.testing.assert_close(experience.return_BT[mask_BT], torch.tensor(returns), rtol=1e-4, atol=1e-4)
    raw_N = torch.tensor(raw, dtype=torch.float64)
    white_N = (raw_N - raw_N.mean()) / raw_N.std(correction=0)
    torch.testing.assert_close(experience.advantage_BT[mask_BT].double(), white_N, rtol=1e-4, atol=1e-4)
    explained = 1.0 - raw_N.var(correction=0) / torch.tensor(returns, dtype=torch.float64).var(correction=0)
    assert experience.stats["value/explained_variance"] == pytest.approx(float(explained), abs=1e-4)


def test_values_of_the_batch_are_those_of_the_critic_before_the_updates(
    ppo: Parts, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = ppo(model={"value_clip": 1e-4})
    keep = Keep()
    make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
    # Four optimizer steps; in the first of each rollout batch no value has moved yet.
    for step in (0, 2):
        assert keep.metrics[step]["value/clip_share"] == 0.0
        assert keep.metrics[step + 1]["value/clip_share"] > 0.0
    after = token_values(keep.experiences[1].rollouts, module.critic, micro_batch_size=3)
    assert keep.experiences[1].value_BT is not None
    assert not torch.allclose(after, keep.experiences[1].value_BT)


def test_rows_and_micro_batches_change_nothing(ppo: Parts, make_trainer: Callable[..., Trainer]) -> None:
    found = []
    for micro_batch_size in (8, 2):
        # Scoring in like micro-batches, so that only training differs.
        module, data = ppo(micro_batch_size=micro_batch_size, model={"score_micro_batch_size": 4})
        keep = Keep()
        make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
        found.append((weights(module.actor), weights(module.critic), keep.metrics))
    for whole, parts in zip(found[0][:2], found[1][:2], strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=2e-6, msg=name)
    for whole_step, part_step in zip(found[0][2], found[1][2], strict=True):
        for key in ("value/loss", "value/clip_share", "value/grad_norm", "policy/grad_norm"):
            assert part_step[key] == pytest.approx(whole_step[key], rel=1e-3, abs=1e-6), key


def test_one_optimizer_holds_both_at_their_own_rates(
    ppo: Parts, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module, data = ppo(model={"warmup_ratio": 0.5, "optimizer": partial(torch.optim.AdamW, lr=1e-3)})
    keep = Keep()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer = make_trainer(max_epochs=2, callbacks=[keep, checkpoint], enable_checkpointing=True)
    trainer.fit(module, data)
    (optimizer,) = trainer.optimizers
    groups = [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]
    assert groups == [{id(p) for p in model.parameters()} for model in (module.actor, module.critic)]
    assert not groups[0] & groups[1]
    rates = [(step["policy/learning_rate"], step["value/learning_rate"]) for step in keep.metrics]
    assert [rate for rate, _ in rates] == pytest.approx([0.0, 5e-4, 1e-3, 1e-3 * 0.55])
    assert [rate for _, rate in rates] == pytest.approx([0.0, CRITIC_LR / 2, CRITIC_LR, CRITIC_LR * 0.55])
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert {f"value_model.{name}" for name in weights(module.critic)} <= saved["state_dict"].keys()


def test_the_actors_step_does_not_depend_on_the_critic(ppo: Parts, make_trainer: Callable[..., Trainer]) -> None:
    # The same rollouts and advantages, and a critic whose gradient is a thousand times larger: what it is to predict
    # grows, and whitening takes the scale out again.
    found = []
    for scale in (1.0, 1000.0):
        module, data = ppo(model={"reward": ScaledReward(scale), "critic_lr": 1e-6, "kl_in_reward": 0.0})
        keep = Keep()
        make_trainer(max_epochs=1, callbacks=[keep], gradient_clip_val=0.01).fit(module, data)
        found.append((weights(module.actor), keep))
    (small, keep), (large, keep_large) = found
    for step, step_large in zip(keep.metrics, keep_large.metrics, strict=True):
        assert step["policy/grad_norm"] > 0.05
        assert step_large["policy/grad_norm"] == pytest.approx(step["policy/grad_norm"], rel=1e-3)
        assert step_large["value/grad_norm"] > 500 * step["value/grad_norm"] > 0.0
    for name, value in small.items():
        torch.testing.assert_close(large[name], value, rtol=1e-5, atol=1e-7, msg=name)


class ScaledReward(SentenceReward):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __call__(self, scores: Any) -> Tensor:
        return self.scale * super().__call__(scores)


@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_each_group_is_clipped_by_itself(
    algorithm: str | None, ppo: Parts, make_trainer: Callable[..., Trainer]
) -> None:
    norms: list[list[tuple[float, float]]] = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            found = []
            for group in optimizer.param_groups:
                grads = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
                if grads:
                    largest = max(float(grad.abs().max()) for grad in grads)
                    found.append((float(torch.nn.utils.get_total_norm(grads)), largest))
            if found:
                norms.append(found)

    module, data = ppo(model={"critic_lr": 1e-6})
    settings = {} if algorithm is None else {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    make_trainer(callbacks=[Norms()], **settings).fit(module, data)
    assert norms
    for (actor_norm, actor_largest), (critic_norm, critic_largest) in norms:
        if algorithm == "norm":
            assert actor_norm == pytest.approx(0.01, rel=1e-3)
            assert critic_norm == pytest.approx(0.01, rel=1e-3)
        elif algorithm == "value":
            assert actor_largest == pytest.approx(0.01)
            assert critic_largest == pytest.approx(0.01)
            assert critic_norm > 0.02
        else:
            assert actor_norm > 0.02
            assert critic_norm > 0.02


def test_tokens_of_both_models_are_counted(ppo: Parts, make_trainer: Callable[..., Trainer]) -> None:
    module, data = ppo(micro_batch_size=2)
    keep = Keep()
    make_trainer(max_epochs=2, callbacks=[keep]).fit(module, data)
    num_tokens = sum(int(experience.rollouts.attention_mask_BT.sum()) for experience in keep.experiences)
    # Scored by actor, teacher, reference and critic; actor and critic are trained.
    assert module.token_counts == {"rolled_out": num_tokens, "scored": 4 * num_tokens, "trained": 2 * num_tokens}


@pytest.mark.parametrize("when", ["scoring", "training"])
def test_a_critic_that_is_not_finite_stops_the_run(when: str, ppo: Parts, make_trainer: Callable[..., Trainer]) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == ((1, 1) if when == "training" else (0, 1)):
                pl_module.critic.head.weight.data.fill_(float("nan"))

    module, data = ppo()
    with pytest.raises(NonFiniteError, match=r"loss became nan on rank 0 at optimizer step [13]"):
        make_trainer(max_epochs=3, callbacks=[Poison()]).fit(module, data)
    assert all(bool(torch.isfinite(value).all()) for value in weights(module.actor).values())


def test_only_fit_loads_a_critic(
    ppo: Parts, demonstrations_file: str, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def make() -> tuple[PPOModule, RolloutDataModule]:
        module, data = ppo(model={"decoding": SamplingConfig(max_new_tokens=2, temperature=0.0)})
        data.demonstrations = DemonstrationConfig(source=demonstrations_file, validation_source=demonstrations_file)
        return module, data

    fitted, data = make()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    make_trainer(callbacks=[checkpoint], enable_checkpointing=True).fit(fitted, data)
    last = tmp_path / "checkpoints" / "last.ckpt"
    for subcommand in ("validate", "test", "predict"):
        module, data = make()
        trainer = make_trainer()
        getattr(trainer, subcommand)(module, data, ckpt_path=last)
        assert module.value_model is None
        for name, value in weights(fitted.actor).items():
            assert torch.equal(module.actor.state_dict()[name], value), name
    # fit after validate loads it.
    trainer.fit(module, data)
    assert module.critic.training


def test_the_export_is_the_actor_alone(ppo: Parts, make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module, data = ppo()
    make_trainer().fit(module, data)
    module.save_pretrained(tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert loaded.keys() == module.actor.model.state_dict().keys()
    for name, value in weights(module.actor.model).items():
        assert torch.equal(loaded[name], value), name


def test_a_critic_learns_what_its_states_are_worth(ppo: Parts, make_trainer: Callable[..., Trainer]) -> None:
    # A policy that stands still and answers each prompt in one way, and values that may move freely: a regression.
    settings = {
        "optimizer": partial(torch.optim.AdamW, lr=1e-12),
        "critic_lr": 3e-3,
        "value_clip": float("inf"),
        # Two layers of random weights learn a large mean by making all states alike.
        "reward": ScaledReward(0.02),
    }
    module, data = ppo(model=settings, prompts_per_rollout=24, global_batch_size=12, micro_batch_size=12)
    data.sampling = SamplingConfig(max_new_tokens=8, temperature=0.0)
    keep = Keep()
    make_trainer(max_epochs=8, callbacks=[keep]).fit(module, data)
    explained = [experience.stats["value/explained_variance"] for experience in keep.experiences]
    assert explained[0] == 0.0
    # It ended at 0.21.
    assert explained[-1] > 0.1
    assert keep.metrics[-1]["value/loss"] < keep.metrics[0]["value/loss"] / 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.1}, r"^model\.gamma: found 1\.1; give a number between 0 and 1"),
        ({"gae_lambda": -0.1}, r"^model\.gae_lambda: found -0\.1; give"),
        ({"gae_lambda": float("nan")}, r"^model\.gae_lambda: found nan; give"),
        ({"critic_lr": 0.0}, r"^model\.critic_lr: found 0\.0; give a number above 0"),
        ({"value_clip": 0.0}, r"^model\.value_clip: found 0\.0; give a number above 0"),
        ({"value_clip": float("nan")}, r"^model\.value_clip: found nan"),
        ({"alpha": 0.0}, r"^model\.alpha: found 0\.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PPOModule("teacher", backbone=BackboneConfig(name_or_path="unused"), **settings)  # type: ignore[arg-type]
