from __future__ import annotations

import dataclasses

import torch

from dpr_lightning.types import PairExperience, RolloutBatch, pack, unpack


def rollouts(value: int) -> RolloutBatch:
    mask_BT = torch.tensor([[False, True]])
    return RolloutBatch(
        input_ids_BT=torch.tensor([[1, value]]),
        attention_mask_BT=torch.ones_like(mask_BT),
        response_mask_BT=mask_BT,
        prompt_index_B=torch.tensor([value]),
        is_truncated_B=torch.tensor([False]),
        sampler_logp_BT=torch.tensor([[0.0, -0.5]]),
    )


def experience(previous: RolloutBatch | None) -> PairExperience:
    return PairExperience(
        rollouts=rollouts(7),
        previous=previous,
        demonstration_logp_P=torch.tensor([-1.0], dtype=torch.float64),
        sample_logp_P=torch.tensor([-2.0], dtype=torch.float64),
        stats={"response/length_mean": 1.0},
        seconds={"rollout": 0.5, "score": 0.25},
    )


def test_pack_gives_plain_values_and_unpack_the_dataclasses_back() -> None:
    packed = pack(experience(rollouts(8)))
    assert type(packed) is type(packed["rollouts"]) is type(packed["previous"]) is dict
    assert packed["stats"] == {"response/length_mean": 1.0}
    found = unpack(PairExperience, {"epoch": 3, **packed})
    assert isinstance(found.rollouts, RolloutBatch)
    assert isinstance(found.previous, RolloutBatch)
    for name, value in (("rollouts", 7), ("previous", 8)):
        for field in dataclasses.fields(RolloutBatch):
            expected = getattr(rollouts(value), field.name)
            assert torch.equal(getattr(getattr(found, name), field.name), expected), field.name
    assert found.sample_logp_P.dtype == torch.float64
    assert found.seconds == {"rollout": 0.5, "score": 0.25}


def test_a_batch_that_may_be_missing_stays_missing() -> None:
    assert unpack(PairExperience, pack(experience(None))).previous is None
