"""Rollouts from prompts of mixed lengths, ended by EOS at mixed lengths, at most so many at once.

All engines sample the same prompts from the same weights at temperature 1 without top-p or top-k, in the same type.
One piece of work is all prompts once; the number of the piece is its seed. Tokens are those of responses, EOS included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gate import Gate
from benchmarks.generation import generate_batch_responses, generate_responses


def read_prompts(path: str, tokenizer: Any) -> list[list[int]]:
    """Return token ids of prompts, each ended by a line break as our default template does."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    ids: list[list[int]] = tokenizer([f"{row['prompt']}\n" for row in rows])["input_ids"]
    return ids


def load(settings: dict[str, Any]) -> tuple[Any, Any, list[list[int]]]:
    """Return model, tokenizer and prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"])).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    return model, tokenizer, read_prompts(settings["prompts"], tokenizer)


def ours(gate: Gate, settings: dict[str, Any]) -> None:
    """Our default sampler, with the log-probabilities that it gives along."""
    from benchmarks.floor import count_forwards
    from dpr_lightning.rollout import TransformersSampler

    count_forwards(gate)
    _sample(gate, settings, TransformersSampler())


def ours_vllm(gate: Gate, settings: dict[str, Any]) -> None:
    """Our vLLM sampler; each round hands the weights over first, as training does."""
    from dpr_lightning.rollout import VLLMSampler

    _sample(
        gate,
        settings,
        VLLMSampler(
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["batch_size"],
            enforce_eager=True,
            kv_cache_gib=1.0,
        ),
    )


def _sample(gate: Gate, settings: dict[str, Any], sampler: Any) -> None:
    from dpr_lightning.types import SamplingConfig

    model, tokenizer, prompts = load(settings)
    config = SamplingConfig(max_new_tokens=settings["max_new_tokens"], batch_size=settings["batch_size"])

    def work(number: int) -> None:
        some = _part(prompts, number, gate)
        samples = sampler.sample(model, some, config=config, eos_token_id=tokenizer.eos_token_id, seed=number)
        _count(gate, samples.response_ids)

    gate.serve(work)


def generate(gate: Gate, settings: dict[str, Any]) -> None:
    """``model.generate``, one batch after the other, in the order of the prompts."""
    import torch

    model, tokenizer, prompts = load(settings)
    eos, size = tokenizer.eos_token_id, settings["batch_size"]

    def work(number: int) -> None:
        torch.manual_seed(number)
        some = _part(prompts, number, gate)
        for start in range(0, len(some), size):
            batch = some[start : start + size]
            _count(gate, generate_responses(model, batch, eos, settings["max_new_tokens"]))

    gate.serve(work)


def generate_batch(gate: Gate, settings: dict[str, Any]) -> None:
    """Transformers' continuous batching."""
    model, tokenizer, prompts = load(settings)

    def work(number: int) -> None:
        responses = generate_batch_responses(
            model,
            _part(prompts, number, gate),
            tokenizer.eos_token_id,
            settings["max_new_tokens"],
            num_rows=settings["batch_size"],
            seed=number,
            cache=settings["cache"],
        )
        _count(gate, responses)

    gate.serve(work)


def vllm(gate: Gate, settings: dict[str, Any]) -> None:
    """``vllm.LLM.generate`` of weights that it read itself; its prefix cache is off, as weights change in training."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["batch_size"],
        enforce_eager=settings.get("eager", True),
        enable_prefix_caching=False,
        seed=settings["seed"],
    )
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    prompts = read_prompts(settings["prompts"], tokenizer)
    params = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_tokens=settings["max_new_tokens"],
        stop_token_ids=[tokenizer.eos_token_id],
        detokenize=False,
    )

    def work(number: int) -> None:
        some = _part(prompts, number, gate)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in some], params, use_tqdm=False)
        _count(gate, [output.outputs[0].token_ids for output in outputs])

    gate.serve(work)


def _part(prompts: list[list[int]], number: int, gate: Gate) -> list[list[int]]:
    """Return all prompts, or few of them to warm up on."""
    return prompts[:4] if number < gate.warm_up else prompts


def _count(gate: Gate, responses: list[list[int]]) -> None:
    gate.add(tokens=sum(map(len, responses)), responses=len(responses))


CONTENDERS = {
    "ours": ours,
    "ours_vllm": ours_vllm,
    "generate": generate,
    "generate_batch": generate_batch,
    "vllm": vllm,
}
