"""Metrics of responses in ``validate`` and while training: logged for every method, and checkpoints chosen by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpr_lightning.application import command_line
from dpr_lightning.main import main

FOLLOWED = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def files(recipe: str, *overlays: Path) -> list[str]:
    names = [f"configs/{name}.yaml" for name in ("base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")]
    return [argument for name in [*names, *map(str, overlays)] for argument in ("-c", name)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("metrics")
    rows = [{"prompt": f"draw {i}.", "response": f"it is {i % 3}", **FOLLOWED} for i in range(24)]
    for split, found in (("train", rows), ("validation", rows[:6])):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    overlay = {
        "model": {
            "init_args": {
                "metrics": [
                    {"class_path": "dpr_lightning.evaluation.ifeval.IFEval"},
                    {
                        "class_path": "dpr_lightning.evaluation.metrics.VerifierAccuracy",
                        "init_args": {"verifier": {"class_path": "dpr_lightning.evaluation.verifiers.FinalNumber"}},
                    },
                ],
                "decoding": {"max_new_tokens": 8, "temperature": 0.0},
            }
        },
        "trainer": {
            "check_val_every_n_epoch": 1,
            "callbacks+": [
                {
                    "class_path": "dpr_lightning.callbacks.checkpoint.RunCheckpoint",
                    "init_args": {"monitor": "val/accuracy", "mode": "max", "save_top_k": 1, "filename": "best"},
                }
            ],
        },
    }
    (root / "metrics.yaml").write_text(yaml.safe_dump(overlay))
    main(
        [
            "fit",
            *files("sft", root / "metrics.yaml"),
            f"--run_dir={root / 'sft'}",
            f"--data.demonstrations.source={root / 'train.jsonl'}",
            f"--data.demonstrations.validation_source={root / 'validation.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.subsample=null",
            "--data.global_batch_size=8",
            "--data.micro_batch_size=8",
            "--trainer.max_epochs=6",
            "--model.optimizer.lr=1e-3",
        ]
    )
    return root


def curves(run: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_sft_answers_its_held_out_prompts_and_keeps_the_best_checkpoint(root: Path) -> None:
    found = curves(root / "sft")
    accuracy = found["val/accuracy"]
    assert len(accuracy) == len(found["val/loss"]) == 6
    assert max(accuracy.values()) > min(accuracy.values())
    assert {f"val/ifeval/{name}" for name in ("prompt_strict", "instruction_loose")} <= set(found)
    best = torch.load(root / "sft" / "checkpoints" / "best.ckpt", weights_only=False)
    score = {key: value for key, value in best["callbacks"].items() if "val/accuracy" in key}
    (state,) = score.values()
    assert float(state["best_model_score"]) == pytest.approx(max(accuracy.values()))
    # The first epoch that reached it.
    step = next(step for step in sorted(accuracy) if accuracy[step] == max(accuracy.values()))
    assert best["global_step"] == step + 1


@pytest.mark.parametrize("recipe", ["dpr", "spin", "gsil", "ppo"])
def test_every_method_logs_the_same_metrics_and_validate_repeats_them(recipe: str, root: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"spin": ["--model.iteration_rates=null", "--model.loss.beta=0.1"]}
    pairs = ["--data.prompts_per_rollout=null", "--data.passes_per_rollout=1"]
    arguments = [
        *files(recipe, root / "metrics.yaml"),
        f"--model.teacher={root / 'sft'}",
        *(pairs if recipe in ("spin", "gsil") else ["--data.prompts_per_rollout=8"]),
        "--data.global_batch_size=8",
        "--data.micro_batch_size=8",
        "--data.sampling.max_new_tokens=8",
        "--trainer.max_epochs=1",
        *own.get(recipe, []),
    ]
    main(["fit", *arguments, f"--run_dir={tmp_path / 'run'}"])
    found = curves(tmp_path / "run")
    again = command_line(["validate", *arguments, f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"])
    for name in ("accuracy", "ifeval/prompt_strict", "ifeval/instruction_loose"):
        (value,) = found[f"val/{name}"].values()
        assert float(again.trainer.callback_metrics[f"val/{name}"]) == pytest.approx(value)


def test_two_metrics_of_one_name_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "fit",
                *files("dpr", root / "metrics.yaml"),
                f"--model.teacher={root / 'sft'}",
                "--model.verifier=dpr_lightning.evaluation.verifiers.FinalNumber",
                f"--run_dir={tmp_path / 'run'}",
            ]
        )
    assert "model.metrics: two of them log the same figure" in capsys.readouterr().err
