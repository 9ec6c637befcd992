"""Every configuration file that ships: found by listing the directory, read by the real parser."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

import dpr_lightning.application
from dpr_lightning.application import CommandLine, command_line
from dpr_lightning.errors import UserError
from dpr_lightning.functional.advantages import RawAdvantage, WhitenedAdvantage
from dpr_lightning.functional.losses import ClippedPolicyLoss, ReinforceLoss
from dpr_lightning.functional.pair_losses import BernoulliGSILLoss, SPINLoss
from dpr_lightning.functional.rewards import DenseReward, SentenceReward, TeacherLogprobReward

CONFIGS = Path(dpr_lightning.application.__file__).parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
AXES = {axis: sorted((CONFIGS / axis).rglob("*.yaml")) for axis in ("recipe", "backbone", "hardware")}
COMBINATIONS = list(itertools.product(*AXES.values()))
OVERLAYS = ("sr", "wo_baseline", "with_v", "algorithm1")
"""Recipes that are laid over dpr.yaml, as their first line says."""
DEMO = {"sft": ["sft"], "continued": ["sft", "continued"], "dpr": ["rollouts", "dpr"]}
ALLOWED = ("dpr_lightning.", "lightning.", "torch.", "transformers.")
LINK_TARGETS: set[str] = set()
"""Keys that main.py fills by link_arguments: there are none, as values that must agree are resolved in ``setup``."""


class ParseOnly(CommandLine):
    """Parses as the program does and builds nothing."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(dpr_lightning.application, "CommandLine", ParseOnly)

    def run(subcommand: str, files: list[Path], *more: str) -> Any:
        args = [argument for file in (CONFIGS / "base.yaml", *files) for argument in ("-c", str(file))]
        return command_line([subcommand, *args, *more]).config[subcommand]

    return run


def teacher(recipe: str) -> list[str]:
    return [] if recipe == "sft" else ["--model.teacher=somewhere"]


def layers(recipe: str) -> list[Path]:
    """Return a recipe's files, the later over the earlier."""
    return [CONFIGS / "recipe" / f"{part}.yaml" for part in (["dpr"] if recipe in OVERLAYS else []) + [recipe]]


def name(path: Path) -> str:
    return path.stem


def keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    own = [f"{prefix}{key}" for key in node]
    return own + [below for key, value in node.items() for below in keys(value, f"{prefix}{key}.")]


def class_paths(node: Any) -> list[str]:
    if isinstance(node, list):
        return [path for item in node for path in class_paths(item)]
    if not isinstance(node, dict):
        return []
    found = [node[key] for key in ("class_path", "model_class") if key in node]
    return found + [path for value in node.values() for path in class_paths(value)]


def test_listing_is_complete() -> None:
    assert {name(path) for path in AXES["recipe"]} == {"sft", "dpr", "spin", "gsil", "ppo", *OVERLAYS}
    assert {name(path) for path in AXES["hardware"]} == {"cpu", "cpu2", "gpu1", "gpu8", "nodes2_gpu8"}
    families = {"tiny", "llama3.1_8b", "qwen2.5_7b", "mistral_7b_v0.1", "gemma3_4b", "smollm2_135m"}
    assert {name(path) for path in AXES["backbone"]} == families
    on_axes = {path for paths in AXES.values() for path in paths}
    rest = {path.relative_to(CONFIGS).as_posix() for path in set(FILES) - on_axes}
    experiments = {path for path in rest if path.startswith("experiments/")}
    assert {path.partition("/")[2] for path in experiments} == {
        *(f"table{number}.yaml" for number in (1, 2, 3)),
        *(f"figure{number}.yaml" for number in (2, 3)),
        *(f"regime_{name}.yaml" for name in ("plenty", "scarce", "saturated")),
        "learning_rates.yaml",
    }
    benchmarks = {path for path in rest if path.startswith("evaluation/")}
    names = ("alpaca_eval", "arena_hard", "embedded", "gsm8k", "ifeval", "lima", "mt_bench")
    assert benchmarks == {f"evaluation/{name}.yaml" for name in names}
    assert rest - experiments - benchmarks == {
        "base.yaml",
        "lora.yaml",
        "qlora.yaml",
        "rollout/vllm.yaml",
        "demo/rollouts.yaml",
        *(f"demo/{overlay}.yaml" for overlay in DEMO),
    }


