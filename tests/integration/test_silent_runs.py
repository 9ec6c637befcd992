"""Runs that used to end without a word: what is evaluated, what trains nothing, and what trains on something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dpr_lightning.application import command_line
from dpr_lightning.errors import UserError
from dpr_lightning.main import main
from dpr_lightning.models.policies import find_frozen_pair

NUM_ROWS = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and DPR of all weights, and SFT with LoRA, on the embedded backbone."""
    root = tmp_path_factory.mktemp("runs")
    for name, start in (("train", 0), ("validation", 100)):
        rows = [{"prompt": f"draw {n}.", "response": f"{n * 7} it is"} for n in range(start, start + NUM_ROWS)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["fit", *sft(root, "sft")])
    main(["fit", *dpr(root, "dpr")])
    main(["fit", *sft(root, "lora", "-c", "configs/lora.yaml")])
    return root


def files(recipe: str) -> list[str]:
    names = ("base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")
    return [argument for name in names for argument in ("-c", f"configs/{name}.yaml")]


def sft(root: Path, run: str, *more: str) -> list[str]:
    return [
        *files("sft"),
        f"--run_dir={root / run}",
        f"--data.demonstrations.source={root / 'train.jsonl'}",
        f"--data.demonstrations.validation_source={root / 'validation.jsonl'}",
        f"--data.demonstrations.test_source={root / 'validation.jsonl'}",
        "--data.demonstrations.preset=prompt_response",
        "--data.demonstrations.subsample=null",
        "--data.global_batch_size=8",
        "--data.micro_batch_size=8",
        "--trainer.max_epochs=1",
        "--model.optimizer.lr=3e-3",
        "--model.decoding.max_new_tokens=6",
        *more,
    ]


def dpr(root: Path, run: str, *more: str, teacher: str = "sft") -> list[str]:
    return [
        *files("dpr"),
        f"--run_dir={root / run}",
        f"--model.teacher={root / teacher}",
        "--data.prompts_per_rollout=16",
        "--data.global_batch_size=8",
        "--data.micro_batch_size=8",
        "--data.sampling.max_new_tokens=6",
        "--trainer.max_epochs=2",
        "--model.optimizer.lr=1e-2",
        "--model.decoding.max_new_tokens=6",
        *more,
    ]


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as status:
        main(args)
    assert status.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def metric(args: list[str], name: str) -> float:
    return float(command_line(args).trainer.callback_metrics[name])


