from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedModel

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.errors import NonFiniteError, UserError
from dpr_lightning.models.backbone import load_model
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.types import SamplingConfig


def weights(module: CausalLMModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.actor.model.state_dict().items()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **({"rtol": 0.0, "atol": 0.0} | tolerance))


def initial_weights(module: CausalLMModule) -> PreTrainedModel:
    return load_model(module.initial_weights, module.backbone)


@pytest.mark.parametrize(("stage", "global_batch_size", "num_steps"), [("sft", 8, 2), ("sft", 10, 3), ("dpr", 8, 2)])
def test_many_small_micro_batches_give_what_one_large_one_gives(
    stage: str,
    global_batch_size: int,
    num_steps: int,
    make_trainer: Callable[..., Trainer],
    request: pytest.FixtureRequest,
) -> None:
    # 24 rows in steps of 10: the third step is incomplete, so Lightning takes it after fewer micro-batches.
    make = request.getfixturevalue(stage)
    found = []
    for micro_batch_size in (global_batch_size, global_batch_size // 2, 1):
        module, data = make(micro_batch_size=micro_batch_size, global_batch_size=global_batch_size)
        trainer = make_trainer(max_steps=num_steps)
        trainer.fit(module, data)
        assert trainer.global_step == num_steps
        assert trainer.accumulate_grad_batches == global_batch_size // micro_batch_size
        assert module.loss_scale == global_batch_size / micro_batch_size
        found.append(weights(module))
    start = initial_weights(module).state_dict()
    assert max(float((found[0][name] - value).abs().max()) for name, value in start.items()) > 0.01
    for other in found[1:]:
        # float32 sums in another order; a wrong scale would be off by a factor.
        assert_same_weights(other, found[0], rtol=1e-4, atol=2e-6)


def test_one_step_is_plain_gradient_descent_on_the_token_mean(
    sft: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    module, data = sft(micro_batch_size=2, global_batch_size=24)
    make_trainer(max_steps=1).fit(module, data)

    start = initial_weights(module)
    encoded = data.encoded["train"]
    total, num_tokens = torch.zeros(()), 0
    for row in range(24):
        prompt, response = encoded.prompt_ids(row), encoded.response_ids(row)
        logits_TV = start(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits_TV, torch.tensor(response), reduction="sum")
        num_tokens += len(response)
    (total / num_tokens).backward()
    with torch.no_grad():
        for parameter in start.parameters():
            assert parameter.grad is not None
            parameter -= 0.5 * parameter.grad
    assert_same_weights(weights(module), start.state_dict(), rtol=1e-4, atol=2e-6)


class Watch(Callback):
    """Keeps the weights at every optimizer step's end, and the logged metrics."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, CausalLMModule)
        self.weights[trainer.global_step] = weights(pl_module)
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Poison(Callback):
    """Makes one micro-batch's log-probabilities, or one step's gradient, not finite."""

    def __init__(self, batch: int, *, where: str) -> None:
        self.batch = batch
        self.where = where

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.batch:
            return
        assert isinstance(pl_module, CausalLMModule)
        if self.where == "loss":
            forward = pl_module.actor.forward

            def poisoned(*args: Any, **kwargs: Any) -> Any:
                out = forward(*args, **kwargs)
                out.logp_N.data[0] = float("nan")
                return out

            pl_module.actor.forward = poisoned  # type: ignore[method-assign]
        else:
            pl_module.actor.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))


@pytest.mark.parametrize("stage", ["sft", "dpr"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", r"loss became nan on rank 0 at optimizer step 1, epoch 0, micro-batch 3"),
        ("gradient", r"gradient norm became (nan|inf) on rank 0 at optimizer step 1, epoch 0, all micro-batches"),
    ],
)
def test_a_number_that_is_none_stops_the_run_before_it_does_harm(
    stage: str,
    where: str,
    message: str,
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    # Two micro-batches a step: number 3 completes the second optimizer step.
    module, data = request.getfixturevalue(stage)(micro_batch_size=4)
    watch = Watch()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
    callbacks = [watch, Poison(3, where=where), checkpoint]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_steps=2)
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(module, data)
    assert trainer.global_step == 1
    assert_same_weights(weights(module), watch.weights[1])
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 1
    assert_same_weights(
        {name.removeprefix("policy.model."): value for name, value in saved["state_dict"].items() if "policy" in name},
        watch.weights[1],
    )


def test_metrics_are_sums_over_the_step_and_logged_once(
    sft: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    logged = []
    for micro_batch_size in (8, 2):
        module, data = sft(micro_batch_size=micro_batch_size)
        watch = Watch()
        make_trainer(max_steps=3, callbacks=[watch]).fit(module, data)
        logged.append(watch.metrics)
    for one, many in zip(*logged, strict=True):
        assert one.keys() >= {"train/loss", "policy/grad_norm", "policy/learning_rate"}
        for name in ("train/loss", "policy/grad_norm", "policy/learning_rate"):
            assert many[name] == pytest.approx(one[name], rel=1e-4), name
    # A random model over V tokens starts near the loss of guessing.
    num_tokens = len(module.tokenizer)
    assert logged[0][0]["train/loss"] == pytest.approx(math.log(num_tokens), rel=0.1)


def test_planned_steps_and_schedule(sft: Callable[..., Any], make_trainer: Callable[..., Trainer]) -> None:
    # 24 rows in steps of 10 are 3 steps an epoch, the last one incomplete.
    module, data = sft(micro_batch_size=5, global_batch_size=10, model={"warmup_ratio": 0.5, "min_lr_ratio": 0.1})
    watch = Watch()
    trainer = make_trainer(max_epochs=2, callbacks=[watch])
    trainer.fit(module, data)
    assert module.planned_optimizer_steps() == trainer.global_step == 6
    rates = [metrics["policy/learning_rate"] for metrics in watch.metrics]
    # Three steps of linear warm-up to 0.5, then half a cosine over three: 0.1 + 0.9 (1 + cos(pi k / 3)) / 2.
    expected = [0.0, 0.5 / 3, 1.0 / 3, 0.5, 0.5 * (0.1 + 0.9 * 0.75), 0.5 * (0.1 + 0.9 * 0.25)]
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        ("sft", {"max_epochs": 2, "max_steps": 4}, 4),
        ("sft", {"max_epochs": None, "max_steps": 2}, 2),
        ("dpr", {"max_epochs": 2}, 4),
        ("dpr", {"max_epochs": None, "max_steps": 1}, 1),
    ],
)
def test_planned_steps_are_those_that_are_taken(
    stage: str,
    settings: dict[str, Any],
    expected: int,
    make_trainer: Callable[..., Trainer],
    request: pytest.FixtureRequest,
) -> None:
    module, data = request.getfixturevalue(stage)()
    trainer = make_trainer(**settings)
    trainer.fit(module, data)
    assert module.planned_optimizer_steps() == trainer.global_step == expected


@pytest.mark.parametrize("stage", ["sft", "dpr"])
def test_a_run_without_end_is_refused(
    stage: str, make_trainer: Callable[..., Trainer], request: pytest.FixtureRequest
) -> None:
    module, data = request.getfixturevalue(stage)()
    with pytest.raises(UserError, match="both are unbounded"):
        make_trainer(max_epochs=-1).fit(module, data)


@pytest.mark.parametrize("name", ["warmup_ratio", "min_lr_ratio"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_shares_outside_their_range_are_refused(sft: Callable[..., Any], name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model\.{name}: found {value}"):
        sft(model={name: value})


def test_the_tokenizer_is_read_without_weights(sft: Callable[..., Any]) -> None:
    module, _ = sft()
    assert module.tokenizer.eos_token == "</s>"
    assert module.policy is None
    with pytest.raises(AssertionError, match="configure_model has not run"):
        _ = module.actor


def test_configure_model_keeps_weights_that_are_there(sft: Callable[..., Any]) -> None:
    module, _ = sft()
    module.configure_model()
    policy = module.policy
    assert isinstance(policy, CausalPolicy)
    assert policy.training
    module.configure_model()
    assert module.policy is policy


def test_evaluation_seeds_differ_between_batches_and_not_between_epochs(sft: Callable[..., Any]) -> None:
    first, _ = sft()
    second, _ = sft(model={"prediction_seed": 1})
    seeds = [module.evaluation_seed(batch) for module in (first, second) for batch in range(100)]
    assert len(set(seeds)) == 200
    assert seeds[:100] == [first.evaluation_seed(batch) for batch in range(100)]


def test_predict_answers_every_held_out_prompt(
    sft: Callable[..., Any], demonstrations_file: str, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = sft(model={"decoding": SamplingConfig(max_new_tokens=5, temperature=0.7)})
    data.demonstrations = DemonstrationConfig(source=demonstrations_file, validation_source=demonstrations_file)
    rows = [row for batch in make_trainer().predict(module, data) or [] for row in batch]
    assert [row["prompt"] for row in rows] == [f"{n} and {n * n}" for n in range(24)]
    assert len({row["row"] for row in rows}) == 24
    for row in rows:
        assert 1 <= row["num_tokens"] <= 5
        assert isinstance(row["response"], str)
        assert "</s>" not in row["response"]
