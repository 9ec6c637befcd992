from __future__ import annotations

import pytest
import torch

from dpr_lightning.rollout.draws import draw, row_uniforms
from dpr_lightning.types import SamplingConfig

PLAIN = SamplingConfig()


@pytest.mark.parametrize("num_entries", [7, 256, 1000])
def test_a_draw_inverts_the_cumulative_distribution(num_entries: int) -> None:
    logits_V = torch.randn(num_entries, generator=torch.Generator().manual_seed(0)) * 3
    sum_V = logits_V.double().softmax(dim=0).cumsum(dim=0)
    uniform_N = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Where the oracle's own rounding cannot matter.
    uniform_N = uniform_N[(uniform_N[:, None] - sum_V).abs().min(dim=1).values > 1e-5]
    assert len(uniform_N) > 3000
    token_N, logp_N = draw(logits_V.repeat(len(uniform_N), 1), uniform_N, PLAIN)
    assert torch.equal(token_N, (sum_V <= uniform_N[:, None]).sum(dim=1))
    torch.testing.assert_close(logp_N, logits_V.log_softmax(dim=0)[token_N], rtol=0, atol=2e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_no_token_of_probability_zero_is_drawn(uniform: float) -> None:
    logits_NV = torch.full((3, 1024), -torch.inf)
    for row, column in enumerate((0, 500, 1023)):
        logits_NV[row, column] = -50.0
    token_N, logp_N = draw(logits_NV, torch.full((3,), uniform, dtype=torch.float64), PLAIN)
    assert token_N.tolist() == [0, 500, 1023]
    assert logp_N.tolist() == [0.0, 0.0, 0.0]


def test_a_token_of_a_billionth_can_be_drawn() -> None:
    # In a float32 sum over the whole vocabulary it would be lost.
    logits_NV = torch.zeros(1, 2**17)
    logits_NV[0, 0] = 30.0
    total = 1.0 + (2**17 - 1) * torch.tensor(-30.0, dtype=torch.float64).exp()
    uniform = 1.0 - 0.5 * torch.tensor(-30.0, dtype=torch.float64).exp() / total
    token_N, logp_N = draw(logits_NV, uniform[None], PLAIN)
    assert token_N.tolist() == [2**17 - 1]
    assert float(logp_N) == pytest.approx(-30.0 - float(total.log()), abs=1e-5)


def test_truncated_and_tempered_draws_stay_inside() -> None:
    logits_NV = torch.randn(500, 600, generator=torch.Generator().manual_seed(2))
    uniform_N = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    token_N, logp_N = draw(logits_NV.clone(), uniform_N, SamplingConfig(temperature=0.5, top_k=3))
    top_N3 = logits_NV.topk(3).values
    assert bool((logits_NV.gather(1, token_N[:, None]) >= top_N3[:, -1:]).all())
    expected_N = 2 * logits_NV.gather(1, token_N[:, None]).squeeze(1) - (2 * top_N3).logsumexp(dim=1)
    torch.testing.assert_close(logp_N, expected_N, rtol=0, atol=1e-5)


def test_greedy_takes_the_most_likely_with_its_own_probability() -> None:
    logits_NV = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    expected_N = logits_NV.log_softmax(dim=1)
    token_N, logp_N = draw(logits_NV.clone(), torch.zeros(5, dtype=torch.float64), SamplingConfig(temperature=0.0))
    assert torch.equal(token_N, expected_N.argmax(dim=1))
    torch.testing.assert_close(logp_N, expected_N.max(dim=1).values)


def test_a_rows_numbers_follow_from_seed_and_row() -> None:
    assert row_uniforms(3, 5, 8) == row_uniforms(3, 5, 20)[:8]
    assert row_uniforms(3, 5, 8) != row_uniforms(3, 6, 8)
    assert row_uniforms(3, 5, 8) != row_uniforms(4, 5, 8)
    assert row_uniforms(-1, 0, 2) == row_uniforms(2**64 - 1, 0, 2)
    assert all(0.0 <= value < 1.0 for value in row_uniforms(0, 0, 1000))
