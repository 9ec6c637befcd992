"""``dpr-lightning diagnose``: before any RL, does the dense reward know better from worse, and what does it pay?

The teacher is sampled at temperature 1, as the first rollout of DPR would; its samples are scored by it and by every
reference, and some responses are known to be better than others: by a verifier, by a judge's file, or, weaker, because
they are demonstrations.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from dpr_lightning.analysis.frozen import (
    FrozenPolicies,
    ScoredResponses,
    add_policy_arguments,
    policies_from_arguments,
    score_responses,
)
from dpr_lightning.analysis.preferences import COSTS, DENSE, rank, ranking_table
from dpr_lightning.analysis.responses import (
    JudgedResponses,
    Responses,
    add_data_arguments,
    check_counts,
    data_config,
    make_verifier,
    read_judged,
    read_responses,
    recorded_demonstrations,
)
from dpr_lightning.analysis.reward_figures import FORMS, best_of_n, reward_figures, reward_table
from dpr_lightning.analysis.teacher_samples import ScoredSamples, draw_and_score
from dpr_lightning.analysis.verdict import Candidate, Evidence, Verdict, judge
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.ranking import Pairs, RankingAccuracy, pair_up
from dpr_lightning.evaluation.statistics import mean_estimate
from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.functional.collate import collate
from dpr_lightning.manifest import atomic_write_json, environment
from dpr_lightning.terminal import make_console
from dpr_lightning.types import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """Prompts to diagnose on, and what is known of responses to them."""

    responses: Responses
    """Given responses; one to each prompt where they are demonstrations."""
    judged: JudgedResponses | None
    what: str
    """The prompts in words."""


def main(args: Sequence[str] | None = None) -> None:
    """Say before any RL whether the dense reward knows better from worse, and whether DPR is expected to help."""
    parser = argparse.ArgumentParser(prog="dpr-lightning diagnose", description=main.__doc__)
    add_policy_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--num_samples", type=int, default=8, help="samples of the teacher to each prompt")
    parser.add_argument("--max_new_tokens", type=int, help="longest sample; the run's longest response if left out")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts sampled together")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parsed = parser.parse_args(args)
    check_counts(parsed, "num_prompts", "num_samples", "batch_size", "max_prompt_tokens", "max_response_tokens")
    verifier = make_verifier(parsed.verifier, parsed.verifier_args)
    policies = policies_from_arguments(parsed)
    console = make_console(160)
    prompts = _read(parsed, policies, verifier, console)
    result = diagnose(
        policies,
        prompts.responses,
        judged=prompts.judged,
        verifier=verifier,
        num_samples=parsed.num_samples,
        sampling=SamplingConfig(max_new_tokens=_longest(parsed, policies), batch_size=parsed.batch_size),
        seed=parsed.seed,
    )
    result = {"data": prompts.what, **result, "environment": environment()}
    show(result, console)
    if parsed.out is not None:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(parsed.out, result)
        console.print(f"figures: {parsed.out}", soft_wrap=True, highlight=False)


def diagnose(
    policies: FrozenPolicies,
    responses: Responses,
    *,
    judged: JudgedResponses | None,
    verifier: Verifier | None,
    num_samples: int,
    sampling: SamplingConfig,
    seed: int,
) -> dict[str, Any]:
    """Return every figure and the verdict as plain values.

    Args:
        policies: Teacher and references.
        responses: Responses to the prompts; with neither judgement nor verifier the first of each prompt is taken for
            a demonstration.
        judged: ``responses`` with judgement; comes before the verifier.
        verifier: Judges samples of the teacher.
        num_samples: Samples to each prompt.
        sampling: Length limit and batch size; the temperature is 1.
        seed: Of samples and intervals.
    """
    first = responses.first_of_each_prompt()
    drawn = draw_and_score(
        policies,
        [responses.prompt_ids[index] for index in first],
        [responses.rows[index] for index in first],
        verifier=None if judged is not None else verifier,
        sampling=sampling,
        num_samples=num_samples,
        seed=seed,
    )
    evidence: Evidence
    quality_N: npt.NDArray[np.float64] | None
    if judged is not None:
        evidence, quality_N = "judge", judged.quality_N
        scored, index_N, pairs = _score(policies, responses), responses.prompt_index_N, judged.pairs
    elif drawn.is_correct_N is not None:
        evidence, quality_N = "verifier", drawn.is_correct_N
        scored, index_N = drawn.scored, drawn.prompt_index_N
        pairs = pair_up(quality_N, index_N)
    else:
        evidence, quality_N = "demonstrations", None
        scored, index_N, pairs = _against_demonstrations(policies, responses, first, drawn)
    ranking = rank(scored, pairs, seed=seed)
    has_choice = quality_N is not None and len(np.unique(index_N)) < len(index_N)
    best = best_of_n(scored, quality_N, index_N, seed=seed) if quality_N is not None and has_choice else None
    figures = reward_figures(drawn.scored, drawn.prompt_index_N)
    return {
        "teacher": policies.teacher,
        "references": policies.references,
        "seed": seed,
        "evidence": evidence,
        "samples": _describe(drawn, num_samples, seed),
        "ranking": {"num_pairs": len(pairs), "num_prompts": pairs.num_prompts, "scores": ranking},
        "rewards": figures,
        "best_of_n": best,
        "verdict": _verdict(ranking, pairs, figures, best, evidence).to_json(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables and the verdict of what :func:`diagnose` returned."""
    samples, ranking, verdict = result["samples"], result["ranking"], result["verdict"]
    console.print(
        f"{samples['num_prompts']} prompts ({result['data']}) x {samples['num_samples']} samples of the teacher at "
        f"temperature 1: {samples['mean_length']:.1f} tokens, {samples['truncated_share']:.3f} truncated"
        + (f", {samples['accuracy']['value']:.3f} right" if samples["accuracy"] else ""),
        highlight=False,
    )
    what = {
        "verifier": "samples that the verifier calls right against wrong ones",
        "judge": "judged responses",
        "demonstrations": "demonstrations against samples: the weaker test, SFT teaches just this difference",
    }[result["evidence"]]
    rows = [row for row in ranking["scores"] if row["of"] == "sum"]
    title = f"Better first: {ranking['num_pairs']} pairs of {ranking['num_prompts']} prompts ({what}); chance 0.5"
    console.print(ranking_table(rows, title=title))
    best = result["best_of_n"]
    title = "What the reward pays the samples, in nats: per token; above and below 0 per response; correlation of its "
    title += "sum with length, over all and within prompts; share of variance between prompts"
    title += "; and the quality of the best of a prompt's responses by it, less a random one" if best else ""
    console.print(reward_table(result["rewards"], best, title=title))
    is_open = verdict["status"] == "cannot tell"
    text = "Verdict: cannot tell." if is_open else f"Verdict: DPR is {verdict['status']} to help."
    if verdict["status"] == "expected":
        text += f" Take --model.alpha {verdict['alpha']}"
        text += " --model.reward.clip_high 0." if verdict["clip_high"] == 0 else " and the reward as it is."
    console.print(f"{text} {verdict['reason']}", highlight=False, style="bold")


