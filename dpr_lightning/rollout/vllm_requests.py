"""What a vLLM engine is asked, and what it answers, in the terms of the sampler protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.types import SamplingConfig, as_ends


def draw(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: SamplingConfig,
    eos_token_id: int | Sequence[int],
    seed: int,
    lora_request: Any = None,
    on_progress: Callable[[int], object] | None = None,
) -> Samples:
    """Draw one response per prompt from the weights that the engine has; see ``Sampler.sample``.

    The engine gets all prompts at once and takes further ones in as responses end.

    Args:
        engine: A ``vllm.LLMEngine`` in this process, idle.
        prompts: Token ids, BOS included where the tokenizer has one; none empty.
        config: Length limit, temperature and truncation of the distribution.
        eos_token_id: The id that ends a response, or several.
        seed: Of torch's generators, which the caller puts back. The same seed, weights and prompts give the same
            responses.
        lora_request: The adapter to sample with, if any.
        on_progress: Called with the number of responses finished since the last call.

    Raises:
        RuntimeError: A response ended in another way than by EOS or the length limit.
    """
    # The engine draws in this process, from torch's own generators. A generator for each request, which vLLM makes of a
    # seed of its own, is slow, and on a CPU it fails where a prompt is read in parts.
    torch.manual_seed(seed)
    for row, prompt in enumerate(prompts):
        params = _sampling_params(config, eos_token_id)
        engine.add_request(str(row), {"prompt_token_ids": list(prompt)}, params, lora_request=lora_request)
    outputs = _finish(engine, on_progress)
    return _collect(outputs, max_new_tokens=config.max_new_tokens, eos_token_id=eos_token_id)


def _sampling_params(config: SamplingConfig, eos_token_id: int | Sequence[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_new_tokens,
        # Of the sampled token alone.
        logprobs=0,
        # There is no tokenizer to know one by.
        stop_token_ids=list(as_ends(eos_token_id)),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _finish(engine: Any, on_progress: Callable[[int], object] | None) -> list[Any]:
    """Run the engine until every request has ended; return their outputs in the order in which they were made."""
    finished: dict[int, Any] = {}
    while engine.has_unfinished_requests():
        ended = [output for output in engine.step() if output.finished]
        finished |= {int(output.request_id): output for output in ended}
        if ended and on_progress is not None:
            on_progress(len(ended))
    return [finished[row] for row in sorted(finished)]


def _collect(outputs: Sequence[Any], *, max_new_tokens: int, eos_token_id: int | Sequence[int]) -> Samples:
    """Return vLLM's finished requests, one response each, as the sampler protocol has them.

    Args:
        outputs: ``vllm.RequestOutput`` in the order of the prompts.
        max_new_tokens: The length limit that they were asked for with.
        eos_token_id: The id that ends a response, or several.

    Raises:
        RuntimeError: A response ended in another way than by EOS or the length limit.
    """
    samples = Samples(response_ids=[], logp=[], is_truncated=[])
    for output in outputs:
        (found,) = output.outputs
        ids = list(found.token_ids)
        ended = bool(ids) and ids[-1] in as_ends(eos_token_id)
        if not ended and (found.finish_reason != "length" or len(ids) != max_new_tokens):
            raise RuntimeError(
                f"vLLM ended response {len(samples.logp)} after {len(ids)} of {max_new_tokens} tokens by "
                f"'{found.finish_reason}' ({found.stop_reason}), without EOS"
            )
        samples.response_ids.append(ids)
        samples.logp.append([float(said[token].logprob) for token, said in zip(ids, found.logprobs, strict=True)])
        samples.is_truncated.append(not ended)
    return samples
