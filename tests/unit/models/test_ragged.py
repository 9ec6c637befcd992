from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from dpr_lightning.functional.collate import collate
from dpr_lightning.models import ragged
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.types import TokenBatch

GENERATOR = torch.Generator().manual_seed(1)
LENGTHS = [(4, 9), (1, 3), (12, 20), (7, 0), (3, 1), (5, 14)]
SAMPLED_ROWS = [2, 0, 2, 3, 5, 0, 2, 3]
"""Whose prompts the rows of a batch of samples have; the first with prompt 3 has no response."""


def ids(count: int) -> list[int]:
    return torch.randint(3, 48, (count,), generator=GENERATOR).tolist()


PROMPTS, RESPONSES = [ids(prompt) for prompt, _ in LENGTHS], [ids(response) for _, response in LENGTHS]


SAMPLES = [RESPONSES[row] if number != 3 else [] for number, row in enumerate(SAMPLED_ROWS)]
SAMPLES[2], SAMPLES[5], SAMPLES[7] = ids(11), ids(2), ids(4)


@pytest.fixture(params=["left", "right"])
def batch(request: pytest.FixtureRequest) -> TokenBatch:
    return collate(PROMPTS, RESPONSES, pad_id=0, side=request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_shared", [False, True], ids=["a prompt each", "samples of prompts"])
def test_log_probs_and_gradients_are_those_of_each_row_alone(
    family: str, side: Literal["left", "right"], is_shared: bool, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    # Windows are 8 in families that have one, shorter than the longest row.
    packed, alone = tiny_model(family).double(), tiny_model(family).double()
    policy = CausalPolicy(packed)
    assert ragged.is_enabled(packed)
    prompts = [PROMPTS[row] for row in SAMPLED_ROWS] if is_shared else PROMPTS
    responses = SAMPLES if is_shared else RESPONSES
    logp_N = policy(collate(prompts, responses, pad_id=0, side=side)).logp_N
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits_TV = alone(torch.tensor([prompt + response])).logits[0]
        target_T = torch.tensor(response, dtype=torch.long)
        rows_TV = logits_TV[len(prompt) - 1 : len(prompt) + len(response) - 1].log_softmax(dim=1)
        expected.append(rows_TV.gather(1, target_T[:, None]).squeeze(1))
    torch.testing.assert_close(logp_N, torch.cat(expected), rtol=0, atol=1e-9)
    weight_N = torch.randn(len(logp_N), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (logp_N * weight_N).sum().backward()
    (torch.cat(expected) * weight_N).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        # Norms are float32.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_no_padding_goes_through_the_blocks(batch: TokenBatch, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    CausalPolicy(model)(batch)
    assert seen == [sum(prompt + response for prompt, response in LENGTHS)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_of_several_samples_goes_through_the_blocks_once(
    side: Literal["left", "right"], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    # Prompt 9 is the beginning of prompt 2, and another prompt.
    prompts = [PROMPTS[row] for row in SAMPLED_ROWS] + [PROMPTS[2][:-1]]
    batch = collate(prompts, [*SAMPLES, [5, 6]], pad_id=0, side=side)
    assert ragged.first_of_prompt(batch).tolist() == [0, 1, 0, 3, 4, 1, 0, 3, 8]
    CausalPolicy(model)(batch)
    once = sum(len(PROMPTS[row]) for row in {*SAMPLED_ROWS}) + len(PROMPTS[2]) - 1
    assert seen == [once + sum(map(len, SAMPLES)) + 2]


def test_gradient_checkpointing_runs_the_same_layout_again(
    family: str, batch: TokenBatch, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    plain, checkpointed = tiny_model(family).train(), tiny_model(family).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        CausalPolicy(model)(batch).logp_N.sum().backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_without_a_layout_a_model_is_what_it_was(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    before, enabled = tiny_model(family), tiny_model(family)
    assert ragged.enable(enabled)
    ids_BT = torch.randint(3, 48, (3, 20), generator=torch.Generator().manual_seed(3))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :7] = 0
    for found, expected in zip(
        enabled(input_ids=ids_BT, attention_mask=mask_BT).logits,
        before(input_ids=ids_BT, attention_mask=mask_BT).logits,
        strict=True,
    ):
        assert torch.equal(found, expected)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(
        enabled.generate(ids_BT, attention_mask=mask_BT, **settings),
        before.generate(ids_BT, attention_mask=mask_BT, **settings),
    )
    assert "dpr_lightning" not in enabled.config.to_json_string(use_diff=False)


@pytest.mark.parametrize(
    "change", [{"layer_types": ["chunked_attention"] * 2}, {"attn_logit_softcapping": 30.0}], ids=str
)
def test_attention_that_a_layout_does_not_know_is_left_alone(
    change: dict[str, Any], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    for name, value in change.items():
        setattr(model.config, name, value)
    assert not ragged.enable(model)
    assert not ragged.verify(model)
    assert model.config._attn_implementation == "sdpa"


def test_other_attention_functions_that_were_asked_for_are_kept(
    batch: TokenBatch, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    eager, packed = tiny_model("qwen2"), tiny_model("qwen2")
    eager.set_attn_implementation("eager")
    found = CausalPolicy(eager)(batch).logp_N
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(found, CausalPolicy(packed)(batch).logp_N, rtol=1e-4, atol=1e-4)


class _Leaning(modeling_llama.LlamaForCausalLM):
    """Its attention does something of its own with the mask that it makes."""


def test_a_class_that_means_more_than_a_layout_says_is_found_and_refused(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged, "_REFUSED", set())
    good = tiny_model("llama")
    assert ragged.enable(good)
    assert ragged.verify(good)
    model = _Leaning(good.config.__class__(**good.config.to_dict())).eval()
    assert ragged.enable(model)

    def look_at_the_first_token(module: Any, args: Any, kwargs: Any) -> Any:
        states: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        changed = states + states[:, :1]
        return (args, {**kwargs, "hidden_states": changed}) if "hidden_states" in kwargs else ((changed,), kwargs)

    model.model.layers[0].self_attn.register_forward_pre_hook(look_at_the_first_token, with_kwargs=True)
    assert not ragged.verify(model)
    assert model.config._attn_implementation == "sdpa"
    assert not ragged.enable(model), "found out once, it stays out"


def test_a_window_that_attention_is_not_told_of_is_found(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged, "_REFUSED", set())
    model = tiny_model("llama")
    # Llama's attention passes no window on, so a configuration with one would be ignored.
    model.config.sliding_window = 8
    assert ragged.enable(model)
    assert not ragged.verify(model)
