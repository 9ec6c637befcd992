"""Sampling with transformers' models: draws responses in the fastest way that was found exact for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from dpr_lightning.rollout.decoding import find_decoding
from dpr_lightning.rollout.draws import row_uniforms
from dpr_lightning.rollout.packed import packed_linears
from dpr_lightning.rollout.response import Response
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.types import SamplingConfig, as_ends


class TransformersSampler:
    """Samples with any transformers causal language model, on the model's own device."""

    @torch.no_grad()
    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        config: SamplingConfig,
        eos_token_id: int | Sequence[int],
        seed: int,
        on_progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Draw one response per prompt; see ``Sampler.sample``.

        Each row has random numbers of its own, so that its response does not depend on ``batch_size`` nor on the other
        rows, but for rounding.

        Raises:
            NonFiniteError: The model's logits are not numbers.
            UserError: The model's cached decoding is not what its forward says; see :func:`find_decoding`.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt is empty: there is no state to sample from")
        ends = frozenset(as_ends(eos_token_id))
        rows = [
            Response(row, tuple(prompt), row_uniforms(seed, row, config.max_new_tokens), ends)
            for row, prompt in enumerate(prompts)
        ]
        was_training = model.training
        model.eval()
        try:
            decode = find_decoding(model)
            with packed_linears(model.get_decoder()):
                decode(model, rows, config, on_progress or (lambda _: None))
        finally:
            model.train(was_training)
        return Samples(
            response_ids=[row.ids for row in rows],
            logp=[row.logps for row in rows],
            is_truncated=[row.is_truncated for row in rows],
        )

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot be sampled, before anything is trained; see :func:`find_decoding`."""
        find_decoding(model)
