"""Inputs of ``make gpu``: random Llamas, and rows of exact lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.gpu.models import RandomLlama, write_model
from benchmarks.gpu.smollm2 import SentenceVerifier, sentence_row
from benchmarks.inputs import embedded_model, exact_rows
from dpr_lightning.demo.tasks import make_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [6, 50])
def test_responses_end_after_the_wanted_number_of_tokens(dtype: torch.dtype, mean: int, tmp_path: Path) -> None:
    model = RandomLlama.from_pretrained(
        write_model(tmp_path, "1B", is_toy=True, seed=3, mean_response_tokens=mean), dtype=dtype
    )
    with torch.no_grad():
        prob_BTV = model(torch.randint(3, 400, (4, 30))).logits.float().softmax(dim=-1)
    # A geometric distribution with this probability has its inverse as mean.
    rate_BT = 1 / prob_BTV[..., model.config.eos_token_id]
    torch.testing.assert_close(rate_BT, torch.full_like(rate_BT, mean), rtol=0.1, atol=0)


def test_weights_follow_the_seed_and_are_not_read(tmp_path: Path) -> None:
    directories = [write_model(tmp_path / str(seed), "8B", is_toy=True, seed=seed) for seed in (1, 2)]
    assert not list(tmp_path.glob("*/*.safetensors"))
    first, again, other = (RandomLlama.from_pretrained(directories[n]).lm_head.weight for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_have_exactly_the_wanted_tokens(tmp_path: Path) -> None:
    path = exact_rows(embedded_model(), tmp_path / "rows.jsonl", 12, (17, 9))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    assert len({row["prompt"] for row in rows}) == 12
    for row in rows:
        # BOS and the template's line break; EOS.
        assert len(tokenizer(f"{row['prompt']}\n")["input_ids"]) == 17
        assert len(tokenizer(row["response"], add_special_tokens=False)["input_ids"]) + 1 == 9


def test_tasks_in_sentences_are_verified_as_the_others() -> None:
    verify = SentenceVerifier()
    rows = make_rows(num_rows=200, seed=0, split="train", slip_share=0.3)
    verdicts = []
    for row in rows:
        sentences = sentence_row(row)
        assert sentences["prompt"][0].isupper()
        assert sentences["prompt"][-1] in ".?!"
        assert "\nAnswer: " in sentences["response"]
        _, _, stated = row["response"].rpartition("answer: ")
        verdicts.append(verify(sentences, sentences["response"]))
        assert verdicts[-1] == (stated == row["answer"])
    assert 0.6 < sum(verdicts) / len(verdicts) < 0.8
