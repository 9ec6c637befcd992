"""Supervised fine-tuning on response tokens: the teacher, and halfway to it the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from dpr_lightning.data.prompts import PromptBatch
from dpr_lightning.functional.losses import sft_loss
from dpr_lightning.models.policies import scatter_tokens
from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.types import SFTBatch


class SFTModule(CausalLMModule):
    """Cross-entropy on response tokens, EOS included, as a mean over the whole optimizer step (ALGORITHM.md section 1).

    Args:
        kwargs: See ``CausalLMModule``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.evaluation_loss = MeanMetric()

    @override
    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        logp_BT = scatter_tokens(self.actor(batch).logp_N, batch.response_mask_BT)
        out = sft_loss(logp_BT, batch.response_mask_BT, num_tokens=batch.num_tokens)
        return self.finish_step(out, batch, batch_idx)

    @override
    def validation_step(self, batch: SFTBatch | PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, "val/loss")

    @override
    def test_step(self, batch: SFTBatch | PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, "test/loss")

    def _evaluate(self, batch: SFTBatch | PromptBatch, batch_idx: int, key: str) -> None:
        """Score held-out demonstrations; or answer held-out prompts, where there are metrics of responses."""
        if isinstance(batch, PromptBatch):
            samples = self.sample(batch.prompt_ids, self.decoding, seed=self.evaluation_seed(batch_idx))
            self.update_response_metrics(batch, samples)
            return
        logp_N = self.actor(batch).logp_N
        self.evaluation_loss.update(-logp_N, torch.ones_like(logp_N))
        self.log(
            key,
            self.evaluation_loss,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=1,
            add_dataloader_idx=False,
        )
