"""Token log-probabilities at large vocabularies: time and memory of forward and backward, and error against float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.worker import Context
from benchmarks.meter import CudaMemory, HostMemory
from dpr_lightning.functional.logprobs import LMHead, token_logprobs

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states [N, D], weight [V, D] and targets [N] to log-probabilities: [N], or their sum."""


def ours(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """What every forward of ours uses."""
    return token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N).logp_N


def dense(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """All logits, log-softmax in float32, gather."""
    return (hidden_ND @ weight_VD.T).float().log_softmax(dim=-1).gather(1, target_N[:, None]).squeeze(1)


def liger(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy; the sum alone."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Any = liger_fused_linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="sum")
    return -loss


def cut_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Apple's cut cross-entropy with its defaults: small gradients are left out."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="none")


def cut_cross_entropy_exact(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The same with all gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="none", filter_eps=None)


def trl_chunked(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """TRL's chunked log-probabilities, by the function and the chunk that its trainers use."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    out: Any = ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, target_N, *settings)
    return out[0]


CONTENDERS: dict[str, LogProbs] = {
    "ours": ours,
    "dense": dense,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "cut-cross-entropy, unfiltered": cut_cross_entropy_exact,
    "TRL, chunked": trl_chunked,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One comparison."""

    num_tokens: int
    width: int
    vocabulary: int
    is_frozen: bool
    """The weight needs no gradient, as under LoRA."""
    dtype: torch.dtype
    """Of hidden states and weight."""

    @property
    def name(self) -> str:
        """Name in result tables."""
        weight = "frozen" if self.is_frozen else "trained"
        kind = str(self.dtype).removeprefix("torch.")
        return f"V = {self.vocabulary:,}, N = {self.num_tokens:,}, D = {self.width:,}, {kind}, weight {weight}"


def sizes(context: Context) -> list[Size]:
    """Return the comparisons, the most important first: in bfloat16, and as bf16-mixed has them (float32)."""
    if context.rehearse:
        small = {"num_tokens": 64, "width": 32}
        vocabularies = {1280: torch.float32, 2560: torch.bfloat16}
        return [
            Size(vocabulary=vocabulary, is_frozen=frozen, dtype=dtype, **small)
            for vocabulary, dtype in vocabularies.items()
            for frozen in (False, True)
        ]
    large: dict[str, Any] = {"num_tokens": 4096, "width": 4096}
    wanted = [(262144, torch.bfloat16), (128256, torch.bfloat16), (128256, torch.float32)]
    return [
        Size(vocabulary=vocabulary, is_frozen=frozen, dtype=dtype, **large)
        for vocabulary, dtype in wanted
        for frozen in (False, True)
    ]


def run(context: Context) -> None:
    """Time every contender at every size."""
    wanted = sizes(context)
    largest = max(size.vocabulary for size in wanted)
    for size in wanted:
        with context.step(size.name):
            times = _compare(context, size)
            is_headline = size.vocabulary == largest and size.dtype == torch.bfloat16 and not size.is_frozen
            if is_headline and "dense" in times:
                context.headline(f"V = {largest:,}: {times['ours'] / times['dense']:.2f} of dense's time")


def _compare(context: Context, size: Size) -> dict[str, float]:
    memory_counter = CudaMemory() if context.is_cuda else HostMemory()
    generator = torch.Generator(context.device).manual_seed(context.seed)
    normal = {"generator": generator, "device": context.device, "dtype": torch.float32}
    hidden_ND = torch.randn(size.num_tokens, size.width, **normal).to(size.dtype).requires_grad_()
    weight_VD = torch.randn(size.vocabulary, size.width, **normal).mul_(2 / size.width**0.5).to(size.dtype)
    weight_VD.requires_grad_(not size.is_frozen)
    target_N = torch.randint(size.vocabulary, (size.num_tokens,), generator=generator, device=context.device)
    grad_N = torch.full((size.num_tokens,), 1 / size.num_tokens, device=context.device)
    reference = float64_reference(
        hidden_ND.detach(), weight_VD.detach(), target_N, num_tokens=min(256, size.num_tokens)
    )
    times: dict[str, float] = {}
    for name, logprobs in CONTENDERS.items():
        try:
            row = _measure(context, memory_counter, logprobs, hidden_ND, weight_VD, target_N, grad_N, reference)
        except Exception as error:
            if name == "ours":
                raise
            # A peer that cannot do this is a result, and no fault of ours.
            reason = f"{type(error).__name__}: {error}"[:200]
            context.row(size.name, **{"log-probabilities": name, "not run": reason})
            continue
        finally:
            hidden_ND.grad = weight_VD.grad = None
        times[name] = row["ms"]
        context.row(size.name, **{"log-probabilities": name}, **row)
    return times


@dataclass(frozen=True, slots=True)
class Float64Reference:
    """Values of the first tokens in float64, from the given (rounded) inputs."""

    logp_M: Tensor
    grad_MD: Tensor
    """d logp / d hidden."""


def float64_reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, num_tokens: int) -> Float64Reference:
    """Return log-probabilities and their gradient of the first ``num_tokens`` tokens, in float64."""
    weight = weight_VD.double()
    logits_MV = hidden_ND[:num_tokens].double() @ weight.T
    logp_MV = logits_MV.log_softmax(dim=-1)
    target_M1 = target_N[:num_tokens, None]
    grad_MD = weight[target_M1.squeeze(1)] - logp_MV.exp() @ weight
    return Float64Reference(logp_MV.gather(1, target_M1).squeeze(1), grad_MD)


def _measure(
    context: Context,
    memory_counter: Any,
    logprobs: LogProbs,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    grad_N: Tensor,
    reference: Float64Reference,
) -> dict[str, Any]:
    def work() -> Tensor:
        hidden_ND.grad = weight_VD.grad = None
        logp = logprobs(hidden_ND, weight_VD, target_N)
        # The mean over tokens, as a loss has it; where there is the sum alone, its gradient is scaled alike.
        logp.backward(grad_N.to(logp.dtype) if logp.dim() else grad_N[0].to(logp.dtype))
        return logp.detach()

    logp = work()
    grad_bytes = hidden_ND.nbytes + (weight_VD.nbytes if weight_VD.requires_grad else 0)
    times = []
    memory = 0
    for _ in range(2 if context.rehearse else 3):
        hidden_ND.grad = weight_VD.grad = None
        before = memory_counter.current()
        memory_counter.reset_peak()
        times.append(_milliseconds(context, work))
        memory = max(memory, memory_counter.peak() - before - grad_bytes)
    num_compared = len(reference.logp_M)
    row: dict[str, Any] = {"ms": statistics.median(times), "MiB": memory / 2**20}
    if logp.dim():
        row["largest error, nats"] = float((logp[:num_compared].double() - reference.logp_M).abs().max())
    assert hidden_ND.grad is not None
    grad_MD = hidden_ND.grad[:num_compared].double() * len(hidden_ND)
    row["error of d/d hidden"] = float((grad_MD - reference.grad_MD).norm() / reference.grad_MD.norm())
    return row


def _milliseconds(context: Context, work: Callable[[], object]) -> float:
    import time

    if not context.is_cuda:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
