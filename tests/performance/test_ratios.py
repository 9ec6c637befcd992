"""Times against the plain way of doing the same, in turns in one process, so that a busy machine slows both.

The least CPU time of several rounds is compared; the margins are wide, as these are alarms and no measurements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import in_turns
from dpr_lightning.functional.logprobs import LMHead, token_logprobs
from dpr_lightning.rollout import TransformersSampler
from dpr_lightning.types import SamplingConfig


def ratio(ours: Callable[[], object], plain: Callable[[], object], rounds: int = 5) -> float:
    """Return the least CPU time of ours over that of the plain way."""
    least = in_turns({"ours": ours, "plain": plain}, rounds=rounds)
    return least["ours"] / least["plain"]


def test_log_probs_are_no_slower_than_whole_logits() -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(256, 128, requires_grad=True)
    weight_VD = torch.randn(65536, 128, requires_grad=True)
    target_N = torch.randint(65536, (256,))

    def naive() -> None:
        logits_NV = hidden_ND @ weight_VD.T
        logits_NV.log_softmax(dim=1).gather(1, target_N[:, None]).sum().backward()

    def ours() -> None:
        token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N).logp_N.sum().backward()

    assert ratio(ours, naive) < 1.3


def test_rollouts_of_unequal_length_take_less_than_generate() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    # About every 20th token ends a response.
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    model.lm_head.bias.data[2] = 5.0
    width, rows = 24, 16
    prompts = [torch.randint(3, 512, (4 + 5 * n % 20,)).tolist() for n in range(3 * rows)]
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])

    def generate() -> None:
        torch.manual_seed(0)
        for ids, mask in zip(ids_BT.split(rows), mask_BT.split(rows), strict=True):
            model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=64)

    def ours() -> None:
        settings = SamplingConfig(max_new_tokens=64, batch_size=rows)
        TransformersSampler().sample(model, prompts, config=settings, eos_token_id=2, seed=0)

    assert ratio(ours, generate, rounds=3) < 0.8
