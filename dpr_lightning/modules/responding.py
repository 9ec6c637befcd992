"""How a module answers prompts: sampling, the text of responses, and the metrics that grade them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from lightning import LightningModule
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from dpr_lightning.data.ends import decode_response, response_ends
from dpr_lightning.data.prompts import PromptBatch
from dpr_lightning.data.templates import PromptTemplate
from dpr_lightning.evaluation.metrics import ResponseMetric
from dpr_lightning.models.backbone import BackboneConfig, load_tokenizer
from dpr_lightning.models.parallel import gathered
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.rollout.sampler import Sampler, Samples
from dpr_lightning.types import SamplingConfig


class RespondingModule(LightningModule):
    """Draws responses from its policy; ``CausalLMModule`` sets what is declared here."""

    backbone: BackboneConfig
    policy: CausalPolicy | None
    sampler: Sampler
    decoding: SamplingConfig
    metrics: torch.nn.ModuleList
    prediction_seed: int
    _tokenizer: PreTrainedTokenizerBase | None
    _response_ends: int | list[int] | None

    @property
    def initial_weights(self) -> str:
        """Directory or hub name that the trained weights start from."""
        return self.backbone.name_or_path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the initial weights; read on first use, without any weights."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.initial_weights, self.backbone)
        return self._tokenizer

    @property
    def actor(self) -> CausalPolicy:
        """The policy that is trained."""
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    @override
    def on_test_start(self) -> None:
        self.on_validation_start()

    @override
    def on_validation_start(self) -> None:
        # States that ``validate`` made in inference mode could not be added to by a later ``fit``'s validation.
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def sample(self, prompts: list[list[int]], config: SamplingConfig, *, seed: int, **kwargs: Any) -> Samples:
        """Draw one response per prompt from the current weights, in the Trainer's precision."""
        # A sampler with weights of its own takes them over one by one.
        has_own_weights = getattr(self.sampler, "has_own_weights", False)
        weights = nullcontext() if has_own_weights else gathered(self.actor)
        with self.trainer.precision_plugin.forward_context(), weights:
            return self.sampler.sample(
                self.actor.model, prompts, config=config, eos_token_id=self.response_ends, seed=seed, **kwargs
            )

    @property
    def response_ends(self) -> int | list[int]:
        """All ids that end a response: of the tokenizer, the chat template and the model's generation config."""
        if self.policy is None:
            # The model's own are not known before it is loaded.
            return response_ends(self.tokenizer, self._template)
        if self._response_ends is None:
            self._response_ends = response_ends(self.tokenizer, self._template, self.policy.model.generation_config)
        return self._response_ends

    @property
    def _template(self) -> PromptTemplate | None:
        return getattr(getattr(self._trainer, "datamodule", None), "template", None)

    def decode(self, response_ids: list[int]) -> str:
        """Return the text of a response, without its end."""
        return decode_response(self.tokenizer, response_ids, self.response_ends)

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one row per prompt: ``row``, ``prompt``, ``response``, ``num_tokens``, ``is_truncated``."""
        samples = self.sample(batch.prompt_ids, self.decoding, seed=self.evaluation_seed(batch_idx))
        return [
            {
                "row": row["row"],
                "prompt": row["prompt"],
                "response": self.decode(ids),
                "num_tokens": len(ids),
                "is_truncated": is_truncated,
            }
            for row, ids, is_truncated in zip(batch.rows, samples.response_ids, samples.is_truncated, strict=True)
        ]

    @property
    def response_metrics(self) -> list[ResponseMetric]:
        """The metrics of responses to held-out prompts."""
        return cast("list[ResponseMetric]", list(self.metrics))

    def update_response_metrics(self, batch: PromptBatch, samples: Samples) -> None:
        """Let every metric grade the responses to ``batch``, if it is meant for them."""
        if not batch.for_metrics or not self.response_metrics:
            return
        texts = [self.decode(ids) for ids in samples.response_ids]
        for metric in self.response_metrics:
            metric.update(batch.rows, texts, samples.is_truncated)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_response_metrics("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_response_metrics("test")

    def _log_response_metrics(self, stage: str) -> None:
        for metric in self.response_metrics:
            # Of all ranks: torchmetrics sums the states before it computes.
            for name, value in metric.compute().items():
                self.log(f"{stage}/{name}", value.float(), prog_bar=name == "accuracy", batch_size=1, sync_dist=True)
            metric.reset()

    def evaluation_seed(self, batch_idx: int) -> int:
        """Return a seed that differs between batches and ranks, and not between epochs: curves stay comparable."""
        return (self.prediction_seed * 1_000_003 + batch_idx) * 4099 + self.global_rank
