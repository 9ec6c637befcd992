from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpr_lightning.analysis.measure import by_position, load_answers, save_answers, steps_for, token_forwards
from dpr_lightning.evaluation.answers import Answers
from dpr_lightning.types import TokenScores


def test_compute_is_counted_in_forwards_of_a_token() -> None:
    run = {"tokens": {"rolled_out": 100, "scored": 300, "trained": 200}}
    # Sampling and scoring cost one forward each, training three.
    assert token_forwards(run) == 100 + 300 + 3 * 200
    sft = {"tokens": {"rolled_out": 0, "scored": 0, "trained": 500}, "optimizer_steps": 10}
    # 150 forwards a step.
    assert [steps_for(forwards, sft) for forwards in (150, 151, 1000)] == [1, 2, 7]


def test_by_position_is_the_mean_over_the_samples_that_reach_it() -> None:
    # Responses of 2 and 3 tokens that begin in different columns.
    mask_BT = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    value_BT = torch.tensor([[9.0, 9.0, 1.0, 2.0, 9.0], [9.0, 3.0, 6.0, 5.0, 9.0]])
    zero_BT = torch.zeros(2, 5)
    scores = TokenScores(
        response_mask_BT=mask_BT,
        old_logp_BT=zero_BT,
        teacher_logp_BT=value_BT,
        reference_logp_BT=value_BT / 2,
        old_entropy_BT=zero_BT,
        teacher_kl_BT=10 * value_BT,
    )
    found = by_position(scores)
    assert found == {"count": [2.0, 2.0, 1.0], "kl": [20.0, 40.0, 50.0], "reward": [1.0, 2.0, 2.5]}


def test_answers_survive_a_file(tmp_path: Path) -> None:
    answers = {
        temperature: Answers(
            is_correct_PS=np.array([[True, False], [False, False]]),
            num_tokens_PS=np.array([[3, 4], [5, 6]]) + int(10 * temperature),
            is_truncated_PS=np.array([[False, False], [True, False]]),
        )
        for temperature in (0.0, 0.35, 1.0)
    }
    save_answers(tmp_path / "answers.npz", answers)
    found = load_answers(tmp_path / "answers.npz")
    assert list(found) == [0.0, 0.35, 1.0]
    for temperature, ours in answers.items():
        for name in ("is_correct_PS", "num_tokens_PS", "is_truncated_PS"):
            np.testing.assert_array_equal(getattr(found[temperature], name), getattr(ours, name))
    save_answers(tmp_path / "none.npz", {})
    assert load_answers(tmp_path / "none.npz") == {}


def test_a_run_without_counts_is_no_run() -> None:
    with pytest.raises(KeyError):
        token_forwards({})
