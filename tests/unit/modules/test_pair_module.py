"""SPIN and GSIL on two-layer models: what pairs are made of, scored under, trained on and counted as."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.pair_datamodule import PairDataModule
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.errors import UserError
from dpr_lightning.functional.pair_losses import BernoulliGSILLoss, SPINLoss
from dpr_lightning.models.backbone import BackboneConfig, load_model
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.pairs import PairModule
from dpr_lightning.types import PairBatch, PairExperience, SamplingConfig

Parts = Callable[..., tuple[PairModule, PairDataModule]]
NUM_PROMPTS = 24


class Watch(Callback):
    """Keeps every iteration's experience and weights, and what each optimizer step saw."""

    def __init__(self) -> None:
        self.experiences: list[PairExperience] = []
        self.weights: list[dict[str, Tensor]] = []
        self.batches: list[PairBatch] = []
        self.metrics: list[dict[str, float]] = []
        self.rates: list[float] = []
        self.num_states: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.experiences.append(trainer.datamodule.experience)  # type: ignore[attr-defined]
        assert isinstance(pl_module, PairModule)
        self.weights.append({name: value.clone() for name, value in pl_module.actor.model.state_dict().items()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.num_states.append(len(optimizer.state))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def pairs(frozen_dirs: tuple[str, str], demonstrations_file: str) -> Parts:
    def make(*, model: dict[str, Any] | None = None, **data: Any) -> tuple[PairModule, PairDataModule]:
        settings = {"optimizer": partial(torch.optim.SGD, lr=0.05), "warmup_ratio": 0.0} | (model or {})
        module = PairModule(frozen_dirs[0], backbone=BackboneConfig(name_or_path="unused"), **settings)
        settings = {"prompts_per_rollout": 8, "global_batch_size": 4, "micro_batch_size": 2, "keep_previous": True}
        return module, PairDataModule(
            demonstrations=DemonstrationConfig(source=demonstrations_file),
            sampling=SamplingConfig(max_new_tokens=6),
            **(settings | data),
        )

    return make


def response(batch: Any, row: int) -> list[int]:
    ids: list[int] = batch.input_ids_BT[row][batch.response_mask_BT[row]].tolist()
    return ids


def prompt(batch: Any, row: int) -> list[int]:
    mask_T = batch.attention_mask_BT[row] & ~batch.response_mask_BT[row]
    ids: list[int] = batch.input_ids_BT[row][mask_T].tolist()
    return ids


def test_each_micro_batch_holds_demonstrations_and_then_their_samples(
    pairs: Parts, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = pairs(passes_per_rollout=2)
    watch = Watch()
    make_trainer(max_epochs=2, callbacks=[watch]).fit(module, data)
    encoded = data.prompts["train"].encoded
    eos = module.tokenizer.eos_token_id
    seen: list[tuple[int, list[int], list[int]]] = []
    for batch in watch.batches:
        assert batch.input_ids_BT.shape[0] == 4
        assert batch.num_pairs == 4
        for row in range(2):
            assert prompt(batch, row) == prompt(batch, row + 2)
            index = next(i for i in range(NUM_PROMPTS) if encoded.prompt_ids(i) == prompt(batch, row))
            assert response(batch, row) == encoded.response_ids(index)
            assert response(batch, row)[-1] == eos
            seen.append((batch.iteration, prompt(batch, row), response(batch, row + 2)))
    # Iteration 0: 8 pairs twice. Iteration 1: its own 8 and those of iteration 0, all twice.
    first, second = watch.experiences
    assert len(seen) == 2 * 8 + 2 * 16
    own = [[(prompt(e.rollouts, row), response(e.rollouts, row)) for row in range(8)] for e in (first, second)]
    assert sorted(pair[1:] for pair in seen[:16]) == sorted(own[0] * 2)
    assert sorted(pair[1:] for pair in seen[16:]) == sorted((own[0] + own[1]) * 2)
    assert [pair[0] for pair in seen] == [0] * 16 + [1] * 32
    # Each pass has every pair once, in an order of its own.
    assert sorted(pair[1:] for pair in seen[:8]) == sorted(own[0])
    assert seen[:8] != seen[8:16]


def test_reference_of_an_iteration_is_the_policy_that_it_began_with(
    pairs: Parts, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = pairs()
    watch = Watch()
    make_trainer(max_epochs=2, callbacks=[watch]).fit(module, data)
    model = load_model(module.found_teacher.teacher, module.backbone)
    for iteration, experience in enumerate(watch.experiences):
        model.load_state_dict(watch.weights[iteration])
        parts = [part for part in (experience.rollouts, experience.previous) if part is not None]
        assert len(parts) == iteration + 1
        row = 0
        for part in parts:
            for index, prompt_index in enumerate(part.prompt_index_B.tolist()):
                demonstration = data.prompts["train"].encoded.response_ids(prompt_index)
                for ids, found_P in (
                    (demonstration, experience.demonstration_logp_P),
                    (response(part, index), experience.sample_logp_P),
                ):
                    expected = log_prob(model, prompt(part, index), ids)
                    assert float(found_P[row]) == pytest.approx(expected, abs=1e-4)
                row += 1
        assert row == len(experience.sample_logp_P) == len(experience.demonstration_logp_P)
    # The samples of iteration 0 are scored anew under pi_1, which is not pi_0.
    first, second = watch.experiences
    assert second.previous is first.rollouts
    assert float((second.sample_logp_P[8:] - first.sample_logp_P).abs().max()) > 1e-3


def log_prob(model: Any, prompt_ids: list[int], ids: list[int]) -> float:
    """The sum over the response by transformers' own logits."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return float(logits_TV.double().log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("loss", [SPINLoss(0.5), BernoulliGSILLoss(scale=0.1, shift=1.0)], ids=["spin", "gsil"])
def test_the_first_step_is_by_hand(loss: Any, pairs: Parts, make_trainer: Callable[..., Trainer]) -> None:
    """One step of plain SGD over all pairs at once against autograd on transformers' own logits."""
    module, data = pairs(model={"loss": loss, "optimizer": partial(torch.optim.SGD, lr=0.01)}, global_batch_size=8)
    watch = Watch()
    make_trainer(callbacks=[watch], gradient_clip_val=None).fit(module, data)
    model = load_model(module.found_teacher.teacher, module.backbone)
    total = torch.zeros(())
    rollouts = watch.experiences[0].rollouts
    for row, index in enumerate(rollouts.prompt_index_B.tolist()):
        log_ratios = []
        for ids in (data.prompts["train"].encoded.response_ids(index), response(rollouts, row)):
            prompt_ids = prompt(rollouts, row)
            logits_TV = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
            logp = logits_TV.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None]).sum()
            log_ratios.append(logp - logp.detach())
        up, down = log_ratios
        if isinstance(loss, SPINLoss):
            total = total - torch.log(torch.sigmoid(0.5 * (up - down)))
        else:
            total = total - torch.log(torch.sigmoid(0.1 * up + 1)) - torch.log(torch.sigmoid(-0.1 * down - 1))
    (total / 8).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found = module.actor.model.get_parameter(name)
        torch.testing.assert_close(found, parameter - 0.01 * parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert watch.metrics[-1]["policy/loss"] == pytest.approx(float(total.detach()) / 8, abs=1e-5)


def test_micro_batches_do_not_change_the_step(pairs: Parts, make_trainer: Callable[..., Trainer]) -> None:
    # 8 pairs in steps of 3: the last step has 2, and a micro-batch of 3 holds a padding pair.
    found = []
    for micro_batch_size in (1, 3):
        module, data = pairs(global_batch_size=3, micro_batch_size=micro_batch_size)
        watch = Watch()
        trainer = make_trainer(callbacks=[watch], gradient_clip_val=None)
        trainer.fit(module, data)
        assert trainer.global_step == 3 == module.planned_optimizer_steps()
        assert {batch.num_pairs for batch in watch.batches} == {3, 2}
        found.append((module, watch.metrics[-1]))
    (one, metrics), (other, expected) = found
    for key in ("policy/loss", "pairs/margin", "pairs/demonstration_log_ratio", "policy/grad_norm"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key
    for name, value in one.actor.model.state_dict().items():
        torch.testing.assert_close(other.actor.model.state_dict()[name], value, rtol=1e-4, atol=2e-6)


def test_tokens_are_counted(pairs: Parts, make_trainer: Callable[..., Trainer]) -> None:
    module, data = pairs(passes_per_rollout=2)
    watch = Watch()
    make_trainer(max_epochs=2, callbacks=[watch]).fit(module, data)
    encoded = data.prompts["train"].encoded

    def of_samples(rollouts: Any) -> int:
        return sum(len(prompt(rollouts, row)) + len(response(rollouts, row)) for row in range(8))

    def of_demonstrations(indices: set[int]) -> int:
        return sum(len(encoded.prompt_ids(i)) + len(encoded.response_ids(i)) for i in indices)

    first, second = (experience.rollouts for experience in watch.experiences)
    one, other = (set(rollouts.prompt_index_B.tolist()) for rollouts in (first, second))
    samples = [of_samples(first), of_samples(second)]
    # Each pair twice; the first iteration's once more in the second.
    pairs_of = [samples[0] + of_demonstrations(one), samples[1] + of_demonstrations(other)]
    assert module.token_counts == {
        "rolled_out": sum(samples),
        # Under pi_k: demonstrations once for each prompt, samples, and the samples of the iteration before again.
        "scored": pairs_of[0] + samples[1] + samples[0] + of_demonstrations(one | other),
        "trained": 2 * pairs_of[0] + 2 * sum(pairs_of),
    }


def test_figures_of_the_samples(pairs: Parts, make_trainer: Callable[..., Trainer]) -> None:
    module, data = pairs()
    watch = Watch()
    make_trainer(max_epochs=2, callbacks=[watch]).fit(module, data)
    for experience in watch.experiences:
        stats, rollouts = experience.stats, experience.rollouts
        assert stats["response/length_mean"] == sum(len(response(rollouts, row)) for row in range(8)) / 8
        assert stats["rollout/num_responses"] == 8
        assert stats["rollout/sampler_gap"] < 1e-4
        assert stats["pairs/sample_logp"] == pytest.approx(float(experience.sample_logp_P[:8].mean()))
        assert stats["pairs/demonstration_logp"] == pytest.approx(float(experience.demonstration_logp_P[:8].mean()))
        lengths = data.prompts["train"].encoded.response_lengths[rollouts.prompt_index_B.numpy()]
        assert stats["pairs/demonstration_length"] == pytest.approx(float(lengths.mean()))
        assert stats["pairs/identical_share"] == 0.0
    first, second = watch.experiences
    assert first.stats["policy/teacher_kl"] == 0.0
    # Against transformers' own forward of the teacher.
    teacher = load_model(module.found_teacher.teacher, module.backbone)
    of_teacher = [log_prob(teacher, prompt(second.rollouts, r), response(second.rollouts, r)) for r in range(8)]
    expected = float(second.sample_logp_P[:8].mean()) - sum(of_teacher) / 8
    assert second.stats["policy/teacher_kl"] == pytest.approx(expected, abs=1e-4)


def test_samples_that_are_the_demonstration_are_counted(
    pairs: Parts, make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = pairs(prompts_per_rollout=None, keep_previous=False)
    sample = module.sample

    def half_of_them_imitated(prompts: list[list[int]], config: SamplingConfig, **kwargs: Any) -> Any:
        samples = sample(prompts, config, **kwargs)
        encoded = data.prompts["train"].encoded
        answers = {tuple(encoded.prompt_ids(i)): encoded.response_ids(i) for i in range(NUM_PROMPTS)}
        for row in range(0, NUM_PROMPTS, 2):
            samples.response_ids[row] = answers[tuple(prompts[row])]
            samples.logp[row] = [0.0] * len(samples.response_ids[row])
        return samples

    monkeypatch.setattr(module, "sample", half_of_them_imitated)
    make_trainer(max_epochs=1).fit(module, data)
    assert data.experience is not None
    assert data.experience.stats["pairs/identical_share"] == 0.5
    assert data.experience.stats["rollout/num_responses"] == NUM_PROMPTS


def test_learning_rate_and_optimizer_begin_anew_in_each_iteration(
    pairs: Parts, make_trainer: Callable[..., Trainer]
) -> None:
    model = {
        "optimizer": partial(torch.optim.RMSprop, lr=0.01),
        "iteration_rates": [1.0, 0.2],
        "warmup_ratio": 0.5,
        "min_lr_ratio": 0.0,
    }
    module, data = pairs(model=model, micro_batch_size=4, passes_per_rollout=2)
    watch = Watch()
    make_trainer(max_epochs=2, callbacks=[watch]).fit(module, data)
    # 4 steps, then 8: half of them rise from 0, the others fall towards 0 linearly.
    assert module.iteration_steps() == [4, 8]
    expected = [0, 0.5, 1, 0.5] + [0.2 * share for share in (0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25)]
    assert watch.rates == pytest.approx([0.01 * share for share in expected])
    num_weights = len(list(module.actor.parameters()))
    assert watch.num_states == [0] + [num_weights] * 3 + [0] + [num_weights] * 7


def test_max_steps_ends_the_last_iterations_fall(pairs: Parts, make_trainer: Callable[..., Trainer]) -> None:
    module, data = pairs(model={"min_lr_ratio": 0.5}, micro_batch_size=4)
    watch = Watch()
    trainer = make_trainer(max_epochs=-1, max_steps=4, callbacks=[watch])
    trainer.fit(module, data)
    assert module.iteration_steps() == [2, 2]
    assert (trainer.global_step, module.planned_optimizer_steps()) == (4, 4)
    assert watch.rates == pytest.approx([0.05, 0.0375, 0.05, 0.0375])
    module, data = pairs()
    with pytest.raises(UserError, match=r"trainer\.max_epochs and trainer\.max_steps: both are unbounded"):
        make_trainer(max_epochs=-1).fit(module, data)


def test_beta_follows_the_iteration(pairs: Parts, make_trainer: Callable[..., Trainer]) -> None:
    seen = []

    class Spy(SPINLoss):
        def of_pairs(self, demonstration_P: Tensor, sample_P: Tensor, *, iteration: int) -> Tensor:
            seen.append(iteration)
            return super().of_pairs(demonstration_P, sample_P, iteration=iteration)

    module, data = pairs(model={"loss": Spy([0.1, 5.0])}, micro_batch_size=4)
    make_trainer(max_epochs=2).fit(module, data)
    assert seen == [0] * 2 + [1] * 4


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            {"iteration_rates": [1.0, 0.2, 0.2]},
            {},
            r"model\.iteration_rates: found 3 values, but trainer\.max_epochs plans 2 iterations",
        ),
        ({"loss": SPINLoss([0.1])}, {}, r"model\.loss\.beta: found 1 values, but trainer\.max_epochs plans 2"),
        ({}, {"prompts_per_rollout": 25}, r"data\.prompts_per_rollout: found 25, but there are 24 training prompts"),
        ({}, {"prompts_per_rollout": 0}, r"data\.prompts_per_rollout: found 0; give a whole number of at least 1"),
        ({}, {"passes_per_rollout": 0}, r"data\.passes_per_rollout: found 0"),
        ({}, {"micro_batch_size": 3}, r"data\.global_batch_size: 4 is no multiple of data\.micro_batch_size 3"),
    ],
)
def test_refusals_before_any_weights(
    model: dict[str, Any],
    data: dict[str, Any],
    message: str,
    pairs: Parts,
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, module_data = pairs(model=model, **data)
    monkeypatch.setattr(module, "configure_model", lambda: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        make_trainer(max_epochs=2).fit(module, module_data)


def test_iteration_rates_are_positive(frozen_dirs: tuple[str, str]) -> None:
    for rates in ([], [1.0, 0.0]):
        with pytest.raises(UserError, match=r"model\.iteration_rates: found .*; give numbers above 0"):
            PairModule(frozen_dirs[0], iteration_rates=rates, backbone=BackboneConfig(name_or_path="unused"))


def test_modules_and_data_that_do_not_fit_are_refused(
    frozen_dirs: tuple[str, str], demonstrations_file: str, pairs: Parts, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = pairs()
    demonstrations = DemonstrationConfig(source=demonstrations_file)
    with pytest.raises(UserError, match=r"data\.class_path: RolloutDataModule does not fit model\.class_path PairMod"):
        make_trainer().fit(module, RolloutDataModule(demonstrations))
    dpr = DPRModule(*frozen_dirs, backbone=BackboneConfig(name_or_path="unused"))
    with pytest.raises(UserError, match=r"data\.class_path: PairDataModule does not fit model\.class_path DPRModule"):
        make_trainer().fit(dpr, data)


def test_demonstrations_are_those_of_sft(
    frozen_dirs: tuple[str, str], tmp_path: Path, make_trainer: Callable[..., Trainer]
) -> None:
    """Dropped rows are counted, and a demonstration that was cut does not end by EOS."""
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {n}", "response": "ok " * (30 if n == 3 else 2)} for n in range(6)]
    rows += [{"prompt": "long " * 40, "response": "ok"}, {"prompt": "nothing", "response": " "}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    demonstrations = DemonstrationConfig(
        source=str(source), max_prompt_tokens=30, max_response_tokens=9, max_rejected_share=0.5
    )
    module = PairModule(frozen_dirs[0], backbone=BackboneConfig(name_or_path="unused"))
    data = PairDataModule(demonstrations=demonstrations, sampling=SamplingConfig(max_new_tokens=4), micro_batch_size=2)
    watch = Watch()
    make_trainer(callbacks=[watch]).fit(module, data)
    found = data.data_manifest()["splits"]["train"]
    assert (found["rows"], found["kept"], found["dropped"]) == (8, 6, 2)
    assert found["reasons"] == {"prompt too long": 1, "empty response": 1, "response cut, EOS not taught": 1}
    assert data.data_manifest()["prompts_per_rollout"] == 6
    responses = [response(batch, row) for batch in watch.batches for row in range(len(batch.input_ids_BT) // 2)]
    eos = module.tokenizer.eos_token_id
    assert len(responses) == 6
    assert sorted(ids[-1] == eos for ids in responses) == [False] + [True] * 5
    assert [len(ids) for ids in responses if ids[-1] != eos] == [9]


def test_held_out_answers_are_measured(
    pairs: Parts, make_trainer: Callable[..., Trainer], demonstrations_file: str
) -> None:
    def verifier(row: dict[str, Any], text: str) -> bool:
        return len(text) % 2 == 0

    module, data = pairs(
        model={"verifier": verifier, "decoding": SamplingConfig(max_new_tokens=5)}, prompts_per_rollout=4
    )
    data.demonstrations = DemonstrationConfig(source=demonstrations_file, validation_fraction=0.3)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert logged.keys() == {"val/teacher_kl", "val/length", "val/truncated_share", "val/accuracy"}
    assert 1.0 <= logged["val/length"] <= 5.0
    assert logged["val/teacher_kl"] != 0.0
    assert 0.0 <= logged["val/accuracy"] <= 1.0 - logged["val/truncated_share"]
