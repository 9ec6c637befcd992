"""Batched sampling with transformers' forward and key-value cache.

Prompts are grouped by length and padded on the left, so that every row's next token is in the last column. Rows leave
the batch when they end: once a quarter of it has, the cache is cut down to the rest, so the cost follows the tokens
that are really drawn and not the longest response times the batch. The draw itself is exact: float32 softmax of the
tempered logits and one exponential race per row (argmax of p / Exp(1) is distributed as p).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.types import SamplingConfig

_COMPACT_AT = 0.75
"""The cache is cut when this share of its rows, or less, is still alive: copying it costs about one step."""


class TransformersSampler:
    """Samples with any transformers causal language model, on the model's own device."""

    @torch.no_grad()
    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        config: SamplingConfig,
        eos_token_id: int,
        seed: int,
        on_progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Draw one response per prompt; see ``Sampler.sample``."""
        _check(prompts)
        responses: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        truncated = [False] * len(prompts)
        generator = torch.Generator(device=model.device).manual_seed(seed)
        was_training = model.training
        model.eval()
        try:
            by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
            for start in range(0, len(by_length), config.batch_size):
                rows = by_length[start : start + config.batch_size]
                ids_BT, logp_BT, length_B, truncated_B = _decode(
                    model, [prompts[row] for row in rows], config, eos_token_id, generator
                )
                for row, ids, logp, length, cut in zip(
                    rows, ids_BT.tolist(), logp_BT.tolist(), length_B.tolist(), truncated_B.tolist(), strict=True
                ):
                    responses[row], logps[row], truncated[row] = ids[:length], logp[:length], cut
                if on_progress is not None:
                    on_progress(len(rows))
        finally:
            model.train(was_training)
        return Samples(response_ids=responses, logp=logps, is_truncated=truncated)


def _check(prompts: Sequence[Sequence[int]]) -> None:
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty: there is no state to sample from")


def _decode(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    config: SamplingConfig,
    eos_token_id: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decode one batch: ids and log-probs [B, max_new_tokens], lengths [B], truncated [B]."""
    device = model.device
    width, num_rows = max(map(len, prompts)), len(prompts)
    input_BT = torch.full((num_rows, width), eos_token_id, dtype=torch.long)
    mask_BT = torch.zeros((num_rows, width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_BT[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    input_BT, mask_BT = input_BT.to(device), mask_BT.to(device)
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp_(min=0)

    ids_BT = torch.zeros((num_rows, config.max_new_tokens), dtype=torch.long, device=device)
    logp_BT = torch.zeros((num_rows, config.max_new_tokens), dtype=torch.float32, device=device)
    length_B = torch.full((num_rows,), config.max_new_tokens, dtype=torch.long, device=device)
    truncated_B = torch.ones((num_rows,), dtype=torch.bool, device=device)
    row_B = torch.arange(num_rows, device=device)
    """Which row of the output each row of the cache writes to."""
    alive_B = torch.ones((num_rows,), dtype=torch.bool, device=device)

    cache = DynamicCache(config=model.config)
    for step in range(config.max_new_tokens):
        logits_BV: Tensor = model(
            input_ids=input_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token_B, token_logp_B = draw(logits_BV.float(), config, generator)
        ids_BT[row_B[alive_B], step] = token_B[alive_B]
        logp_BT[row_B[alive_B], step] = token_logp_B[alive_B]
        ended_B = alive_B & (token_B == eos_token_id)
        length_B[row_B[ended_B]] = step + 1
        truncated_B[row_B[ended_B]] = False
        alive_B = alive_B & ~ended_B

        num_alive = int(alive_B.sum())
        if num_alive == 0 or step + 1 == config.max_new_tokens:
            break
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones((mask_BT.shape[0], 1))], dim=1)
        input_BT, position_BT = token_B.unsqueeze(1), position_BT[:, -1:] + 1
        if num_alive <= _COMPACT_AT * len(alive_B):
            kept_B = alive_B.nonzero().squeeze(1)
            cache.batch_select_indices(kept_B)
            mask_BT, input_BT, position_BT = mask_BT[kept_B], input_BT[kept_B], position_BT[kept_B]
            row_B, alive_B = row_B[kept_B], alive_B[kept_B]
    return ids_BT, logp_BT, length_B, truncated_B


def draw(logits_BV: Tensor, config: SamplingConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token per row of float32 logits; return ids [B] and their log-probabilities [B]."""
    if config.temperature == 0:
        logp_BV = logits_BV.log_softmax(dim=-1)
        token_B = logits_BV.argmax(dim=-1)
    else:
        logits_BV = _truncate(logits_BV / config.temperature, top_p=config.top_p, top_k=config.top_k)
        logp_BV = logits_BV.log_softmax(dim=-1)
        race_BV = torch.empty_like(logp_BV).exponential_(generator=generator)
        token_B = (logp_BV - race_BV.log_()).argmax(dim=-1)
    return token_B, logp_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)


def _truncate(logits_BV: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Set logits outside the top-k and the nucleus to minus infinity; the most likely token always stays."""
    if 0 < top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, index_BV = logits_BV.sort(dim=-1, descending=True)
        prob_BV = sorted_BV.softmax(dim=-1)
        # A token goes when the mass before it already reaches top_p.
        is_outside_BV = prob_BV.cumsum(dim=-1) - prob_BV >= top_p
        is_outside_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(is_outside_BV.scatter(1, index_BV, is_outside_BV), -torch.inf)
    return logits_BV
