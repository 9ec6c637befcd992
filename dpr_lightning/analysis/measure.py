"""What a finished run is worth: verified answers, proxy reward and distance to the teacher, and the compute it took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpr_lightning.analysis.experiment import EvaluationSpec
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.ends import response_ends
from dpr_lightning.data.prompts import PromptBatch, load_prompts
from dpr_lightning.data.templates import TextTemplate, template_from_manifest
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.evaluation.answers import Answers, verify
from dpr_lightning.manifest import read_manifest
from dpr_lightning.models.backbone import BackboneConfig, load_tokenizer
from dpr_lightning.models.policies import find_frozen_pair, load_policy
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.scoring import make_rollouts, score_tokens
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import SamplingConfig, TokenScores

FORWARD, FORWARD_BACKWARD = 1, 3
"""Compute of one token in forwards: sampled or scored once, or trained on (a backward is two forwards)."""


def token_forwards(run: Mapping[str, Any]) -> int:
    """Return the compute of a run in forwards of one token, from its ``run.json``."""
    tokens = run["tokens"]
    return int(FORWARD * (tokens["rolled_out"] + tokens["scored"]) + FORWARD_BACKWARD * tokens["trained"])


def steps_for(forwards: int, sft: Mapping[str, Any]) -> int:
    """Return the SFT steps that ``forwards`` pays for, rounded up, at the tokens per step of an SFT run."""
    per_step = FORWARD_BACKWARD * sft["tokens"]["trained"] / sft["optimizer_steps"]
    return int(-(-forwards // per_step))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of one policy; P prompts, S samples of each, T response positions."""

    answers: dict[float, Answers]
    """Verified answers by temperature."""
    teacher_kl: float
    """KL(pi || pi_SFT) in nats per response, exact at each state, over one sample per prompt at temperature 1."""
    reward_sum: float
    """Mean of the summed r_hat of the same samples, in nats."""
    length_correlation: float
    """Pearson's correlation of that sum with the response's length; 0 where either is constant."""
    positions: dict[str, list[float]]
    """By response position, over the samples that reach it: ``count``, and means of ``kl`` and ``reward``."""


def measure(run_dir: Path, teacher_dir: Path, evaluation: EvaluationSpec) -> Measured:
    """Let the final policy of a run answer held-out prompts, and hold its samples against teacher and reference.

    Args:
        run_dir: A finished run.
        teacher_dir: The SFT run that it started from.
        evaluation: Prompts (their variables filled in), verifier and decoding.
    """
    final = run_dir / "final"
    backbone = BackboneConfig(name_or_path=str(final))
    actor = load_policy(str(final), backbone, chunk_size=1024).freeze()
    tokenizer = load_tokenizer(str(final), backbone)
    recorded = read_manifest(final).get("data")
    template = template_from_manifest(recorded["template"]) if recorded else TextTemplate()
    source = DemonstrationConfig(source=evaluation.prompts, preset=evaluation.preset)  # type: ignore[arg-type]
    prompts = load_prompts(source, template=template, tokenizer=tokenizer)["train"]
    batch = prompts.batch(range(len(prompts)))

    def draw(temperature: float, num_samples: int) -> Samples:
        return TransformersSampler().sample(
            actor.model,
            [ids for ids in batch.prompt_ids for _ in range(num_samples)],
            config=SamplingConfig(
                temperature=temperature, max_new_tokens=evaluation.max_new_tokens, batch_size=evaluation.batch_size
            ),
            eos_token_id=response_ends(tokenizer, template, actor.model.generation_config),
            seed=evaluation.seed,
        )

    answers = {}
    if evaluation.verifier is not None:
        for temperature in evaluation.temperatures:
            num_samples = evaluation.num_samples if temperature > 0 else 1
            answers[temperature] = verify(
                draw(temperature, num_samples),
                batch.rows,
                verifier=evaluation.verifier,
                tokenizer=tokenizer,
                num_samples=num_samples,
            )
    pair = find_frozen_pair(str(teacher_dir), None, alpha=evaluation.alpha)
    return Measured(
        answers=answers, **_against_teacher(batch, draw(1.0, 1), actor, pair, backbone, pad_id(tokenizer), evaluation)
    )


def _against_teacher(
    batch: PromptBatch,
    samples: Samples,
    actor: Any,
    pair: Any,
    backbone: BackboneConfig,
    padding: int,
    evaluation: EvaluationSpec,
) -> dict[str, Any]:
    rollouts = make_rollouts(batch.prompt_ids, samples, range(len(batch)), pad_id=padding)
    teacher, reference = (
        load_policy(str(name), backbone, chunk_size=1024).freeze() for name in (pair.teacher, pair.reference)
    )
    scores = score_tokens(
        rollouts,
        actor=actor,
        teacher=teacher,
        reference=reference,
        micro_batch_size=evaluation.batch_size,
        expectation_limits=(-float("inf"), float("inf")),
    )
    assert scores.teacher_kl_BT is not None
    sum_B = (scores.teacher_logp_BT - scores.reference_logp_BT).sum(dim=1, dtype=torch.float64)
    length_B = rollouts.response_mask_BT.sum(dim=1, dtype=torch.float64)
    is_constant = float(sum_B.std()) == 0.0 or float(length_B.std()) == 0.0
    return {
        "teacher_kl": float(scores.teacher_kl_BT.sum(dim=1, dtype=torch.float64).mean()),
        "reward_sum": float(sum_B.mean()),
        "length_correlation": 0.0 if is_constant else float(torch.corrcoef(torch.stack([sum_B, length_B]))[0, 1]),
        "positions": by_position(scores),
    }


def by_position(scores: TokenScores) -> dict[str, list[float]]:
    """Return count, mean exact KL to the teacher, and mean r_hat by response position (paper Figure 4a)."""
    mask_BT = scores.response_mask_BT
    assert scores.teacher_kl_BT is not None
    position_N = (mask_BT.cumsum(dim=1) - 1)[mask_BT]
    count_T = position_N.bincount()

    def mean(value_BT: Tensor) -> list[float]:
        total_T = torch.bincount(position_N, weights=value_BT[mask_BT].double())
        return [float(value) for value in total_T / count_T]

    return {
        "count": [float(value) for value in count_T],
        "kl": mean(scores.teacher_kl_BT),
        "reward": mean(scores.teacher_logp_BT - scores.reference_logp_BT),
    }


def save_answers(path: Path, answers: Mapping[float, Answers]) -> None:
    """Write verified answers as ``.npz``: by temperature, whether each is right, its length, and truncation."""
    arrays = {
        f"{field.name}@{temperature:g}": getattr(found, field.name)
        for temperature, found in answers.items()
        for field in dataclasses.fields(found)
    }
    np.savez_compressed(path, **arrays)


def load_answers(path: Path) -> dict[float, Answers]:
    """Read what :func:`save_answers` wrote."""
    with np.load(path) as arrays:
        temperatures = dict.fromkeys(name.partition("@")[2] for name in arrays.files)
        return {
            float(temperature): Answers(
                **{field.name: arrays[f"{field.name}@{temperature}"] for field in dataclasses.fields(Answers)}
            )
            for temperature in temperatures
        }
