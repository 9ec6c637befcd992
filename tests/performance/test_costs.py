"""What a step costs, in operations: the same on any machine, however busy it is.

Matrix products are counted exactly (torch leaves attention on a CPU out), so one padding token too many fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dpr_lightning.functional import logprobs
from dpr_lightning.functional.collate import collate
from dpr_lightning.functional.logprobs import LMHead, token_logprobs
from dpr_lightning.models.policies import CausalPolicy
from dpr_lightning.rollout import TransformersSampler
from dpr_lightning.rollout.scoring import score_tokens
from dpr_lightning.types import SamplingConfig, TokenBatch

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = [(3, 21), (17, 2), (8, 8), (1, 30), (11, 5)]
NUM_TOKENS = sum(prompt + response for prompt, response in LENGTHS)
NUM_RESPONSE_TOKENS = sum(response for _, response in LENGTHS)


@pytest.fixture
def batch() -> TokenBatch:
    prompts, responses = (
        [torch.randint(3, 48, (n,)).tolist() for n in lengths] for lengths in zip(*LENGTHS, strict=True)
    )
    return collate(prompts, responses, pad_id=0)


def sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the weights of the blocks' linear layers, and of the output layer."""
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    return sum(layer.weight.numel() for layer in linear), model.lm_head.weight.numel()


def added_in_place(sum_: Any, left: Any, right: Any, **kwargs: Any) -> int:
    """Return the operations of a product that torch's own table leaves out, by shapes."""
    return 2 * left[0] * left[1] * right[1]


def flops(work: Callable[[], object]) -> int:
    # Some transformers versions compute RoPE angles with bmm, which uses no weights.
    mapping = {torch.ops.aten.addmm_: added_in_place, torch.ops.aten.bmm: lambda *args, **kwargs: 0}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        work()
    return counter.get_total_flops()


def test_training_costs_six_operations_a_weight_and_token(
    family: str, batch: TokenBatch, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family)
    blocks, head = sizes(model)
    found = flops(lambda: CausalPolicy(model)(batch).logp_N.sum().backward())
    # The output layer sees response tokens only, and its logits are made once more in the backward pass.
    assert found == 6 * blocks * NUM_TOKENS + 8 * head * NUM_RESPONSE_TOKENS


def test_a_frozen_output_layer_costs_no_second_pass(
    batch: TokenBatch, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    blocks, head = sizes(model)
    model.lm_head.requires_grad_(False)
    found = flops(lambda: CausalPolicy(model)(batch).logp_N.sum().backward())
    assert found == 6 * blocks * NUM_TOKENS + 4 * head * NUM_RESPONSE_TOKENS


def test_scoring_costs_a_forward_for_each_policy(batch: TokenBatch, tiny_model: Callable[..., PreTrainedModel]) -> None:
    policies = [CausalPolicy(tiny_model("llama", seed=seed)).freeze() for seed in range(3)]
    blocks, head = sizes(policies[0].model)
    actor, teacher, reference = policies
    forward = 2 * (blocks * NUM_TOKENS + head * NUM_RESPONSE_TOKENS)
    old_logp_BT = torch.zeros(batch.input_ids_BT.shape)
    for known, num_asked in (({}, 3), ({"old_logp_BT": old_logp_BT}, 2)):
        work = partial(score_tokens, batch, actor=actor, teacher=teacher, reference=reference, micro_batch_size=2)
        assert flops(partial(work, **known)) == num_asked * forward


def test_a_rollout_costs_its_tokens(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(family)
    blocks, head = sizes(model)
    prompts = [torch.randint(3, 48, (n,), generator=GENERATOR).tolist() for n in (4, 9, 1, 15, 6, 2)]
    settings = SamplingConfig(max_new_tokens=20, batch_size=3)
    lengths: list[int] = []
    # Once for a model, and not for a rollout.
    TransformersSampler().check_model(model)

    def sample() -> None:
        samples = TransformersSampler().sample(model, prompts, config=settings, eos_token_id=2, seed=0)
        lengths.extend(map(len, samples.response_ids))

    found = flops(sample)
    # A response's last token is not read, and a prompt's last token gives the first.
    num_read = sum(map(len, prompts)) + sum(lengths) - len(prompts)
    assert found == 2 * (blocks * num_read + head * sum(lengths))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_decoding_step_takes_few_operations(tiny_model: Callable[..., PreTrainedModel]) -> None:
    # On an accelerator each is a launch; what grows with the rows or the length would show here.
    def count(rows: int, tokens: int) -> int:
        model = tiny_model("llama")
        settings = SamplingConfig(max_new_tokens=tokens, batch_size=rows)
        with _Operations() as operations:
            # No token ends a response.
            TransformersSampler().sample(model, [[5, 6]] * rows, config=settings, eos_token_id=-1, seed=0)
        return operations.count

    few, many = ((count(rows, 40) - count(rows, 20)) / 20 for rows in (2, 32))
    assert many == pytest.approx(few, rel=0.02)
    assert many < OPERATIONS_A_STEP


OPERATIONS_A_STEP = 270
"""Of two blocks, views counted; 256 when this was written."""


@pytest.mark.parametrize("trains_head", [True, False])
def test_log_probs_hold_no_more_than_a_tile_of_logits(trains_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_TILE", 1024)
    num_tokens, num_entries, width = 200, 3000, 4
    hidden_ND = torch.randn(num_tokens, width, requires_grad=True)
    weight_VD = torch.randn(num_entries, width, requires_grad=trains_head)
    target_N = torch.randint(num_entries, (num_tokens,))
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor) and value.shape != weight_VD.shape:
                    largest = max(largest, value.numel())
            return out

    with Largest():
        token_logprobs(hidden_ND, LMHead(weight_VD=weight_VD), target_N, chunk_size=64).logp_N.sum().backward()
    assert largest == 1024
