"""Figures of responses that need no judge: torchmetrics over (prompt, response) rows, and the same over files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from dpr_lightning.evaluation.statistics import Estimate, ratio_interval
from dpr_lightning.evaluation.verifiers import Verifier


class ResponseMetric(Metric, ABC):
    """Shares over responses; a subclass says what one response counts, and can be named in YAML by its ``class_path``.

    Args:
        kwargs: See ``torchmetrics.Metric``.
    """

    figures: tuple[str, ...]
    """Names of the shares."""
    higher_is_better = True
    full_state_update = False
    counts_F2: Tensor
    """[F, 2] float64: for each figure what was reached and what could be, summed over responses and ranks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros_F2 = torch.zeros(len(self.figures), 2, dtype=torch.float64)
        self.add_state("counts_F2", default=zeros_F2, dist_reduce_fx="sum")

    @abstractmethod
    def grade(self, row: Mapping[str, Any], response: str, *, is_truncated: bool) -> Sequence[tuple[float, float]]:
        """Return what one response reached and what it could have, for each figure.

        Args:
            row: Columns of the prompt's source row.
            response: Text of the response, without its EOS.
            is_truncated: Whether the length limit came before EOS.

        Raises:
            UserError: The row lacks what responses are compared with.
        """

    @override
    def update(self, rows: Sequence[Mapping[str, Any]], responses: Sequence[str], is_truncated: Sequence[bool]) -> None:
        """Grade one response for each row."""
        for row, response, cut in zip(rows, responses, is_truncated, strict=True):
            grades = self.grade(row, response, is_truncated=cut)
            self.counts_F2 += torch.tensor(grades, dtype=torch.float64, device=self.counts_F2.device)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return each figure: what was reached over what could be, 0 without any response."""
        reached_F, possible_F = self.counts_F2.unbind(dim=1)
        return dict(zip(self.figures, reached_F / possible_F.clamp(min=1.0), strict=True))


class VerifierAccuracy(ResponseMetric):
    """The share of responses that a verifier calls right; a truncated one is wrong whatever it says.

    Args:
        verifier: Judges the text, such as ``FinalNumber`` (GSM8K's exact match) or ``ExactMatch``.
        name: Name of the figure; metrics beside each other need different ones.
        kwargs: See ``torchmetrics.Metric``.
    """

    def __init__(self, verifier: Verifier, name: str = "accuracy", **kwargs: Any) -> None:
        self.figures = (name,)
        super().__init__(**kwargs)
        self.verifier = verifier

    @override
    def grade(self, row: Mapping[str, Any], response: str, *, is_truncated: bool) -> Sequence[tuple[float, float]]:
        return [(float(not is_truncated and self.verifier(row, response)), 1.0)]


def grade_rows(
    metric: ResponseMetric,
    rows: Sequence[Mapping[str, Any]],
    responses: Sequence[str],
    is_truncated: Sequence[bool],
    prompt_index: Sequence[int],
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return each figure of a file's responses with its 95% bootstrap interval over prompts.

    Args:
        metric: Grades single responses; its state is not used.
        rows: Source row of each response.
        responses: Their texts.
        is_truncated: Whether each reached the length limit.
        prompt_index: Which prompt each answers; several responses to one prompt are resampled together.
        seed: Of the resampling.
    """
    by_prompt: dict[int, Tensor] = {}
    for row, response, cut, prompt in zip(rows, responses, is_truncated, prompt_index, strict=True):
        counts_F2 = torch.tensor(metric.grade(row, response, is_truncated=cut), dtype=torch.float64)
        by_prompt[prompt] = by_prompt.get(prompt, torch.zeros_like(counts_F2)) + counts_F2
    counts_PF2 = torch.stack(list(by_prompt.values())).numpy()
    found = {}
    for number, name in enumerate(metric.figures):
        reached_P, possible_P = counts_PF2[:, number, 0], counts_PF2[:, number, 1]
        interval = ratio_interval(reached_P, possible_P, seed=seed)
        value = float(reached_P.sum() / possible_P.sum())
        found[name] = Estimate(value=value, low=interval.low, high=interval.high, n=len(by_prompt))
    return found
