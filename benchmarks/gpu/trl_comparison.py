"""SFT and a whole on-policy iteration: ours and TRL's trainers, in turn on the same device."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from benchmarks.driver import Bench, Contender, Result, play
from benchmarks.gpu.models import write_model
from benchmarks.gpu.worker import Context
from benchmarks.inputs import demonstrations, prompts


def run(context: Context) -> None:
    """Run both workloads."""
    if importlib.util.find_spec("trl") is None:
        context.skip("trl is not installed")
        return
    bench = Bench(
        pythons={"ours": Path(sys.executable), "trl": Path(sys.executable)},
        work_dir=context.scratch_dir / "trl",
        rounds=1 if context.rehearse else 2,
        threads=1,
        seed=context.seed,
        small=context.rehearse,
    )
    mean = 6 if context.rehearse else 96
    for seed, name in ((1, "teacher"), (2, "reference")):
        write_model(bench.work_dir / name, "1B", is_toy=context.rehearse, seed=seed, mean_response_tokens=mean)
    context.note(
        "Llama of 1B shape with random weights and an untied output layer, all of them trained; float32 weights under "
        "bf16 autocast, AdamW, clipped gradients, no activation checkpointing, rows in the same order. Lengths are "
        "mixed; token counts exclude padding. Each contender is a process of its own. They load together, then one "
        "works at a time, in rounds whose order alternates; in between each empties its CUDA cache, so a round begins "
        "by allocating its memory again."
    )
    _sft(context, bench)
    _iteration(context, bench)


def _shared(context: Context, bench: Bench) -> dict[str, Any]:
    return {
        "device": context.device,
        "is_bf16": True,
        "hardware": "gpu1" if context.is_cuda else "cpu",
        "model_class": "benchmarks.gpu.models.RandomLlama",
        "fit_arguments": [
            "--model.backbone.model_class=benchmarks.gpu.models.RandomLlama",
            f"--trainer.precision={context.precision}",
        ],
        "seed": bench.seed,
        "warm_up": 1,
    }


def _sft(context: Context, bench: Bench) -> None:
    num_rows, most = (32, 12) if context.rehearse else (1024, 300)
    settings = _shared(context, bench) | {
        "model": str(bench.work_dir / "teacher"),
        "rows": str(demonstrations(bench, num_rows, most=most)),
        "global_batch_size": 4 if context.rehearse else 64,
        "micro_batch_size": 2 if context.rehearse else 8,
        "max_length": 1024,
        "rounds_of": 1 if context.rehearse else 2,
    }
    contenders = [Contender("ours", "ours"), Contender("TRL SFTTrainer", "trl", "trl")]
    if context.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        contenders.append(Contender("TRL SFTTrainer, Liger", "trl", "trl", {"more": {"use_liger_kernel": True}}))
    _run_contenders(context, bench, "sft", "SFT", contenders, settings)


def _iteration(context: Context, bench: Bench) -> None:
    settings = _shared(context, bench) | {
        "teacher": str(bench.work_dir / "teacher"),
        "reference": str(bench.work_dir / "reference"),
        # TRL's user is free to score in 16 bits; our frozen policies have the type of the backbone.
        "frozen_dtype": "bfloat16",
        "prompts": str(prompts(bench, 64, most=24 if context.rehearse else 96)),
        "prompts_per_step": 2 if context.rehearse else 16,
        "samples_per_prompt": 2 if context.rehearse else 4,
        "micro_batch_size": 2 if context.rehearse else 8,
        "max_new_tokens": 8 if context.rehearse else 192,
        "rounds_of": 1,
    }
    contenders = [Contender("ours", "ours"), Contender("TRL RLOOTrainer", "rloo", "trl")]
    results = _run_contenders(context, bench, "iteration", "An iteration of Algorithm 1", contenders, settings)
    for facts in results["ours"].rounds[-1:]:
        rollout, score = (facts[f"{name}_seconds"] / facts["wall"] for name in ("rollout", "score"))
        context.note(
            f"Of our iteration sampling takes {rollout:.0%}, scoring {score:.0%} (teacher and reference alone "
            f"{facts['frozen_seconds'] / facts['wall']:.0%}), the rest is training."
        )


def _run_contenders(
    context: Context, bench: Bench, workload: str, title: str, contenders: list[Contender], settings: dict[str, Any]
) -> dict[str, Result]:
    results = play(bench, workload, contenders, settings, parallel_startup=context.is_cuda)
    ours = results["ours"]
    if ours.failure is not None:
        context.fail(f"{title}, ours", ours.failure)
    for name, result in results.items():
        row: dict[str, Any] = {"trainer": name}
        for number, facts in enumerate(result.rounds):
            row[f"tokens/s, round {number + 1}"] = facts["tokens"] / facts["wall"]
        if result.rounds:
            row["peak GiB"] = result.rounds[-1]["peak_gib"]
            if "responses" in result.rounds[-1]:
                row["tokens a response"] = result.rounds[-1]["response_tokens"] / result.rounds[-1]["responses"]
        if name != "ours" and result.rounds and ours.rounds:
            pairs = zip(ours.rounds, result.rounds, strict=False)
            ratios = [mine["tokens"] / mine["wall"] / (their["tokens"] / their["wall"]) for mine, their in pairs]
            row["ours / this"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
            context.headline(f"{title}: {min(ratios):.2f} to {max(ratios):.2f} times {name}")
        if result.failure is not None:
            row["failure"] = result.failure
        context.row(title, **row)
    return results
