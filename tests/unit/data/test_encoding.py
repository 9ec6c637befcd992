from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from dpr_lightning.data import demonstrations
from dpr_lightning.data.demonstrations import DemonstrationConfig, load_demonstrations
from dpr_lightning.data.encoding import DropReport, EncodedDemonstrations, Reason, encode_table
from dpr_lightning.data.prompts import evaluation_split, load_prompts
from dpr_lightning.data.templates import ChatTemplate, PromptTemplate, TextTemplate
from dpr_lightning.errors import UserError

Write = Callable[..., str]


def encode(
    source: str, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate | None = None, **kwargs: Any
) -> tuple[EncodedDemonstrations, DropReport]:
    config = DemonstrationConfig(source=source, **{"max_rejected_share": 1.0, **kwargs})
    table = load_demonstrations(config)["train"]
    return encode_table(table, tokenizer=tokenizer, template=template or TextTemplate(), config=config, split="train")


def test_ids_and_lengths_worked_by_hand(write_jsonl: Write, words: PreTrainedTokenizerFast) -> None:
    # <unk> 0, <s> 1, </s> 2, a 3, b 4, c 5, d 6; no BOS by default.
    path = write_jsonl([{"prompt": "a b", "response": "c"}, {"prompt": "d", "response": "a a z"}])
    encoded, report = encode(path, words)
    assert [encoded.prompt_ids(i) for i in (0, 1)] == [[3, 4], [6]]
    assert [encoded.response_ids(i) for i in (0, 1)] == [[5, 2], [3, 3, 0, 2]]
    assert encoded.prompt_lengths.tolist() == [2, 1]
    assert encoded.response_lengths.tolist() == [2, 4]
    assert encoded.response_flat.dtype == np.int32
    assert encoded.metadata(1)["response"] == "a a z"
    assert (report.num_rows, report.num_kept, report.num_dropped) == (2, 2, 0)


def test_every_reason_is_counted_with_its_rows(write_jsonl: Write, words: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "  ", "response": "b"},
        {"prompt": "a", "response": "\n"},
        {"prompt": "a", "response": None},
        {"prompt": "a b c d", "response": "b"},
        {"prompt": "a", "response": "b </s> c"},
        {"prompt": "a </s>", "response": "b"},
        {"prompt": "a", "response": "a b c d"},
        {"prompt": "a", "response": "a b c"},
        {"prompt": "a", "response": "a b"},
        {"prompt": "a", "response": "b <|x|>"},
    ]
    encoded, report = encode(write_jsonl(rows), words, max_prompt_tokens=3, max_response_tokens=3)
    assert dict(report.counts) == {
        Reason.EMPTY_PROMPT: 1,
        Reason.EMPTY_RESPONSE: 2,
        Reason.LONG_PROMPT: 1,
        Reason.SPECIAL_IDS: 2,
        Reason.TRUNCATED: 2,
    }
    assert encoded.rows.tolist() == [0, 7, 8, 9, 10]
    # Cut to three ids without EOS; three ids leave no room for EOS; two and EOS fit.
    assert [encoded.response_ids(i) for i in (1, 2, 3)] == [[3, 4, 5], [3, 4, 5], [3, 4, 2]]
    assert (report.num_kept, report.num_dropped) == (5, 6)
    table = report.table()
    assert "train: 11 rows, 5 kept, 6 dropped" in table
    assert "18.18%  empty response" in table
    assert "rows.jsonl line 5)" in table
    assert report.to_manifest()["reasons"]["prompt too long"] == 1


def test_labels_that_vanish_are_dropped(write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast) -> None:
    byte_bpe.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    encoded, report = encode(
        write_jsonl([{"prompt": "a", "response": "~"}, {"prompt": "~", "response": "b"}]), byte_bpe
    )
    assert report.counts == {Reason.NO_LABELS: 1}
    # The template's newline still is a prompt; without it there would be no token before the response.
    assert len(encoded.prompt_ids(0)) == 1
    _, report = encode(
        write_jsonl([{"prompt": "~", "response": "b"}, {"prompt": "a", "response": "b"}]),
        byte_bpe,
        TextTemplate(prompt="{prompt}"),
    )
    assert report.counts == {Reason.EMPTY_PROMPT: 1}


def test_special_token_spelt_out_is_kept_and_noted(write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "response": "x<|endoftext|>y"}, {"prompt": "<|im_end|>", "response": "y"}]
    for template, end in ((TextTemplate(), "<|endoftext|>"), (ChatTemplate(), "<|im_end|>")):
        encoded, report = encode(write_jsonl(rows), byte_bpe, template)
        assert report.counts == {Reason.SPELLS_SPECIAL: 2}
        assert report.num_dropped == 0
        end_id = byte_bpe.convert_tokens_to_ids(end)
        assert [encoded.response_ids(i).count(end_id) for i in (0, 1)] == [1, 1]
        assert byte_bpe.decode(encoded.response_ids(0)[:-1]) == "x<|endoftext|>y"


