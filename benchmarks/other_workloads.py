"""Log-probabilities, start-up and scaling: contenders, sizes and targets."""

from __future__ import annotations

import resource
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import floor, inputs
from benchmarks.driver import ROOT, Bench, Contender, Facts, Result, play, worker_environment
from benchmarks.kernels import ROWS
from benchmarks.logprobs import WIDTH
from benchmarks.report import Column, Target, fact, ratios, table

_SIZES = {"49k": 49_152, "128k": 128_256, "256k": 262_144}
"""Vocabularies of SmolLM2, Llama 3 and Gemma 3."""


def logprobs(bench: Bench) -> list[str]:
    """Return the section on log-probabilities."""
    num_tokens = 256 if bench.small else 2048
    pair = [Contender("ours", "ours"), Contender("naive", "naive")]
    fused = [Contender("torch linear_cross_entropy", "torch"), Contender("TRL", "trl", "trl")]
    lines = [
        "## Log-probabilities, forward and backward",
        "",
        f"{num_tokens} tokens of width {WIDTH}, float32. Memory is the most above what was resident before, less the",
        "gradients asked for. Naive is all logits, log_softmax, gather; torch's gives only the sum; TRL's is what its",
        "trainers call, and is not asked with a frozen weight. Liger's losses need Triton, which has no CPU. To save",
        "time there are two rounds at most, and at 128k only naive is a peer.",
    ]
    for name, vocabulary in _SIZES.items():
        for is_frozen in (False, True):
            settings = {
                "vocabulary": vocabulary,
                "is_frozen": is_frozen,
                "num_tokens": num_tokens,
                "seed": bench.seed,
                "warm_up": 0,
            }
            peers = [] if name == "128k" else fused[:1] if is_frozen else fused
            results = play(bench, "logprobs", pair + peers, settings, rounds=min(bench.rounds, 2))
            columns = [
                Column("wall s", fact("wall")),
                Column("CPU s", fact("cpu")),
                Column("memory MiB", fact("memory_mib"), ".0f"),
                Column("log-probability of a token", fact("value"), ".5f"),
            ]
            figures = [("wall s", fact("wall")), ("CPU s", fact("cpu"))]
            memory = [("memory", fact("memory_mib"))]
            lines += [
                "",
                f"### Vocabulary of {name}, weight {'frozen' if is_frozen else 'trained'}",
                "",
                *table(results, columns),
                *ratios(results, figures, [Target("naive", 1.0, at_most=True)]),
                *ratios(results, memory, [Target("naive", 1 / 16, at_most=True)] if name == "256k" else [], form=".4f"),
                *floor.section(bench, results["ours"], partial(_logprob_parts, settings)),
            ]
    return lines


def _logprob_parts(settings: dict[str, Any], facts: Facts) -> list[floor.Part]:
    # Logits, and each gradient that is asked for.
    num_products = 2 if settings["is_frozen"] else 3
    operations = 2.0 * num_products * settings["num_tokens"] * WIDTH * settings["vocabulary"]
    return [floor.Part("forward and backward", operations, 0.0, facts["wall"])]


def startup(bench: Bench) -> list[str]:
    """Return the section on start-up."""
    commands = {
        "ours": [bench.pythons["ours"].with_name("dpr-lightning"), "--help"],
        "TRL": [bench.pythons["trl"].with_name("trl"), "--help"],
    }
    helps = {name: Result() for name in commands}
    settings = {
        "model": str(inputs.embedded_model()),
        "rows": str(inputs.demonstrations(bench, 64, most=30)),
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "max_length": 256,
        "seed": bench.seed,
        "warm_up": 1,
    }
    fits = {"ours": Result(), "TRL": Result()}
    contenders = [Contender("ours", "ours"), Contender("TRL", "trl", "trl")]
    # The first round reads the files of both from the disk, and does not count.
    for number in range(bench.rounds + 1):
        for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
            _note(helps[name], _seconds(commands[name], bench), number)
        results = play(bench, "sft", contenders[:: 1 if number % 2 == 0 else -1], settings, rounds=0)
        for name, result in results.items():
            facts = None if result.failure else {"wall": result.start["uptime"], "cpu": result.start["cpu"]}
            _note(fits[name], facts or result.failure, number)
    columns = [Column("wall s", fact("wall"), ".2f"), Column("CPU s", fact("cpu"), ".2f")]
    figures = [("wall s", fact("wall")), ("CPU s", fact("cpu"))]
    own = [facts["wall"] for facts in helps["ours"].rounds]
    lines = ["## Start-up", "", "### `--help`", "", *table(helps, columns), *ratios(helps, figures)]
    if own:
        verdict = "reached" if statistics.median(own) < 2 else "**missed**"
        lines += ["", f"Below 2 s: {verdict} ({min(own):.2f} to {max(own):.2f})."]
    return [
        *lines,
        "",
        "### From the start of the process to the end of the first optimizer step",
        "",
        "SFT of the embedded model on 64 rows; the same files for both.",
        "",
        *table(fits, columns),
        *ratios(fits, figures),
    ]


