from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpr_lightning import demo
from dpr_lightning.demo.pretrain import PEAK_LR, WARMUP_STEPS, build_model, learning_rate, noisy_batches, pretrain
from dpr_lightning.demo.tokenizer import build_tokenizer


def test_batches_are_right_padded_documents_from_bos_to_eos() -> None:
    tokenizer = build_tokenizer(seed=0, num_documents=200)
    batches = noisy_batches(tokenizer, seed=0)
    for _ in range(3):
        ids_BT, mask_BT = next(batches)
        for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True):
            length = int(mask_T.sum())
            assert bool(mask_T[:length].all())
            assert ids_T[0] == tokenizer.bos_token_id
            # One EOS, at the end, even where the noise put one into the text.
            assert (ids_T[:length] == tokenizer.eos_token_id).nonzero().flatten().tolist() == [length - 1]
            assert bool((ids_T[length:] == tokenizer.pad_token_id).all())


def test_learning_rate_warms_up_and_ends_at_a_hundredth() -> None:
    assert learning_rate(0, num_steps=1000) == pytest.approx(PEAK_LR / WARMUP_STEPS)
    assert learning_rate(WARMUP_STEPS, num_steps=1000) == pytest.approx(PEAK_LR)
    assert learning_rate(1000, num_steps=1000) == pytest.approx(0.01 * PEAK_LR)


def test_the_backbone_is_small() -> None:
    model = build_model(build_tokenizer(seed=0, num_documents=200))
    assert 200_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_pretraining_repeats_itself() -> None:
    first, _, loss = pretrain(seed=3, num_steps=1)
    second, _, again = pretrain(seed=3, num_steps=1)
    assert loss == again
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_the_shipped_backbone_has_the_recipes_tokenizer_and_shape() -> None:
    shipped = Path(demo.__file__).parent / "backbone"
    tokenizer = build_tokenizer(seed=0)
    loaded = AutoTokenizer.from_pretrained(shipped)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(shipped)
    expected = {name: tensor.shape for name, tensor in build_model(tokenizer).state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
