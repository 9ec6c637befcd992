"""What every sampler gives: responses to prompts, with the log-probabilities under which they were drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from transformers import PreTrainedModel

from dpr_lightning.types import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Responses in the order of the prompts that they answer."""

    response_ids: list[list[int]]
    """Sampled ids up to and including the end; never empty."""
    logp: list[list[float]]
    """Log-probability of each id under the distribution that it was drawn from (temperature, top-p, top-k applied)."""
    is_truncated: list[bool]
    """True where the length limit came before an end."""


class Sampler(Protocol):
    """Draws one response for each prompt from a model's current weights."""

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
        """Draw one response per prompt; repeat a prompt to draw several.

        Args:
            model: A causal language model; its train or eval mode is left as it was.
            prompts: Token ids, BOS included where the tokenizer has one; none empty.
            config: Length limit, temperature and truncation of the distribution.
            eos_token_id: The id that ends a response, or several; the first is the one that demonstrations teach.
            seed: The same seed, weights, prompts and batch size give the same responses.
            on_progress: Called with the number of responses finished since the last call.
        """
        ...


@runtime_checkable
class BoundedSampler(Sampler, Protocol):
    """A sampler whose sequences have a longest length of their own."""

    def check_length(self, longest_prompt: int, max_new_tokens: int) -> None:
        """Refuse prompts whose responses might not fit; called before any weights are loaded.

        Args:
            longest_prompt: Tokens of the longest prompt.
            max_new_tokens: The length limit of responses.

        Raises:
            UserError: They do not fit.
        """
        ...
