"""Batches of given shapes, for steps whose tensors have no contents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.modules.pairs import PairModule
from dpr_lightning.modules.ppo import PPOModule
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import DPRBatch, PairBatch, PPOBatch, RolloutBatch, SFTBatch, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The rectangle of one micro-batch, the longest that limits allow unless said otherwise."""

    rows: int
    prompt_tokens: int
    response_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the rectangle."""
        return self.rows * (self.prompt_tokens + self.response_tokens)


def training_batch(module: CausalLMModule, shape: Shape) -> Any:
    """Return a micro-batch of a module's kind; half of its rows are a token shorter, so that padding is there."""
    tokens = _tokens(shape)
    num_tokens, zeros_BT = int(tokens.response_mask_BT.sum()), torch.zeros(tokens.input_ids_BT.shape)
    common: dict[str, Any] = {
        "input_ids_BT": tokens.input_ids_BT,
        "attention_mask_BT": tokens.attention_mask_BT,
        "response_mask_BT": tokens.response_mask_BT,
    }
    if isinstance(module, SFTModule):
        return SFTBatch(**common, num_tokens=num_tokens)
    if isinstance(module, PairModule):
        old_logp_B = torch.zeros(len(zeros_BT), dtype=torch.float64)
        return PairBatch(**common, old_logp_B=old_logp_B, iteration=0, num_pairs=len(zeros_BT) // 2)
    common |= {name: zeros_BT.clone() for name in ("old_logp_BT", "teacher_logp_BT", "advantage_BT")}
    common |= {"num_tokens": num_tokens, "num_sequences": len(zeros_BT)}
    if isinstance(module, PPOModule):
        return PPOBatch(**common, old_value_BT=zeros_BT.clone(), return_BT=zeros_BT.clone())
    return DPRBatch(**common)


def _tokens(shape: Shape) -> TokenBatch:
    width = shape.prompt_tokens + shape.response_tokens
    attention_mask_BT = torch.ones((shape.rows, width), dtype=torch.bool)
    attention_mask_BT[shape.rows // 2 + 1 :, -1] = False
    response_mask_BT = attention_mask_BT.clone()
    response_mask_BT[:, : shape.prompt_tokens] = False
    input_ids_BT = torch.ones((shape.rows, width), dtype=torch.long)
    # No two prompts are the same: those that are would be read once.
    input_ids_BT[:, 0] = torch.arange(shape.rows)
    return TokenBatch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        response_mask_BT=response_mask_BT,
    )


def rollouts(shape: Shape) -> RolloutBatch:
    """Return samples that were all cut off."""
    tokens = _tokens(shape)
    return RolloutBatch(
        input_ids_BT=tokens.input_ids_BT,
        attention_mask_BT=tokens.attention_mask_BT,
        response_mask_BT=tokens.response_mask_BT,
        prompt_index_B=torch.arange(shape.rows),
        is_truncated_B=torch.ones(shape.rows, dtype=torch.bool),
        sampler_logp_BT=torch.zeros(tokens.input_ids_BT.shape),
    )
