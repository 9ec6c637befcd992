from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerBase

from dpr_lightning.analysis.corruption import changed_tokens, corrupt, number_items
from dpr_lightning.data.tokenization import encode_responses

WORKED = "She sold 48/2 = <<48/2=24>>24 clips for $1,050.75.\n#### 72"


def test_numbers_are_found_whole_and_in_order() -> None:
    found = [WORKED[item.start : item.stop] for item in number_items(WORKED)]
    assert found == ["48", "2", "48", "2", "24", "24", "1,050.75", "72"]


@pytest.mark.parametrize(
    ("number", "count", "excluded"),
    [("7", 9, {"7"}), ("48", 17, {"08"}), ("0.2", 18, set()), ("10", 17, {"00"})],
)
def test_alternatives_are_one_digit_off_and_as_long(number: str, count: int, excluded: set[str]) -> None:
    (item,) = number_items(number)
    assert len(set(item.alternatives)) == count
    assert not excluded & set(item.alternatives)
    for other in item.alternatives:
        assert len(other) == len(number)
        assert sum(a != b for a, b in zip(number, other, strict=True)) == 1


def test_corruption_changes_one_digit_and_one_token(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    # Every digit is a token of its own there.
    right_ids = encode_responses(tiny_tokenizer, [WORKED])[0]
    places = set()
    for seed in range(60):
        corruption = corrupt(WORKED, tokenizer=tiny_tokenizer, rng=random.Random(seed))
        assert corruption is not None
        differing = [i for i, (a, b) in enumerate(zip(WORKED, corruption.text, strict=True)) if a != b]
        assert len(differing) == 1
        places.add(differing[0])
        assert corruption.is_same_length
        assert corruption.is_corrupted == [a != b for a, b in zip(right_ids, corruption.response_ids, strict=True)]
        assert sum(corruption.is_corrupted) == 1
        assert tiny_tokenizer.decode(corruption.response_ids) == corruption.text
    # Sixteen digits in eight numbers; a fixed place would be given away.
    assert len(places) > 8


def test_same_seed_gives_the_same_mistake(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = (corrupt(WORKED, tokenizer=tiny_tokenizer, rng=random.Random("a")) for _ in range(2))
    assert first == second


def test_last_place_is_the_result_and_the_verifier_vouches(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(20):
        corruption = corrupt(
            WORKED,
            tokenizer=tiny_tokenizer,
            rng=random.Random(seed),
            place="last",
            is_right=lambda text: not text.endswith("71"),
        )
        assert corruption is not None
        assert corruption.text == WORKED[:-2] + "71"


def test_nothing_to_corrupt(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert corrupt("no numbers here", tokenizer=tiny_tokenizer, rng=random.Random(0)) is None
    # A verifier that takes everything for right leaves nothing either.
    assert corrupt("7", tokenizer=tiny_tokenizer, rng=random.Random(0), is_right=lambda text: True) is None


@pytest.mark.parametrize(
    ("right", "wrong", "marks"),
    [
        ([1, 2, 3], [1, 9, 3], [0, 1, 0]),
        ([1, 2, 3], [1, 8, 9, 3], [0, 1, 1, 0]),
        ([1, 2, 2, 3], [1, 9, 3], [0, 1, 0]),
        # One token fewer and none new: nothing that stands there is wrong.
        ([1, 2, 3], [1, 3], [0, 0]),
        ([1, 1], [1, 1, 1], [0, 0, 1]),
    ],
)
def test_changed_tokens(right: list[int], wrong: list[int], marks: list[int]) -> None:
    assert changed_tokens(right, wrong) == [bool(mark) for mark in marks]