@pytest.mark.parametrize("how", ["flags", "recorded"])
@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_the_trained_policy_is_what_is_measured(
    subcommand: str, how: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    args = dpr(root, "dpr") if how == "flags" else ["-c", str(root / "dpr" / "config.yaml")]
    key = f"{'val' if subcommand == 'validate' else 'test'}/teacher_kl"
    trained = metric([subcommand, *args], key)
    assert f"Evaluating the trained model '{root / 'dpr' / 'final'}'" in caplog.text
    # The last checkpoint holds the same weights; the start is the teacher itself.
    assert trained == pytest.approx(metric([subcommand, *args, "--ckpt_path=last"], key), rel=1e-4)
    assert metric([subcommand, *args, "--ckpt_path=initial"], key) == pytest.approx(0.0, abs=1e-4)
    assert trained > 0.1


@pytest.mark.parametrize("run", ["sft", "lora"])
def test_sft_and_adapters_are_measured_as_trained(run: str, root: Path) -> None:
    more = ["-c", "configs/lora.yaml"] if run == "lora" else []
    args = ["validate", *sft(root, run, *more)]
    trained = metric(args, "val/loss")
    assert trained == pytest.approx(metric([*args, "--ckpt_path=last"], "val/loss"), rel=1e-4)
    assert trained < metric([*args, "--ckpt_path=initial"], "val/loss")


def test_predict_answers_with_the_trained_model(root: Path) -> None:
    greedy = "--model.decoding.temperature=0"
    texts = []
    for more in ([], ["--ckpt_path=last"]):
        main(["predict", *sft(root, "sft", greedy), *more])
        texts.append((root / "sft" / "predictions.jsonl").read_text())
    assert texts[0] == texts[1]


def test_nothing_trained_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = sft(root, "sft")
    for subcommand in ("validate", "test", "predict"):
        found = refusal([subcommand, *args, f"--run_dir={tmp_path / 'none'}"], capsys)
        assert "holds no trained model" in found
        assert "--ckpt_path initial" in found
    shutil.copytree(root / "sft", tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "final")
    found = refusal(["validate", *args, f"--run_dir={tmp_path / 'unfinished'}"], capsys)
    assert "holds an unfinished run" in found
    assert "--ckpt_path last takes its newest checkpoint" in found


def test_a_teacher_is_no_reference_of_its_own(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = root / "sft" / "final"
    link = tmp_path / "link"
    link.symlink_to(final)
    for reference in (final, link, final.parent / "final" / ".." / "final"):
        with pytest.raises(UserError, match="is the teacher itself, so the reward would be 0"):
            find_frozen_pair(str(root / "sft"), str(reference))
    with pytest.raises(UserError, match="are one directory"):
        find_frozen_pair(
            str(root / "sft"), [str(root / "sft/reference/alpha_0.5"), f"{root}/sft/./reference/alpha_0.5"]
        )
    # A copy, and a reference snapshot that holds the same weights.
    shutil.copytree(final, tmp_path / "copy")
    found = refusal(["fit", *dpr(root, "equal", f"--model.reference={tmp_path / 'copy'}")], capsys)
    assert "teacher and reference have equal weights" in found
    shutil.copytree(root / "sft" / "reference" / "alpha_0.5", tmp_path / "again")
    references = json.dumps([str(root / "sft/reference/alpha_0.5"), str(tmp_path / "again")])
    found = refusal(["fit", *dpr(root, "equal2", f"--model.reference={references}")], capsys)
    assert "reference_0 and reference_1 have equal weights" in found


def test_an_adapter_is_no_reference_of_its_own(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "lora" / "final", tmp_path / "copy")
    more = ("-c", "configs/lora.yaml", f"--model.reference={tmp_path / 'copy'}")
    found = refusal(["fit", *dpr(root, "equal", *more, teacher="lora")], capsys)
    assert "teacher and reference have equal weights" in found


def test_a_snapshot_of_the_untrained_model_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 4 steps; warm-up of one: step 1 has a learning rate of 0. Without warm-up step 1 is trained.
    callback = "dpr_lightning.callbacks.reference_snapshot.ReferenceSnapshot"
    overlay = tmp_path / "early.yaml"
    overlay.write_text(f"trainer: {{callbacks+: [{{class_path: {callback}, init_args: {{alphas: 0.25}}}}]}}\n")
    args = sft(root, "early", "-c", str(overlay))
    found = refusal(["fit", *args, "--model.warmup_ratio=0.25"], capsys)
    assert "0.25 of 4 planned optimizer steps is step 1, the untrained model" in found
    main(["fit", *args, f"--run_dir={tmp_path / 'warm'}", "--model.warmup_ratio=0"])
    assert (tmp_path / "warm" / "reference" / "alpha_0.25").is_dir()


def test_a_teacher_with_an_adapter_needs_its_settings(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for teacher in ("lora", "lora/final", "lora/reference/alpha_0.5"):
        more = f"--model.reference={root / 'sft' / 'final'}"
        found = refusal(["fit", *dpr(root, "whole", more, teacher=teacher)], capsys)
        assert "was trained with LoRA, but model.backbone.lora is not set" in found
        assert "configs/lora.yaml" in found


@pytest.mark.parametrize("bound", ["max_epochs", "max_steps"])
def test_a_run_of_no_step_is_refused(bound: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = refusal(["fit", *sft(root, "none"), f"--trainer.{bound}=0"], capsys)
    assert f"trainer.{bound}: must be >= 1, got 0" in found
    assert not (root / "none").exists()


def test_few_steps_are_warned_of(root: Path, tmp_path: Path) -> None:
    # 4 steps without warm-up, a cosine from 3e-3 to a tenth of it: 1, 0.868, 0.55, 0.232 of the rate.
    expected = 3e-3 * sum(0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * n / 4))) for n in range(4))
    with pytest.warns(UserWarning, match=r"only 4 optimizer steps are planned") as caught:
        main(["fit", *sft(root, "few"), f"--run_dir={tmp_path / 'few'}", "--model.warmup_ratio=0"])
    (text,) = {str(warning.message) for warning in caught if "optimizer steps are planned" in str(warning.message)}
    assert f"sum to {float(expected):.2g}" in text
    for setting in ("data.global_batch_size (now 8)", "trainer.max_epochs (now 1)", "model.optimizer.lr (now 0.003)"):
        assert setting in text


def test_a_chat_model_on_plain_text_is_warned_of(
    root: Path, tmp_path: Path, tiny_model_dir: Path, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    backbone = f"--model.backbone.name_or_path={tmp_path / 'chat'}"
    for number, (template, is_warned) in enumerate(
        (([], True), (["--data.template=TextTemplate"], False), (["--data.template=ChatTemplate"], False))
    ):
        recwarn.clear()
        main(["fit", *sft(root, "chat", backbone, *template), f"--run_dir={tmp_path / f'run{number}'}"])
        said = [str(warning.message) for warning in recwarn if "has a chat template" in str(warning.message)]
        assert len(said) == is_warned, template
        assert all("--data.template dpr_lightning.data.ChatTemplate" in text for text in said)


def test_sequences_beyond_the_models_positions_are_warned_of(
    root: Path, tmp_path: Path, tiny_model_dir: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    shutil.copytree(tiny_model_dir, tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    main(["fit", *sft(root, "short", f"--model.backbone.name_or_path={tmp_path / 'short'}")])
    said = [str(warning.message) for warning in recwarn if "positions" in str(warning.message)]
    assert any("32 of 32 training rows are longer than the model's 8 positions" in text for text in said)
    recwarn.clear()
    main(["fit", *dpr(root, "long", "--trainer.max_epochs=1", teacher="short")])
    said = [str(warning.message) for warning in recwarn if "positions" in str(warning.message)]
    assert any("lower data.sampling.max_new_tokens" in text for text in said)


@pytest.mark.parametrize(
    ("flags", "is_warned"),
    [
        ([], False),
        (["--data.sampling.temperature=0.7"], True),
        (["--data.sampling.top_p=0.9"], True),
        (["--data.sampling.top_k=5"], True),
        (["--data.sampling.temperature=0.7", "--model.importance_cap=2"], False),
    ],
)
def test_rollouts_of_another_distribution_are_warned_of(
    flags: list[str], is_warned: bool, root: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    main(["fit", *dpr(root, "tempered", *flags, "--trainer.max_epochs=1"), f"--run_dir={tmp_path / 'run'}"])
    said = [str(warning.message) for warning in recwarn if "do not sample from the policy" in str(warning.message)]
    assert len(said) == is_warned
