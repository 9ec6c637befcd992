"""What the dense reward pays: per token, per response, with length, between prompts, and for the best of n samples.

Shapes: N responses, T positions, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpr_lightning.analysis.frozen import ScoredResponses
from dpr_lightning.analysis.preferences import TEACHER
from dpr_lightning.evaluation.association import between_share, centred_by_prompt, correlation, rank_correlation
from dpr_lightning.evaluation.ranking import best_by_score
from dpr_lightning.evaluation.statistics import mean_estimate
from dpr_lightning.terminal import Table

FORMS: dict[str, float | None] = {"as is": None, "clip_high 0": 0.0}
"""Forms of the reward by name: its limit from above, as ``model.reward.clip_high`` takes it."""


def reward_form(scored: ScoredResponses, alpha: str, clip_high: float | None) -> Tensor:
    """Return [N, T] token rewards against one reference in one form."""
    dense_BT = scored.dense(alpha)
    return dense_BT if clip_high is None else dense_BT.clamp(max=clip_high)


def reward_figures(scored: ScoredResponses, prompt_index_N: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return what each reference's reward pays the responses, in each form.

    Args:
        scored: Samples of the teacher at temperature 1: their mean reward per token is then an estimate of its
            expectation, which for the reward as it is is KL(pi_SFT || pi_ref) and never negative.
        prompt_index_N: Which prompt each answers.

    Returns:
        Rows with ``alpha``, ``form`` and ``clip_high``; in nats ``mean_per_token``, ``std_per_token``, ``quantiles``
        (1%, 50%, 99% of tokens), ``positive_mass`` and ``negative_mass`` (sums over a response of the rewards above
        and below 0, mean over responses); the correlation of the sum with the length, ``pearson`` and ``spearman``
        over all responses and ``pearson_within`` prompts; and ``between_share``, the share of the sum's variance that
        lies between prompts, which a baseline per prompt removes (None where every prompt has one response).
    """
    mask_BT = scored.response_mask_BT
    length_N = scored.lengths.double().numpy()
    rows = []
    for alpha in scored.reference_logp_BT:
        for form, clip_high in FORMS.items():
            reward_BT = reward_form(scored, alpha, clip_high)
            token_N = reward_BT[mask_BT].double().numpy()
            sum_N = reward_BT.sum(dim=1, dtype=torch.float64).numpy()
            within_N = (centred_by_prompt(sum_N, prompt_index_N), centred_by_prompt(length_N, prompt_index_N))
            share = between_share(sum_N, prompt_index_N)
            rows.append(
                {
                    "alpha": alpha,
                    "form": form,
                    "clip_high": clip_high,
                    "mean_per_token": float(token_N.mean()),
                    "std_per_token": float(token_N.std()),
                    "quantiles": [float(value) for value in np.quantile(token_N, [0.01, 0.5, 0.99])],
                    "positive_mass": float(token_N.clip(min=0).sum()) / len(sum_N),
                    "negative_mass": float(token_N.clip(max=0).sum()) / len(sum_N),
                    "pearson": correlation(sum_N, length_N),
                    "spearman": rank_correlation(sum_N, length_N),
                    "pearson_within": correlation(*within_N),
                    "between_share": None if np.isnan(share) else share,
                }
            )
    return rows


def best_of_n(
    scored: ScoredResponses,
    quality_N: npt.NDArray[np.float64],
    prompt_index_N: npt.NDArray[np.int64],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the quality of the response that each summed score would pick of a prompt's own, without any training.

    Args:
        scored: The responses.
        quality_N: How good each is.
        prompt_index_N: Which prompt each answers.
        seed: Of the intervals' resampling.

    Returns:
        Estimates over prompts with 95% intervals: ``random`` (the mean response), ``oracle`` (the best by the quality
        itself), ``headroom`` (their difference), ``teacher`` and ``teacher_gain`` (picked by log pi_SFT; less random),
        and under ``rewards`` for each reference and form ``value``, ``gain`` (less random) and ``gain_over_teacher``.
    """
    random_P = _mean_by_prompt(quality_N, prompt_index_N)
    oracle_P = best_by_score(quality_N, quality_N, prompt_index_N)
    teacher_N = scored.teacher_logp_BT.sum(dim=1, dtype=torch.float64).numpy()
    teacher_P = best_by_score(teacher_N, quality_N, prompt_index_N)

    def estimate(value_P: npt.NDArray[np.float64]) -> dict[str, Any]:
        return asdict(mean_estimate(value_P, seed=seed))

    rewards = []
    for alpha in scored.reference_logp_BT:
        for form, clip_high in FORMS.items():
            sum_N = reward_form(scored, alpha, clip_high).sum(dim=1, dtype=torch.float64).numpy()
            picked_P = best_by_score(sum_N, quality_N, prompt_index_N)
            rewards.append(
                {
                    "alpha": alpha,
                    "form": form,
                    "value": estimate(picked_P),
                    "gain": estimate(picked_P - random_P),
                    "gain_over_teacher": estimate(picked_P - teacher_P),
                }
            )
    return {
        "random": estimate(random_P),
        "oracle": estimate(oracle_P),
        "headroom": estimate(oracle_P - random_P),
        "teacher": estimate(teacher_P),
        "teacher_gain": estimate(teacher_P - random_P),
        "rewards": rewards,
    }


def reward_table(rows: Sequence[dict[str, Any]], best: dict[str, Any] | None, *, title: str) -> Table:
    """Return the table of :func:`reward_figures`, with the best of n beside it where it was measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("alpha", justify="right")
    table.add_column("form")
    names = ["per token", "std", "paid", "charged", "with length", "within", "between", "best of n", "gain"]
    for name in names:
        table.add_column(name, justify="right")
    for index, row in enumerate(rows):
        share = "" if row["between_share"] is None else f"{row['between_share']:.0%}"
        cells = [
            f"{row['mean_per_token']:+.4f}",
            f"{row['std_per_token']:.3f}",
            f"{row['positive_mass']:.2f}",
            f"{row['negative_mass']:.2f}",
            f"{row['pearson']:+.2f}",
            f"{row['pearson_within']:+.2f}",
            share,
        ]
        if best is None:
            cells += ["", ""]
        else:
            found = best["rewards"][index]
            gain = found["gain"]
            cells += [
                f"{found['value']['value']:.3f}",
                f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
            ]
        table.add_row(row["alpha"], row["form"], *cells)
    if best is not None:
        gain = best["teacher_gain"]
        shown = f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        table.add_row("", TEACHER, *[""] * 7, f"{best['teacher']['value']:.3f}", shown)
        table.add_row("", "random", *[""] * 7, f"{best['random']['value']:.3f}", "")
        table.add_row("", "oracle", *[""] * 7, f"{best['oracle']['value']:.3f}", "")
    return table


def _mean_by_prompt(value_N: npt.NDArray[np.float64], prompt_index_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    _, group_N = np.unique(prompt_index_N, return_inverse=True)
    mean: npt.NDArray[np.float64] = np.bincount(group_N, weights=value_N) / np.bincount(group_N)
    return mean
