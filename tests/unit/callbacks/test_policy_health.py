from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dpr_lightning.callbacks.checkpoint import RunCheckpoint
from dpr_lightning.callbacks.policy_health import GUARDS, PolicyHealth
from dpr_lightning.errors import UserError


def fit(run_dir: Path, callback: PolicyHealth, epochs: list[dict[str, float]], parts: Any, **kwargs: Any) -> Any:
    toy, toy_rollouts, trainer_in, experience_of = parts
    module = toy()
    trainer = trainer_in(run_dir, callback, max_epochs=len(epochs), **kwargs)
    trainer.fit(module, datamodule=toy_rollouts([experience_of(["p"], ["ab"], [1.0], **stats) for stats in epochs]))
    return module


@pytest.fixture
def parts(toy: Any, toy_rollouts: Any, trainer_in: Any, experience_of: Any) -> Any:
    return toy, toy_rollouts, trainer_in, experience_of


@pytest.mark.parametrize(
    ("kind", "later", "message"),
    [
        ("len_corr", {"reward__len_corr": 0.7}, r"correlate by \+0.70.*pays for long"),
        ("len_corr", {"reward__len_corr": -0.6}, "pays for short"),
        # The first rollout's mean length is 10.
        ("length", {"response__length_mean": 15.5}, "1.55 times the first rollout's 10.0"),
        ("length", {"response__length_mean": 6.0}, "0.60 times"),
        ("eos", {"response__truncated_share": 0.2}, "only 80% of responses end by EOS; in the first rollout 100% did"),
        ("entropy", {"policy__entropy": 0.2}, "0.20 times the first rollout's 1: the policy stops exploring"),
        ("teacher_kl", {"policy__teacher_kl": 3.0}, "3 nats per response, above PolicyHealth.teacher_kl_budget = 2"),
        # The first rollout's mean is 1.0 and its standard deviation 0.5.
        ("reward", {"reward__sum_mean": 0.49}, r"get 0.49 nats of reward on average; .* 1, with a standard deviation"),
        ("reward", {"reward__sum_mean": float("nan")}, "get nan nats of reward"),
        ("spread", {"reward__sum_std": 0.049}, "spreads by 0.049 nats; in the first rollout it was 0.5"),
    ],
)
def test_warns_once_per_kind(kind: str, later: dict[str, float], message: str, tmp_path: Path, parts: Any) -> None:
    callback = PolicyHealth(teacher_kl_budget=2.0)
    with pytest.warns(UserWarning, match=message) as caught:
        fit(tmp_path, callback, [{}, {}, later, later], parts)
    ours = [str(warning.message) for warning in caught if str(warning.message).startswith("Optimizer step")]
    # Two optimizer steps an epoch: the third rollout comes after 4.
    assert len(ours) == 1
    assert ours[0].startswith("Optimizer step 4:")
    assert callback.warned == {kind}


def test_a_healthy_policy_raises_no_alarm(tmp_path: Path, parts: Any) -> None:
    callback = PolicyHealth(teacher_kl_budget=1.0, stop_on=list(GUARDS))
    steady = {"reward__len_corr": 0.4, "response__length_mean": 12.0, "policy__entropy": 0.8, "policy__teacher_kl": 0.5}
    module = fit(tmp_path, callback, [{}, steady, steady], parts)
    assert callback.warned == set()
    assert len(module.seen) == 6


@pytest.mark.parametrize("kl", [2.5, float("nan")])
def test_stops_before_any_update_on_the_rollout_that_is_too_far(kl: float, tmp_path: Path, parts: Any) -> None:
    callback = PolicyHealth(teacher_kl_budget=2.0, stop_on=["teacher_kl"])
    with pytest.warns(
        UserWarning,
        match=r"run stops at optimizer step 2: .*stop_on 'teacher_kl' \(teacher_kl_budget 2\) after 1 rollout: ",
    ):
        module = fit(tmp_path, callback, [{}, {"policy__teacher_kl": kl}, {}], parts)
    assert [step for step, _ in module.seen] == [0, 1]
    assert callback.stop_reason is not None
    assert "the KL to the teacher is" in callback.stop_reason


