from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpr_lightning.functional.collate import collate
from dpr_lightning.functional.rewards import DenseReward
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.scoring import (
    RESPONSE_SUMS,
    describe_rollouts,
    make_rollouts,
    micro_batches,
    rollout_stats,
    score_tokens,
    trim,
)
from dpr_lightning.types import RolloutBatch, TokenScores

PROMPTS = [[5, 9, 4], [7], [3, 3, 8, 20, 31, 6], [12, 40]]
RESPONSES = [[4, 2], [9, 9, 30, 2], [2], [17, 21, 33, 40, 41, 6]]
SAMPLES = Samples(
    response_ids=RESPONSES,
    logp=[[-0.5, -1.0], [-2.0, -0.25, -0.75, -3.0], [-4.0], [-1.5] * 6],
    is_truncated=[False, False, False, True],
)


@pytest.fixture
def rollouts() -> RolloutBatch:
    # Padded with 2, which is also EOS here: masks come from lengths, so nothing may depend on it.
    return make_rollouts(PROMPTS, SAMPLES, [7, 7, 1, 4], pad_id=2)


def test_make_rollouts_keeps_every_id_in_its_place(rollouts: RolloutBatch) -> None:
    # Rows are 5, 5, 7 and 8 long.
    assert rollouts.input_ids_BT.tolist() == [
        [5, 9, 4, 4, 2, 2, 2, 2],
        [7, 9, 9, 30, 2, 2, 2, 2],
        [3, 3, 8, 20, 31, 6, 2, 2],
        [12, 40, 17, 21, 33, 40, 41, 6],
    ]
    assert rollouts.attention_mask_BT.sum(dim=1).tolist() == [5, 5, 7, 8]
    assert rollouts.response_mask_BT.long().tolist() == [
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 1, 1, 1, 1, 1, 1],
    ]
    assert rollouts.sampler_logp_BT.tolist() == [
        [0, 0, 0, -0.5, -1.0, 0, 0, 0],
        [0, -2.0, -0.25, -0.75, -3.0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, -4.0, 0],
        [0, 0, -1.5, -1.5, -1.5, -1.5, -1.5, -1.5],
    ]
    assert rollouts.prompt_index_B.tolist() == [7, 7, 1, 4]
    assert rollouts.is_truncated_B.tolist() == [False, False, False, True]


def test_micro_batches_are_of_like_length_and_samples_of_a_prompt_stay_together(policies: list[CausalPolicy]) -> None:
    prompts = [[3], [4, 5], [3], [6], [4, 5], [6]]
    lengths = [2, 5, 9, 3, 1, 3]
    batch = collate(prompts, [[7] * length for length in lengths], pad_id=0)
    found = list(micro_batches(batch, 4, policies[0]))
    # In tokens: prompt [3] has 3 and 10, [4, 5] has 7 and 3, [6] has 4 twice.
    assert [rows_B.tolist() for rows_B, _ in found] == [[0, 2, 1, 4], [3, 5]]
    assert [micro.input_ids_BT.shape for _, micro in found] == [(4, 10), (2, 4)]


def test_trim_drops_columns_that_are_padding_in_all_named_rows(rollouts: RolloutBatch) -> None:
    rows_B = torch.tensor([2, 0])
    found = trim(rollouts, rows_B)
    assert found.input_ids_BT.tolist() == [[3, 3, 8, 20, 31, 6, 2], [5, 9, 4, 4, 2, 2, 2]]
    assert torch.equal(found.attention_mask_BT, rollouts.attention_mask_BT[rows_B, :7])
    assert torch.equal(found.response_mask_BT, rollouts.response_mask_BT[rows_B, :7])


@pytest.fixture
def policies(tiny_model: Callable[..., PreTrainedModel]) -> list[CausalPolicy]:
    """Actor, teacher and reference: three different models."""
    actor, teacher, reference = (CausalPolicy(tiny_model("llama", seed=seed), chunk_size=5) for seed in (1, 2, 3))
    return [actor.train(), teacher.freeze(), reference.freeze()]


