"""``dpr-lightning variance``: how noisy the policy gradient is under dense, sentence and expected returns.

All estimators see the same samples of the same policy, so what differs is the credit alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from dpr_lightning.analysis.frozen import (
    FrozenPolicies,
    add_policy_arguments,
    policies_from_arguments,
    sample_teacher,
)
from dpr_lightning.analysis.gradient_variance import (
    BASELINES,
    Credit,
    GradientMoments,
    credits_of,
    measure_gradients,
)
from dpr_lightning.analysis.responses import (
    Responses,
    add_data_arguments,
    check_counts,
    data_config,
    read_responses,
    recorded_demonstrations,
)
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.statistics import ratio_interval
from dpr_lightning.functional.losses import reinforce_loss
from dpr_lightning.functional.rewards import DenseReward
from dpr_lightning.manifest import atomic_write_json, environment
from dpr_lightning.models.policies import CausalPolicy, load_policy, scatter_tokens
from dpr_lightning.rollout.scoring import make_rollouts, score_tokens, trim
from dpr_lightning.terminal import Table, make_console
from dpr_lightning.types import RolloutBatch, SamplingConfig, TokenScores

_CHUNK_SIZE = 256
"""Tokens whose logits over the vocabulary exist at one time."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure the variance of the policy gradient under dense, sentence and expected returns on the same samples."""
    parser = argparse.ArgumentParser(prog="dpr-lightning variance", description=main.__doc__)
    add_policy_arguments(parser)
    add_data_arguments(parser)
    parser.set_defaults(num_prompts=64)
    parser.add_argument("--policy", help="transformers directory that samples; the teacher, where training starts")
    parser.add_argument("--num_samples", type=int, default=8, help="responses to each prompt, an even number from 4 on")
    parser.add_argument("--gamma", type=float, nargs="*", default=[0.95], help="further discounts of dense returns")
    parser.add_argument("--clip_low", type=float, help="limit of each token's reward from below, in nats")
    parser.add_argument("--clip_high", type=float, help="limit from above")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest response")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts sampled together")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parsed = parser.parse_args(args)
    check_counts(parsed, "num_prompts", "max_new_tokens", "batch_size", "max_prompt_tokens", "max_response_tokens")
    if parsed.num_samples < 4 or parsed.num_samples % 2:
        raise UserError(
            f"--num_samples: found {parsed.num_samples}; give an even number from 4 on: two halves are compared, and "
            "each needs two samples for the leave-one-out baseline"
        )
    for gamma in parsed.gamma:
        if not 0.0 <= gamma <= 1.0:
            raise UserError(f"--gamma: found {gamma}; give numbers between 0 and 1")
    try:
        dense = DenseReward(parsed.clip_low, parsed.clip_high)
    except ValueError as error:
        raise UserError(f"--clip_low: {error}; change one of them") from error
    policies = policies_from_arguments(parsed)
    console = make_console(160)
    responses = _read(parsed, policies, console)
    result = {
        **variance(
            policies,
            responses,
            policy_dir=parsed.policy or policies.teacher,
            dense=dense,
            gammas=parsed.gamma,
            num_samples=parsed.num_samples,
            sampling=SamplingConfig(max_new_tokens=parsed.max_new_tokens, batch_size=parsed.batch_size),
            seed=parsed.seed,
        ),
        "environment": environment(),
    }
    for reference in result["by_reference"]:
        show(reference, result, console)
    if parsed.out is not None:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(parsed.out, result)
        console.print(f"figures: {parsed.out}", soft_wrap=True, highlight=False)


