"""Rollouts by vLLM against the transformers sampler: the same weights and prompts, in turns, in one process.

    python benchmarks/rollouts.py MODEL_DIR --rounds 5

MODEL_DIR is a transformers directory. Prints a table in Markdown; every round draws with both, the order alternating,
so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpr_lightning.models.policies import CausalPolicy, scatter_tokens
from dpr_lightning.rollout import Samples, TransformersSampler, VLLMSampler
from dpr_lightning.rollout.scoring import make_rollouts, trim
from dpr_lightning.types import SamplingConfig


def prompts_of(tokenizer: Any, num_prompts: int, longest: int) -> list[list[int]]:
    """Return prompts of lengths spread evenly up to ``longest`` tokens, no two alike."""
    text = " ".join(f"Question {n}: Ann has {n} pens and buys {n * n % 97} more. How many?" for n in range(longest))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    lengths = [max(4, longest * (row + 1) // num_prompts) for row in range(num_prompts)]
    return [ids[row : row + length] for row, length in enumerate(lengths)]


@torch.no_grad()
def largest_gap(model: Any, prompts: list[list[int]], samples: Samples) -> float:
    """Return the largest distance between the sampler's log-probabilities and the trainer's, in nats."""
    rollouts = make_rollouts(prompts, samples, range(len(prompts)), pad_id=0)
    policy, largest = CausalPolicy(model), 0.0
    for rows_B in torch.arange(len(prompts)).split(8):
        batch = trim(rollouts, rows_B)
        logp_BT = scatter_tokens(policy(batch).logp_N, batch.response_mask_BT)
        width = batch.input_ids_BT.shape[1]
        largest = max(largest, float((logp_BT - rollouts.sampler_logp_BT[rows_B, :width]).abs().max()))
    return largest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="transformers directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest_prompt", type=int, default=128)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile")
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    model = AutoModelForCausalLM.from_pretrained(parsed.model, dtype=getattr(torch, parsed.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(parsed.model)
    prompts = prompts_of(tokenizer, parsed.prompts, parsed.longest_prompt)
    config = SamplingConfig(max_new_tokens=parsed.max_new_tokens, batch_size=parsed.prompts)
    vllm = VLLMSampler(
        max_model_len=parsed.longest_prompt + parsed.max_new_tokens,
        max_num_seqs=parsed.prompts,
        enforce_eager=not parsed.compile,
    )
    samplers: dict[str, Any] = {"transformers": TransformersSampler(), "vLLM": vllm}
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in samplers}

    def draw(name: str, seed: int, **changes: Any) -> tuple[Samples, float, float]:
        start = time.perf_counter(), time.process_time()
        settings = SamplingConfig(
            **({"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size} | changes)
        )
        samples = samplers[name].sample(model, prompts, config=settings, eos_token_id=tokenizer.eos_token_id, seed=seed)
        return samples, time.perf_counter() - start[0], time.process_time() - start[1]

    for name in samplers:
        _, seconds, _ = draw(name, 0, max_new_tokens=2)
        print(f"{name}: first call, two tokens each, {seconds:.1f} s", flush=True)
    _, update, _ = draw("vLLM", 0, max_new_tokens=1)
    last: dict[str, Samples] = {}
    for number in range(parsed.rounds):
        for name in list(samplers)[:: 1 if number % 2 == 0 else -1]:
            samples, wall, cpu = draw(name, number)
            found[name].append((wall, cpu, sum(map(len, samples.response_ids))))
            last[name] = samples
            print(name, *(f"{value:.1f}" for value in found[name][-1]), flush=True)
    gaps = {name: largest_gap(model, prompts, samples) for name, samples in last.items()}
    print(f"\nvLLM, weights handed over, prompts read and one token each: {update:.1f} s\n")
    print("| sampler | response tokens | wall s | CPU s | tokens/s | tokens/CPU s | largest gap, nats |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in found.items():
        middle = [statistics.median(values) for values in zip(*rows, strict=True)]
        rates = [statistics.median(row[2] / row[index] for row in rows) for index in (0, 1)]
        print(
            f"| {name} | {middle[2]:.0f} | {middle[0]:.1f} | {middle[1]:.1f} | {rates[0]:.0f} | {rates[1]:.0f} "
            f"| {gaps[name]:.1e} |"
        )
    for index, what in enumerate(("second", "CPU second")):
        ratios = [
            (ours[2] / ours[index]) / (theirs[2] / theirs[index])
            for theirs, ours in zip(found["transformers"], found["vLLM"], strict=True)
        ]
        print(
            f"\nvLLM / transformers, tokens per {what}: median {statistics.median(ratios):.2f}, of rounds "
            f"{min(ratios):.2f} to {max(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
