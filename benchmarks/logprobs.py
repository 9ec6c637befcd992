"""Log-probabilities of given tokens from hidden states, forward and backward: time and memory by vocabulary.

2048 tokens of width 576 in float32. Every contender returns the sum of log-probabilities and the gradient of the hidden
states, and that of the weight unless it is frozen, as a base under LoRA is. Memory is what is resident at most during
one call, above what was resident before it, less the gradients that the caller asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from benchmarks.gate import Gate, resident

_MIB = 2**20
WIDTH = 576
"""Of hidden states: SmolLM2-135M's."""


def _run(gate: Gate, settings: dict[str, Any], total: Callable[[Any, Any, Any], Any]) -> None:
    import torch

    torch.manual_seed(settings["seed"])
    num_tokens, width, vocabulary = settings["num_tokens"], WIDTH, settings["vocabulary"]
    is_frozen = settings["is_frozen"]
    hidden_ND = torch.randn(num_tokens, width, requires_grad=True)
    weight_VD = (torch.randn(vocabulary, width) / width**0.5).requires_grad_(not is_frozen)
    target_N = torch.randint(vocabulary, (num_tokens,))
    wanted = hidden_ND.nbytes + (0 if is_frozen else weight_VD.nbytes)
    # Libraries and threads have what they keep before memory counts.
    few_ND = hidden_ND[:8].detach().requires_grad_()
    total(few_ND, weight_VD, target_N[:8]).backward()
    weight_VD.grad = None

    def work(number: int) -> None:
        before = _set_peak_back()
        found = total(hidden_ND, weight_VD, target_N)
        found.backward()
        memory = resident("VmHWM") - before - wanted
        assert hidden_ND.grad is not None
        gate.add(
            tokens=num_tokens,
            memory_mib=memory / _MIB,
            value=float(found.detach()) / num_tokens,
            grad_norm=float(hidden_ND.grad.norm()),
        )
        hidden_ND.grad = weight_VD.grad = None

    gate.serve(work)


def _set_peak_back() -> int:
    """Give back what malloc kept, let the kernel count the peak anew, and return bytes resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("VmRSS")


def naive(gate: Gate, settings: dict[str, Any]) -> None:
    """All logits, log_softmax, gather."""

    def total(hidden_ND: Any, weight_VD: Any, target_N: Any) -> Any:
        return (hidden_ND @ weight_VD.T).log_softmax(dim=-1).gather(1, target_N[:, None]).sum()

    _run(gate, settings, total)


def ours(gate: Gate, settings: dict[str, Any]) -> None:
    """What every forward of ours uses."""
    from dpr_lightning.functional.logprobs import LMHead, token_logprobs

    def total(hidden_ND: Any, weight_VD: Any, target_N: Any) -> Any:
        return token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N).logp_N.sum()

    _run(gate, settings, total)


def torch_fused(gate: Gate, settings: dict[str, Any]) -> None:
    """``F.linear_cross_entropy`` in chunks, which gives the sum alone: no log-probability of a token."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    options = torch.nn.LinearCrossEntropyOptions()

    def total(hidden_ND: Any, weight_VD: Any, target_N: Any) -> Any:
        return -F.linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="sum", options=options)

    _run(gate, settings, total)


def trl(gate: Gate, settings: dict[str, Any]) -> None:
    """TRL's chunked log-probabilities, by the function and the chunk that its trainers use."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def total(hidden_ND: Any, weight_VD: Any, target_N: Any) -> Any:
        found = ChunkedLogProbFunction.apply(
            hidden_ND, weight_VD, None, target_N, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )
        return found[0].sum()

    _run(gate, settings, total)


CONTENDERS = {"ours": ours, "naive": naive, "torch": torch_fused, "trl": trl}