def variance(
    policies: FrozenPolicies,
    responses: Responses,
    *,
    policy_dir: str,
    dense: DenseReward,
    gammas: Sequence[float],
    num_samples: int,
    sampling: SamplingConfig,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of every reference and estimator as plain values.

    Memory beyond the models: two gradients for each estimator, and three in passing.

    Args:
        policies: Teacher and references.
        responses: Whose prompts are sampled.
        policy_dir: The policy that samples and whose gradient is taken.
        dense: Token reward, with its limits.
        gammas: Further discounts of dense returns.
        num_samples: Responses to each prompt.
        sampling: Length limit and batch size; the temperature is 1.
        seed: Of samples and intervals.
    """
    actor = load_policy(policy_dir, policies.backbone, chunk_size=_CHUNK_SIZE).freeze()
    actor.to(policies.device)
    prompt_ids = [responses.prompt_ids[index] for index in responses.first_of_each_prompt()]
    if len(prompt_ids) < 2:
        raise UserError(f"--num_prompts: found {len(prompt_ids)} prompts; the variance between them needs two or more")
    samples = sample_teacher(policies, actor, prompt_ids, sampling=sampling, num_samples=num_samples, seed=seed)
    repeated = [ids for ids in prompt_ids for _ in range(num_samples)]
    # A half of a prompt's samples is what a baseline may look at.
    half = [index // (num_samples // 2) for index in range(len(repeated))]
    rollouts = make_rollouts(repeated, samples, half, pad_id=pad_id(policies.tokenizer))
    teacher = policies.load(policies.teacher)
    by_reference = []
    for name, path in policies.references.items():
        scores = score_tokens(
            rollouts,
            actor=actor,
            teacher=teacher,
            reference=policies.load(path),
            micro_batch_size=policies.micro_batch_size,
            expectation_limits=(dense.low, dense.high),
        )
        by_reference.append({"alpha": name, **_measure(actor, rollouts, scores, dense, gammas, num_samples, seed)})
    return {
        "teacher": policies.teacher,
        "policy": policy_dir,
        "num_prompts": len(prompt_ids),
        "num_samples": num_samples,
        "seed": seed,
        "clip_low": None if dense.low == -math.inf else dense.low,
        "clip_high": None if dense.high == math.inf else dense.high,
        "by_reference": by_reference,
    }


def _measure(
    actor: CausalPolicy,
    rollouts: RolloutBatch,
    scores: TokenScores,
    dense: DenseReward,
    gammas: Sequence[float],
    num_samples: int,
    seed: int,
) -> dict[str, Any]:
    advantages = credits_of(scores, rollouts.prompt_index_B, dense=dense, gammas=gammas)
    base = Credit(reward="dense", gamma=1.0, baseline="none")
    num_prompts = len(rollouts.prompt_index_B) // num_samples
    # Gradients are wanted for a moment; the policy stays in eval mode.
    actor.requires_grad_(True)
    prompts = [
        partial(_halves, actor, rollouts, advantages, start=number * num_samples, num_samples=num_samples)
        for number in range(num_prompts)
    ]
    shown = tqdm(prompts, desc="gradients", disable=None, leave=False)
    moments = measure_gradients(shown, base, num_samples=num_samples // 2)
    actor.freeze()
    return {"estimators": [_figures(credit, moments, base, seed) for credit in _ordered(moments)]}


def _halves(
    actor: CausalPolicy,
    rollouts: RolloutBatch,
    advantages: Mapping[Credit, Tensor],
    *,
    start: int,
    num_samples: int,
) -> tuple[dict[Credit, Tensor], dict[Credit, Tensor]]:
    """Return the [D] mean gradient of each half of a prompt's samples, by estimator."""
    half = num_samples // 2
    first, second = (
        _gradients(actor, rollouts, advantages, torch.arange(begin, begin + half)) for begin in (start, start + half)
    )
    return first, second


def _gradients(
    actor: CausalPolicy, rollouts: RolloutBatch, advantages: Mapping[Credit, Tensor], rows_B: Tensor
) -> dict[Credit, Tensor]:
    tokens = trim(rollouts, rows_B)
    width, device = tokens.input_ids_BT.shape[1], actor.model.device
    mask_BT = tokens.response_mask_BT.to(device)
    logp_BT = scatter_tokens(actor(tokens.to(device)).logp_N, mask_BT)
    parameters = list(actor.parameters())
    found = {}
    for credit, advantage_BT in advantages.items():
        part_BT = advantage_BT[rows_B, :width].to(device)
        loss = reinforce_loss(logp_BT, part_BT, mask_BT, num_sequences=len(rows_B)).loss
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found[credit] = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    return found


def _ordered(moments: Mapping[Credit, GradientMoments]) -> list[Credit]:
    rewards = ("sentence", "dense", "expected")
    return sorted(
        moments, key=lambda credit: (-credit.gamma, BASELINES.index(credit.baseline), rewards.index(credit.reward))
    )


def _figures(credit: Credit, moments: Mapping[Credit, GradientMoments], base: Credit, seed: int) -> dict[str, Any]:
    own, other = moments[credit], moments[base]
    squared_mean, base_mean = own.squared_mean, other.squared_mean
    is_visible = squared_mean > 0 and base_mean > 0
    return {
        **dataclasses.asdict(credit),
        "variance": own.within,
        "variance_ratio": _ratio(own.within_P, other.within_P, seed),
        "between_prompts": own.between,
        "mean_norm": math.sqrt(max(squared_mean, 0.0)),
        "cosine_to_base": own.product_with(other) / math.sqrt(squared_mean * base_mean) if is_visible else None,
    }


def _ratio(own_P: Sequence[float], base_P: Sequence[float], seed: int) -> dict[str, float] | None:
    """Return the ratio of both sums with its interval; None where the base has no variance at all."""
    # A prompt whose samples are all alike adds nothing to either.
    kept = [(own, base) for own, base in zip(own_P, base_P, strict=True) if base > 0]
    if not kept:
        return None
    own, base = (list(values) for values in zip(*kept, strict=True))
    interval = ratio_interval(own, base, seed=seed)
    return {"value": sum(own) / sum(base), "low": interval.low, "high": interval.high}


def show(reference: Mapping[str, Any], result: Mapping[str, Any], console: Console) -> None:
    """Print the table of one reference."""
    table = Table(
        title=f"Reference {reference['alpha']}: variance of one response's gradient given its prompt; "
        f"{result['num_prompts']} prompts x {result['num_samples']} samples, 95% intervals over prompts"
    )
    for column in ("returns", "baseline", "variance", "ratio to dense", "|mean|", "cosine to dense"):
        table.add_column(column, justify="left" if column in ("returns", "baseline") else "right")
    last = None
    for row in reference["estimators"]:
        if last not in (None, (row["gamma"], row["baseline"])):
            table.add_section()
        last = (row["gamma"], row["baseline"])
        ratio, cosine = row["variance_ratio"], row["cosine_to_base"]
        table.add_row(
            row["reward"] + ("" if row["gamma"] == 1.0 else f", gamma {row['gamma']:g} (another objective)"),
            row["baseline"],
            f"{row['variance']:.4g}",
            "" if ratio is None else f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
            f"{row['mean_norm']:.3g}",
            "" if cosine is None else f"{cosine:.2f}",
        )
    console.print(table)


def _read(parsed: argparse.Namespace, policies: FrozenPolicies, console: Console) -> Responses:
    """Read ``--data``, or prompts of the run."""
    draw: dict[str, Any] = {"num_prompts": parsed.num_prompts, "seed": parsed.seed, "console": console}
    if parsed.data is not None:
        return read_responses(data_config(parsed, parsed.data), policies, needs_response=False, **draw)
    config, split, _ = recorded_demonstrations(policies)
    return read_responses(config, policies, split=split, needs_response=False, **draw)