def _read(
    parsed: argparse.Namespace, policies: FrozenPolicies, verifier: Verifier | None, console: Console
) -> _Prompts:
    """Read ``--data``, or the prompts that the run held out (else trained on)."""
    draw: dict[str, Any] = {"num_prompts": parsed.num_prompts, "seed": parsed.seed, "console": console}
    if parsed.data is None:
        config, split, is_held_out = recorded_demonstrations(policies)
        # The subsample is of training rows; here prompts are drawn from what it left.
        try:
            responses = read_responses(config, policies, split=split, needs_response=verifier is None, **draw)
        except UserError as error:
            raise UserError(f"{error} (the data that the teacher's run recorded; --data names others)") from error
        what = "held out by the SFT run" if is_held_out else "that SFT was trained on"
        return _Prompts(responses=responses, judged=None, what=what)
    config = data_config(parsed, parsed.data)
    judged = read_judged(config, policies, **draw)
    if judged is not None and verifier is not None:
        raise UserError("--verifier: the data are judged already; leave it out, or give data without judgements")
    if judged is not None:
        return _Prompts(responses=judged.responses, judged=judged, what=parsed.data)
    responses = read_responses(config, policies, needs_response=verifier is None, **draw)
    return _Prompts(responses=responses, judged=None, what=parsed.data)


def _longest(parsed: argparse.Namespace, policies: FrozenPolicies) -> int:
    if parsed.max_new_tokens is not None:
        check_counts(parsed, "max_new_tokens")
        return int(parsed.max_new_tokens)
    recorded = (policies.manifest or {}).get("data")
    return int(recorded["demonstrations"]["max_response_tokens"] if recorded else parsed.max_response_tokens)


