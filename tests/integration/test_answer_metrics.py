"""Metrics of answers in ``validate``, named in YAML, with every method; and checkpoints that are chosen by them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpr_lightning.application import command_line
from dpr_lightning.demo.data import EmbeddedTasks
from dpr_lightning.demo.verifier import TaskVerifier
from dpr_lightning.evaluation import FinalNumber, IFEval, VerifierAccuracy, grade_rows
from dpr_lightning.evaluation.metrics import ResponseMetric
from dpr_lightning.main import main
from dpr_lightning.modules.dpr import DPRModule

pytestmark = pytest.mark.skipif(importlib.util.find_spec("if_verifiable") is None, reason="the extra ifeval is absent")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
IFEVAL_ROWS = [
    {
        "key": n,
        "prompt": f"{n} and {n * n}",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 2 + n % 4, "relation": "at least"}],
    }
    for n in range(12)
]
FIGURES = {f"val/ifeval/{level}" for level in ("prompt_strict", "prompt_loose")} | {
    f"val/ifeval/{level}" for level in ("instruction_strict", "instruction_loose")
}


def overlay(tmp_path: Path, settings: dict[str, Any], name: str = "metrics.yaml") -> str:
    path = tmp_path / name
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def metrics_of(tmp_path: Path, **evaluation: Any) -> dict[str, Any]:
    rows = tmp_path / "ifeval.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in IFEVAL_ROWS))
    return {
        "model": {"init_args": {"metrics": [{"class_path": "dpr_lightning.evaluation.IFEval"}]}},
        "data": {"init_args": {"evaluation_prompts": {"source": str(rows), **evaluation}}},
    }


def arguments(method: str, run_dir: Path, demonstrations: str, frozen_dirs: tuple[str, str]) -> list[str]:
    teacher, reference = frozen_dirs
    own = {
        "sft": ["--data.demonstrations.preset=prompt_response"],
        "dpr": [f"--model.teacher={teacher}", f"--model.reference={reference}"],
        "ppo": [f"--model.teacher={teacher}", f"--model.reference={reference}"],
        "spin": [f"--model.teacher={teacher}", "--model.iteration_rates=[1, 1]", "--model.loss.beta=[0.1, 0.5]"],
        "gsil": [f"--model.teacher={teacher}"],
    }
    if method in ("dpr", "ppo", "spin", "gsil"):
        own[method] += ["--data.prompts_per_rollout=8", "--data.sampling.max_new_tokens=6"]
    files = ("base", f"recipe/{method}", "backbone/tiny", "hardware/cpu")
    return [
        *(argument for name in files for argument in ("-c", f"configs/{name}.yaml")),
        f"--run_dir={run_dir}",
        f"--data.demonstrations.source={demonstrations}",
        "--data.demonstrations.validation_fraction=0.3",
        "--data.demonstrations.subsample=null",
        "--data.global_batch_size=4",
        "--data.micro_batch_size=4",
        "--model.decoding.max_new_tokens=8",
        "--trainer.max_epochs=2",
        *own[method],
    ]


def curves_of(run_dir: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("method", ["sft", "dpr", "ppo", "spin", "gsil"])
def test_every_method_logs_them_beside_its_own_figures(
    method: str, tmp_path: Path, demonstrations_file: str, frozen_dirs: tuple[str, str]
) -> None:
    run_dir = tmp_path / "run"
    main(
        [
            "fit",
            *arguments(method, run_dir, demonstrations_file, frozen_dirs),
            "-c",
            overlay(tmp_path, metrics_of(tmp_path)),
            "--trainer.check_val_every_n_epoch=1",
        ]
    )
    curves = curves_of(run_dir)
    own = "val/loss" if method == "sft" else "val/teacher_kl"
    num_validations = len(curves[own])
    assert num_validations >= 2
    for name in FIGURES:
        assert len(curves[name]) == num_validations
        assert all(0 <= value <= 1 for value in curves[name])
    # No comma is never said, so that half of the instructions is followed.
    assert min(curves["val/ifeval/instruction_loose"]) >= 0.4


def test_the_figures_are_those_of_the_answers(
    tmp_path: Path, demonstrations_file: str, frozen_dirs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, str]] = []
    update = ResponseMetric.update

    def watch(self: ResponseMetric, rows: Any, responses: Any, is_truncated: Any) -> None:
        seen.extend(zip(rows, responses, strict=True))
        update(self, rows, responses, is_truncated)

    answered: list[int] = []
    scores = DPRModule.evaluation_scores

    def count(self: DPRModule, rollouts: Any) -> Any:
        answered.append(len(rollouts.prompt_index_B))
        return scores(self, rollouts)

    monkeypatch.setattr(ResponseMetric, "update", watch)
    monkeypatch.setattr(DPRModule, "evaluation_scores", count)
    cli = command_line(
        [
            "validate",
            "--ckpt_path=initial",
            *arguments("dpr", tmp_path / "run", demonstrations_file, frozen_dirs),
            "--config",
            overlay(tmp_path, metrics_of(tmp_path)),
        ]
    )
    assert [row["key"] for row, _ in seen] == list(range(12))
    followed = [
        [("," not in text) and bool(text.strip()), bool(text.strip()) and words(text) >= 2 + row["key"] % 4]
        for row, text in seen
    ]
    logged = cli.trainer.callback_metrics
    assert float(logged["val/ifeval/prompt_strict"]) == pytest.approx(sum(map(all, followed)) / 12)
    assert float(logged["val/ifeval/instruction_strict"]) == pytest.approx(sum(map(sum, followed)) / 24)
    # The method's own figures are of the held-out prompts alone.
    assert answered == [len(cli.datamodule.prompts["validation"])]


def words(text: str) -> int:
    return len("".join(one if one.isalnum() or one == "_" else " " for one in text).split())


def test_without_prompts_of_their_own_the_held_out_ones_are_answered(
    tmp_path: Path, demonstrations_file: str, frozen_dirs: tuple[str, str]
) -> None:
    exact = {"class_path": "dpr_lightning.evaluation.ExactMatch"}
    metric = {"class_path": "dpr_lightning.evaluation.VerifierAccuracy", "init_args": {"verifier": exact}}
    settings = overlay(tmp_path, {"model": {"init_args": {"metrics": [metric]}}})
    for method in ("sft", "dpr"):
        cli = command_line(
            [
                "validate",
                "--ckpt_path=initial",
                *arguments(method, tmp_path / method, demonstrations_file, frozen_dirs),
                "--config",
                settings,
                "--data.num_validation_prompts=5",
            ]
        )
        assert "val/accuracy" in cli.trainer.callback_metrics
        dataset = cli.datamodule.val_dataloader()
        assert len(dataset) == (2 if method == "sft" else 1)


@pytest.mark.parametrize("method", ["sft", "dpr"])
@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_prompts_of_their_own_need_no_held_out_ones(
    method: str, subcommand: str, tmp_path: Path, demonstrations_file: str, frozen_dirs: tuple[str, str]
) -> None:
    cli = command_line(
        [
            subcommand,
            "--ckpt_path=initial",
            *arguments(method, tmp_path / "run", demonstrations_file, frozen_dirs),
            "--data.demonstrations.validation_fraction=0",
            "--config",
            overlay(tmp_path, metrics_of(tmp_path)),
        ]
    )
    stage = "val" if subcommand == "validate" else "test"
    figures = {stage + name.removeprefix("val") for name in FIGURES}
    assert set(cli.trainer.callback_metrics) == figures


def test_the_checkpoint_of_the_best_figure_is_kept(
    tmp_path: Path, demonstrations_file: str, frozen_dirs: tuple[str, str]
) -> None:
    exact = {"class_path": "dpr_lightning.evaluation.ExactMatch"}
    checkpoint = {
        "class_path": "dpr_lightning.callbacks.checkpoint.RunCheckpoint",
        "init_args": {"monitor": "val/exact", "mode": "max", "save_top_k": 1, "save_last": True},
    }
    metric = {"class_path": "dpr_lightning.evaluation.VerifierAccuracy", "init_args": {"verifier": exact}}
    metric["init_args"]["name"] = "exact"  # type: ignore[index]
    settings = overlay(
        tmp_path,
        {
            "model": {"init_args": {"metrics": [metric], "decoding": {"temperature": 0.0}}},
            "data": {"init_args": {"evaluation_prompts": {"source": demonstrations_file}}},
            "trainer": {"callbacks": [checkpoint]},
        },
    )
    # A rate that learns the demonstrations by heart and forgets them again.
    more = ["--trainer.max_epochs=10", "--model.optimizer.lr=1e-2", "--model.decoding.max_new_tokens=16"]
    run_dir = tmp_path / "run"
    sft = arguments("sft", run_dir, demonstrations_file, frozen_dirs)
    cli = command_line(["fit", *sft, "-c", settings, *more, "--trainer.accelerator=cpu"])
    curve = curves_of(run_dir)["val/exact"]
    best = curve.index(max(curve))
    assert best < len(curve) - 1
    kept = cli.trainer.checkpoint_callback
    assert float(kept.best_model_score) == pytest.approx(max(curve))
    saved = torch.load(kept.best_model_path, weights_only=False)
    assert saved["epoch"] == best
    assert saved["global_step"] == (best + 1) * (cli.trainer.global_step // len(curve))
    # The checkpoint gives the figure again.
    again = command_line(["validate", *sft, "-c", settings, *more, f"--ckpt_path={kept.best_model_path}"])
    assert float(again.trainer.callback_metrics["val/exact"]) == pytest.approx(max(curve))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metrics": ["IFEval", "IFEval"]}, "model.metrics: two figures are called 'ifeval/prompt_strict'"),
        ({"evaluation": {"validation_fraction": 0.5}}, "data.evaluation_prompts: all of its source is evaluated"),
        ({"evaluation": {"source": "none.jsonl"}}, "data.evaluation_prompts.source: no file none.jsonl"),
        ({"evaluation": {"preset": "gsm8k"}}, "data.evaluation_prompts.columns: no column 'question'"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path,
    demonstrations_file: str,
    frozen_dirs: tuple[str, str],
    settings: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = metrics_of(tmp_path, **settings.get("evaluation", {}))
    if "metrics" in settings:
        made["model"]["init_args"]["metrics"] *= 2
    with pytest.raises(SystemExit):
        main(
            [
                "validate",
                "--ckpt_path=initial",
                *arguments("dpr", tmp_path / "run", demonstrations_file, frozen_dirs),
                "-c",
                overlay(tmp_path, made),
            ]
        )
    assert words in capsys.readouterr().err


def test_validate_and_a_file_of_generate_agree_on_the_embedded_tasks(tmp_path: Path) -> None:
    EmbeddedTasks(num_demonstrations=8, num_validation=40, num_test=8)(tmp_path, 0)
    tasks = str(tmp_path / "validation.jsonl")
    verifier = {"class_path": "dpr_lightning.demo.verifier.TaskVerifier"}
    metric = {"class_path": "dpr_lightning.evaluation.VerifierAccuracy", "init_args": {"verifier": verifier}}
    settings = {
        "model": {"init_args": {"metrics": [metric], "decoding": {"temperature": 0.0, "max_new_tokens": 40}}},
        "data": {"init_args": {"evaluation_prompts": {"source": tasks}}},
    }
    files = ("base", "recipe/sft", "backbone/tiny", "hardware/cpu")
    cli = command_line(
        [
            "validate",
            "--ckpt_path=initial",
            *(argument for name in files for argument in ("-c", f"configs/{name}.yaml")),
            f"--run_dir={tmp_path / 'run'}",
            f"--data.demonstrations.source={tmp_path / 'train.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.subsample=null",
            "-c",
            overlay(tmp_path, settings),
        ]
    )
    validated = float(cli.trainer.callback_metrics["val/accuracy"])
    out = tmp_path / "answers.jsonl"
    names = ["--model", "dpr_lightning/demo/backbone", "--prompts", tasks, "--out", str(out)]
    main(["generate", *names, "--temperature", "0", "--max_new_tokens", "40", "--batch_size", "7"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = figures_of(rows, VerifierAccuracy(TaskVerifier()))["accuracy"]
    assert found.value == pytest.approx(validated)
    assert found.low < found.value < found.high
    # Greedily the embedded backbone solves most of them.
    assert found.value > 0.5


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the developers' shared data are not here")
@pytest.mark.parametrize(
    ("name", "metric", "num_figures"),
    [
        ("gsm8k/train.jsonl", lambda: VerifierAccuracy(FinalNumber("answer"), name="gsm8k"), 1),
        ("ifeval/input_data.jsonl", IFEval, 4),
    ],
)
def test_files_of_generate_are_scored(name: str, metric: Any, num_figures: int, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    names = ["--model", "dpr_lightning/demo/backbone", "--prompts", str(SHARED / name), "--out", str(out)]
    main(["generate", *names, "--limit", "20", "--max_new_tokens", "8"])
    found = figures_of([json.loads(line) for line in out.read_text().splitlines()], metric())
    assert len(found) == num_figures
    assert all(one.n == 20 for one in found.values())
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in found.values())


def figures_of(rows: list[dict[str, Any]], metric: ResponseMetric) -> Any:
    """Return the figures of a file that ``generate`` wrote."""
    columns = ("source", "response", "is_truncated", "row")
    return grade_rows(metric, *([row[column] for row in rows] for column in columns))
