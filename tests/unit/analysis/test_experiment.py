from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import dpr_lightning.main
from dpr_lightning.analysis.experiment import command, plan, read_experiment
from dpr_lightning.errors import UserError

CONFIGS = Path(dpr_lightning.main.__file__).parent / "configs"
SHIPPED = sorted((CONFIGS / "experiments").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "title": "small",
    "seeds": [3, 1],
    "base": ["configs/base.yaml"],
    "prepare": {"class_path": "dpr_lightning.demo.data.EmbeddedTasks", "init_args": {"num_demonstrations": 8}},
    "teacher": {"configs": ["configs/recipe/sft.yaml"], "settings": {"data.demonstrations.source": "{train}"}},
    "runs": {
        "DPR": {
            "configs": ["configs/recipe/dpr.yaml"],
            "settings": {"model.teacher": "{teacher}", "model.reward": {"class_path": "a.B", "init_args": {"x": None}}},
            "grid": {"model.alpha": [0.25, 0.5], "data.prompts_per_rollout data.global_batch_size": [8, 16]},
        },
        "more": {"configs": ["configs/recipe/sft.yaml"], "same_compute_as": "DPR"},
    },
    "evaluation": {"prompts": "{test}", "verifier": "dpr_lightning.demo.verifier.TaskVerifier"},
}


def write(path: Path, changes: dict[str, Any] | None = None) -> Path:
    path.write_text(yaml.safe_dump({**SMALL, **(changes or {})}, sort_keys=False))
    return path


def test_grid_and_seeds_are_multiplied_in_waves(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml"))
    waves = plan(experiment, tmp_path)
    assert {wave: len(tasks) for wave, tasks in waves.items()} == {"teacher": 2, "runs": 8, "matched": 2}
    assert [task.seed for task in waves["teacher"]] == [3, 1]
    first = waves["runs"][0]
    assert first.label == "DPR (alpha 0.25, prompts_per_rollout 8)"
    assert first.settings["data.prompts_per_rollout"] == first.settings["data.global_batch_size"] == 8
    # The first variant of the run with the same seed is what compute is matched with.
    assert waves["matched"][0].same_compute_as == first.directory
    assert waves["matched"][1].same_compute_as == waves["runs"][4].directory
    assert len({task.directory for tasks in waves.values() for task in tasks}) == 12
    assert [len(tasks) for tasks in plan(experiment, tmp_path, seeds=[7]).values()] == [1, 4, 1]


def test_command_fills_variables_and_writes_values_as_json(tmp_path: Path) -> None:
    task = plan(read_experiment(write(tmp_path / "e.yaml")), tmp_path)["runs"][3]
    arguments = command(task, {"teacher": "T", "train": "data.jsonl"})
    assert arguments[:2] == ["fit", "-c"]
    assert [Path(arguments[index]).name for index in (2, 4)] == ["base.yaml", "dpr.yaml"]
    assert set(arguments[5:]) == {
        f"--run_dir={task.directory}",
        "--seed_everything=3",
        "--data.seed=3",
        "--model.teacher=T",
        '--model.reward={"class_path": "a.B", "init_args": {"x": null}}',
        "--model.alpha=0.5",
        "--data.prompts_per_rollout=16",
        "--data.global_batch_size=16",
    }
    with pytest.raises(UserError, match=r"settings\.model\.teacher: found '\{teacher\}', whose variable 'teacher'"):
        command(task, {"train": "data.jsonl"})


def names(path: Path, root: Path) -> list[str]:
    waves = plan(read_experiment(path), root, seeds=[1])
    return [task.directory.parent.name for tasks in waves.values() for task in tasks]


def test_a_run_is_shared_wherever_it_is_asked_for_and_repeated_when_anything_changes(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer:\n  max_epochs: 3\n")
    teacher = {"configs": ["configs/recipe/sft.yaml", str(overlay)]}
    before = names(write(tmp_path / "e.yaml", {"teacher": teacher}), tmp_path)
    # The name of a method, comments, and where a file lies are nothing to a run.
    moved = tmp_path / "moved.yaml"
    moved.write_text("# the same\ntrainer: {max_epochs: 3}\n")
    renamed = {"Dense": SMALL["runs"]["DPR"], "more": {**SMALL["runs"]["more"], "same_compute_as": "Dense"}}
    same = {"runs": renamed, "teacher": {"configs": ["configs/recipe/sft.yaml", str(moved)]}, "title": "other"}
    assert names(write(tmp_path / "f.yaml", same), tmp_path) == before
    # What shapes the teacher shapes all that stand on it.
    for changed in (
        {"teacher": {"configs": ["configs/recipe/sft.yaml"]}},
        {"teacher": {**teacher, "settings": {"trainer.max_epochs": 4}}},
        {"teacher": teacher, "prepare": {**SMALL["prepare"], "init_args": {"num_demonstrations": 9}}},
    ):
        assert not set(names(write(tmp_path / "g.yaml", changed), tmp_path)) & set(before)
    overlay.write_text("trainer:\n  max_epochs: 5\n")
    assert not set(names(tmp_path / "e.yaml", tmp_path)) & set(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, r"seeds: found \[1, 1\]"),
        ({"seeds": []}, "seeds: found"),
        ({"runs": {"SFT": {}}}, r"runs\.SFT: this name is the teacher's"),
        ({"runs": {"a": {"grid": {"model.alpha": []}}}}, r"runs\.a\.grid\.model\.alpha: found no values"),
        ({"runs": {"a": {"grid": {"model.alpha": 0.5}}}}, r"grid\.model\.alpha: found 0\.5; give a list"),
        ({"runs": {"a": {"settings": [1]}}}, r"runs\.a\.settings: found \[1\]"),
        ({"runs": {"a": {"same_compute_as": "b"}}}, r"runs\.a\.same_compute_as: found 'b'"),
        ({"runs": {"a": {"same_compute_as": "a"}}}, r"runs\.a\.same_compute_as: found 'a'"),
        ({"titel": "x"}, "titel"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_experiment(write(tmp_path / "e.yaml", changes))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read_experiment(tmp_path / "absent.yaml")
    for text, message in (("- a\n", "holds no mapping"), ("a: [", "is no YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_experiment(tmp_path / "bad.yaml")
    teacher = {"configs": ["configs/recipe/absent.yaml"]}
    with pytest.raises(UserError, match="no file 'configs/recipe/absent"):
        plan(read_experiment(write(tmp_path / "e.yaml", {"teacher": teacher})), tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_are_read_and_planned(path: Path, tmp_path: Path) -> None:
    experiment = read_experiment(path)
    waves = plan(experiment, tmp_path)
    variables = {"teacher": "T", "seed": "0", **{name: f"{name}.jsonl" for name in ("train", "validation", "test")}}
    tasks = [task for wave in waves.values() for task in wave]
    assert len(tasks) == len({task.directory for task in tasks})
    labels = {task.label for task in tasks}
    for figure in experiment.figures:
        assert set(figure.runs or []) <= labels | {task.name for task in tasks}, figure.name
    for task in tasks:
        assert all("{" not in argument or argument.endswith(("}", "]")) for argument in command(task, variables))