@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        ("len_corr", {"reward__len_corr": 0.7}),
        ("length", {"response__length_mean": 30.0}),
        ("eos", {"response__truncated_share": 0.5}),
        ("entropy", {"policy__entropy": 0.1}),
        ("teacher_kl", {"policy__teacher_kl": 9.0}),
        ("reward", {"reward__sum_mean": -3.0}),
        ("spread", {"reward__sum_std": 0.0}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_guard_stops_after_patience_and_only_when_asked(
    kind: str, trouble: dict[str, float], tmp_path: Path, parts: Any
) -> None:
    # In trouble, well, and in trouble twice: two in a row are reached at the fifth rollout.
    epochs = [{}, trouble, {}, trouble, trouble, {}]
    asked = PolicyHealth(teacher_kl_budget=2.0, stop_on=[kind], patience=2)
    assert len(fit(tmp_path / "asked", asked, epochs, parts).seen) == 2 * 4
    others = [guard for guard in GUARDS if guard != kind]
    not_asked = PolicyHealth(teacher_kl_budget=2.0, stop_on=others, patience=2)
    assert len(fit(tmp_path / "not_asked", not_asked, epochs, parts).seen) == 2 * 6
    assert not_asked.stop_reason is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_patience_counts_over_a_resume(tmp_path: Path, parts: Any) -> None:
    far = {"policy__teacher_kl": 9.0}
    before, after = (PolicyHealth(teacher_kl_budget=2.0, stop_on=["teacher_kl"], patience=2) for _ in range(2))
    fit(tmp_path, before, [{}, far], parts)
    after.load_state_dict(before.state_dict())
    assert fit(tmp_path, after, [far, {}], parts).seen == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stopped_run_goes_on_with_the_rollout_that_stopped_it(tmp_path: Path, parts: Any) -> None:
    toy, toy_rollouts, trainer_in, experience_of = parts
    far = {"policy__teacher_kl": 9.0}
    epochs = [{}, far, far, far, {}]

    def run(directory: str, callback: PolicyHealth, *, resume: bool = False) -> Any:
        module = toy()
        # At every third epoch's end: also at that of the epoch that is stopped before its first update.
        saving = ModelCheckpoint(tmp_path / directory, save_top_k=-1, every_n_epochs=3, save_on_train_epoch_end=True)
        last = RunCheckpoint(tmp_path / directory / "last", save_last=True, every_n_train_steps=100)
        trainer = trainer_in(tmp_path / directory, callback, saving, last, max_epochs=5, checkpoint_every=100)
        data = toy_rollouts([experience_of(["p"], ["ab"], [1.0], **stats) for stats in epochs])
        trainer.fit(module, datamodule=data, ckpt_path=tmp_path / directory / "last" / "last.ckpt" if resume else None)
        return module, trainer

    def health(patience: int, *kinds: str) -> PolicyHealth:
        return PolicyHealth(teacher_kl_budget=2.0, stop_on=list(kinds), patience=patience)

    whole, _ = run("whole", health(2))
    stopped = health(2, "teacher_kl")
    module, trainer = run("stopped", stopped)
    # The second rollout in a row is the third of all: two epochs of two steps.
    assert [step for step, _ in module.seen] == [0, 1, 2, 3]
    assert trainer.current_epoch == 2
    files = [tmp_path / "stopped" / "last" / "last.ckpt", *(tmp_path / "stopped").glob("epoch=2*.ckpt")]
    assert len(files) == 2
    for file in files:
        counts = torch.load(file, weights_only=False)["loops"]["fit_loop"]["epoch_progress"]
        assert set(counts["current"].values()) == set(counts["total"].values()) == {2}
    # Looked at once more with the same bound it stops at once: still two in a row, not three.
    again = health(2, "teacher_kl")
    module, _ = run("stopped", again, resume=True)
    assert module.seen == []
    assert again.in_a_row == {"teacher_kl": 2}
    # With more patience it trains on that rollout and stops at the next.
    patient = health(3, "teacher_kl")
    module, _ = run("stopped", patient, resume=True)
    assert [step for step, _ in module.seen] == [4, 5]
    assert patient.in_a_row == {"teacher_kl": 3}
    # And without a stop it ends where a run ends that was never stopped.
    free = health(3)
    module, trainer = run("stopped", free, resume=True)
    assert [step for step, _ in module.seen] == [6, 7, 8, 9]
    assert trainer.current_epoch == 5
    assert free.stop_reason is None
    assert torch.equal(module.weight, whole.weight)


def test_guards_are_logged(tmp_path: Path, parts: Any) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="2.00 times"):
        fit(tmp_path, PolicyHealth(), [{}, {"response__length_mean": 20.0}, {}], parts, logger=logger)
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    logged = {int(row["step"]): row for row in rows if row["guard/length"]}
    assert {step: row["guard/length"] for step, row in logged.items()} == {0: "0.0", 2: "1.0", 4: "0.0"}
    assert all(float(row[f"guard/{kind}"]) == 0.0 for row in logged.values() for kind in GUARDS if kind != "length")


