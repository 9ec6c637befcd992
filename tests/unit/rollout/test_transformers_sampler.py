from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dpr_lightning.errors import NonFiniteError
from dpr_lightning.models import ragged
from dpr_lightning.models.policies import CausalPolicy, scatter_tokens
from dpr_lightning.rollout import continuous
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.scoring import make_rollouts
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import SamplingConfig

GENERATOR = torch.Generator().manual_seed(11)
PROMPTS = [torch.randint(3, 48, (n,), generator=GENERATOR).tolist() for n in (4, 1, 9, 6, 2, 7, 3, 9, 12, 5)]


def sample(
    model: PreTrainedModel, prompts: list[list[int]], *, eos: int = 2, seed: int = 0, **config: object
) -> Samples:
    settings = SamplingConfig(**config)  # type: ignore[arg-type]
    return TransformersSampler().sample(model, prompts, config=settings, eos_token_id=eos, seed=seed)


def greedy_one_by_one(model: PreTrainedModel, *, max_new_tokens: int) -> list[list[int]]:
    """Independent of the sampler: transformers' own ``generate``, without padding or EOS, one prompt at a time."""
    found = []
    model.generation_config.eos_token_id = None
    for prompt in PROMPTS:
        ids_BT = torch.tensor([prompt])
        out_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
        found.append(out_BT[0, len(prompt) :].tolist())
    return found


def pick_eos(responses: list[list[int]]) -> int:
    """Return the token at which the rows would end at the most different times."""
    firsts = {token: {row.index(token) for row in responses if token in row} for token in range(48)}
    return max(firsts, key=lambda token: len(firsts[token]))


@pytest.mark.parametrize("batch_size", [10, 4])
def test_greedy_is_transformers_own_token_for_token(
    family: str, batch_size: int, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    check_greedy(tiny_model(family, tie_word_embeddings=False), batch_size=batch_size)


def test_greedy_with_absolute_positions() -> None:
    # Rotary positions hide a shift of the whole row; GPT-2's are absolute.
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, tie_word_embeddings=False, bos_token_id=1
    )
    check_greedy(GPT2LMHeadModel(config).eval(), batch_size=10)


def check_greedy(model: PreTrainedModel, *, batch_size: int) -> None:
    endless = greedy_one_by_one(model, max_new_tokens=20)
    eos = pick_eos(endless)
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in endless]
    lengths = {len(row) for row in expected}
    assert len(lengths) >= 4, "rows should leave the batch at different times"

    found = sample(model, PROMPTS, eos=eos, temperature=0.0, max_new_tokens=20, batch_size=batch_size)
    assert found.response_ids == expected
    assert found.is_truncated == [row[-1] != eos for row in expected]


def check_logp(model: PreTrainedModel, samples: Samples, prompts: list[list[int]]) -> None:
    rollouts = make_rollouts(prompts, samples, range(len(prompts)), pad_id=0)
    with torch.no_grad():
        logp_BT = scatter_tokens(CausalPolicy(model)(rollouts).logp_N, rollouts.response_mask_BT)
    torch.testing.assert_close(rollouts.sampler_logp_BT, logp_BT, rtol=0, atol=1e-4)


