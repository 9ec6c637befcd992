"""The teacher's own samples, scored by teacher and references, and verified where a verifier is at hand.

Shapes: N samples, those of one prompt adjacent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpr_lightning.analysis.frozen import FrozenPolicies, ScoredResponses, sample_teacher, score_responses
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.evaluation.answers import verify
from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.functional.collate import collate
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.types import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSamples:
    """Samples of the teacher and what is known of them."""

    samples: Samples
    scored: ScoredResponses
    prompt_index_N: npt.NDArray[np.int64]
    """[N] which prompt each answers."""
    is_correct_N: npt.NDArray[np.float64] | None
    """[N] the verifier's word, 1 for right; a truncated sample is wrong. None without a verifier."""


def draw_and_score(
    policies: FrozenPolicies,
    prompt_ids: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    *,
    verifier: Verifier | None,
    sampling: SamplingConfig,
    num_samples: int,
    seed: int,
) -> ScoredSamples:
    """Sample the teacher, verify its responses, and score them under teacher and references.

    Args:
        policies: Whom to sample and to ask.
        prompt_ids: Token ids of the prompts.
        rows: Their rows, for the verifier.
        verifier: Judges each response; None leaves them unjudged.
        sampling: How the teacher is sampled.
        num_samples: Responses of each prompt.
        seed: Of the samples.

    Raises:
        UserError: A row lacks what the verifier compares with; told before anything is sampled.
    """
    if verifier is not None:
        for row in rows:
            verifier(row, "")
    teacher = policies.load(policies.teacher)
    samples = sample_teacher(policies, teacher, prompt_ids, sampling=sampling, num_samples=num_samples, seed=seed)
    is_correct_N = None
    if verifier is not None:
        answers = verify(samples, rows, verifier=verifier, tokenizer=policies.tokenizer, num_samples=num_samples)
        is_correct_N = answers.is_correct_PS.reshape(-1).astype(np.float64)
    repeated = [ids for ids in prompt_ids for _ in range(num_samples)]
    tokens = collate(repeated, samples.response_ids, pad_id=pad_id(policies.tokenizer))
    return ScoredSamples(
        samples=samples,
        scored=score_responses(policies, tokens, teacher=teacher),
        prompt_index_N=np.repeat(np.arange(len(prompt_ids), dtype=np.int64), num_samples),
        is_correct_N=is_correct_N,
    )
