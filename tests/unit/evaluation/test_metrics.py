"""Metrics of responses: shares worked out by hand, over batches, ranks and files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpr_lightning.evaluation.metrics import VerifierAccuracy, grade_rows
from dpr_lightning.evaluation.verifiers import FinalNumber


def shares(metric: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def test_accuracy_is_the_share_of_right_and_finished_responses() -> None:
    metric = VerifierAccuracy(FinalNumber("answer"))
    rows = [{"answer": "#### 7"}, {"answer": "#### 8"}, {"answer": "#### 9"}]
    metric.update(rows[:2], ["it is 7", "it is 7"], [False, False])
    metric.update(rows[2:], ["it is 9"], [True])
    assert shares(metric) == {"accuracy": pytest.approx(1 / 3)}
    metric.reset()
    assert shares(metric) == {"accuracy": 0.0}


def test_ranks_are_added_before_shares_are_taken() -> None:
    metrics = [VerifierAccuracy(FinalNumber("answer")) for _ in range(2)]
    row = {"answer": "1"}
    metrics[0].update([row], ["1"], [False])
    metrics[1].update([row] * 3, ["2"] * 3, [False] * 3)
    # What torchmetrics does with the states of two processes.
    metrics[0].counts_F2 = metrics[0]._reductions["counts_F2"](torch.stack([metric.counts_F2 for metric in metrics]))
    assert shares(metrics[0]) == {"accuracy": 0.25}


def test_a_prompts_responses_are_resampled_together() -> None:
    metric = VerifierAccuracy(FinalNumber("answer"))
    rows, responses = [{"answer": "1"}] * 8, ["1", "1", "1", "1", "2", "2", "2", "2"]
    together = grade_rows(metric, rows, responses, [False] * 8, [0, 0, 0, 0, 1, 1, 1, 1])["accuracy"]
    apart = grade_rows(metric, rows, responses, [False] * 8, list(range(8)))["accuracy"]
    assert together.value == apart.value == 0.5
    assert (together.n, apart.n) == (2, 8)
    # Of two prompts a quarter of the resamples is all right, a quarter all wrong.
    assert (together.low, together.high) == (0.0, 1.0)
    assert apart.low > 0.0
