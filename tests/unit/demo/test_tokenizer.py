from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpr_lightning.demo.tasks import make_rows
from dpr_lightning.demo.tokenizer import VOCAB_SIZE, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(seed=0, num_documents=300)


@pytest.mark.parametrize(
    "text", ["", "add 12, 3 and 40.", "  two  spaces\n\n\ttab ", "h\u00e9llo \u20ac \U0001f600", "</a> it's 007"]
)
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_bos_is_added_once_and_special_ids_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("sort 3 1 2.")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) <= VOCAB_SIZE


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.tokenize("71 + 2046")
    assert [token.lstrip("\u0120") for token in tokens] == ["7", "1", "+", "2", "0", "4", "6"]


def test_prompt_and_response_tokenize_apart_as_together(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in make_rows(num_rows=50, seed=0, split="train"):
        prompt, response = row["prompt"] + "\n", row["response"]
        apart = tokenizer(prompt)["input_ids"] + tokenizer(response, add_special_tokens=False)["input_ids"]
        assert apart == tokenizer(prompt + response)["input_ids"]


def test_training_is_deterministic_and_saving_keeps_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert tokenizer.get_vocab() == build_tokenizer(seed=0, num_documents=300).get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("add 12 and 3.")["input_ids"] == tokenizer("add 12 and 3.")["input_ids"]
    assert loaded.padding_side == "right"
