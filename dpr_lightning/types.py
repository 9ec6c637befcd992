"""Settings and batches that cross a room's border.

Shape legend, used for every tensor name in the package: B sequences, T positions (prompt and response together),
N response tokens laid end to end, V vocabulary entries, D hidden units, S samples of one prompt.

Alignment: every ``*_BT`` tensor is indexed by the token that it speaks of. ``logp_BT[b, t]`` is
``log pi(input_ids_BT[b, t] | input_ids_BT[b, :t])``, and ``response_mask_BT[b, t]`` is True where
``input_ids_BT[b, t]`` belongs to the response (its EOS included). There is no shifted copy anywhere, and column 0 is
never part of a response.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar, cast, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import pad

DataclassT = TypeVar("DataclassT")


def pack(value: Any) -> Any:
    """Return a dataclass of tensors, plain values and further such dataclasses as nested mappings by field name."""
    if not dataclasses.is_dataclass(value):
        return value
    return {field.name: pack(getattr(value, field.name)) for field in dataclasses.fields(value)}


def unpack(cls: type[DataclassT], packed: Mapping[str, Any]) -> DataclassT:
    """Return the ``cls`` that :func:`pack` made ``packed`` of; keys that are no field are left alone."""
    hints = get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value, hint = packed[field.name], hints[field.name]
        # A field that may be None names its dataclass as one of several types.
        inner = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        values[field.name] = value if inner is None or value is None else unpack(cast("type[Any]", inner), value)
    return cls(**values)


def concatenate(parts: Sequence[Any]) -> Any:
    """Return what :func:`pack` would have made of all rows together, given what it made of parts of them.

    Rows are dimension 0 of every tensor; a second dimension is padded on the right with 0 to the widest. What is no
    tensor is taken from the first part.

    Args:
        parts: One or more, all of the same class.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: concatenate([part[name] for part in parts]) for name in first}
    if not isinstance(first, Tensor):
        return first
    if first.dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])


def as_ends(eos_token_id: int | Sequence[int]) -> tuple[int, ...]:
    """Return the ids that end a response as a sequence, however many there are."""
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


