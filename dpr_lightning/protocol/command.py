"""``dpr-lightning evaluate``: a run against the teacher that it started from, on benchmarks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dpr_lightning.errors import UserError
from dpr_lightning.generation.command import main as generate
from dpr_lightning.main import packaged_configs
from dpr_lightning.manifest import (
    atomic_write_json,
    atomic_write_text,
    environment,
    is_complete,
    now,
    read_json,
    read_manifest,
)
from dpr_lightning.models.policies import find_teacher
from dpr_lightning.protocol.benchmark import Benchmark, read_benchmark
from dpr_lightning.protocol.compare import compare_by_metric, compare_ratings, describe, read_rows
from dpr_lightning.protocol.report import draw_temperatures, print_result, to_markdown
from dpr_lightning.terminal import headline, make_console

_SIDES = ("policy", "teacher")
_GRADES_ALONE = "mt_bench"
"""Preset that grades each model's answers and compares no two."""


def main(args: Sequence[str] | None = None) -> None:
    """Compare a run with its teacher on benchmarks; answers and judgments that are there already are not made again."""
    parser = argparse.ArgumentParser(prog="dpr-lightning evaluate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("run", help="run of DPR or of another method")
    parser.add_argument("--benchmarks", nargs="+", required=True, help="such as configs/evaluation/ifeval.yaml")
    parser.add_argument("--data_dir", type=Path, help="where the benchmarks' files of prompts are")
    parser.add_argument("--teacher", help="compare with this model; the run's own start if left out")
    parser.add_argument("--revision", help="branch, tag or commit of --teacher on the hub")
    parser.add_argument("--out", type=Path, help="directory of everything; evaluation/ in the run's if left out")
    parser.add_argument("--temperatures", type=float, nargs="+", help="in place of the benchmarks' own")
    parser.add_argument("--limit", type=int, help="answer the first prompts of each benchmark only")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and of the intervals")
    group = parser.add_argument_group("models")
    group.add_argument("--batch_size", type=int, default=64, help="prompts decoded together")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the weights")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group = parser.add_argument_group("judge", "handed on to dpr-lightning judge, which explains them")
    for name in ("judge_model", "base_url", "api_key_env", "max_tokens", "token_limit_key", "concurrency", "timeout"):
        group.add_argument(f"--{name}")
    for name in ("max_retries", "price_in", "price_out", "max_cost", "max_failed"):
        group.add_argument(f"--{name}")
    group.add_argument("--dry_run", action="store_true", help="answer, and say what judging would cost")
    parsed = parser.parse_args(args)
    evaluate(parsed, make_console(160))


@dataclass(frozen=True, kw_only=True)
class Models:
    """Whose answers are compared."""

    policy: str
    """Run directory."""
    teacher: str
    """Directory or hub name."""
    template_of: str
    """Directory whose recorded template both are asked with."""


def find_models(run: str, teacher: str | None) -> Models:
    """Find a run's final weights and what it started from.

    Args:
        run: The run's directory.
        teacher: What to compare with instead.

    Raises:
        UserError: The run is unfinished, or its start is not where it was.
    """
    final = Path(run) / "final"
    if not is_complete(final):
        raise UserError(f"'{run}' has no finished 'final/' directory, so it is no finished run; give one that is")
    start = teacher or read_manifest(final).get("initial_weights")
    if not start:
        raise UserError(f"'{final}' does not say what it started from; give --teacher")
    try:
        find_teacher(start)
    except UserError as error:
        raise UserError(str(error).replace("model.teacher", "--teacher")) from error
    looks_local = Path(start).is_absolute() or len(Path(start).parts) > 2
    if looks_local and not Path(start).exists() and not start.startswith("dpr_lightning/"):
        raise UserError(f"'{run}' started from '{start}' (from {Path.cwd()}), where nothing is now; give --teacher")
    return Models(policy=run, teacher=start, template_of=str(final))


def evaluate(parsed: argparse.Namespace, console: Console) -> None:
    """Run every benchmark and write ``report.json``, ``report.md`` and a figure for each sweep over temperatures.

    Raises:
        UserError: An argument or a file does not fit, or a judge's score was refused; all that could be done is done
            before.
    """
    models = find_models(parsed.run, parsed.teacher)
    out: Path = parsed.out or Path(parsed.run) / "evaluation"
    paths = [Path(path) for path in packaged_configs(parsed.benchmarks)]
    # All are read first: a mistake in the last one is told before the first has run for an hour.
    benchmarks = {path.stem: read_benchmark(path, parsed.data_dir) for path in paths}
    for name, benchmark in benchmarks.items():
        if parsed.temperatures is not None and benchmark.category_temperatures is not None:
            raise UserError(f"--temperatures: {name} has a temperature for each category; leave one of the two out")
    results, refused = {}, []
    for name, benchmark in benchmarks.items():
        console.rule(headline(f"{benchmark.title}"))
        rows = []
        for temperature in parsed.temperatures or benchmark.temperatures:
            place = out / name / f"T{temperature:g}"
            files = _answer(parsed, models, benchmark, temperature, place)
            row: dict[str, Any] = {
                "temperature": temperature,
                "answers": {side: describe(read_rows(file)) for side, file in files.items()},
            }
            try:
                row |= _compare(parsed, benchmark, files, place, out)
            except UserError as error:
                if benchmark.judge is None or "--max_failed" not in str(error):
                    raise
                # Its report says what was lost; the other benchmarks go on.
                refused.append(f"{name} at temperature {temperature:g}: {error}")
                row["refused"] = str(error)
            rows.append(row)
        results[name] = {"title": benchmark.title, "rows": rows}
    if parsed.dry_run:
        return
    result = {
        "run": parsed.run,
        "teacher": models.teacher,
        "seed": parsed.seed,
        "limit": parsed.limit,
        "benchmarks": results,
        "created": now(),
        "environment": environment(),
    }
    atomic_write_json(out / "report.json", result)
    atomic_write_text(out / "report.md", to_markdown(result))
    print_result(result, console)
    for name, found in results.items():
        if len(found["rows"]) > 1:
            figure = draw_temperatures(found, out / name / "temperature.png")
            console.print(f"figure: {figure}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {out / 'report.md'}", highlight=False, markup=False, soft_wrap=True)
    if refused:
        raise UserError("; ".join(refused))


def _answer(
    parsed: argparse.Namespace, models: Models, benchmark: Benchmark, temperature: float, place: Path
) -> dict[str, Path]:
    """Let both models answer; return the files by side."""
    prompts = benchmark.prompts
    if benchmark.prepare is not None:
        directory = place.parent / "prompts"
        directory.mkdir(parents=True, exist_ok=True)
        # A function of the benchmark and the seed: made again, the files are the same.
        prompts = prompts.format(
            **{name: str(path) for name, path in benchmark.prepare(directory, parsed.seed).items()}
        )
    files = {side: place / f"{side}.jsonl" for side in _SIDES}
    place.mkdir(parents=True, exist_ok=True)
    for side, file in files.items():
        arguments = {
            "model": getattr(models, side),
            "prompts": prompts,
            "out": str(file),
            "name": side,
            "template_of": models.template_of,
            "temperature": temperature,
            "category_temperatures": benchmark.category_temperatures,
            "max_new_tokens": benchmark.max_new_tokens,
            "num_samples": benchmark.num_samples,
            # A run and its own start know theirs.
            "revision": parsed.revision if side == "teacher" and parsed.teacher is not None else None,
            **{name: getattr(parsed, name) for name in ("limit", "seed", "batch_size", "dtype", "device")},
        }
        generate(_flags(arguments))
    return files


def _compare(
    parsed: argparse.Namespace, benchmark: Benchmark, files: dict[str, Path], place: Path, out: Path
) -> dict[str, Any]:
    """Return what a judge or a metric says of the two files."""
    if benchmark.metric is not None:
        policy, teacher = (read_rows(files[side]) for side in _SIDES)
        return {"figures": compare_by_metric(benchmark.metric, policy, teacher, seed=parsed.seed)}
    judging = {
        "preset": benchmark.judge,
        "templates": benchmark.templates,
        "references": benchmark.references,
        # One file of paid replies for all: a prompt that two benchmarks share is paid for once.
        "cache": str(out / "judge_cache.sqlite"),
        **{name: getattr(parsed, name) for name in ("judge_model", "base_url", "api_key_env", "max_tokens")},
        **{name: getattr(parsed, name) for name in ("token_limit_key", "concurrency", "timeout", "max_retries")},
        **{name: getattr(parsed, name) for name in ("price_in", "price_out", "max_cost", "max_failed", "seed")},
    }
    more = ["--dry_run"] if parsed.dry_run else []
    if benchmark.judge == _GRADES_ALONE:
        for side, file in files.items():
            where = {"responses": str(file), "prompts": benchmark.prompts, "model": side, "out": str(place / side)}
            _judge(_flags(where | judging) + more)
        if parsed.dry_run:
            return {}
        ratings = [read_rows(place / side / "judgments.jsonl") for side in _SIDES]
        return {"ratings": compare_ratings(*ratings, seed=parsed.seed)}
    where = {"responses": str(files["policy"]), "baseline": str(files["teacher"]), "out": str(place / "judge")}
    _judge(_flags(where | judging) + more)
    return {} if parsed.dry_run else {"judge": read_json(place / "judge" / "report.json")["models"][0]}


def _judge(arguments: list[str]) -> None:
    # The extra that it needs is not everyone's.
    from dpr_lightning.judging.command import main as judge

    judge(arguments)


def _flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", _as_text(value))]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
