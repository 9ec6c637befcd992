from __future__ import annotations

import pytest
import torch
from torch import nn

from dpr_lightning.functional.logprobs import LMHead
from dpr_lightning.rollout.packed import packed_head, packed_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
OPERATION = "mkldnn::_linear_pointwise"


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300, bias=False), nn.Linear(300, 4))


def operations(model: nn.Module, input_: torch.Tensor) -> list[str]:
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(input_)
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("shape", [(1, 300), (5, 300), (1, 70, 300)])
def test_packed_layers_give_what_they_gave(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    input_ = torch.randn(shape)
    with torch.no_grad():
        expected = model(input_)
        with packed_linears(model):
            found = model(input_)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(input_), expected)
    with packed_linears(model):
        # The last layer is too small to be worth it.
        assert operations(model, input_).count(OPERATION) == 2
    assert OPERATION not in operations(model, input_)


def test_layers_are_restored_after_an_error(model: nn.Sequential) -> None:
    with pytest.raises(KeyError), packed_linears(model):
        raise KeyError
    assert all("forward" not in layer.__dict__ for layer in model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(model: nn.Sequential, dtype: torch.dtype) -> None:
    model.to(dtype)
    with packed_linears(model):
        assert all("forward" not in layer.__dict__ for layer in model)


def test_mixed_precision_is_left_alone(model: nn.Sequential) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_linears(model):
        assert all("forward" not in layer.__dict__ for layer in model)


@pytest.mark.parametrize("num_entries", [40, 2000])
def test_a_packed_head_does_what_its_family_does(num_entries: int) -> None:
    torch.manual_seed(1)
    head = LMHead(
        weight_VD=torch.randn(num_entries, 64), bias_V=torch.randn(num_entries), logit_softcap=5.0, logit_scale=0.5
    )
    hidden_ND = torch.randn(7, 64)
    torch.testing.assert_close(packed_head(head)(hidden_ND), head.logits(hidden_ND), rtol=1e-5, atol=1e-5)