def _score(policies: FrozenPolicies, responses: Responses) -> ScoredResponses:
    return score_responses(
        policies, collate(responses.prompt_ids, responses.response_ids, pad_id=pad_id(policies.tokenizer))
    )


def _against_demonstrations(
    policies: FrozenPolicies, responses: Responses, first: Sequence[int], drawn: ScoredSamples
) -> tuple[ScoredResponses, npt.NDArray[np.int64], Pairs]:
    """Return samples and then demonstrations as one set, and every pair of one of each that differ."""
    picked = dataclasses.replace(
        responses,
        prompt_ids=[responses.prompt_ids[index] for index in first],
        response_ids=[responses.response_ids[index] for index in first],
        rows=[responses.rows[index] for index in first],
        prompt_index_N=np.arange(len(first), dtype=np.int64),
    )
    samples, demonstrations = drawn.scored, _score(policies, picked)
    num_samples = len(drawn.prompt_index_N)
    is_other_N = np.array(
        [
            ids != picked.response_ids[prompt]
            for ids, prompt in zip(drawn.samples.response_ids, drawn.prompt_index_N, strict=True)
        ]
    )
    worse_M = np.flatnonzero(is_other_N)
    prompt_M = drawn.prompt_index_N[worse_M]
    pairs = Pairs(better_M=num_samples + prompt_M, worse_M=worse_M, prompt_M=prompt_M)
    return (
        _join(samples, demonstrations),
        np.concatenate([drawn.prompt_index_N, picked.prompt_index_N]),
        pairs,
    )


def _join(a: ScoredResponses, b: ScoredResponses) -> ScoredResponses:
    """Lay two sets under each other, padded to the wider."""
    width = max(a.response_mask_BT.shape[1], b.response_mask_BT.shape[1])

    def join(first_BT: torch.Tensor, second_BT: torch.Tensor) -> torch.Tensor:
        padded = [torch.nn.functional.pad(x_BT, (0, width - x_BT.shape[1])) for x_BT in (first_BT, second_BT)]
        return torch.cat(padded)

    return ScoredResponses(
        response_mask_BT=join(a.response_mask_BT, b.response_mask_BT),
        teacher_logp_BT=join(a.teacher_logp_BT, b.teacher_logp_BT),
        teacher_entropy_BT=join(a.teacher_entropy_BT, b.teacher_entropy_BT),
        reference_logp_BT={
            name: join(logp_BT, b.reference_logp_BT[name]) for name, logp_BT in a.reference_logp_BT.items()
        },
        expected_dense_BT={},
    )


def _describe(drawn: ScoredSamples, num_samples: int, seed: int) -> dict[str, Any]:
    accuracy = None
    if drawn.is_correct_N is not None:
        estimate = mean_estimate(drawn.is_correct_N, prompt_index=drawn.prompt_index_N, seed=seed)
        accuracy = dataclasses.asdict(estimate)
    return {
        "num_prompts": len(drawn.prompt_index_N) // num_samples,
        "num_samples": num_samples,
        "temperature": 1.0,
        "accuracy": accuracy,
        "mean_length": float(drawn.scored.lengths.double().mean()),
        "truncated_share": float(np.mean(drawn.samples.is_truncated)),
    }


def _verdict(
    ranking: Sequence[dict[str, Any]],
    pairs: Pairs,
    figures: Sequence[dict[str, Any]],
    best: dict[str, Any] | None,
    evidence: Evidence,
) -> Verdict:
    """Bring the figures into the form that the rule wants."""
    score_of = dict(zip(FORMS, (DENSE, COSTS), strict=True))
    summed = {(row["score"], row["alpha"]): row for row in ranking if row["of"] == "sum"}
    gains = {(row["alpha"], row["form"]): row["gain"] for row in best["rewards"]} if best else {}
    candidates = []
    for row in figures:
        found = summed[score_of[row["form"]], row["alpha"]]
        gain = gains.get((row["alpha"], row["form"]))
        candidates.append(
            Candidate(
                alpha=row["alpha"],
                clip_high=row["clip_high"],
                ranking=RankingAccuracy(
                    0.5 if found["accuracy"] is None else found["accuracy"],
                    found["low"],
                    found["high"],
                    len(pairs),
                    pairs.num_prompts,
                ),
                gain=None if gain is None else (gain["value"], gain["low"], gain["high"]),
                length_correlation=row["pearson_within"],
            )
        )
    headroom = best["headroom"] if best else None
    return judge(
        candidates,
        evidence=evidence,
        headroom=None if headroom is None else (headroom["value"], headroom["low"], headroom["high"]),
    )
