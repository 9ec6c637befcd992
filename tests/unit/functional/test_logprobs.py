"""Chunked log-probabilities against the plain computation. Shapes: N tokens, V vocabulary entries, D hidden units."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpr_lightning.functional import LMHead, state_expectations, token_logprobs


def _inputs(
    num_tokens: int = 7, vocabulary: int = 11, width: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    target_N = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden_ND, weight_VD, bias_V, target_N


def _naive_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V) * scale
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


HEADS = [
    pytest.param(False, None, 1.0, id="plain"),
    pytest.param(True, None, 1.0, id="bias"),
    pytest.param(False, 2.0, 1.0, id="softcap"),
    pytest.param(False, None, 0.3, id="scale"),
    pytest.param(True, 1.5, 0.7, id="all"),
]


@pytest.mark.parametrize(("has_bias", "softcap", "scale"), HEADS)
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_forward_and_backward_equal_log_softmax(
    has_bias: bool, softcap: float | None, scale: float, chunk_size: int
) -> None:
    hidden_ND, weight_VD, bias_V, target_N = _inputs()
    upstream_N = torch.linspace(-1.0, 2.0, len(target_N))
    leaves = [x.requires_grad_() for x in ((hidden_ND, weight_VD, bias_V) if has_bias else (hidden_ND, weight_VD))]
    head = LMHead(weight_VD=weight_VD, bias_V=bias_V if has_bias else None, logit_softcap=softcap, logit_scale=scale)
    logp_N = token_logprobs(hidden_ND, head, target_N, chunk_size=chunk_size).logp_N
    grads = torch.autograd.grad(logp_N, leaves, upstream_N)

    logits_NV = _naive_logits(hidden_ND, weight_VD, bias_V if has_bias else None, softcap, scale)
    naive_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None]).squeeze(1)
    naive_grads = torch.autograd.grad(naive_N, leaves, upstream_N)

    torch.testing.assert_close(logp_N, naive_N, rtol=1e-5, atol=1e-5)
    for grad, naive_grad in zip(grads, naive_grads, strict=True):
        torch.testing.assert_close(grad, naive_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("has_bias", "softcap", "scale"), HEADS)
def test_gradcheck_in_float64(has_bias: bool, softcap: float | None, scale: float) -> None:
    hidden_ND, weight_VD, bias_V, target_N = _inputs(num_tokens=4, vocabulary=5, width=3, dtype=torch.float64)

    def logp(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        head = LMHead(weight_VD=weight, bias_V=bias[0] if bias else None, logit_softcap=softcap, logit_scale=scale)
        return token_logprobs(hidden, head, target_N, chunk_size=3).logp_N

    leaves = [x.requires_grad_() for x in ((hidden_ND, weight_VD, bias_V) if has_bias else (hidden_ND, weight_VD))]
    assert torch.autograd.gradcheck(logp, leaves)


def test_hand_worked_value() -> None:
    # logits (log 1, log 2, log 5): probabilities 1/8, 2/8, 5/8; logsumexp log 8
    head = LMHead(weight_VD=torch.tensor([[1.0], [2.0], [5.0]]).log())
    out = token_logprobs(torch.ones(2, 1), head, torch.tensor([1, 2]), with_entropy=True)
    torch.testing.assert_close(out.logp_N, torch.tensor([0.25, 0.625]).log())
    torch.testing.assert_close(out.logsumexp_N, torch.tensor([8.0, 8.0]).log())
    # H = 1/8 log 8 + 1/4 log 4 + 5/8 log 8/5 = 0.9002561 nats
    torch.testing.assert_close(out.entropy_N, torch.tensor([0.9002561, 0.9002561]))


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_entropy_and_logsumexp_equal_torch(chunk_size: int) -> None:
    hidden_ND, weight_VD, bias_V, target_N = _inputs()
    head = LMHead(weight_VD=weight_VD, bias_V=bias_V, logit_softcap=3.0, logit_scale=0.9)
    out = token_logprobs(hidden_ND, head, target_N, chunk_size=chunk_size, with_entropy=True)
    logits_NV = _naive_logits(hidden_ND, weight_VD, bias_V, 3.0, 0.9)
    torch.testing.assert_close(out.logsumexp_N, logits_NV.logsumexp(-1))
    torch.testing.assert_close(out.entropy_N, torch.distributions.Categorical(logits=logits_NV).entropy())


def test_only_logp_is_differentiable_and_entropy_is_opt_in() -> None:
    hidden_ND, weight_VD, _, target_N = _inputs()
    out = token_logprobs(hidden_ND.requires_grad_(), LMHead(weight_VD=weight_VD), target_N, with_entropy=True)
    assert out.logp_N.requires_grad
    assert not out.logsumexp_N.requires_grad
    assert out.entropy_N is not None
    assert not out.entropy_N.requires_grad
    assert token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N).entropy_N is None


def test_no_tokens_give_empty_outputs_and_zero_gradients() -> None:
    hidden_ND, weight_VD, bias_V, target_N = _inputs(num_tokens=0)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    out = token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD, bias_V=bias_V), target_N, with_entropy=True)
    assert out.logp_N.shape == out.logsumexp_N.shape == (0,)
    assert out.entropy_N is not None
    assert out.entropy_N.shape == (0,)
    for grad, leaf in zip(torch.autograd.grad(out.logp_N.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_differentiable_input_at_a_time(wanted: str) -> None:
    hidden_ND, weight_VD, bias_V, target_N = _inputs()
    leaf = {"hidden": hidden_ND, "weight": weight_VD, "bias": bias_V}[wanted].requires_grad_()
    logp_N = token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD, bias_V=bias_V), target_N, chunk_size=2).logp_N
    (grad,) = torch.autograd.grad(logp_N.sum(), leaf)
    logits_NV = _naive_logits(hidden_ND, weight_VD, bias_V, None, 1.0)
    (naive_grad,) = torch.autograd.grad(logits_NV.log_softmax(-1).gather(1, target_N[:, None]).sum(), leaf)
    torch.testing.assert_close(grad, naive_grad, rtol=1e-5, atol=1e-5)


def test_tied_weight_adds_up_both_uses() -> None:
    _, weight_VD, _, target_N = _inputs()
    weight_VD.requires_grad_()
    input_N = torch.arange(len(target_N))
    # The embedding makes the hidden states, and is the output layer as well.
    hidden_ND = torch.tanh(weight_VD[input_N])
    logp_N = token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N, chunk_size=3).logp_N
    (grad_VD,) = torch.autograd.grad(logp_N.sum(), weight_VD)
    naive_hidden_ND = torch.tanh(weight_VD[input_N])
    naive_NV = (naive_hidden_ND @ weight_VD.T).log_softmax(-1)
    (naive_grad_VD,) = torch.autograd.grad(naive_NV.gather(1, target_N[:, None]).sum(), weight_VD)
    torch.testing.assert_close(grad_VD, naive_grad_VD, rtol=1e-5, atol=1e-5)


def test_bfloat16_inputs_give_float32_logprobs() -> None:
    hidden_ND, weight_VD, _, target_N = _inputs(dtype=torch.bfloat16)
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    out = token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N, chunk_size=3)
    grads = torch.autograd.grad(out.logp_N.sum(), leaves)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_NV = (exact_leaves[0] @ exact_leaves[1].T).log_softmax(-1)
    exact_N = exact_NV.gather(1, target_N[:, None]).squeeze(1)
    exact_grads = torch.autograd.grad(exact_N.sum(), exact_leaves)
    assert out.logp_N.dtype == out.logsumexp_N.dtype == torch.float32
    assert out.logp_N.unique().numel() == len(target_N)
    # The matrix product rounds each logit to 8 bits, a relative error of 2^-9; logits here stay below 8 in size, so
    # a logit is off by at most 2^-6, and a logp, a difference of two such, by twice that.
    torch.testing.assert_close(out.logp_N.double(), exact_N, rtol=0.0, atol=2.0**-5)
    # A gradient adds the rounding of onehot - softmax (2^-9 of at most 1, times up to 7 terms of size 3) to that.
    for grad, leaf, exact in zip(grads, leaves, exact_grads, strict=True):
        assert grad.dtype == leaf.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), exact, rtol=2.0**-6, atol=0.1)


def test_second_derivative_is_refused_rather_than_wrong() -> None:
    hidden_ND, weight_VD, _, target_N = _inputs()
    logp_N = token_logprobs(hidden_ND.requires_grad_(), LMHead(weight_VD=weight_VD), target_N).logp_N
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logp_N.sum(), hidden_ND, create_graph=True)


class _LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 8, 16])
def test_no_tensor_outgrows_a_chunk_of_logits(chunk_size: int, dtype: torch.dtype, with_entropy: bool) -> None:
    num_tokens, vocabulary, width = 64, 128, 4
    hidden_ND, weight_VD, bias_V, target_N = _inputs(num_tokens, vocabulary, width, dtype)
    for leaf in (hidden_ND, weight_VD, bias_V):
        leaf.requires_grad_()
    head = LMHead(weight_VD=weight_VD, bias_V=bias_V, logit_softcap=5.0, logit_scale=0.5)
    with _LargestTensor() as largest:
        out = token_logprobs(hidden_ND, head, target_N, chunk_size=chunk_size, with_entropy=with_entropy)
        out.logp_N.sum().backward()
    assert weight_VD.grad is not None
    ceiling = max(chunk_size * vocabulary, vocabulary * width)
    assert ceiling < num_tokens * vocabulary
    # Reaching it shows that the mode saw inside forward and backward.
    assert largest.numel == ceiling


def test_state_expectations_equal_torch_distributions() -> None:
    hidden_ND, weight_VD, bias_V, _ = _inputs(seed=1)
    teacher_hidden_ND, teacher_weight_VD, _, _ = _inputs(seed=2)
    # The reference may have another width.
    wide_hidden_ND, wide_weight_VD, _, _ = _inputs(width=9, seed=3)
    old = (hidden_ND, LMHead(weight_VD=weight_VD, bias_V=bias_V))
    teacher = (teacher_hidden_ND, LMHead(weight_VD=teacher_weight_VD, logit_softcap=2.0))
    reference = (wide_hidden_ND, LMHead(weight_VD=wide_weight_VD, logit_scale=0.5))
    categorical = torch.distributions.Categorical
    of_old = categorical(logits=hidden_ND @ weight_VD.T + bias_V)
    of_teacher = categorical(logits=2.0 * torch.tanh(teacher_hidden_ND @ teacher_weight_VD.T / 2.0))
    of_reference = categorical(logits=0.5 * wide_hidden_ND @ wide_weight_VD.T)
    ratio_NV = of_teacher.probs.log() - of_reference.probs.log()
    for low, high in ((-math.inf, math.inf), (-0.7, 0.4), (-5.0, 0.0)):
        want_N = (of_old.probs * ratio_NV.clip(low, high)).sum(dim=1)
        for chunk_size in (1, 3, 7, 100):
            found = state_expectations(old, teacher, reference, low=low, high=high, chunk_size=chunk_size)
            torch.testing.assert_close(found.log_ratio_N, want_N, rtol=1e-5, atol=1e-5)
            kl_N = torch.distributions.kl_divergence(of_old, of_teacher)
            torch.testing.assert_close(found.teacher_kl_N, kl_N, rtol=1e-5, atol=1e-5)


def test_several_references_are_averaged_in_log_probability() -> None:
    hidden_ND, weight_VD, _, _ = _inputs(seed=1)
    old, teacher, first, second = ((hidden_ND * scale, LMHead(weight_VD=weight_VD)) for scale in (1.0, 0.5, 2.0, -1.0))
    logps = [(states_ND @ head.weight_VD.T).log_softmax(dim=-1) for states_ND, head in (old, teacher, first, second)]
    ratio_NV = logps[1] - (logps[2] + logps[3]) / 2
    for low, high in ((-math.inf, math.inf), (-0.5, 0.0)):
        found = state_expectations(old, teacher, first, second, low=low, high=high, chunk_size=3)
        want_N = (logps[0].exp() * ratio_NV.clip(low, high)).sum(dim=1)
        torch.testing.assert_close(found.log_ratio_N, want_N, rtol=1e-5, atol=1e-5)
        # Twice the same is once.
        once, twice = state_expectations(old, teacher, first), state_expectations(old, teacher, first, first)
        torch.testing.assert_close(twice.log_ratio_N, once.log_ratio_N, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="at least one reference"):
        state_expectations(old, teacher)


def test_state_expectations_carry_no_gradient_and_take_no_states() -> None:
    hidden_ND, weight_VD, _, _ = _inputs()
    old = (hidden_ND.requires_grad_(), LMHead(weight_VD=weight_VD))
    assert not state_expectations(old, old, old).log_ratio_N.requires_grad
    empty = (hidden_ND[:0], LMHead(weight_VD=weight_VD))
    assert state_expectations(empty, empty, empty).teacher_kl_N.shape == (0,)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_below_one_is_refused(chunk_size: int) -> None:
    hidden_ND, weight_VD, _, target_N = _inputs()
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N, chunk_size=chunk_size)
    old = (hidden_ND, LMHead(weight_VD=weight_VD))
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        state_expectations(old, old, old, chunk_size=chunk_size)


def test_shapes_that_disagree_are_refused() -> None:
    hidden_ND, weight_VD, _, target_N = _inputs()
    with pytest.raises(ValueError, match=r"got \(7, 5\) and \(6,\)"):
        token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N[1:])
    with pytest.raises(ValueError, match=r"need hidden \[N, D\]"):
        token_logprobs(hidden_ND[None], LMHead(weight_VD=weight_VD), target_N[None])


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_head_trained", [False, True])
def test_the_bias_is_added_in_float32_to_products_in_bfloat16(bias_dtype: torch.dtype, is_head_trained: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(64, 16, generator=generator).bfloat16().requires_grad_()
    weight_VD = (0.05 * torch.randn(512, 16, generator=generator)).bfloat16().requires_grad_(is_head_trained)
    # As of a bias that holds token frequencies: bfloat16 has steps of 1/16 here, and products are below 1.
    bias_V = (10.0 + torch.randn(512, generator=generator)).to(bias_dtype).requires_grad_(is_head_trained)
    target_N = torch.randint(512, (64,), generator=generator)
    head = LMHead(weight_VD=weight_VD, bias_V=bias_V)
    logp_N = token_logprobs(hidden_ND, head, target_N, chunk_size=16).logp_N

    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (hidden_ND, weight_VD, bias_V)]
    exact_NV = (exact[0] @ exact[1].T + exact[2]).log_softmax(-1)
    exact_N = exact_NV.gather(1, target_N[:, None]).squeeze(1)
    error_N = logp_N.double() - exact_N
    # What is left is the product's own rounding: 2**-9 of at most 1. A bias added in bfloat16 errs by 0.02 rms.
    assert error_N.square().mean().sqrt() < 2e-3
    torch.testing.assert_close(head.logits(hidden_ND).double().log_softmax(-1), exact_NV, rtol=0, atol=1e-2)
    logp_N.sum().backward()
    exact_N.sum().backward()
    for ours, theirs in zip((hidden_ND, weight_VD, bias_V), exact, strict=True):
        if ours.requires_grad:
            assert ours.grad is not None
            assert theirs.grad is not None
            # Gradients are returned in the type of what they are of; bfloat16 keeps 2**-8 of each.
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=5e-3 * scale)
