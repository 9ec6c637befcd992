"""A token MDP that is small enough to write down: every sequence, every probability, float64.

Three ordinary tokens and EOS, at most four tokens in a response. A response ends at EOS or is cut off at the horizon.
A policy is a table of logits with a row for each prefix (state) that can be reached.

Shapes: B all sequences, T positions (column 0 is the prompt), P prefixes, V tokens, N response tokens laid end to end.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpr_lightning.functional import LMHead, state_expectations, token_logprobs
from dpr_lightning.types import TokenScores

EOS = 3
NUM_TOKENS = 4
HORIZON = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMDP:
    """All responses to one prompt."""

    prefixes: list[tuple[int, ...]]
    """The P states, shortest first; number 0 is the empty response."""
    sequences: list[tuple[int, ...]]
    """The B responses."""
    input_ids_BT: Tensor
    """[B, 1 + horizon] int64; column 0 and the padding hold 0, which is an ordinary token as well."""
    prefix_BT: Tensor
    """[B, T] int64, the state in which each response token was chosen; 0 elsewhere."""
    mask_BT: Tensor
    """[B, T] bool, True on response tokens."""

    @classmethod
    def build(cls) -> TokenMDP:
        """Enumerate prefixes and responses."""
        words = [
            word for length in range(HORIZON + 1) for word in itertools.product(range(NUM_TOKENS - 1), repeat=length)
        ]
        prefixes = [word for word in words if len(word) < HORIZON]
        sequences = [(*word, EOS) for word in prefixes] + [word for word in words if len(word) == HORIZON]
        input_ids_BT = torch.zeros(len(sequences), 1 + HORIZON, dtype=torch.int64)
        prefix_BT = torch.zeros_like(input_ids_BT)
        mask_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            for t, token in enumerate(sequence):
                input_ids_BT[row, 1 + t] = token
                prefix_BT[row, 1 + t] = prefixes.index(sequence[:t])
                mask_BT[row, 1 + t] = True
        return cls(
            prefixes=prefixes, sequences=sequences, input_ids_BT=input_ids_BT, prefix_BT=prefix_BT, mask_BT=mask_BT
        )

    def policy(self, seed: int, *, scale: float = 1.0) -> Tensor:
        """Return a [P, V] float64 table of random logits."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(len(self.prefixes), NUM_TOKENS, generator=generator, dtype=torch.float64)

    def logp(self, logits_PV: Tensor) -> Tensor:
        """Return [B, T] log-probabilities, 0 outside the response; differentiable, by plain log_softmax."""
        logp_BT = logits_PV.log_softmax(dim=-1)[self.prefix_BT, self.input_ids_BT]
        return torch.where(self.mask_BT, logp_BT, 0.0)

    def probability(self, logits_PV: Tensor) -> Tensor:
        """Return the [B] probability of each response; differentiable."""
        return self.logp(logits_PV).sum(dim=1).exp()

    def by_state(self, value_P: Tensor) -> Tensor:
        """Return [B, T] the value of the state in which each token was chosen, 0 outside the response."""
        return torch.where(self.mask_BT, value_P[self.prefix_BT], 0.0)

    def scores(
        self,
        actor_PV: Tensor,
        teacher_PV: Tensor,
        reference_PV: Tensor,
        *,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> TokenScores:
        """Score all responses with the package's own functions, logits for hidden states and the identity for head."""
        head = LMHead(weight_VD=torch.eye(NUM_TOKENS, dtype=torch.float64))
        target_N, prefix_N = self.input_ids_BT[self.mask_BT], self.prefix_BT[self.mask_BT]
        actor, teacher, reference = (
            token_logprobs(logits_PV.detach()[prefix_N], head, target_N, chunk_size=50, with_entropy=True)
            for logits_PV in (actor_PV, teacher_PV, reference_PV)
        )
        expected = state_expectations(
            (actor_PV, head), (teacher_PV, head), (reference_PV, head), low=low, high=high, chunk_size=7
        )
        assert actor.entropy_N is not None
        return TokenScores(
            response_mask_BT=self.mask_BT,
            old_logp_BT=self._spread(actor.logp_N),
            teacher_logp_BT=self._spread(teacher.logp_N),
            reference_logp_BT=self._spread(reference.logp_N),
            old_entropy_BT=self._spread(actor.entropy_N),
            teacher_value_BT=self._spread(teacher.logsumexp_N),
            reference_value_BT=self._spread(reference.logsumexp_N),
            teacher_kl_BT=self.by_state(expected.teacher_kl_N),
            expected_dense_BT=self.by_state(expected.log_ratio_N),
        )

    def _spread(self, value_N: Tensor) -> Tensor:
        return torch.zeros_like(self.mask_BT, dtype=torch.float64).masked_scatter(self.mask_BT, value_N)


def gradient_of_expectation(mdp: TokenMDP, logits_PV: Tensor, total_B: Tensor) -> Tensor:
    """Return the exact [P, V] gradient of sum_y pi(y) total(y), ``total_B`` held constant."""
    leaf_PV = logits_PV.detach().clone().requires_grad_()
    (grad_PV,) = torch.autograd.grad((mdp.probability(leaf_PV) * total_B.detach()).sum(), leaf_PV)
    return grad_PV
