from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dpr_lightning.functional.collate import collate
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.models.critic import ValueModel, load_critic
from dpr_lightning.models.policies import CausalPolicy, scatter_tokens

# Lengths 3+5, 9+1, 1+12, 6+4; the longest is 13, so windows of 4 end inside every row.
GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(3, 48, (length,), generator=GENERATOR).tolist() for length in (3, 9, 1, 6)]
RESPONSES = [torch.randint(3, 48, (length,), generator=GENERATOR).tolist() for length in (5, 1, 12, 4)]


def make_critic(model: PreTrainedModel) -> ValueModel:
    critic = ValueModel(model.get_decoder(), hidden_size=32)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    return critic


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_are_of_the_state_before_each_token(
    family: str, side: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family)
    critic = make_critic(model)
    batch = collate(PROMPTS, RESPONSES, pad_id=0, side=side)  # type: ignore[arg-type]
    value_BT = scatter_tokens(critic(batch), batch.response_mask_BT).detach()
    # Independent of the critic's batching: one unpadded row that ends where the token is yet to be chosen.
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        columns = batch.response_mask_BT[row].nonzero().flatten().tolist()
        for t, column in enumerate(columns):
            state = torch.tensor([[*prompt, *response[:t]]])
            with torch.no_grad():
                hidden_D = model.get_decoder()(input_ids=state).last_hidden_state[0, -1]
            expected = float(hidden_D @ critic.head.weight[0].detach())
            # float32 attention over a padded rectangle sums in another order: rounding of values of size ten.
            assert float(value_BT[row, column]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert float(value_BT[~batch.response_mask_BT].abs().max()) == 0.0
    assert float(value_BT.std()) > 0.1


def test_order_is_that_of_the_policy(tiny_model: Callable[..., PreTrainedModel]) -> None:
    # A head that copies one hidden unit gives the policy's own hidden state.
    model = tiny_model("llama")
    critic = ValueModel(model.get_decoder(), hidden_size=32)
    critic.head.weight.data[0, 3] = 1.0
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    assert torch.equal(critic(batch), CausalPolicy(model).hidden_states(batch)[:, 3])


def test_it_starts_as_zero_with_a_gradient_in_its_head(frozen_dirs: tuple[str, str]) -> None:
    critic = load_critic(frozen_dirs[0], BackboneConfig(name_or_path="unused"))
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)

    def step() -> tuple[float, float]:
        """Return the norms of head's and decoder's gradients of one step towards a value of 1."""
        optimizer.zero_grad()
        (critic(batch) - 1.0).square().mean().backward()
        optimizer.step()
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
            for part in (critic.head, critic.decoder)
        ]
        return float(norms[0]), float(norms[1])

    assert torch.equal(critic(batch), torch.zeros(22))
    head, decoder = step()
    assert head > 0.1
    assert decoder == 0.0
    head, decoder = step()
    assert head > 0.1
    assert decoder > 1e-3


def test_it_is_the_decoder_alone(frozen_dirs: tuple[str, str]) -> None:
    critic = load_critic(frozen_dirs[0], BackboneConfig(name_or_path="unused"))
    names = [name for name, _ in critic.named_parameters()]
    assert "head.weight" in names
    assert not any("lm_head" in name for name in names)
    assert {name.partition(".")[0] for name in names} == {"decoder", "head"}


def test_its_dropout_is_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    critic = load_critic(str(tmp_path), BackboneConfig(name_or_path="unused")).train()
    torch.nn.init.normal_(critic.head.weight)
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    assert critic.decoder.training
    assert torch.equal(critic(batch), critic(batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_are_float32(dtype: str, autocast: bool, frozen_dirs: tuple[str, str]) -> None:
    backbone = BackboneConfig(name_or_path="unused", dtype=dtype)  # type: ignore[arg-type]
    critic = load_critic(frozen_dirs[0], backbone)
    torch.nn.init.normal_(critic.head.weight)
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value_N = critic(batch)
    assert value_N.dtype == torch.float32
    assert bool(torch.isfinite(value_N).all())
    # The Trainer's bf16-true narrows the head as well.
    assert critic.to(torch.bfloat16)(batch).dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(frozen_dirs: tuple[str, str]) -> None:
    batch = collate(PROMPTS, RESPONSES, pad_id=0)
    grads = []
    for is_on in (False, True):
        backbone = BackboneConfig(name_or_path="unused", gradient_checkpointing=is_on)
        critic = load_critic(frozen_dirs[0], backbone).train()
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(3))
        assert any(getattr(module, "gradient_checkpointing", False) for module in critic.modules()) == is_on
        critic(batch).square().sum().backward()
        grads.append([parameter.grad for parameter in critic.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)