def test_comparisons_are_logged_at_optimizer_steps(tmp_path: Path, parts: Any) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    later = {"response__length_mean": 12.0, "response__truncated_share": 0.25, "policy__entropy": 0.5}
    fit(tmp_path, PolicyHealth(max_eos_drop=1.0), [{}, later], parts, logger=logger)
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    keys = ("response/length_ratio", "response/eos_share", "policy/entropy_ratio")
    logged = {int(row["step"]): [float(row[key]) for key in keys] for row in rows if row[keys[0]]}
    assert logged == {0: [1.0, 1.0, 1.0], 2: [1.2, 0.75, 0.5]}


def test_a_resumed_run_compares_with_the_first_rollout_and_does_not_repeat_itself(tmp_path: Path, parts: Any) -> None:
    before = PolicyHealth()
    with pytest.warns(UserWarning, match="correlate"):
        fit(tmp_path, before, [{"reward__len_corr": 0.9}], parts)
    after = PolicyHealth()
    after.load_state_dict(before.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, after, [{"reward__len_corr": 0.9, "response__length_mean": 30.0}], parts)
    ours = [str(warning.message) for warning in caught if str(warning.message).startswith("Optimizer step")]
    assert len(ours) == 1
    assert "3.00 times the first rollout's 10.0" in ours[0]


def test_fine_tuning_without_rollouts_is_left_alone(tmp_path: Path, toy: Any, toy_data: Any, trainer_in: Any) -> None:
    trainer_in(tmp_path, PolicyHealth(teacher_kl_budget=0.0, stop_on=["teacher_kl"]), max_epochs=1).fit(
        toy(), datamodule=toy_data(2)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_len_corr", 1.5),
        ("max_length_ratio", 0.5),
        ("teacher_kl_budget", -1.0),
        ("min_entropy_ratio", float("nan")),
        ("max_reward_drop", -0.5),
        ("min_spread_ratio", 2.0),
        ("patience", 0),
    ],
)
def test_impossible_bounds_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"PolicyHealth.{name}: found {value}"):
        PolicyHealth(**{name: value})


@pytest.mark.parametrize("bound", ["min_epochs", "min_steps"])
def test_bounds_that_would_train_on_past_the_stop_are_refused(bound: str, tmp_path: Path, parts: Any) -> None:
    with pytest.raises(UserError, match=r"they keep a run going that PolicyHealth\.stop_on stops"):
        fit(tmp_path, PolicyHealth(stop_on=["length"]), [{}, {}], parts, **{bound: 2})
    # Warnings alone need no early end.
    assert len(fit(tmp_path, PolicyHealth(teacher_kl_budget=2.0), [{}, {}], parts, **{bound: 2}).seen) == 4


def test_unknown_guards_and_a_bound_that_is_not_set_are_refused() -> None:
    with pytest.raises(UserError, match="stop_on: found 'kl'; there are len_corr, length"):
        PolicyHealth(stop_on=["kl"])
    with pytest.raises(UserError, match="'teacher_kl' without a bound; set teacher_kl_budget"):
        PolicyHealth(stop_on=["teacher_kl"])