def test_logp_is_that_of_a_trainer_side_forward(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    prompts = PROMPTS * 3
    samples = sample(model, prompts, max_new_tokens=24, batch_size=30)
    assert len({len(row) for row in samples.response_ids}) >= 4
    check_logp(model, samples, prompts)


def test_greedy_logp_is_the_models_untempered_one(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("qwen2")
    check_logp(model, sample(model, PROMPTS, temperature=0.0, max_new_tokens=6), PROMPTS)


def truncated(prob_V: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Independent of the sampler: the top k made a distribution, then tokens one by one until the mass is there."""
    order = prob_V.argsort(descending=True).tolist()[: top_k or None]
    prob_V = prob_V / prob_V[order].sum()
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(prob_V[token])
    out_V = torch.zeros_like(prob_V)
    out_V[kept] = prob_V[kept]
    return out_V / out_V.sum()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"top_k": 5}, {"temperature": 2.0, "top_p": 0.9, "top_k": 12}],
    ids=str,
)
def test_draws_follow_the_exact_distribution(
    settings: dict[str, float], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model, prompt, num_draws = tiny_model("llama"), PROMPTS[3], 4000
    # The second token's state has been through the cache, and the prompt is padded by a longer one's presence.
    padding = [PROMPTS[8]]
    samples = sample(model, [prompt] * num_draws + padding, max_new_tokens=2, batch_size=num_draws + 1, **settings)
    drawn = samples.response_ids[:num_draws]
    first = max({row[0] for row in drawn} - {2}, key=lambda token: sum(row[0] == token for row in drawn))
    for prefix in ([], [first]):
        tokens = [row[len(prefix)] for row in drawn if row[: len(prefix)] == prefix]
        logits_V = model(torch.tensor([[*prompt, *prefix]])).logits[0, -1].detach().double()
        prob_V = (logits_V / settings.get("temperature", 1.0)).softmax(dim=-1)
        prob_V = truncated(prob_V, top_p=settings.get("top_p", 1.0), top_k=int(settings.get("top_k", 0)))
        count_V = torch.bincount(torch.tensor(tokens), minlength=48).double()
        assert float(count_V[prob_V == 0].sum()) == 0.0, "a token outside the distribution was drawn"
        expected_V = prob_V * len(tokens)
        is_common_V = expected_V >= 5
        # Rare tokens make one cell.
        expected_C = torch.cat([expected_V[is_common_V], expected_V[~is_common_V].sum()[None]])
        count_C = torch.cat([count_V[is_common_V], count_V[~is_common_V].sum()[None]])
        is_used_C = expected_C > 1e-9
        statistic = float(((count_C - expected_C).square() / expected_C)[is_used_C].sum())
        # chi-square: mean df, variance 2 df. Seeded, so that this either always or never passes.
        df = int(is_used_C.sum()) - 1
        assert statistic < df + 4 * (2 * df) ** 0.5 + 1e-6
        for row, logp in list(zip(drawn, samples.logp, strict=False))[:50]:
            if row[: len(prefix)] == prefix:
                assert logp[len(prefix)] == pytest.approx(float(prob_V[row[len(prefix)]].log()), abs=1e-4)


def test_the_same_seed_gives_the_same_samples(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("mistral")
    first = sample(model, PROMPTS, seed=3, max_new_tokens=16, batch_size=4)
    torch.manual_seed(123)  # another state of the global generator changes nothing
    state = torch.get_rng_state()
    again = sample(model, PROMPTS, seed=3, max_new_tokens=16, batch_size=4)
    assert dataclasses.asdict(again) == dataclasses.asdict(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(model, PROMPTS, seed=4, max_new_tokens=16, batch_size=4).response_ids != first.response_ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_response_depends_on_its_row_alone(
    family: str, attention: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    # "eager" takes the way of models without layouts.
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    expected = sample(model, prompts, seed=5, max_new_tokens=16, batch_size=len(prompts))
    assert ragged.is_enabled(model) is (attention == "sdpa")
    for batch_size in (1, 2, 7):
        found = sample(model, prompts, seed=5, max_new_tokens=16, batch_size=batch_size)
        assert found.response_ids == expected.response_ids
        for logps, others in zip(found.logp, expected.logp, strict=True):
            assert logps == pytest.approx(others, abs=1e-4)
    assert sample(model, prompts[:4], seed=5, max_new_tokens=16).response_ids == expected.response_ids[:4]
    # Samples of one prompt differ.
    assert len({tuple(ids) for ids in expected.response_ids}) > len(PROMPTS)


def test_with_and_without_layouts_the_samples_are_the_same(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    first, other = tiny_model(family), tiny_model(family)
    other.set_attn_implementation("eager")
    expected = sample(first, PROMPTS * 2, max_new_tokens=24, batch_size=6)
    found = sample(other, PROMPTS * 2, max_new_tokens=24, batch_size=6)
    assert (ragged.is_enabled(first), ragged.is_enabled(other)) == (True, False)
    assert found.response_ids == expected.response_ids


class _CountTokens:
    """Counts the tokens that go through a model's blocks, and the forwards."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.forwards: list[int] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: self.forwards.append(args[0].numel()))


def test_only_tokens_that_are_needed_go_through_the_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    TransformersSampler().check_model(model)
    counted = _CountTokens(model)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    samples = sample(model, prompts, max_new_tokens=16, batch_size=8)
    lengths = [len(ids) for ids in samples.response_ids]
    # The last token drawn is never read, and the first needs no forward but that of the prompt, or of its last token.
    decoded = sum(length - 1 for length in lengths)
    # Each distinct prompt is read at least once, and again only where no slot still holds it.
    read_once = sum(map(len, PROMPTS))
    known = len(prompts) - len(PROMPTS)
    assert sum(counted.forwards) < decoded + 1.5 * read_once + known
    assert sum(counted.forwards) >= decoded + read_once + known - sum(len(prompt) == 1 for prompt in PROMPTS)
    # All slots are busy until no prompt waits any more.
    assert max(counted.forwards[4:-16]) >= 8
    assert len(counted.forwards) <= sum(lengths) / 8 + 16


def test_long_prompts_are_read_in_several_forwards(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen2").double()
    expected = sample(model, PROMPTS, max_new_tokens=8)
    monkeypatch.setattr(continuous, "PROMPT_TOKENS", 10)
    counted = _CountTokens(model)
    assert sample(model, PROMPTS, max_new_tokens=8).response_ids == expected.response_ids
    assert max(counted.forwards) <= 12 + len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_broken_down_is_named(temperature: float, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        sample(model, PROMPTS, max_new_tokens=3, temperature=temperature)


def test_eos_comes_once_and_last_and_truncation_is_marked(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    samples = sample(model, PROMPTS * 20, max_new_tokens=16, batch_size=64)
    assert {True, False} == set(samples.is_truncated)
    for ids, logp, is_truncated in zip(samples.response_ids, samples.logp, samples.is_truncated, strict=True):
        assert 1 <= len(ids) <= 16
        assert len(logp) == len(ids)
        assert max(logp) <= 0.0
        assert ids.count(2) == (0 if is_truncated else 1)
        assert len(ids) == 16 if is_truncated else ids[-1] == 2
    # EOS as the very last token that the limit allows is no truncation.
    assert any(len(ids) == 16 and not cut for ids, cut in zip(samples.response_ids, samples.is_truncated, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_end_ends_a_response(attention: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    settings: Any = {"config": SamplingConfig(max_new_tokens=16), "seed": 0}
    free = TransformersSampler().sample(model, PROMPTS * 8, eos_token_id=2, **settings)
    ends = [2, 7, 11]
    found = TransformersSampler().sample(model, PROMPTS * 8, eos_token_id=ends, **settings)
    # The same draws, cut after the first of the ends.
    for ids, logp, cut, longer, said in zip(
        found.response_ids, found.logp, found.is_truncated, free.response_ids, free.logp, strict=True
    ):
        first = next((place for place, token in enumerate(longer) if token in ends), len(longer) - 1)
        assert ids == longer[: first + 1]
        assert logp == pytest.approx(said[: first + 1], abs=1e-4)
        assert cut == (ids[-1] not in ends)
    assert {ids[-1] for ids, cut in zip(found.response_ids, found.is_truncated, strict=True) if not cut} == set(ends)


def test_one_new_token(tiny_model: Callable[..., PreTrainedModel]) -> None:
    samples = sample(tiny_model("gemma3"), PROMPTS * 30, max_new_tokens=1)
    assert {len(ids) for ids in samples.response_ids} == {1}
    assert samples.is_truncated == [ids != [2] for ids in samples.response_ids]
    assert not all(samples.is_truncated)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_models_mode_is_left_as_it_was(is_training: bool, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama").train(is_training)
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    sample(model, PROMPTS, max_new_tokens=3)
    assert not any(modes)
    assert all(module.training is is_training for module in model.modules())
    with pytest.raises(IndexError):
        sample(model, [[48]], max_new_tokens=3)
    assert model.training is is_training


def test_gradient_checkpointing_does_not_change_samples(tiny_model: Callable[..., PreTrainedModel]) -> None:
    plain, checkpointed = tiny_model("llama"), tiny_model("llama")
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    expected = sample(plain, PROMPTS, max_new_tokens=12)
    assert sample(checkpointed, PROMPTS, max_new_tokens=12).response_ids == expected.response_ids


def test_progress_counts_every_prompt(tiny_model: Callable[..., PreTrainedModel]) -> None:
    steps: list[int] = []
    TransformersSampler().sample(
        tiny_model(),
        PROMPTS,
        config=SamplingConfig(max_new_tokens=2, batch_size=4),
        eos_token_id=2,
        seed=0,
        on_progress=steps.append,
    )
    assert sum(steps) == len(PROMPTS)
    assert min(steps) > 0


def test_no_prompts_give_no_samples(tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert sample(tiny_model(), []).response_ids == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be 0 .* got -0\.1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1\.1"),
        ({"top_k": -1}, "top_k must be 0 .* got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(
    settings: dict[str, float], message: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(tiny_model(), PROMPTS, **settings)


def test_an_empty_prompt_is_refused(tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        sample(tiny_model(), [[3], []])
