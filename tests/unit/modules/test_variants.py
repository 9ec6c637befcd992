"""Every variant of reward, returns, advantage and loss trains by its class path in YAML, as a user would write it."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpr_lightning.application import command_line
from dpr_lightning.functional import advantages, losses, returns, rewards

CORE = "dpr_lightning.functional"

VARIANTS: dict[str, dict[str, Any]] = {
    "dense_clipped": {
        "reward": {"class_path": f"{CORE}.rewards.DenseReward", "init_args": {"clip_low": -5.0, "clip_high": 0.0}}
    },
    "sentence": {
        "reward": {"class_path": f"{CORE}.rewards.SentenceReward", "init_args": {"clip_low": -10.0, "clip_high": 10.0}}
    },
    "no_baseline": {"reward": {"class_path": f"{CORE}.rewards.TeacherLogprobReward"}},
    "value": {"reward": {"class_path": f"{CORE}.rewards.DenseWithValueReward"}},
    "value_literal": {
        "reward": {"class_path": f"{CORE}.rewards.DenseWithValueReward", "init_args": {"relative": False}}
    },
    "discounted": {"returns": {"class_path": f"{CORE}.returns.DiscountedReturns", "init_args": {"gamma": 0.9}}},
    "expected": {"returns": {"class_path": f"{CORE}.returns.ExpectedReturns"}},
    "whitened_leave_one_out": {
        "advantage": {"class_path": f"{CORE}.advantages.WhitenedAdvantage", "init_args": {"leave_one_out": True}}
    },
    "raw_leave_one_out": {
        "advantage": {"class_path": f"{CORE}.advantages.RawAdvantage", "init_args": {"leave_one_out": True}}
    },
    "algorithm1": {
        "advantage": {"class_path": f"{CORE}.advantages.RawAdvantage"},
        "loss": {"class_path": f"{CORE}.losses.ReinforceLoss"},
        "kl_in_reward": 0.0,
    },
    "kl_k2": {
        "loss": {"class_path": f"{CORE}.losses.ClippedPolicyLoss", "init_args": {"kl_coefficient": 0.1}},
        "kl_in_reward": 0.0,
    },
    "kl_k3": {
        "loss": {
            "class_path": f"{CORE}.losses.ClippedPolicyLoss",
            "init_args": {"kl_coefficient": 0.1, "kl_estimator": "k3"},
        },
    },
}


def test_every_class_is_among_the_variants() -> None:
    named = {part["class_path"] for variant in VARIANTS.values() for part in variant.values() if isinstance(part, dict)}
    for module, base in (
        (rewards, rewards.Reward),
        (returns, returns.ReturnEstimator),
        (advantages, advantages.AdvantageEstimator),
        (losses, losses.PolicyLoss),
    ):
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, base) and not inspect.isabstract(cls):
                assert f"{cls.__module__}.{cls.__qualname__}" in named


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variant_trains(name: str, frozen_dirs: tuple[str, str], demonstrations_file: str, tmp_path: Path) -> None:
    teacher, reference = frozen_dirs
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 1,
        },
        "model": {
            "class_path": "dpr_lightning.modules.dpr.DPRModule",
            "init_args": {
                "teacher": teacher,
                "reference": reference,
                "backbone": {"name_or_path": "unused"},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
                "warmup_ratio": 0.0,
                **VARIANTS[name],
            },
        },
        "data": {
            "class_path": "dpr_lightning.data.rollout_datamodule.RolloutDataModule",
            "init_args": {
                "demonstrations": {"source": demonstrations_file},
                "sampling": {"max_new_tokens": 6},
                "prompts_per_rollout": 4,
                "samples_per_prompt": 2,
                "global_batch_size": 4,
                "micro_batch_size": 2,
            },
        },
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = command_line(["fit", "-c", str(tmp_path / "config.yaml")])
    assert cli.trainer.global_step == 2
    for part, value in VARIANTS[name].items():
        built = getattr(cli.model, part)
        if isinstance(value, dict):
            assert f"{type(built).__module__}.{type(built).__qualname__}" == value["class_path"]
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert math.isfinite(metrics["policy/loss"])
    assert metrics["policy/grad_norm"] > 0.0
    assert ("policy/kl_term" in metrics) == name.startswith("kl_")
    teacher_VD = cli.model.frozen["teacher"].model.lm_head.weight
    moved = float((cli.model.actor.model.lm_head.weight.detach() - teacher_VD).norm())
    assert moved > 0.0
