"""An experiment: methods, grids over any configuration keys, and seeds in one YAML file, and the runs it stands for."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpr_lightning.analysis.figures import Figure
from dpr_lightning.arguments import Parser
from dpr_lightning.data.preparation import DataPreparation
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.yaml_text import load_yaml

TEACHER = "SFT"
"""Name of the teacher's runs in tables and results."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One method, or a grid of variants of it. Text values may hold ``{seed}``, ``{teacher}`` and prepared files."""

    configs: list[str] = field(default_factory=list)
    """Overlays of ``fit``, after the experiment's ``base``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Flags of ``fit`` by key, without dashes."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Flags that take several values: every combination is a variant. Several keys that always agree are written
    ``key1 key2``."""
    same_compute_as: str | None = None
    """Run whose token forwards bound this one: ``trainer.max_steps`` becomes the SFT steps that they buy."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """How every policy of the experiment is measured."""

    prompts: str
    """File of held-out prompts."""
    preset: str = "prompt_response"
    """Its layout, see ``data.demonstrations.preset``."""
    verifier: Verifier | None = None
    """Judges answers; None leaves accuracies and win rates out."""
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.7, 1.0])
    """Where answers are drawn; 0 takes the most likely token."""
    num_samples: int = 4
    """Answers to each prompt above temperature 0."""
    max_new_tokens: int = 1024
    """Longest answer."""
    batch_size: int = 64
    """Prompts decoded and scored together."""
    alpha: float = 0.5
    """Reference of the proxy reward that all policies are measured by."""
    seed: int = 0
    """Of the answers, the same for every policy."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What ``dpr-lightning sweep`` runs."""

    title: str
    """Heading of its table."""
    seeds: list[int]
    """Each variant is run once for each."""
    base: list[str]
    """Overlays of every run, such as configs/base.yaml, a backbone and hardware."""
    teacher: RunSpec
    """SFT; one run for each seed that all others start from."""
    runs: dict[str, RunSpec]
    """Methods by the name that tables show."""
    evaluation: EvaluationSpec
    """How policies are measured."""
    prepare: DataPreparation | None = None
    """Makes one seed's data; None where ``settings`` name files."""
    figures: list[Figure] = field(default_factory=list)
    """Plots of the results."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One ``fit`` and its measurement."""

    name: str
    """The method."""
    seed: int
    values: dict[str, Any]
    """The grid's keys and this variant's values."""
    configs: list[str]
    """Paths of overlays."""
    settings: dict[str, Any]
    """Flags, their variables not yet filled in."""
    directory: Path
    """The run's directory; its name holds a fingerprint of everything that shapes the run."""
    same_compute_as: Path | None = None
    """Directory of the run whose compute is matched."""

    @property
    def label(self) -> str:
        """Name and grid values, as tables show them."""
        values = ", ".join(f"{key.split()[0].rpartition('.')[2]} {_shown(value)}" for key, value in self.values.items())
        return f"{self.name} ({values})" if values else self.name


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment's YAML.

    Raises:
        UserError: The file is absent, or a key or value in it is wrong.
    """
    if not path.is_file():
        raise UserError(f"sweep: no file '{path}'; give an experiment such as configs/experiments/table1.yaml")
    parser = Parser(prog="dpr-lightning sweep", exit_on_error=False)
    parser.add_class_arguments(Experiment)
    raw = _read_yaml(path)
    flags = {name: _take_flags(name, spec) for name, spec in _run_specs(raw).items()}
    found = parser.instantiate(parser.parse_object(raw))
    experiment = Experiment(**{item.name: found[item.name] for item in dataclasses.fields(Experiment)})
    experiment = dataclasses.replace(
        experiment,
        teacher=_with_flags(experiment.teacher, flags["teacher"]),
        runs={name: _with_flags(run, flags[f"runs.{name}"]) for name, run in experiment.runs.items()},
    )
    if len(set(experiment.seeds)) != len(experiment.seeds) or not experiment.seeds:
        raise UserError(f"seeds: found {experiment.seeds}; give one or more different seeds")
    if TEACHER in experiment.runs:
        raise UserError(f"runs.{TEACHER}: this name is the teacher's; choose another")
    for name, run in experiment.runs.items():
        if run.same_compute_as is not None and experiment.runs.get(run.same_compute_as, run).same_compute_as:
            raise UserError(
                f"runs.{name}.same_compute_as: found '{run.same_compute_as}'; give the name of a run of this file that "
                "has a length of its own"
            )
        for key, values in run.grid.items():
            if not values:
                raise UserError(f"runs.{name}.grid.{key}: found no values; give a list")
    return experiment


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = load_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"sweep: '{path}' is no YAML: {error}; correct it") from error
    if not isinstance(raw, dict):
        raise UserError(f"sweep: '{path}' holds no mapping; give title, seeds, base, teacher, runs and evaluation")
    # Anchors make one object of several; each is changed on its own.
    copied: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    return copied


def _run_specs(raw: Mapping[str, Any]) -> dict[str, Any]:
    runs = raw.get("runs")
    named = {f"runs.{name}": spec for name, spec in runs.items()} if isinstance(runs, dict) else {}
    return {"teacher": raw.get("teacher"), **named}


def _with_flags(run: RunSpec, flags: dict[str, dict[str, Any]]) -> RunSpec:
    return dataclasses.replace(run, settings=flags["settings"], grid=flags["grid"])


def _take_flags(name: str, spec: Any) -> dict[str, dict[str, Any]]:
    """Take ``settings`` and ``grid`` out: their values are flags of ``fit``, whose classes are not made here."""
    flags: dict[str, dict[str, Any]] = {}
    for key in ("settings", "grid"):
        value = spec.pop(key, None) if isinstance(spec, dict) else None
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{name}.{key}: found {value!r}; give flags of fit by key")
        flags[key] = value or {}
    for key, values in flags["grid"].items():
        if not isinstance(values, list):
            raise UserError(f"{name}.grid.{key}: found {values!r}; give a list of values")
    return flags


def plan(experiment: Experiment, root: Path, *, seeds: Sequence[int] | None = None) -> dict[str, list[Task]]:
    """Return the tasks of each wave, in the order in which waves depend on each other.

    Args:
        experiment: What to run.
        root: Directory of all experiments' runs: two experiments that need the same run share it.
        seeds: Instead of the experiment's own.
    """
    base = [_config(path) for path in experiment.base]
    prepared = _fingerprint([_describe(experiment.prepare)])
    teacher_print = _fingerprint([prepared, *_contents(base, experiment.teacher, {})])
    waves: dict[str, list[Task]] = {"teacher": [], "runs": [], "matched": []}
    for seed in experiment.seeds if seeds is None else seeds:
        waves["teacher"].append(_task(TEACHER, experiment.teacher, {}, seed, base, root, teacher_print))
        tasks: dict[str, Task] = {}
        for is_matched in (False, True):
            for name, run in experiment.runs.items():
                if (run.same_compute_as is not None) != is_matched:
                    continue
                target = None if run.same_compute_as is None else tasks[run.same_compute_as].directory
                for values in _combinations(run.grid):
                    described = [teacher_print, *_contents(base, run, values)]
                    described += [] if target is None else [target.parent.name]
                    task = _task(name, run, values, seed, base, root, _fingerprint(described), target)
                    tasks.setdefault(name, task)
                    waves["matched" if is_matched else "runs"].append(task)
    return waves


def data_directory(experiment: Experiment, root: Path, seed: int) -> Path:
    """Return where ``seed``'s prepared data lies."""
    return root / "data" / _fingerprint([_describe(experiment.prepare)]) / f"seed_{seed}"


