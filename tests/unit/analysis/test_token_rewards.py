from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpr_lightning.analysis.token_rewards import EncodedRow, TokenLocator, TokenRewards, score_rows
from dpr_lightning.data.tokenization import encode_response, encode_responses
from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.models.policies import CausalPolicy

TEXTS = [
    "plain words and 12",
    "  two spaces in front, one behind ",
    "line\n\n\tline\r\n",
    "smile \U0001f600 and family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "d\u00e9j\u00e0 vu \u6570\u5b57 \u0928\u092e\u0938\u094d\u0924\u0947",
    "e\u0301 is two characters",
    "</s> is text here, and <0xF0> too",
    "\U0001f600",
    "\n",
    " ",
]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A dummy space before every text, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a", "an", "\u2581an", "or", "wor", "\u2581wor"]
    merges = [("\u2581", "a"), ("a", "n"), ("\u2581", "an"), ("o", "r"), ("w", "or"), ("\u2581", "wor")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def trimming(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer with a post-processor that takes white space off the spans."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


@pytest.fixture(params=["plain", "trimming", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if request.param == "sentencepiece":
        return sentencepiece_like()
    return tiny_tokenizer if request.param == "plain" else trimming(tiny_tokenizer)


@pytest.mark.parametrize("text", TEXTS)
def test_spans_tile_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids, is_complete = encode_response(tokenizer, text, max_tokens=1000)
    assert is_complete
    (spans,) = TokenLocator(tokenizer).spans([text], [ids])
    assert len(spans) == len(ids)
    assert "".join(text[start:stop] for start, stop in spans) == text
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1] == (len(text), len(text))


@pytest.mark.parametrize("text", TEXTS)
def test_token_texts_are_the_spans_except_for_split_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids, _ = encode_response(tokenizer, text, max_tokens=1000)
    locator = TokenLocator(tokenizer)
    (spans,) = locator.spans([text], [ids])
    texts = locator.texts(ids)
    assert texts[-1] == "</s>"
    for name, (start, stop) in list(zip(texts, spans, strict=True))[:-1]:
        assert name == text[start:stop] or "<0x" in name


def test_a_split_character_belongs_to_the_token_that_completes_it(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    text = "a \U0001f600b"
    ids, _ = encode_response(tiny_tokenizer, text, max_tokens=100)
    locator = TokenLocator(tiny_tokenizer)
    (spans,) = locator.spans([text], [ids])
    assert "".join(locator.texts(ids)) == "a <0xF0><0x9F><0x98><0x80>b</s>"
    assert sum(text[start:stop] == "\U0001f600" for start, stop in spans) == 1
    smile = next(index for index, (start, stop) in enumerate(spans) if "\U0001f600" in text[start:stop])
    assert locator.texts(ids)[smile].endswith("<0x80>")
    # Cut in the midst of it: the character is in no span.
    (cut,) = locator.spans([text], [ids[:smile]])
    assert cut == spans[:smile]
    assert cut[-1][1] == 2


def test_ids_of_another_text_are_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="in two ways"):
        TokenLocator(tiny_tokenizer).spans(["abc"], [encode_responses(tiny_tokenizer, ["xyz"])[0]])


def test_a_tokenizer_without_spans_is_refused() -> None:
    class Slow:
        name_or_path = "slow"

    with pytest.raises(UserError, match=r"tokenizer of slow: .* save it as a fast tokenizer"):
        TokenLocator(Slow())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def policies(tiny_model: Any, tiny_tokenizer: PreTrainedTokenizerBase) -> list[CausalPolicy]:
    size = len(tiny_tokenizer)
    return [CausalPolicy(tiny_model("llama", seed=seed, vocab_size=size)).freeze() for seed in (1, 2)]


def encoded(tokenizer: PreTrainedTokenizerBase, max_tokens: int = 1000) -> list[EncodedRow]:
    return [
        EncodedRow(
            row=number,
            prompt="ask",
            response=text,
            prompt_ids=[1, *range(10, 12 + number)],
            response_ids=encode_response(tokenizer, text, max_tokens=max_tokens)[0],
        )
        for number, text in enumerate(TEXTS, start=1)
    ]


def score(
    rows: list[EncodedRow], policies: list[CausalPolicy], tokenizer: PreTrainedTokenizerBase, size: int
) -> list[TokenRewards]:
    return score_rows(
        rows,
        teacher=policies[0],
        reference=policies[1],
        locator=TokenLocator(tokenizer),
        eos_id=2,
        pad_id=0,
        micro_batch_size=size,
    )


def test_rewards_are_the_difference_of_two_plain_forwards(
    policies: list[CausalPolicy], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = encoded(tiny_tokenizer)
    found = score(rows, policies, tiny_tokenizer, 3)
    assert [item.row for item in found] == [row.row for row in rows]
    for row, item in zip(rows, found, strict=True):
        tokens = collate([row.prompt_ids], [row.response_ids], pad_id=0)
        expected = []
        for policy in policies:
            logits_BTV = policy.model(input_ids=tokens.input_ids_BT).logits.float()
            logp_NV = logits_BTV[0, len(row.prompt_ids) - 1 : -1].log_softmax(dim=-1)
            expected.append(logp_NV.gather(1, torch.tensor(row.response_ids)[:, None])[:, 0])
        torch.testing.assert_close(torch.tensor(item.teacher_logp), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(item.reference_logp), expected[1], atol=1e-5, rtol=1e-5)
        differences = [a - b for a, b in zip(item.teacher_logp, item.reference_logp, strict=True)]
        assert item.rewards == pytest.approx(differences)
        assert item.sum == pytest.approx(sum(item.rewards))
        assert item.mean == pytest.approx(item.sum / item.num_tokens)
        assert item.num_tokens == len(item.tokens) == len(item.offsets) == len(item.rewards) == len(row.response_ids)
        assert item.ends_by_eos


def test_a_cut_response_has_no_eos(policies: list[CausalPolicy], tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    found = score(encoded(tiny_tokenizer, max_tokens=4), policies, tiny_tokenizer, 4)
    for item in found:
        assert item.num_tokens <= 4
        assert item.ends_by_eos == (item.tokens[-1] == "</s>" and item.offsets[-1] == (len(item.response),) * 2)
    assert not found[0].ends_by_eos
    assert found[8].ends_by_eos