def test_too_large_a_share_is_refused_and_names_rows(write_jsonl: Write, words: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "response": "b"}] * 18 + [{"prompt": "", "response": "b"}] * 2
    path = write_jsonl(rows)
    _, report = encode(path, words, max_rejected_share=0.1)
    assert report.num_dropped == 2
    with pytest.raises(UserError, match=r"2 of 20 train rows .* 2 empty prompt \(first: .*line 19, .*line 20\)"):
        encode(path, words, max_rejected_share=0.09)
    with pytest.raises(UserError, match="1 of 1 train rows"):
        encode(write_jsonl([{"prompt": "", "response": "b"}]), words, max_rejected_share=1.0)


def test_chunks_change_nothing(
    write_jsonl: Write, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a b"[: 1 + 2 * (i % 2)], "response": "c d" if i % 5 else ""} for i in range(23)]
    whole, _ = encode(write_jsonl(rows), words)
    monkeypatch.setattr(demonstrations, "CHUNK_ROWS", 4)
    parts, _ = encode(write_jsonl(rows), words)
    assert parts.fingerprint() == whole.fingerprint()
    assert parts.rows.tolist() == whole.rows.tolist()


def test_fingerprint_follows_the_ids(write_jsonl: Write, words: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a b", "response": "c"}
    first = encode(write_jsonl([row], "1.jsonl"), words)[0].fingerprint()
    assert first == encode(write_jsonl([{**row, "id": 5}], "2.jsonl"), words)[0].fingerprint()
    moved = {"prompt": "a", "response": "b c"}  # the same ids in a row, divided elsewhere
    assert first != encode(write_jsonl([moved], "3.jsonl"), words)[0].fingerprint()


def test_prompts_are_those_of_sft_and_duplicates_are_counted(
    write_jsonl: Write, metaspace_bpe: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": f"p{'abc'[i % 3]}", "response": "x", "answer": i} for i in range(9)]
    rows.append({"prompt": "pd", "response": "", "answer": 9})
    config = DemonstrationConfig(source=write_jsonl(rows), validation_fraction=0.2, max_rejected_share=0.5)
    prompts = load_prompts(config, template=TextTemplate(), tokenizer=metaspace_bpe)
    for split, table in load_demonstrations(config).items():
        encoded, _ = encode_table(table, tokenizer=metaspace_bpe, template=TextTemplate(), config=config, split=split)
        by_row = {int(row): encoded.prompt_ids(i) for i, row in enumerate(encoded.rows)}
        found = {prompts[split].row(i)["row"] - 1: prompts[split].prompt_ids(i) for i in range(len(prompts[split]))}
        assert by_row.items() <= found.items()
    # The row without a response is a prompt all the same.
    assert sum(len(split) for split in prompts.values()) == 10
    distinct = {tuple(p.prompt_ids(i)) for p in prompts.values() for i in range(len(p))}
    assert sum(p.num_duplicates for p in prompts.values()) == 10 - len(distinct)
    batch = prompts["train"].batch([1, 0])
    assert len(batch) == 2
    assert batch.prompt_ids[1] == prompts["train"].prompt_ids(0)
    assert batch.rows[0]["answer"] == prompts["train"].row(1)["answer"]
    assert batch.to("cpu") is batch
    assert evaluation_split(prompts) == "validation"
    held_out = load_prompts(config, template=TextTemplate(), tokenizer=metaspace_bpe, splits=("validation", "test"))
    assert list(held_out) == ["validation"]
    with pytest.raises(UserError, match="no held-out prompts"):
        evaluation_split({"train": prompts["train"]})


def test_prompt_loader_gives_every_rank_as_many_batches(write_jsonl: Write, words: PreTrainedTokenizerFast) -> None:
    config = DemonstrationConfig(source=write_jsonl([{"prompt": "a"}] * 10))
    prompts = load_prompts(config, template=TextTemplate(), tokenizer=words)["train"]

    def served(**kwargs: Any) -> list[list[int]]:
        return [[row["row"] for row in batch.rows] for batch in prompts.loader(4, **kwargs)]

    assert served() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert served(world_size=2, rank=0) == [[1, 2, 3, 4], [9, 10]]
    assert served(world_size=2, rank=1) == [[5, 6, 7, 8], [1, 2, 3, 4]]  # the first batch again
    assert served(limit=5) == [[1, 2, 3, 4], [5]]
    assert served(world_size=3, rank=2, limit=5) == [[1, 2, 3, 4]]