def command(task: Task, variables: Mapping[str, Any]) -> list[str]:
    """Return the arguments of ``dpr-lightning`` that this task stands for.

    Raises:
        UserError: A setting holds a variable that there is not.
    """
    configs = [argument for path in task.configs for argument in ("-c", path)]
    flags = {"run_dir": str(task.directory), "seed_everything": task.seed, "data.seed": task.seed, **task.settings}
    return ["fit", *configs, *(f"--{key}={_fill(key, value, variables)}" for key, value in flags.items())]


def _task(
    name: str,
    run: RunSpec,
    values: dict[str, Any],
    seed: int,
    base: list[str],
    root: Path,
    fingerprint: str,
    same_compute_as: Path | None = None,
) -> Task:
    # Not the name: two experiments may call the same run differently.
    recipe = next((Path(path).stem for path in run.configs if Path(path).parent.name == "recipe"), "run")
    return Task(
        name=name,
        seed=seed,
        values=values,
        configs=[*base, *(_config(path) for path in run.configs)],
        settings={**run.settings, **{key: value for keys, value in values.items() for key in keys.split()}},
        directory=root / "runs" / f"{recipe}-{fingerprint}" / f"seed_{seed}",
        same_compute_as=same_compute_as,
    )


def _combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _config(path: str) -> str:
    from dpr_lightning.main import packaged_configs

    (found,) = packaged_configs([path])
    if not Path(found).is_file():
        raise UserError(f"configs: no file '{path}'; give a path or one of the package's, such as configs/base.yaml")
    return found


def _contents(base: Sequence[str], run: RunSpec, values: Mapping[str, Any]) -> list[Any]:
    """Return what shapes a run, wherever its files lie and whatever comments they hold."""
    return [
        *(load_yaml(Path(_config(path)).read_text()) for path in [*base, *run.configs]),
        {**run.settings, **values},
    ]


def _describe(value: object) -> Any:
    return None if value is None else [type(value).__qualname__, vars(value)]


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_describe).encode()).hexdigest()[:10]


def _fill(key: str, value: Any, variables: Mapping[str, Any]) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        return value.format(**variables)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"settings.{key}: found '{value}', whose variable {error} is not known; known are "
            f"{', '.join(sorted(variables))}"
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = str(value["class_path"]).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)