def _note(result: Result, found: Facts | str | None, number: int) -> None:
    if isinstance(found, str):
        result.failure = found
    elif found is not None and number > 0:
        result.rounds.append(found)


def _seconds(command: list[Any], bench: Bench) -> Facts | str:
    if not Path(command[0]).exists():
        return f"{command[0]} is missing"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=worker_environment(bench.threads), capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        return f"exit status {done.returncode}: {done.stderr.strip()[-200:]}"
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


_SCALES: dict[str, dict[str, list[int]]] = {
    "tokens of a response": {"max_new_tokens": [32, 64, 128, 256]},
    "prompts of a rollout": {"prompts_per_step": [8, 32, 128]},
    "width of the model": {"width": [128, 256, 512, 768]},
}
_MIDDLE = {"max_new_tokens": 64, "prompts_per_step": 32, "width": 256}


def scaling(bench: Bench) -> list[str]:
    """Return the section on scaling."""
    prompts = str(inputs.prompts(bench, 512, most=30))
    shared = {"prompts": prompts, "samples_per_prompt": 1, "micro_batch_size": 8, "seed": bench.seed}
    columns = [
        Column("tokens", fact("tokens"), ".0f"),
        Column("response tokens", fact("response_tokens"), ".0f"),
        Column("wall s", fact("wall"), ".2f"),
        Column("CPU s", fact("cpu"), ".2f"),
        Column("sampling s", fact("rollout_seconds"), ".2f"),
        Column("scoring s", fact("score_seconds"), ".2f"),
        Column("the rest s", lambda facts: facts["wall"] - facts["rollout_seconds"] - facts["score_seconds"], ".2f"),
        Column("tokens/CPU s", lambda facts: facts["tokens"] / facts["cpu"], ".0f"),
        Column("peak GiB", fact("peak_gib"), ".2f"),
    ]
    lines = [
        "## Scaling of ours",
        "",
        "One iteration of `recipe/algorithm1.yaml` on random Llamas of 6 layers with the embedded vocabulary, whose",
        f"responses run to their limit. Where nothing else is said: {_MIDDLE}.",
    ]
    for what, axis in _SCALES.items():
        ((key, values),) = axis.items()
        results: dict[str, Result] = {}
        for value in values[:2] if bench.small else values:
            sizes = _MIDDLE | {key: value}
            teacher, reference = (str(inputs.random_llama(bench, sizes["width"], number)) for number in (0, 1))
            name = (
                f"{value} ({floor.Weights.of(Path(teacher)).total / 1e6:.1f}M weights)"
                if key == "width"
                else str(value)
            )
            settings = shared | sizes | {"teacher": teacher, "reference": reference}
            results |= play(bench, "iteration", [Contender(name, "ours")], settings)
        lines += ["", f"### By {what}", "", *table(results, columns)]
    return [*lines, *_processes(bench)]