@pytest.mark.parametrize("files", COMBINATIONS, ids=lambda files: "-".join(map(name, files)))
def test_every_combination_parses_for_fit(parse: Any, files: tuple[Path, ...]) -> None:
    recipe, backbone, hardware = files
    config = parse("fit", [*layers(name(recipe)), backbone, hardware], *teacher(name(recipe)))
    given = yaml.safe_load(backbone.read_text())["model"]["init_args"]["backbone"]["name_or_path"]
    assert config.model.init_args.backbone.name_or_path == given
    # A list in an overlay would replace base.yaml's; each recipe adds to them.
    callbacks = [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks]
    assert {"RunCheckpoint", "HFExport", "Throughput", "Progress", "PredictionWriter"} <= set(callbacks)
    assert {"sft": "ReferenceSnapshot"}.get(name(recipe), "RolloutTable") in callbacks


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
@pytest.mark.parametrize("recipe", ["sft", "dpr", "spin", "gsil", "ppo"])
def test_other_subcommands_read_the_same_files(parse: Any, subcommand: str, recipe: str) -> None:
    files = [CONFIGS / f"{part}.yaml" for part in (f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")]
    config = parse(subcommand, files, *teacher(recipe))
    assert config.run_dir == f"runs/{recipe}"


@pytest.mark.parametrize("stage", sorted(DEMO))
def test_demo_overlays_parse_over_their_recipe(parse: Any, stage: str) -> None:
    recipe = "dpr" if stage == "dpr" else "sft"
    files = [CONFIGS / f"{part}.yaml" for part in (f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")]
    files += [CONFIGS / "demo" / f"{overlay}.yaml" for overlay in DEMO[stage]]
    config = parse("fit", files, *teacher(recipe))
    changed = yaml.safe_load(files[-1].read_text())["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert config.model.init_args.optimizer.init_args.lr == changed


@pytest.mark.parametrize("recipe", ["dpr", "spin", "gsil", "ppo"])
def test_rollouts_by_vllm_parse_over_every_recipe_that_samples(parse: Any, recipe: str) -> None:
    files = [CONFIGS / f"{part}.yaml" for part in (f"recipe/{recipe}", "backbone/tiny", "rollout/vllm", "hardware/cpu")]
    config = parse("fit", files, *teacher(recipe), "--model.sampler.lora=request")
    settings = config.model.init_args.sampler.init_args
    assert (settings.max_model_len, settings.lora) == (2048, "request")
    # It serves the recipe's longest sequences.
    data = config.data.init_args
    assert data.sampling.max_new_tokens + 1024 <= settings.max_model_len


def test_dpr_without_teacher_is_refused(parse: Any) -> None:
    files = [CONFIGS / f"{part}.yaml" for part in ("recipe/dpr", "backbone/tiny", "hardware/cpu")]
    with pytest.raises(UserError, match=r"^model\.teacher: it is required, and not given; set it"):
        parse("fit", files)


def test_sft_recipe_is_the_papers(parse: Any) -> None:
    # ALGORITHM.md section 1 (paper Table 3; the cosine's end is OpenRLHF's).
    files = [CONFIGS / f"{part}.yaml" for part in ("recipe/sft", "backbone/tiny", "hardware/cpu")]
    config = parse("fit", files)
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    assert config.model.class_path == "dpr_lightning.modules.sft.SFTModule"
    check_optimizer(model, lr=5e-6)
    assert data.global_batch_size == 256
    assert (data.demonstrations.max_prompt_tokens, data.demonstrations.max_response_tokens) == (1024, 1024)
    assert (data.demonstrations.source, data.demonstrations.preset) == ("Open-Orca/OpenOrca", "open_orca")
    assert data.demonstrations.subsample == 100_000
    assert (trainer.max_epochs, trainer.max_steps, trainer.gradient_clip_val) == (1, -1, 1.0)
    snapshot = next(callback for callback in trainer.callbacks if callback.class_path.endswith("ReferenceSnapshot"))
    assert snapshot.init_args.alphas == 0.5


def test_dpr_recipe_is_the_papers(parse: Any) -> None:
    # ALGORITHM.md section 3 (paper Table 4, Algorithm 1).
    files = [CONFIGS / f"{part}.yaml" for part in ("recipe/dpr", "backbone/tiny", "hardware/cpu")]
    config = parse("fit", files, "--model.teacher=somewhere")
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    assert config.model.class_path == "dpr_lightning.modules.dpr.DPRModule"
    check_optimizer(model, lr=5e-7)
    assert trainer.gradient_clip_val == 1.0
    assert (model.alpha, model.kl_in_reward, model.returns.init_args.gamma) == (0.5, 1e-5, 1.0)
    assert type(build(model.reward)) is DenseReward
    assert (type(build(model.advantage)), build(model.advantage).leave_one_out) == (WhitenedAdvantage, False)
    # "Value clip 0.2" is the policy's clip: rho in [0.8, 1.2]. KL is in the reward, so not in the loss.
    loss = build(model.loss)
    assert (type(loss), loss.clip_low, loss.clip_high, loss.kl_coefficient) == (ClippedPolicyLoss, 0.2, 0.2, 0.0)
    assert (data.prompts_per_rollout, data.samples_per_prompt, data.global_batch_size) == (1024, 1, 128)
    sampling = data.sampling
    sampling = sampling.get("init_args", sampling)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (1.0, 1.0, 0, 1024)
    # 97 x 1024 = 99,328: the last rollout batch that 100,000 prompts fill without a repeat.
    assert trainer.max_epochs * data.prompts_per_rollout <= 100_000 < (trainer.max_epochs + 1) * 1024


def test_spin_recipe_is_the_papers(parse: Any) -> None:
    # ALGORITHM.md section 5 (arXiv 2401.01335, appendix; uclaml/SPIN's scripts).
    files = [CONFIGS / f"{part}.yaml" for part in ("recipe/spin", "backbone/tiny", "hardware/cpu")]
    config = parse("fit", files, "--model.teacher=somewhere")
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    check_rmsprop(model)
    loss = build(model.loss)
    assert (type(loss), loss.beta) == (SPINLoss, [0.1, 0.1, 0.1, 5.0])
    rates = [model.optimizer.init_args.lr * share for share in model.iteration_rates]
    assert rates == pytest.approx([5e-7, 5e-7, 1e-7, 1e-7])
    assert trainer.max_epochs == 4
    assert (data.global_batch_size, data.passes_per_rollout, data.keep_previous) == (64, 2, True)
    assert (data.prompts_per_rollout, data.sampling.temperature) == (None, 1.0)
    assert model.warmup_ratio == 0.1


def test_gsil_recipe_is_the_papers(parse: Any) -> None:
    # ALGORITHM.md section 5 (arXiv 2410.10093; tengxiao1/GSIL's scripts).
    files = [CONFIGS / f"{part}.yaml" for part in ("recipe/gsil", "backbone/tiny", "hardware/cpu")]
    config = parse("fit", files, "--model.teacher=somewhere")
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    check_rmsprop(model)
    loss = build(model.loss)
    assert (type(loss), loss.scale, loss.shift) == (BernoulliGSILLoss, 0.01, 2.0)
    assert (trainer.max_epochs, model.iteration_rates) == (1, None)
    assert (data.global_batch_size, data.passes_per_rollout, data.keep_previous) == (128, 1, False)
    assert (data.prompts_per_rollout, data.sampling.temperature) == (None, 0.0)


def check_rmsprop(model: Any) -> None:
    assert model.optimizer.class_path == "torch.optim.RMSprop"
    settings = model.optimizer.init_args
    # Those of transformers' Trainer, which both repositories use.
    assert (settings.lr, settings.alpha, settings.eps, settings.momentum) == (5e-7, 0.99, 1e-8, 0.0)
    assert (settings.weight_decay, settings.centered, model.min_lr_ratio) == (0.0, False, 0.0)


def test_ppo_recipe_is_dprs_with_a_critic(parse: Any) -> None:
    # ALGORITHM.md section 5 (paper Table 1's PPO, values of Table 4).
    rest = [CONFIGS / f"{part}.yaml" for part in ("backbone/tiny", "hardware/cpu")]
    config, dpr = (parse("fit", [*layers(recipe), *rest], *teacher(recipe)) for recipe in ("ppo", "dpr"))
    model = config.model.init_args
    assert config.model.class_path == "dpr_lightning.modules.ppo.PPOModule"
    reward = build(model.reward)
    assert (type(reward), type(reward.token_reward), reward.is_clipped) == (SentenceReward, DenseReward, False)
    assert (model.gamma, model.gae_lambda, model.value_clip, model.critic_lr) == (1.0, 1.0, 0.2, 9e-6)
    check_optimizer(model, lr=5e-7)
    assert "returns" not in model
    # All else is DPR's.
    own = {"reward", "returns", "gamma", "gae_lambda", "value_clip", "critic_lr"}
    assert {key: value for key, value in vars(model).items() if key not in own} == {
        key: value for key, value in vars(dpr.model.init_args).items() if key not in own
    }
    assert config.data == dpr.data
    assert (config.trainer, config.run_dir) == (dpr.trainer, "runs/ppo")


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        ("sr", {"model.init_args.reward"}),
        ("wo_baseline", {"model.init_args.reward"}),
        ("with_v", {"model.init_args.reward"}),
        (
            "algorithm1",
            {
                "model.init_args.advantage",
                "model.init_args.loss",
                "model.init_args.kl_in_reward",
                "model.init_args.old_logp",
                "data.init_args.prompts_per_rollout",
                "trainer.max_epochs",
            },
        ),
    ],
)
def test_overlays_change_what_they_name(parse: Any, recipe: str, changed: set[str]) -> None:
    rest = [CONFIGS / f"{part}.yaml" for part in ("backbone/tiny", "hardware/cpu")]
    config, dpr = (parse("fit", [*layers(part), *rest], *teacher(part)) for part in (recipe, "dpr"))
    assert layers(recipe)[-1].read_text().startswith("# Laid over dpr.yaml: ")
    assert config.run_dir == f"runs/{recipe}"
    found = set()
    for prefix in ("model.init_args", "data.init_args", "trainer"):
        for key, value in vars(config[prefix]).items():
            if value != dpr[prefix][key]:
                found.add(f"{prefix}.{key}")
    assert found == changed
    model = config.model.init_args
    if recipe == "with_v":
        assert build(model.reward).relative is True
    elif recipe == "algorithm1":
        assert (type(build(model.advantage)), type(build(model.loss))) == (RawAdvantage, ReinforceLoss)
        assert (build(model.advantage).leave_one_out, model.kl_in_reward) == (False, 0.0)
        # Nothing in the objective asks for pi_old.
        assert (model.old_logp, model.importance_cap) == ("sampler", None)
        # One optimizer step per rollout batch; as many steps in all, and as many responses, as in dpr.yaml.
        sizes = config.data.init_args
        assert sizes.prompts_per_rollout * sizes.samples_per_prompt == sizes.global_batch_size == 128
        assert config.trainer.max_epochs == dpr.trainer.max_epochs * 1024 // 128
    else:
        assert type(build(model.reward)) is {"sr": SentenceReward, "wo_baseline": TeacherLogprobReward}[recipe]


def build(node: Any) -> Any:
    module, _, attribute = node.class_path.rpartition(".")
    settings = node.get("init_args")
    return getattr(importlib.import_module(module), attribute)(**(vars(settings) if settings else {}))


def check_optimizer(model: Any, *, lr: float) -> None:
    assert model.optimizer.class_path == "torch.optim.AdamW"
    settings = model.optimizer.init_args
    assert (settings.lr, tuple(settings.betas), settings.weight_decay) == (lr, (0.9, 0.95), 0.0)
    assert settings.fused is True
    assert (model.warmup_ratio, model.min_lr_ratio) == (0.03, 0.1)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_class_paths_begin_with_a_package_that_is_installed(path: Path) -> None:
    for class_path in class_paths(yaml.safe_load(path.read_text())):
        assert class_path.startswith(ALLOWED), class_path
        module, _, attribute = class_path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), class_path


@pytest.mark.parametrize("path", AXES["backbone"], ids=name)
def test_backbones_set_only_their_own_keys(path: Path) -> None:
    allowed = ("model.init_args.backbone", "data.init_args.micro_batch_size")
    for key in keys(yaml.safe_load(path.read_text())):
        assert key.startswith(allowed) or any(whole.startswith(f"{key}.") for whole in allowed), key


@pytest.mark.parametrize("path", AXES["hardware"], ids=name)
def test_hardware_sets_only_the_trainers_placement(path: Path) -> None:
    trainer = {"trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.precision", "trainer.num_nodes"}
    assert set(keys(yaml.safe_load(path.read_text()))) <= trainer | {"trainer"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_sets_a_link_target(path: Path) -> None:
    assert not LINK_TARGETS & set(keys(yaml.safe_load(path.read_text())))


def test_link_targets_are_those_of_the_parser(parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = []
    monkeypatch.setattr(
        dpr_lightning.application.Parser, "link_arguments", lambda self, *args, **kwargs: targets.append(args)
    )
    parse("fit", [CONFIGS / f"{part}.yaml" for part in ("recipe/sft", "backbone/tiny", "hardware/cpu")])
    assert {target for _, target, *_ in targets} == LINK_TARGETS


def test_gemma_is_the_text_only_class() -> None:
    backbone = yaml.safe_load((CONFIGS / "backbone" / "gemma3_4b.yaml").read_text())["model"]["init_args"]["backbone"]
    assert backbone["model_class"] == "transformers.Gemma3ForCausalLM"
