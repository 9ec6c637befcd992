"""Benchmarks as YAML: which prompts, how they are answered, and who says how good the answers are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpr_lightning.arguments import Parser
from dpr_lightning.data.preparation import DataPreparation
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.metrics import ResponseMetric
from dpr_lightning.yaml_text import load_yaml


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One file of ``configs/evaluation``."""

    title: str
    """Heading of its table."""
    prompts: str
    """File of prompts, below ``--data_dir`` or anywhere; ``{name}`` is a file of ``prepare``."""
    judge: str | None = None
    """Preset of ``dpr-lightning judge``: the answers of the two models are compared, or graded each."""
    templates: str | None = None
    """The judge's templates, below ``--data_dir`` or anywhere; for official presets."""
    references: str | None = None
    """Right answers, likewise; for MT-Bench."""
    metric: ResponseMetric | None = None
    """Grades answers without a judge."""
    temperatures: list[float] = field(default_factory=lambda: [0.7])
    """Where both models are sampled; several make a figure."""
    category_temperatures: str | None = None
    """See ``dpr-lightning generate``; in place of the temperatures."""
    max_new_tokens: int = 1024
    """Longest answer."""
    num_samples: int = 1
    """Answers to each prompt above temperature 0; for metrics only."""
    prepare: DataPreparation | None = None
    """Makes the prompts where they are no file."""


def read_benchmark(path: Path, data_dir: Path | None) -> Benchmark:
    """Read and check a benchmark's YAML; its files are made absolute.

    Args:
        path: The file.
        data_dir: Where files of prompts are looked for first.

    Raises:
        UserError: The file is absent, a key or value in it is wrong, or its prompts are not there.
    """
    if not path.is_file():
        raise UserError(f"--benchmarks: no file '{path}'; give one such as configs/evaluation/ifeval.yaml")
    try:
        raw = load_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--benchmarks: '{path}' is no YAML: {error}; correct it") from error
    if not isinstance(raw, dict):
        raise UserError(f"--benchmarks: '{path}' holds no mapping; give title, prompts, and judge or metric")
    parser = Parser(prog="dpr-lightning evaluate", exit_on_error=False)
    parser.add_class_arguments(Benchmark)
    found: Any = parser.instantiate(parser.parse_object(raw))
    benchmark = Benchmark(**{item.name: found[item.name] for item in dataclasses.fields(Benchmark)})
    _check(benchmark, path)
    located: dict[str, Any] = {
        name: _locate(str(value), data_dir, f"{path}: {name}")
        for name in ("prompts", "templates", "references")
        if (value := getattr(benchmark, name)) is not None and not (name == "prompts" and benchmark.prepare)
    }
    return dataclasses.replace(benchmark, **located)


def _check(benchmark: Benchmark, path: Path) -> None:
    if (benchmark.judge is None) == (benchmark.metric is None):
        raise UserError(
            f"{path}: found {'both' if benchmark.judge else 'neither'} of judge and metric; give one of them"
        )
    if not benchmark.temperatures or len(set(benchmark.temperatures)) < len(benchmark.temperatures):
        raise UserError(f"{path}: temperatures: found {benchmark.temperatures}; give one or more different numbers")
    if benchmark.category_temperatures is not None and len(benchmark.temperatures) > 1:
        raise UserError(f"{path}: category_temperatures stand in place of several temperatures; leave one of them out")
    if benchmark.judge is not None and benchmark.num_samples != 1:
        raise UserError(f"{path}: num_samples: found {benchmark.num_samples}; a judge compares one answer each")


def _locate(name: str, data_dir: Path | None, key: str) -> str:
    candidates = [Path(name), *([] if data_dir is None else [data_dir / name])]
    for candidate in reversed(candidates):
        if candidate.is_file():
            return str(candidate.resolve())
    looked = " and ".join(f"'{candidate}'" for candidate in candidates)
    raise UserError(f"{key}: no file {looked}; set --data_dir to the directory that holds it, or change {key}")