def _processes(bench: Bench) -> list[str]:
    """Return one against two processes, by what ``fit`` logs of itself."""
    results = {name: Result() for name in ("1 process", "2 processes (cpu2: FSDP2, gloo)")}
    teacher, reference = (str(inputs.random_llama(bench, 256, number)) for number in (0, 1))
    overlay = bench.work_dir / "throughput.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n    - class_path: dpr_lightning.callbacks.throughput.Throughput\n"
        "  enable_checkpointing: false\n"
    )
    for name, hardware in zip(results, ("cpu", "cpu2"), strict=True):
        run_dir = bench.work_dir / "workers" / f"scaling-{hardware}-{time.time_ns()}"
        command = [str(bench.pythons["ours"]), str(ROOT / "cli.py"), "fit"]
        for file in ("base", "recipe/dpr", "recipe/algorithm1", f"hardware/{hardware}"):
            command += ["-c", f"configs/{file}.yaml"]
        command += ["-c", str(overlay)]
        command += [
            f"--model.backbone.name_or_path={teacher}",
            f"--model.teacher={teacher}",
            f"--model.reference={reference}",
            f"--data.demonstrations.source={inputs.prompts(bench, 512, most=30)}",
            "--data.demonstrations.preset=prompt_response",
            "--data.prompts_per_rollout=32",
            "--data.global_batch_size=32",
            "--data.micro_batch_size=8",
            "--data.sampling.max_new_tokens=64",
            "--trainer.limit_val_batches=0",
            f"--trainer.max_epochs={bench.rounds + 1}",
            f"--run_dir={run_dir}",
        ]
        done = subprocess.run(command, cwd=ROOT, env=worker_environment(1), capture_output=True, text=True)
        if done.returncode != 0:
            results[name].failure = f"exit status {done.returncode}: {done.stderr.strip()[-200:]}"
            continue
        results[name].rounds = _logged(run_dir)[1:]
    columns = [Column(f"{stage} s", fact(stage), ".2f") for stage in ("rollout", "score", "train", "wall")]
    return [
        "",
        "### By processes",
        "",
        "Width 256, 32 prompts, 64 tokens; one thread each, one optimizer step an iteration.",
        "",
        *table(results, columns),
        *ratios(results, [("speed", lambda facts: 1 / facts["wall"])], ours=list(results)[1]),
    ]


def _logged(run_dir: Path) -> list[Facts]:
    """Return the seconds that a run logged of each of its optimizer steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    stages = ("rollout", "score", "train")
    found = zip(*([event.value for event in events.Scalars(f"time/{stage}")] for stage in stages), strict=True)
    return [dict(zip(stages, values, strict=True)) | {"wall": sum(values)} for values in found]


def kernels(bench: Bench) -> list[str]:
    """Return the section on what was chosen between."""
    contender = Contender("products", "products", settings={"num_blocks": 2 if bench.small else 20, "warm_up": 0})
    result = play(bench, "kernels", [contender], {}, rounds=2)["products"]
    lines = [
        "## Choices",
        "",
        "CPU milliseconds of a product of some rows with a million weights, of layers that no cache holds: torch's",
        "own; packed once for oneDNN, as a rollout of ours has them; transposed once; packed, and layers with the same",
        "input together.",
        "",
    ]
    ways = ("plain", "packed", "transposed", "together")
    if result.failure is None:
        lines += [f"| rows | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
        best = {name: min(facts[name] for facts in result.rounds) for name in result.rounds[0]}
        for rows in ROWS:
            cells = [format(best[f"{way}_{rows}"], ".2f") for way in ways]
            lines.append(f"| {rows} | {' | '.join(cells)} |")
        lines += ["", f"Packing a million weights takes {best['packing']:.2f} ms, once in a rollout."]
    else:
        lines.append(f"Did not run: {result.failure}")
    num_weights = 10_000_000 if bench.small else 134_515_008
    contender = Contender("AdamW", "adamw", settings={"num_weights": num_weights, "warm_up": 0})
    result = play(bench, "kernels", [contender], {}, rounds=2)["AdamW"]
    columns = [Column(name, fact(name), ".2f") for name in ("for-loop", "foreach", "fused")]
    return [
        *lines,
        "",
        f"CPU seconds of a step of AdamW, {num_weights / 1e6:.0f}M weights; the recipes' is fused:",
        "",
        *table({"AdamW": result}, columns),
    ]
