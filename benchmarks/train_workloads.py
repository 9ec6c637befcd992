"""SFT, rollouts and iterations: contenders, sizes and targets."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks import floor, inputs
from benchmarks.driver import Bench, Contender, Result, play
from benchmarks.report import COST, SPEEDS, Column, Target, best, fact, rate, ratios, starts, table

_BY_LENGTH = {"more": {"train_sampling_strategy": "group_by_length"}}
_PADDING_FREE = {"more": {"padding_free": True, "max_length": None}}
_PACKING = {"more": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 23}}
"""As many packs of 256 tokens as 64 rows fill."""


def sft(bench: Bench) -> list[str]:
    """Return the section on SFT."""
    lines = [
        "## SFT, prompts and responses of mixed lengths",
        "",
        "`dpr-lightning fit` and TRL's SFTTrainer. Tokens are those of prompts and responses without padding; real",
        "share is what they are of the positions that go through the model. TRL with its defaults, and with its means",
        "against padding: `padding_free`, on the small model `packing` (both run on SDPA here, without flash",
        "attention), and sampling by length, which makes batches of like rows and so another distribution over steps",
        "than shuffling.",
    ]
    sizes: dict[str, dict[str, Any]] = {
        "SmolLM2-135M": {
            "model": str(inputs.smollm2(bench)),
            "rows": str(inputs.demonstrations(bench, 512, most=120)),
            "global_batch_size": 4 if bench.small else 16,
            "micro_batch_size": 2 if bench.small else 8,
            "max_length": 512,
        },
        "embedded": {
            "model": str(inputs.embedded_model()),
            "rows": str(inputs.demonstrations(bench, 2048, most=90)),
            "global_batch_size": 64,
            "micro_batch_size": 16,
            "max_length": 256,
            "rounds_of": 1 if bench.small else 8,
            "warm_up": 2,
        },
    }
    packing = {"SmolLM2-135M": [], "embedded": [Contender("TRL, packing", "trl", "trl", _PACKING)]}
    for model, settings in sizes.items():
        contenders = [
            Contender("ours", "ours"),
            Contender("TRL", "trl", "trl"),
            Contender("TRL, padding_free", "trl", "trl", _PADDING_FREE),
            *packing[model],
            Contender("TRL, by length", "trl", "trl", _BY_LENGTH),
        ]
        results = play(bench, "sft", contenders, {"seed": bench.seed} | settings)
        peers = [contender.name for contender in contenders[1:]]
        targets = [Target(peer, 1.5 if peer == "TRL" else 1.0) for peer in peers]
        lines += [
            "",
            f"### {model}, {settings['global_batch_size']} rows a step, {settings['micro_batch_size']} a forward",
            "",
            inputs.lengths(Path(settings["rows"]), Path(settings["model"])),
            "",
            *table(results, [*COST, Column("real share", rate("tokens", "trained_tokens"), ".2f")]),
            *ratios(results, SPEEDS, targets),
            *_sft_floor(bench, results["ours"], settings),
            *starts(results),
        ]
    return lines


def _sft_floor(bench: Bench, result: Result, settings: dict[str, Any]) -> list[str]:
    weights, num_steps = floor.Weights.of(Path(settings["model"])), settings.get("rounds_of", 1)
    return floor.section(
        bench, result, lambda facts: [floor.training(facts, weights, facts["wall"], num_steps=num_steps)]
    )


def rollout(bench: Bench) -> list[str]:
    """Return the section on rollouts."""
    num_prompts, size = (8, 4) if bench.small else (32, 16)
    settings: dict[str, Any] = {
        "model": str(inputs.tuned_pair(bench)[0]),
        "prompts": str(inputs.prompts(bench, num_prompts, most=96)),
        "batch_size": size,
        "max_new_tokens": 24 if bench.small else 96,
        "max_model_len": 512,
        "dtype": "float32",
        "seed": bench.seed,
        # Of sizes that hold every prompt; what it finds by itself on a CPU is made for a GPU's memory.
        "cache": {"num_blocks": 256, "page_size": 32, "max_batch_tokens": 512},
    }
    contenders = [
        Contender("ours", "ours"),
        Contender("generate", "generate"),
        Contender("generate_batch", "generate_batch"),
        Contender("vLLM", "vllm", "vllm"),
        Contender("ours, vLLM sampler", "ours_vllm", "vllm"),
    ]
    results = play(bench, "rollout", contenders, settings)
    lines = [
        "## Rollouts, prompts and responses of mixed lengths",
        "",
        f"SmolLM2-135M, {num_prompts} prompts, {size} at most at a time, at most {settings['max_new_tokens']} tokens,",
        f"ended by EOS with a chance of about 1/{inputs.MEAN_RESPONSE} a token (`benchmarks/inputs.py`). Tokens are",
        "those of responses. vLLM's CPU build, eager; through our sampler it takes the weights over each round.",
        inputs.lengths(Path(settings["prompts"]), Path(settings["model"])),
        "",
        *table(results, [*COST, Column("tokens a response", rate("tokens", "responses"))]),
    ]
    engines = [name for name in ("generate_batch", "vLLM") if results[name].rounds]
    leader = best(results, among=["generate", *engines])
    targets = [Target("generate", 2.0)] + ([Target(leader, 0.9)] if leader else [])
    lines += ratios(results, SPEEDS, targets)
    if results["ours, vLLM sampler"].rounds and leader is not None:
        only = {name: results[name] for name in ("ours, vLLM sampler", leader)}
        lines += ratios(only, SPEEDS, [Target(leader, 0.9)], ours="ours, vLLM sampler")
    weights = floor.Weights.of(Path(settings["model"]))
    lines += floor.section(
        bench,
        results["ours"],
        lambda facts: [floor.sampling(facts, weights, facts["wall"], num_drawn=facts["tokens"])],
    )
    return [*lines, *starts(results)]


_ITERATIONS: list[tuple[int, dict[str, Any]]] = [
    (5, {"samples_per_prompt": 2, "micro_batch_size": 4, "max_new_tokens": 64, "rounds_of": 2}),
    # What TRL's trainers do if nothing is said: eight samples of a prompt, eight rows a forward.
    (3, {"samples_per_prompt": 8, "micro_batch_size": 8, "max_new_tokens": 96, "rounds_of": 1}),
]
"""How many contenders play, to save time, and what they are told."""


def iteration(bench: Bench) -> list[str]:
    """Return the section on whole iterations."""
    teacher, reference = inputs.tuned_pair(bench)
    shared = {
        "teacher": str(teacher),
        "reference": str(reference),
        "prompts": str(inputs.prompts(bench, 256, most=48)),
        "seed": bench.seed,
    }
    sizes = _ITERATIONS
    if bench.small:
        sizes = [(5, {"samples_per_prompt": 2, "micro_batch_size": 2, "max_new_tokens": 16, "rounds_of": 1})]
    prompts_per_step = 2 if bench.small else 4
    cache = {"num_blocks": 256, "page_size": 32, "max_batch_tokens": 512}
    continuous = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": cache}
    contenders = [
        Contender("ours", "ours"),
        Contender("TRL RLOO", "rloo", "trl"),
        Contender("TRL GRPO", "grpo", "trl"),
        Contender("TRL RLOO, continuous batching", "rloo", "trl", {"more": continuous}),
        Contender("plain PyTorch", "plain"),
    ]
    lines = [
        "## A whole on-policy iteration",
        "",
        f"SmolLM2-135M, {prompts_per_step} prompts, samples of each, scored by two frozen models, one optimizer step.",
        "Tokens are prompts and responses trained on; the prompts of a round are the same for all.",
        inputs.lengths(Path(shared["prompts"]), teacher),
    ]
    for num_contenders, size in sizes:
        settings = shared | size | {"prompts_per_step": prompts_per_step}
        results = play(bench, "iteration", contenders[:num_contenders], settings)
        lines += [
            "",
            f"### {size['samples_per_prompt']} samples of a prompt, at most {size['max_new_tokens']} tokens, "
            f"{size['micro_batch_size']} rows a forward, {size['rounds_of']} iterations a round",
            "",
            *table(results, [*COST, Column("response tokens", fact("response_tokens"), ".0f")]),
            *ratios(results, SPEEDS, [Target(contender.name, 2.0) for contender in contenders[1:4]]),
            *shares(results["ours"]),
            *_iteration_floor(bench, results["ours"], settings),
            *starts(results),
        ]
    return lines


def _iteration_floor(bench: Bench, result: Result, settings: dict[str, Any]) -> list[str]:
    weights = floor.Weights.of(Path(settings["teacher"]))

    def parts(facts: dict[str, float]) -> list[floor.Part]:
        sampled, scored, drawn = facts["rollout_seconds"], facts["score_seconds"], facts["response_tokens"]
        return [
            floor.sampling(facts, weights, sampled, num_drawn=drawn),
            # By teacher and reference.
            floor.scoring(facts, weights, scored, num_scored=2 * drawn),
            floor.training(facts, weights, facts["wall"] - sampled - scored, num_steps=settings["rounds_of"]),
        ]

    return floor.section(bench, result, parts)


def shares(result: Result) -> list[str]:
    """Return how our iteration's time is divided, and whether the frozen policies take little enough."""
    if not result.rounds:
        return []

    def share(name: str) -> tuple[float, float, float]:
        values = [facts[name] / facts["wall"] for facts in result.rounds]
        return statistics.median(values), min(values), max(values)

    rollout_share, score_share, frozen = share("rollout_seconds"), share("score_seconds"), share("frozen_seconds")
    verdict = "reached" if frozen[0] <= 0.25 else "**missed**"
    return [
        "",
        f"Of our iteration's wall time sampling takes {rollout_share[0]:.0%}, scoring "
        f"{score_share[0]:.0%}; teacher and reference alone {frozen[0]:.0%} ({frozen[1]:.0%} to {frozen[2]:.0%}; at "
        f"most 25%: {verdict}).",
    ]
