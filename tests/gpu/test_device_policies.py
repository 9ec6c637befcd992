"""Packed forwards, log-probabilities and their gradients on the device, against float32 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from device_checks import relative_error
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dpr_lightning.functional.collate import collate
from dpr_lightning.models import ragged
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.types import TokenBatch

pytestmark = pytest.mark.gpu

GENERATOR = torch.Generator().manual_seed(5)


def ids(count: int, vocabulary: int = 48) -> list[int]:
    return torch.randint(3, vocabulary, (count,), generator=GENERATOR).tolist()


PROMPTS = [ids(n) for n in (4, 1, 12, 7, 3, 5)]
# Rows 0 and 6 are samples of one prompt.
PROMPTS.append(PROMPTS[0])
BATCH = collate(PROMPTS, [ids(n) for n in (9, 3, 20, 1, 1, 14, 6)], pad_id=0)


def run(model: PreTrainedModel, batch: TokenBatch, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
    """Return log-probabilities, and the gradient of a weighted sum of them by every weight, laid end to end."""
    model = copy.deepcopy(model).to(device)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    policy = CausalPolicy(model)
    assert ragged.is_enabled(model)
    assert ragged.verify(model)
    autocast: Any = torch.autocast(device.type, torch.bfloat16) if precision == "autocast" else nullcontext()
    with autocast:
        logp_N = policy(batch.to(device)).logp_N
    assert logp_N.dtype == torch.float32
    weight_N = torch.linspace(-1.0, 2.0, len(logp_N), device=device)
    (logp_N * weight_N).sum().backward()
    gradients = [weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None]
    return logp_N.detach().cpu(), torch.cat(gradients).cpu()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_log_probs_and_gradients_match_cpu(
    precision: str, family: str, device: torch.device, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    check(tiny_model(family), BATCH, device, precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_heads_and_lengths_that_fast_kernels_take(precision: str, device: torch.device) -> None:
    # Heads of 64 in groups, lengths that no block size divides: where flash attention is chosen.
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    lengths = [(17, 203), (129, 1), (1, 310), (64, 64)]
    batch = collate([ids(p, 640) for p, _ in lengths], [ids(r, 640) for _, r in lengths], pad_id=0)
    check(LlamaForCausalLM(config).eval(), batch, device, precision)


def check(model: PreTrainedModel, batch: TokenBatch, device: torch.device, precision: str) -> None:
    exact_logp_N, exact_gradient = run(model, batch, torch.device("cpu"), "float32")
    logp_N, gradient = run(model, batch, device, precision)
    if precision == "float32":
        torch.testing.assert_close(logp_N, exact_logp_N, rtol=0, atol=1e-4)
        assert relative_error(gradient, exact_gradient) < 1e-4
        return
    # As far off as the same arithmetic on the CPU, which rounds at the same places; kernels add in other orders.
    cpu_logp_N, cpu_gradient = run(model, batch, torch.device("cpu"), precision)
    error, expected = ((found - exact_logp_N).abs().mean() for found in (logp_N, cpu_logp_N))
    assert error < 2 * expected + 1e-3, f"{error} nats off on the device, {expected} on the CPU"
    assert relative_error(gradient, exact_gradient) < 2 * relative_error(cpu_gradient, exact_gradient) + 1e-3