def logits_one_by_one(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Return float64 [len(response), V] logits of the states in which each token was chosen, from a plain forward."""
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()


def test_known_old_log_probs_are_taken_as_they_are(rollouts: RolloutBatch, policies: list[CausalPolicy]) -> None:
    actor, teacher, reference = policies
    asked = score_tokens(rollouts, actor=actor, teacher=teacher, reference=reference, micro_batch_size=3)
    known_BT = rollouts.sampler_logp_BT
    found = score_tokens(
        rollouts, actor=actor, teacher=teacher, reference=reference, micro_batch_size=3, old_logp_BT=known_BT
    )
    assert torch.equal(found.old_logp_BT, known_BT)
    assert torch.equal(found.old_entropy_BT, -known_BT)
    assert torch.equal(found.teacher_logp_BT, asked.teacher_logp_BT)
    assert torch.equal(found.reference_logp_BT, asked.reference_logp_BT)
    with pytest.raises(ValueError, match="leave old_logp_BT out"):
        score_tokens(
            rollouts,
            actor=actor,
            teacher=teacher,
            reference=reference,
            micro_batch_size=3,
            old_logp_BT=known_BT,
            expectation_limits=(-math.inf, math.inf),
        )


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_scores_are_those_of_independent_forwards(
    rollouts: RolloutBatch, policies: list[CausalPolicy], micro_batch_size: int
) -> None:
    actor, teacher, reference = policies
    scores = score_tokens(
        rollouts,
        actor=actor,
        teacher=teacher,
        reference=reference,
        micro_batch_size=micro_batch_size,
        needs_values=True,
        expectation_limits=(-math.inf, math.inf),
    )
    names = ["old_logp", "teacher_logp", "reference_logp", "old_entropy"]
    names += ["teacher_value", "reference_value", "teacher_kl", "expected_dense"]
    fields: dict[str, Tensor] = {name: torch.zeros(rollouts.input_ids_BT.shape).double() for name in names}
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        part = slice(len(prompt), len(prompt) + len(response))
        logits = [logits_one_by_one(policy.model, prompt, response) for policy in policies]
        for name, logits_TV in zip(("old", "teacher", "reference"), logits, strict=True):
            logp_TV = logits_TV.log_softmax(dim=-1)
            fields[f"{name}_logp"][row, part] = torch.stack([logp_TV[t, token] for t, token in enumerate(response)])
        old = torch.distributions.Categorical(logits=logits[0])
        fields["old_entropy"][row, part] = old.entropy()
        kls: dict[str, Tensor] = {}
        for name, logits_TV in (("teacher", logits[1]), ("reference", logits[2])):
            fields[f"{name}_value"][row, part] = logits_TV.logsumexp(dim=-1)
            other = torch.distributions.Categorical(logits=logits_TV)
            kls[name] = torch.distributions.kl_divergence(old, other)
        fields["teacher_kl"][row, part] = kls["teacher"]
        # E[log SFT - log ref] = KL(old || ref) - KL(old || SFT)
        fields["expected_dense"][row, part] = kls["reference"] - kls["teacher"]
    for name, expected_BT in fields.items():
        found_BT = getattr(scores, f"{name}_BT")
        assert found_BT.dtype == torch.float32
        # float32 forwards of another shape
        torch.testing.assert_close(found_BT.double(), expected_BT, rtol=1e-5, atol=5e-5, msg=name)
        assert float(found_BT[~rollouts.response_mask_BT].abs().max()) == 0.0, name
    # The reward is the difference of two forward passes that know nothing of each other.
    torch.testing.assert_close(
        DenseReward()(scores).double(), fields["teacher_logp"] - fields["reference_logp"], rtol=1e-5, atol=1e-4
    )


def test_several_references_are_averaged(rollouts: RolloutBatch, policies: list[CausalPolicy]) -> None:
    actor, teacher, reference = policies
    limits = (-0.5, 0.25)

    def score(*references: CausalPolicy) -> TokenScores:
        return score_tokens(
            rollouts,
            actor=actor,
            teacher=teacher,
            reference=references,
            micro_batch_size=2,
            needs_values=True,
            expectation_limits=limits,
        )

    # The teacher itself as second reference: its log-ratio is 0, so r_hat is half of the first's.
    one, other, both = score(reference), score(teacher), score(reference, teacher)
    for name in ("reference_logp_BT", "reference_value_BT"):
        mean_BT = (getattr(one, name) + getattr(other, name)) / 2
        torch.testing.assert_close(getattr(both, name), mean_BT, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(DenseReward()(both), DenseReward()(one) / 2, rtol=1e-4, atol=1e-5)
    for name in ("old_logp_BT", "teacher_logp_BT", "old_entropy_BT", "teacher_kl_BT"):
        assert torch.equal(getattr(both, name), getattr(one, name))
    # Half the ratio between the limits is half of the ratio between limits twice as wide.
    assert both.expected_dense_BT is not None
    limits = (-1.0, 0.5)
    wide = score(reference)
    assert wide.expected_dense_BT is not None
    torch.testing.assert_close(both.expected_dense_BT, wide.expected_dense_BT / 2, rtol=1e-4, atol=1e-5)


def test_values_and_kls_are_left_out_unless_asked_for(rollouts: RolloutBatch, policies: list[CausalPolicy]) -> None:
    actor, teacher, reference = policies
    scores = score_tokens(rollouts, actor=actor, teacher=teacher, reference=reference, micro_batch_size=2)
    assert scores.teacher_value_BT is scores.reference_value_BT is None
    assert scores.teacher_kl_BT is scores.expected_dense_BT is None
    assert not scores.old_logp_BT.requires_grad
    assert actor.training
    assert all(parameter.grad is None for parameter in actor.parameters())


def test_identical_policies_have_no_reward_and_no_kl(rollouts: RolloutBatch, policies: list[CausalPolicy]) -> None:
    teacher = policies[1]
    scores = score_tokens(
        rollouts,
        actor=teacher,
        teacher=teacher,
        reference=teacher,
        micro_batch_size=2,
        expectation_limits=(-math.inf, math.inf),
    )
    assert torch.equal(scores.old_logp_BT, scores.teacher_logp_BT)
    assert float(DenseReward()(scores).abs().max()) == 0.0
    assert scores.teacher_kl_BT is not None
    assert float(scores.teacher_kl_BT.abs().max()) == 0.0


def test_a_thawed_teacher_is_refused(rollouts: RolloutBatch, policies: list[CausalPolicy]) -> None:
    actor, teacher, reference = policies
    teacher.train()
    with pytest.raises(AssertionError, match="frozen policy"):
        score_tokens(rollouts, actor=actor, teacher=teacher, reference=reference, micro_batch_size=2)


def by_hand() -> tuple[RolloutBatch, TokenScores, Tensor, Tensor]:
    samples = Samples(response_ids=[[4, 2], [9, 9, 30]], logp=[[-1.0, -2.0], [-1.0] * 3], is_truncated=[False, True])
    rollouts = make_rollouts([[5], [5]], samples, [0, 0], pad_id=0)

    def rows(first: list[float], second: list[float]) -> Tensor:
        return torch.tensor([[0.0, *first, 0.0], [0.0, *second]])

    scores = TokenScores(
        response_mask_BT=rollouts.response_mask_BT,
        old_logp_BT=rows([-1.0, -2.5], [-1.0, -1.0, -1.25]),
        teacher_logp_BT=rows([-1.0, -1.0], [-2.0, -2.0, -2.0]),
        reference_logp_BT=rows([-3.0, -3.0], [-2.0, -1.0, -1.0]),
        old_entropy_BT=rows([0.5, 0.5], [1.0, 1.0, 2.0]),
    )
    reward_BT = rows([2.0, 2.0], [0.0, -1.0, -1.0])
    return_BT = rows([4.0, 2.0], [-2.0, -2.0, -1.0])
    return rollouts, scores, reward_BT, return_BT


def test_rollout_stats_worked_by_hand() -> None:
    sums_BK = describe_rollouts(*by_hand())
    assert sums_BK.shape == (2, len(RESPONSE_SUMS))
    assert sums_BK.dtype == torch.float64
    stats = rollout_stats(sums_BK)
    expected = {
        # 5 tokens with rewards 2 2 0 -1 -1: mean 0.4, mean square (4 + 4 + 0 + 1 + 1) / 5 = 2
        "reward/mean": 0.4,
        "reward/std": (2 - 0.16) ** 0.5,
        # sums 4 and -2
        "reward/sum_mean": 1.0,
        "reward/sum_std": 3.0,
        # two points, the longer with the smaller reward
        "reward/len_corr": -1.0,
        # 4 + 2 - 2 - 2 - 1 = 1
        "return/mean": 0.2,
        "return/first_mean": 1.0,
        # -1 - 2.5 - 1 - 1 - 1.25 = -6.75
        "logp/old": -1.35,
        "logp/teacher": -1.6,
        "logp/reference": -2.0,
        "policy/entropy": 1.0,
        # old - teacher by response: -3.5 + 2 = -1.5 and -3.25 + 6 = 2.75
        "policy/teacher_kl": 0.625,
        "response/length_mean": 2.5,
        "response/length_max": 3.0,
        "response/truncated_share": 0.5,
        "rollout/num_responses": 2.0,
        "rollout/num_tokens": 5.0,
        # |-2.5 + 2| + |-1.25 + 1| = 0.75
        "rollout/sampler_gap": 0.15,
        "rollout/sampler_gap_max": 0.5,
        # log pi - log q is -0.5 and -0.25: (e^-0.5 - 0.5 + e^-0.25 - 0.75) / 5
        "rollout/sampler_kl": 0.02706628854,
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, abs=1e-9), name


def test_a_constant_length_has_no_correlation() -> None:
    sums_BK = describe_rollouts(*by_hand())
    sums_BK[:, RESPONSE_SUMS.index("length")] = 3.0
    assert rollout_stats(sums_BK)["reward/len_corr"] == 0.0


def test_stats_do_not_depend_on_how_ranks_share_the_responses() -> None:
    sums_BK = describe_rollouts(*by_hand())
    many_BK = sums_BK.repeat(4, 1)
    shuffled = rollout_stats(many_BK[torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])])
    for name, value in rollout_stats(many_BK).items():
        assert shuffled[name] == pytest.approx(value, abs=1e-12), name
