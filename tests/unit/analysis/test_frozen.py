from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpr_lightning.analysis.frozen import find_policies, score_responses
from dpr_lightning.analysis.teacher_samples import draw_and_score
from dpr_lightning.data.templates import TextTemplate
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.verifiers import ExactMatch, FinalNumber
from dpr_lightning.functional.collate import collate
from dpr_lightning.types import SamplingConfig

PROMPTS = [[1, 40, 41], [1, 50], [1, 60, 61, 62, 63]]
RESPONSES = [[70, 71, 2], [80, 2], [90, 91, 92, 93, 2]]


@torch.no_grad()
def distributions(directory: str, row: int) -> torch.Tensor:
    """Log-probabilities [T, V] at every state of one response: whole logits, one unpadded row, transformers alone."""
    ids = [*PROMPTS[row], *RESPONSES[row]]
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)[len(PROMPTS[row]) - 1 : -1]


@pytest.mark.parametrize("with_expectations", [False, True])
def test_scores_agree_with_transformers_alone(frozen_dirs: tuple[str, str], with_expectations: bool) -> None:
    teacher, reference = frozen_dirs
    policies = find_policies(teacher, reference=reference, micro_batch_size=2)
    (name,) = policies.references
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    scored = score_responses(policies, batch, with_expectations=with_expectations)
    assert scored.lengths.tolist() == [3, 2, 5]
    for row, response in enumerate(RESPONSES):
        mask_T = scored.response_mask_BT[row]
        p_TV, q_TV = distributions(teacher, row), distributions(reference, row)
        target_T1 = torch.tensor(response)[:, None]
        dense_T = (p_TV - q_TV).gather(1, target_T1).squeeze(1)
        torch.testing.assert_close(scored.dense(name)[row][mask_T].double(), dense_T, rtol=0, atol=1e-4)
        entropy_T = -(p_TV.exp() * p_TV).sum(dim=1)
        torch.testing.assert_close(scored.teacher_entropy_BT[row][mask_T].double(), entropy_T, rtol=0, atol=1e-4)
        if with_expectations:
            kl_T = (p_TV.exp() * (p_TV - q_TV)).sum(dim=1)
            found_T = scored.expected_dense_BT[name][row][mask_T].double()
            torch.testing.assert_close(found_T, kl_T, rtol=0, atol=1e-4)
    assert bool((scored.teacher_logp_BT[~scored.response_mask_BT] == 0).all())
    assert bool(scored.expected_dense_BT) == with_expectations


def test_samples_of_a_prompt_are_adjacent_seeded_and_verified(frozen_dirs: tuple[str, str]) -> None:
    policies = find_policies(frozen_dirs[0], reference=frozen_dirs[1])
    rows = [{"prompt": "a", "response": "never said", "row": number} for number in range(3)]

    def draw(seed: int) -> list[list[int]]:
        drawn = draw_and_score(
            policies,
            PROMPTS,
            rows,
            verifier=ExactMatch(),
            sampling=SamplingConfig(max_new_tokens=6),
            num_samples=2,
            seed=seed,
        )
        assert drawn.prompt_index_N.tolist() == [0, 0, 1, 1, 2, 2]
        assert drawn.is_correct_N is not None
        assert drawn.is_correct_N.tolist() == [0.0] * 6
        assert drawn.scored.lengths.tolist() == [len(ids) for ids in drawn.samples.response_ids]
        return drawn.samples.response_ids

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_row_that_cannot_be_judged_is_told_before_anything_is_sampled(frozen_dirs: tuple[str, str]) -> None:
    policies = find_policies(frozen_dirs[0], reference=frozen_dirs[1])
    with pytest.raises(UserError, match="row 7: column 'response' holds no number"):
        draw_and_score(
            policies,
            [[1, 40]],
            [{"response": "none", "row": 7}],
            verifier=FinalNumber(),
            sampling=SamplingConfig(max_new_tokens=2),
            num_samples=1,
            seed=0,
        )


def test_other_trainers_policies_get_the_plain_template(frozen_dirs: tuple[str, str]) -> None:
    policies = find_policies(frozen_dirs[0], reference=frozen_dirs[1])
    assert policies.template == TextTemplate()
    assert policies.manifest is None
    assert list(policies.references) == [Path(frozen_dirs[1]).name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": None}, r"--teacher '.*' is not a run of dpr-lightning.*set --reference"),
        ({"micro_batch_size": 0}, "--micro_batch_size: found 0"),
        ({"device": "nowhere"}, "--device: 'nowhere' cannot be used here"),
        ({"reference": "/no/such/place"}, "'/no/such/place' cannot be loaded"),
        ({"use_chat_template": True}, "has no chat template"),
    ],
)
def test_find_policies_refuses(frozen_dirs: tuple[str, str], changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_policies(frozen_dirs[0], **{"reference": frozen_dirs[1], **changes})  # type: ignore[arg-type]


def test_dense_reward_of_the_teachers_samples_is_positive_in_expectation(frozen_dirs: tuple[str, str]) -> None:
    # E[r_hat] under pi_SFT is KL(pi_SFT || pi_ref) > 0, so longer answers are paid for; its negative part never pays.
    policies = find_policies(frozen_dirs[0], reference=frozen_dirs[1])
    drawn = draw_and_score(
        policies,
        [[1, 40], [1, 41]],
        [{}, {}],
        verifier=None,
        sampling=SamplingConfig(max_new_tokens=20),
        num_samples=200,
        seed=0,
    )
    (name,) = policies.references
    token_N = drawn.scored.dense(name)[drawn.scored.response_mask_BT].double()
    error = float(token_N.std()) / math.sqrt(len(token_N))
    assert float(token_N.mean()) > 4 * error
    assert drawn.is_correct_N is None
