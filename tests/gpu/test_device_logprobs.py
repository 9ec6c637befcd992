"""Tiled log-probabilities and expectations on the device, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from device_checks import relative_error
from torch import Tensor

from dpr_lightning.functional import LMHead, state_expectations, token_logprobs

pytestmark = pytest.mark.gpu

NUM_TOKENS, WIDTH, VOCABULARY = 300, 64, 5000
"""Of several tiles, the last of them not full, at the tile size of ``chunk_size`` 128."""


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator) / 4
    bias_V = torch.randn(VOCABULARY, generator=generator)
    target_N = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    return hidden_ND.to(dtype), weight_VD.to(dtype), bias_V.to(dtype), target_N


def exact_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained head", "frozen head"])
def test_values_and_gradients(
    dtype: torch.dtype, limit: float, softcap: float | None, has_bias: bool, is_frozen: bool, device: torch.device
) -> None:
    hidden_ND, weight_VD, bias_V, target_N = inputs(dtype)
    names = ["hidden"] if is_frozen else ["hidden", "weight", *(["bias"] if has_bias else [])]
    given = {"hidden": hidden_ND, "weight": weight_VD, "bias": bias_V}
    found = {name: value.clone().to(device) for name, value in given.items()}
    exact = {name: value.double() for name, value in given.items()}
    for name in names:
        found[name].requires_grad_()
        exact[name].requires_grad_()
    upstream_N = torch.linspace(-1.0, 2.0, NUM_TOKENS)
    head = LMHead(weight_VD=found["weight"], bias_V=found["bias"] if has_bias else None, logit_softcap=softcap)
    out = token_logprobs(found["hidden"], head, target_N.to(device), chunk_size=128, with_entropy=True)
    logits_NV = exact_logits(exact["hidden"], exact["weight"], exact["bias"] if has_bias else None, softcap)
    logp_NV = logits_NV.log_softmax(dim=1)
    logp_N = logp_NV.gather(1, target_N[:, None]).squeeze(1)
    assert out.logp_N.dtype == torch.float32
    assert out.entropy_N is not None
    assert relative_error(out.logp_N.detach(), logp_N.detach()) < limit
    assert relative_error(out.logsumexp_N, logits_NV.logsumexp(dim=1).detach()) < limit
    assert relative_error(out.entropy_N, -(logp_NV.exp() * logp_NV).sum(dim=1).detach()) < limit
    (out.logp_N * upstream_N.to(device)).sum().backward()
    (logp_N * upstream_N).sum().backward()
    for name in names:
        gradient, exact_gradient = found[name].grad, exact[name].grad
        assert gradient is not None
        assert exact_gradient is not None
        assert relative_error(gradient, exact_gradient) < limit, name


def test_expectations(device: torch.device) -> None:
    hidden_ND, weight_VD, _, _ = inputs(torch.float32)
    heads = [weight_VD, weight_VD * 1.1, weight_VD * 0.8]
    found = state_expectations(
        *((hidden_ND.to(device), LMHead(weight_VD=weight.to(device))) for weight in heads), low=-2.0, high=1.0
    )
    old_NV, teacher_NV, reference_NV = ((hidden_ND.double() @ w.double().T).log_softmax(dim=1) for w in heads)
    prob_NV = old_NV.exp()
    ratio_N = (prob_NV * (teacher_NV - reference_NV).clamp(-2.0, 1.0)).sum(dim=1)
    assert relative_error(found.log_ratio_N, ratio_N) < 1e-4
    assert relative_error(found.teacher_kl_N, (prob_NV * (old_NV - teacher_NV)).sum(dim=1)) < 1e-3


def test_memory_is_a_constant(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("torch counts a CUDA device's memory only")
    num_tokens, width, vocabulary = 4096, 512, 131072
    hidden_ND = torch.randn(num_tokens, width, device=device, requires_grad=True)
    weight_VD = torch.randn(vocabulary, width, device=device, requires_grad=True)
    target_N = torch.randint(vocabulary, (num_tokens,), device=device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N).logp_N.sum().backward()
    gradients = hidden_ND.nbytes + weight_VD.nbytes
    # All logits would be 2 GiB, and as much again for each step of their gradient.
    assert torch.cuda.max_memory_allocated() - before - gradients < 128 * 2**20