class _TensorBatch:
    """Moves and slices a dataclass of tensors; the fields themselves are declared by the subclasses."""

    __slots__ = ()

    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """Return a copy whose tensors lie on ``device``; Lightning calls this to transfer a batch."""
        moved = {
            field.name: value.to(device, **kwargs) if isinstance(value, Tensor) else value
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            for value in (getattr(self, field.name),)
        }
        return type(self)(**moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch(_TensorBatch):
    """Prompts and responses as one padded rectangle."""

    input_ids_BT: Tensor
    """[B, T] int64 token ids, prompt then response; padding holds any valid id."""
    attention_mask_BT: Tensor
    """[B, T] bool, True on prompt and response tokens, False on padding (on either side)."""
    response_mask_BT: Tensor
    """[B, T] bool, True where the token belongs to the response, EOS included. Made from lengths, never from ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTBatch(TokenBatch):
    """One micro-batch of demonstrations."""

    num_tokens: int
    """Response tokens in the whole optimizer step: every micro-batch of every rank. The loss's denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch(TokenBatch):
    """Samples of the current actor, right-padded."""

    prompt_index_B: Tensor
    """[B] int64, which training prompt each row answers; the samples of one prompt share it and are adjacent."""
    is_truncated_B: Tensor
    """[B] bool, True where the response reached the length limit without EOS."""
    sampler_logp_BT: Tensor
    """[B, T] float32 log-probability under the sampler's own (tempered) distribution; 0 outside the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores(_TensorBatch):
    """What the actor, the teacher and the reference say of each response token; all exactly 0 elsewhere.

    Log-probabilities are float32 log-softmax of raw, untempered logits, from the trainer's own forward.
    """

    response_mask_BT: Tensor
    """[B, T] bool, True on response tokens."""
    old_logp_BT: Tensor
    """[B, T] float32, log pi_old: the actor as it sampled."""
    teacher_logp_BT: Tensor
    """[B, T] float32, log pi_SFT."""
    reference_logp_BT: Tensor
    """[B, T] float32, log pi_ref."""
    old_entropy_BT: Tensor
    """[B, T] float32, nats, entropy of pi_old at the state in which the token was chosen."""
    teacher_value_BT: Tensor | None = None
    """[B, T] float32, V_SFT = logsumexp of the teacher's logits at the state in which the token was chosen."""
    reference_value_BT: Tensor | None = None
    """[B, T] float32, the same under the reference."""
    teacher_kl_BT: Tensor | None = None
    """[B, T] float32, exact KL(pi_old || pi_SFT) at that state, summed over the vocabulary."""
    expected_dense_BT: Tensor | None = None
    """[B, T] float32, exact expectation over pi_old of the dense reward (clipped as the reward is) at that state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DPRBatch(TokenBatch):
    """One micro-batch of scored rollouts, ready for the policy loss."""

    old_logp_BT: Tensor
    """[B, T] float32, log pi_old."""
    teacher_logp_BT: Tensor
    """[B, T] float32, log pi_SFT, for the KL terms and metrics."""
    advantage_BT: Tensor
    """[B, T] float32, normalised over the whole rollout batch and all ranks, then times the importance weight where
    ``model.importance_cap`` asks for one; 0 outside the response."""
    num_tokens: int
    """Response tokens in the whole optimizer step: every micro-batch of every rank."""
    num_sequences: int
    """Responses in the whole optimizer step, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOBatch(DPRBatch):
    """The same with what the critic's loss needs."""

    old_value_BT: Tensor
    """[B, T] float32, V of the critic before the updates; 0 outside the response, like the one below."""
    return_BT: Tensor
    """[B, T] float32, what the critic is to predict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch(TokenBatch):
    """One micro-batch of P pairs as B = 2P rows: the demonstrations, then the samples of the same prompts in order.

    A padding pair has no response token in either row.
    """

    old_logp_B: Tensor
    """[B] float64, log pi_k of each response: the sum over its tokens under the actor as iteration k began."""
    iteration: int
    """k, from 0."""
    num_pairs: int
    """Pairs in the whole optimizer step: every micro-batch of every rank. The loss's denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledExperience:
    """What every method keeps of one epoch's samples, of all ranks; subclasses add what their updates need."""

    rollouts: RolloutBatch
    """This epoch's samples."""
    stats: dict[str, float]
    """Figures of the whole rollout batch over all ranks, by log key."""
    seconds: dict[str, float]
    """Wall time of the ``rollout`` and ``score`` stages, of the slowest rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(SampledExperience):
    """One epoch's rollouts with everything that the updates need; advantages are final."""

    scores: TokenScores
    reward_BT: Tensor
    """[B, T] float32, KL penalty inside where there is one; 0 outside the response, like the two below."""
    return_BT: Tensor
    """[B, T] float32 reward-to-go."""
    advantage_BT: Tensor
    """[B, T] float32, baseline removed and normalised over all ranks."""
    value_BT: Tensor | None = None
    """[B, T] float32, the critic's V of the state in which the token was chosen; None for methods without a critic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExperience(SampledExperience):
    """One iteration's pairs: each sample beside the demonstration of its prompt.

    Pairs are numbered through: those of ``rollouts`` first, then those of ``previous``. Demonstrations are found by
    ``prompt_index_B`` and are not kept twice.
    """

    previous: RolloutBatch | None
    """Samples of the iteration before that are trained on once more; None where there are none."""
    demonstration_logp_P: Tensor
    """[P] float64, log pi_k of each pair's demonstration, summed over its tokens."""
    sample_logp_P: Tensor
    """[P] float64, the same of its sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    max_new_tokens: int = 1024
    """Longest response, EOS included; one that reaches it without EOS is marked truncated."""
    temperature: float = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 keeps every token."""
    top_k: int = 0
    """Keep only this many most likely tokens; 0 keeps every token."""
    batch_size: int = 64
    """Prompts decoded together."""

    def __post_init__(self) -> None:
        """Refuse what no sampler could do."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (most likely token) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
