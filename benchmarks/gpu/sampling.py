"""Sampling with 16-bit weights: our default sampler, ``generate``, and transformers' continuous batching."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.generation import generate_batch_responses, generate_responses
from benchmarks.gpu.models import RandomLlama, write_model
from benchmarks.gpu.training import profiled_decode_step
from benchmarks.gpu.worker import Context, free_memory
from benchmarks.inputs import texts
from dpr_lightning.rollout import TransformersSampler
from dpr_lightning.types import SamplingConfig

Sample = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a seed to responses."""
_ROUNDS = 2
"""After one that warms up."""


def run(context: Context) -> None:
    """Sample the same prompts by each, in turn, at each number of rows."""
    shape = "1B"
    mean, limit = (6, 16) if context.rehearse else (64, 96)
    directory = write_model(
        context.scratch_dir / "sampled", shape, is_toy=context.rehearse, seed=context.seed, mean_response_tokens=mean
    )
    model = RandomLlama.from_pretrained(directory, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    context.note(
        f"Llama of {shape} shape in bfloat16 with random weights, prompts of 20 to 200 tokens, responses of at most "
        f"{limit} tokens, ended by EOS with a chance of 1/{mean} a token; a round has twice as many prompts as rows."
    )
    for num_rows in (4, 8) if context.rehearse else (64, 256):
        prompts = _prompts(tokenizer, 2 * num_rows, context.seed)
        with context.step(f"{num_rows} rows"):
            _compare(context, model, tokenizer.eos_token_id, prompts, num_rows, limit)


def _prompts(tokenizer: Any, num_prompts: int, seed: int) -> list[list[int]]:
    found = texts(num_prompts, seed, num_words=(24, 0.6, 8, 80))
    ids: list[list[int]] = tokenizer([f"{number}: {text}\n" for number, text in enumerate(found)])["input_ids"]
    return ids


def _compare(
    context: Context, model: Any, eos: int, prompts: list[list[int]], num_rows: int, max_new_tokens: int
) -> None:
    contenders: dict[str, Sample] = {
        "ours": lambda some, seed: (
            TransformersSampler()
            .sample(
                model,
                some,
                config=SamplingConfig(max_new_tokens=max_new_tokens, batch_size=num_rows),
                eos_token_id=eos,
                seed=seed,
            )
            .response_ids
        ),
        "generate": lambda prompts, seed: _generate(model, prompts, eos, max_new_tokens, num_rows, seed),
        "continuous batching": lambda prompts, seed: generate_batch_responses(
            model, prompts, eos, max_new_tokens, num_rows=num_rows, seed=seed, cache=_cache(context)
        ),
    }
    speeds: dict[str, list[float]] = {}
    for number in range(_ROUNDS + 1):
        for name in list(contenders):
            # Each sets its own attention; what another left would be refused, or slower.
            model.set_attn_implementation("sdpa")
            try:
                # The first round warms up.
                row = _measure(contenders[name], prompts if number else prompts[:num_rows], number)
            except Exception as error:
                if name == "ours":
                    raise
                # A peer that cannot do this is a result, and no fault of ours.
                row = {"not run": f"{type(error).__name__}: {error}"[:200]}
                del contenders[name]
            else:
                if number == 0:
                    continue
                speeds.setdefault(name, []).append(row["tokens/s"])
            context.row("Sampled tokens/s", rows=num_rows, sampler=name, round=number, **row)
    for name in speeds.keys() - {"ours"}:
        ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[name], strict=False)]
        context.note(f"{num_rows} rows: ours / {name} {min(ratios):.2f} to {max(ratios):.2f}.")
        if name == "generate":
            speed = max(speeds["ours"])
            context.headline(f"{num_rows} rows {speed:,.0f} tok/s, {min(ratios):.2f} to {max(ratios):.2f} of generate")
    profiles: list[tuple[dict[str, Any], str]] = []
    with profiled_decode_step(profiles):
        contenders["ours"](prompts[:num_rows], 0)
    for summary, text in profiles:
        context.row("Profile of one decode step of ours", rows=num_rows, **summary)
        context.text(f"A decode step of {num_rows} rows", text)


def _measure(sample: Sample, prompts: list[list[int]], seed: int) -> dict[str, Any]:
    free_memory()
    start = time.perf_counter()
    responses = sample(prompts, seed)
    # Responses are on the host, so the device has finished.
    seconds = time.perf_counter() - start
    num_tokens = sum(map(len, responses))
    return {"tokens/s": num_tokens / seconds, "tokens a response": num_tokens / len(responses)}


def _generate(
    model: Any, prompts: list[list[int]], eos: int, max_new_tokens: int, num_rows: int, seed: int
) -> list[list[int]]:
    torch.manual_seed(seed)
    batches = [prompts[start : start + num_rows] for start in range(0, len(prompts), num_rows)]
    return [ids for batch in batches for ids in generate_responses(model, batch, eos, max_new_tokens)]


def _cache(context: Context) -> dict[str, int]:
    """Return the settings of the cache of continuous batching: its own choice on a GPU, small on a CPU."""
    return {} if context.is_cuda else {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 256}
