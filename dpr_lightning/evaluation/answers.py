"""A policy's answers to held-out prompts, verified: accuracy, length and truncation at several temperatures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.models.backbone import BackboneConfig, load_model, load_tokenizer
from dpr_lightning.models.policies import load_policy
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.scoring import make_rollouts, score_tokens
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Verified answers of one policy at one temperature: P prompts, S samples of each."""

    is_correct_PS: npt.NDArray[np.bool_]
    """[P, S]."""
    num_tokens_PS: npt.NDArray[np.int64]
    """[P, S] length of each response, EOS included."""
    is_truncated_PS: npt.NDArray[np.bool_]
    """[P, S] True where the length limit came before EOS."""


def verify(
    samples: Samples,
    rows: Sequence[Mapping[str, Any]],
    *,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
) -> Answers:
    """Judge samples that lie prompt by prompt; a truncated response is wrong whatever it says.

    Args:
        samples: ``num_samples`` adjacent responses for each row.
        rows: The prompts' rows.
        verifier: Judges text.
        tokenizer: Decodes the ids.
        num_samples: Responses of each prompt.
    """
    texts = tokenizer.batch_decode(samples.response_ids, skip_special_tokens=True)
    verdicts = [
        not is_truncated and verifier(rows[index // num_samples], text)
        for index, (text, is_truncated) in enumerate(zip(texts, samples.is_truncated, strict=True))
    ]
    shape = (len(rows), num_samples)
    return Answers(
        is_correct_PS=np.array(verdicts, dtype=np.bool_).reshape(shape),
        num_tokens_PS=np.array([len(ids) for ids in samples.response_ids], dtype=np.int64).reshape(shape),
        is_truncated_PS=np.array(samples.is_truncated, dtype=np.bool_).reshape(shape),
    )


def answer(
    model_dir: Path,
    prompt_ids: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    *,
    verifier: Verifier,
    sampling: SamplingConfig,
    temperatures: Sequence[float],
    num_samples: int,
    seed: int,
    on_progress: Callable[[int], object] | None = None,
) -> dict[float, Answers]:
    """Let the model in ``model_dir`` answer every prompt at every temperature; temperature 0 takes one sample.

    Args:
        model_dir: A transformers directory.
        prompt_ids: Token ids of P prompts, as SFT encoded them.
        rows: Their rows, for the verifier.
        verifier: Judges each answer.
        sampling: Length limit and batch size; the temperature is replaced.
        temperatures: Where to sample.
        num_samples: Responses of each prompt above temperature 0.
        seed: The same for every policy that is compared.
        on_progress: Called with the number of responses finished since the last call.
    """
    backbone = BackboneConfig(name_or_path=str(model_dir))
    model, tokenizer = load_model(str(model_dir), backbone).eval(), load_tokenizer(str(model_dir), backbone)
    eos_token_id = tokenizer.eos_token_id
    assert isinstance(eos_token_id, int)
    answers = {}
    for temperature in temperatures:
        repeats = num_samples if temperature > 0 else 1
        samples = TransformersSampler().sample(
            model,
            [ids for ids in prompt_ids for _ in range(repeats)],
            config=dataclasses.replace(sampling, temperature=temperature),
            eos_token_id=eos_token_id,
            seed=seed,
            on_progress=on_progress,
        )
        answers[temperature] = verify(samples, rows, verifier=verifier, tokenizer=tokenizer, num_samples=repeats)
    return answers


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRanking:
    """What the teacher's own samples say of the dense reward before any RL."""

    dense_N: npt.NDArray[np.float64]
    """[N] sum of r_hat of each response."""
    logp_N: npt.NDArray[np.float64]
    """[N] log pi_SFT of each response."""
    is_correct_N: npt.NDArray[np.bool_]
    """[N] the verifier's word."""
    prompt_index_N: npt.NDArray[np.int64]
    """[N] which prompt each response answers."""
    num_tokens_N: npt.NDArray[np.int64]
    """[N] length of each response."""


def rank_teacher_samples(
    teacher_dir: Path,
    reference_dir: Path,
    prompt_ids: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    *,
    verifier: Verifier,
    sampling: SamplingConfig,
    num_samples: int,
    seed: int,
    micro_batch_size: int = 256,
) -> TeacherRanking:
    """Sample the teacher, score its responses with the dense reward, and verify them.

    Args:
        teacher_dir: Transformers directory of pi_SFT.
        reference_dir: The same of pi_ref.
        prompt_ids: Token ids of the prompts.
        rows: Their rows, for the verifier.
        verifier: Judges each response.
        sampling: How the teacher is sampled.
        num_samples: Responses of each prompt.
        seed: Of the samples.
        micro_batch_size: Rows of one scoring forward.
    """
    backbone = BackboneConfig(name_or_path=str(teacher_dir))
    teacher = load_policy(str(teacher_dir), backbone, chunk_size=1024).freeze()
    reference = load_policy(str(reference_dir), backbone, chunk_size=1024).freeze()
    tokenizer = load_tokenizer(str(teacher_dir), backbone)
    eos_token_id = tokenizer.eos_token_id
    assert isinstance(eos_token_id, int)
    index = [number for number in range(len(prompt_ids)) for _ in range(num_samples)]
    repeated = [prompt_ids[number] for number in index]
    samples = TransformersSampler().sample(
        teacher.model, repeated, config=sampling, eos_token_id=eos_token_id, seed=seed
    )
    rollouts = make_rollouts(repeated, samples, index, pad_id=eos_token_id)
    scores = score_tokens(
        rollouts, actor=teacher, teacher=teacher, reference=reference, micro_batch_size=micro_batch_size
    )
    answers = verify(samples, rows, verifier=verifier, tokenizer=tokenizer, num_samples=num_samples)
    dense_B = (scores.teacher_logp_BT - scores.reference_logp_BT).sum(dim=1, dtype=torch.float64)
    return TeacherRanking(
        dense_N=dense_B.numpy(),
        logp_N=scores.teacher_logp_BT.sum(dim=1, dtype=torch.float64).numpy(),
        is_correct_N=answers.is_correct_PS.reshape(-1),
        prompt_index_N=np.array(index, dtype=np.int64),
        num_tokens_N=answers.num_tokens_PS.reshape(-1),
    )
