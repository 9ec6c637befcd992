"""Sampling on the device: the CPU's tokens from the same random numbers, and the trainer's log-probabilities."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dpr_lightning.errors import NonFiniteError
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.rollout import TransformersSampler
from dpr_lightning.rollout.draws import draw
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.scoring import make_rollouts, policy_logprobs
from dpr_lightning.types import SamplingConfig

pytestmark = pytest.mark.gpu

GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(3, 48, (n,), generator=GENERATOR).tolist() for n in (4, 1, 9, 6, 2, 7, 12, 5)]
# Samples of one prompt copy its keys and values from another slot.
PROMPTS += [PROMPTS[2], PROMPTS[2], PROMPTS[0]]


def sample(model: PreTrainedModel, device: torch.device, **settings: object) -> Samples:
    config = SamplingConfig(**({"max_new_tokens": 20, "batch_size": 4} | settings))  # type: ignore[arg-type]
    model = copy.deepcopy(model).to(device)
    return TransformersSampler().sample(model, PROMPTS, config=config, eos_token_id=2, seed=3)


def gpt2() -> PreTrainedModel:
    """A model whose attention takes no layout, so that it is decoded with padding."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=1)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_responses_match_cpu(
    temperature: float, family: str, device: torch.device, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family)
    found = sample(model, device, temperature=temperature)
    expected = sample(model, torch.device("cpu"), temperature=temperature)
    assert found.response_ids == expected.response_ids
    assert found.is_truncated == expected.is_truncated
    for ours, theirs in zip(found.logp, expected.logp, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_padded_decoding_matches_cpu(device: torch.device) -> None:
    assert sample(gpt2(), device).response_ids == sample(gpt2(), torch.device("cpu")).response_ids


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_log_probs_match_the_trainers(
    dtype: torch.dtype, limit: float, family: str, device: torch.device, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family).to(device, dtype)
    samples = sample(model, device)
    rollouts = make_rollouts(PROMPTS, samples, range(len(PROMPTS)), pad_id=0)
    logp_BT, _ = policy_logprobs(rollouts, CausalPolicy(model), micro_batch_size=4)
    gap_N = (logp_BT - rollouts.sampler_logp_BT)[rollouts.response_mask_BT].abs()
    # In bfloat16 two forwards of other shapes round otherwise.
    assert gap_N.mean() < limit


@pytest.mark.parametrize("vocabulary", [48, 50257, 128256])
def test_draws_match_cpu_and_the_distribution(vocabulary: int, device: torch.device) -> None:
    logits_NV = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    uniform_N = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    token_N, logp_N = draw(logits_NV.clone().to(device), uniform_N, SamplingConfig())
    expected_N, expected_logp_N = draw(logits_NV.clone(), uniform_N, SamplingConfig())
    # Sums of 256 probabilities are rounded to float32 in another order: a number may fall just beyond an entry's end.
    assert (token_N.cpu() == expected_N).float().mean() > 0.95
    torch.testing.assert_close(logp_N.cpu()[token_N.cpu() == expected_N], expected_logp_N[token_N.cpu() == expected_N])
    logits_V = torch.linspace(-2.0, 2.0, 8)
    many_N = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn_N, _ = draw(logits_V.expand(40_000, 8).clone().to(device), many_N, SamplingConfig())
    share_V = torch.bincount(drawn_N.cpu(), minlength=8) / 40_000
    # Five standard deviations of a share of 0.39 of 40,000.
    torch.testing.assert_close(share_V, logits_V.softmax(dim=0), rtol=0, atol=0.0125)


def test_non_finite_weights_are_refused(device: torch.device, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        sample(model, device)
