"""A record means the same to ``generate`` as to training: the same prompt ids, whatever its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.demonstrations import DemonstrationConfig, load_demonstrations
from dpr_lightning.data.encoding import encode_table
from dpr_lightning.data.entries import read_entries, recorded_columns
from dpr_lightning.data.templates import ChatTemplate, PromptTemplate, TextTemplate
from dpr_lightning.errors import UserError
from dpr_lightning.generation.command import _prompt_columns
from dpr_lightning.generation.prompts import conversation, encode_first_turns

CHAT = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{% endfor %}<assistant>"
)
SYSTEM = {"role": "system", "content": "S"}
TOOL = {"type": "function", "function": {"name": "get"}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get", "arguments": {"a": 1}}}]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
RECORDS: list[tuple[str, dict[str, str] | None, dict[str, Any], str]] = [
    ("prompt_response", None, {"prompt": "q"}, "<user>q"),
    ("prompt_response", None, {"prompt": "q", "system": "S", "input": "not read"}, "<system>S<user>q"),
    ("prompt_response", None, {"prompt": [SYSTEM, user("q")]}, "<system>S<user>q"),
    (
        "prompt_response",
        None,
        {"prompt": [user("a"), assistant("b"), user("c")], "system": "S"},
        "<system>S<user>a<assistant>b<user>c",
    ),
    ("prompt_response", None, {"prompt": [{"from": "human", "value": "q"}]}, "<user>q"),
    (
        "prompt_response",
        None,
        {"prompt": [user("a"), CALL, {"role": "tool", "content": "3"}, user("c")]},
        '<user>a<assistant>[get {"a": 1}]<tool>3<user>c',
    ),
    (
        "prompt_response",
        None,
        {"prompt": "q", "tools": [TOOL]},
        'T[{"type": "function", "function": {"name": "get"}}]<user>q',
    ),
    ("open_orca", None, {"question": "q", "system_prompt": "S"}, "<system>S<user>q"),
    ("gsm8k", None, {"question": "q", "system": "S"}, "<system>S<user>q"),
    ("alpaca", None, {"instruction": "q", "input": "i", "system": "S"}, "<system>S<user>q\n\ni"),
    ("messages", None, {"messages": [user("a"), assistant("b"), user("c")], "system": "S"}, "<system>S<user>a"),
    ("messages", None, {"messages": [SYSTEM, user("a")]}, "<system>S<user>a"),
    ("sharegpt", None, {"conversations": SHAREGPT}, "<system>S<user>a"),
    (
        "prompt_response",
        {"prompt": "ask", "system": "who"},
        {"ask": "q", "who": "S", "prompt": "no"},
        "<system>S<user>q",
    ),
    ("messages", {"messages": "chat"}, {"chat": [SYSTEM, user("a"), assistant("b")]}, "<system>S<user>a"),
]


@pytest.fixture
def tokenizer(frozen_dirs: tuple[str, str]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(frozen_dirs[0])
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("preset", "columns", "record", "expected"), RECORDS)
def test_generate_asks_what_training_taught(
    preset: str,
    columns: dict[str, str] | None,
    record: dict[str, Any],
    expected: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "rows.jsonl", [record])
    template = ChatTemplate(CHAT)
    config = DemonstrationConfig(source=path, preset=preset, columns=columns)  # type: ignore[arg-type]
    table = load_demonstrations(config, needs_response=False)["train"]
    trained, _ = encode_table(
        table, tokenizer=tokenizer, template=template, config=config, split="train", needs_response=False
    )
    manifest = {"data": {"demonstrations": {"preset": preset, "columns": columns}}} if columns else None
    entries = read_entries(path, key="--prompts", with_answers=False, columns=recorded_columns(manifest))
    assert template.render(tokenizer, entries[0].item.messages, entries[0].item.tools) == expected + "<assistant>"
    assert encode_first_turns(entries, tokenizer, template) == [trained.prompt_ids(0)]
    # What generate writes is the same prompt when it is read again, by judges or for training.
    again = write(tmp_path / "again.jsonl", [{**_prompt_columns(entries[0]), "response": "r"}])
    (read,) = read_entries(again, key="--prompts", with_answers=False)
    assert (read.item.messages, read.item.tools) == (entries[0].item.messages, entries[0].item.tools)
    (judged,) = read_entries(again, key="--responses", with_answers=True)
    assert (judged.prompt, judged.answers) == (entries[0].prompt, ("r",))
    config = DemonstrationConfig(source=again)
    (_, (item,)), *_ = load_demonstrations(config)["train"].chunks()
    assert item.messages == entries[0].item.messages


def test_turns_of_the_user_are_asked_one_after_the_other(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"turns": ["a", "b", "c"], "system": "S"},
        {"conversations": ["a", "b"]},
        {"turns": [{"content": "a"}, {"content": "b"}]},
        {"prompt": ["a", "b"]},
        {"conversations": "a", "system": "S"},
    ]
    entries = read_entries(write(tmp_path / "rows.jsonl", rows), key="--prompts", with_answers=False)
    assert [entry.turns for entry in entries] == [("a", "b", "c"), *[("a", "b")] * 3, ("a",)]
    assert conversation(entries[0], []) == [SYSTEM, user("a")]
    assert conversation(entries[0], ["1"]) == [SYSTEM, user("a"), assistant("1"), user("b")]
    assert conversation(entries[4], []) == [SYSTEM, user("a")]
    assert _prompt_columns(entries[0]) == {"prompt": ["a", "b", "c"], "system": "S"}
    assert len(encode_first_turns(entries, tokenizer, TextTemplate())) == 5


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"prompt": "a \ud83d b"}, TextTemplate(), "'prompt' holds half a surrogate pair"),
        ({"prompt": "a", "tag": ["\udc00"]}, TextTemplate(), "'tag' holds half a surrogate pair"),
        ({"prompt": [user("a"), CALL, user("b")]}, TextTemplate(), "'tool_calls' that the prompt template does not"),
        ({"prompt": "a", "tools": [TOOL]}, TextTemplate(), "'tools' that the prompt template does not write"),
        ({"prompt": [user("a"), assistant("b")]}, TextTemplate(), "'prompt' ends with the assistant's turn"),
        ({"prompt": [{"role": "bot", "content": "a"}]}, TextTemplate(), "has role 'bot'"),
        (
            {"turns": ["a", "b"]},
            ChatTemplate("{% if messages[1:] %}{{ raise_exception('one turn') }}{% endif %}x"),
            r"refuses the roles user, assistant, user \(one turn\)",
        ),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(
    row: dict[str, Any], template: PromptTemplate, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "good"}, row])
    with pytest.raises(UserError, match=rf"^--prompts: .*rows\.jsonl line 2: .*{message}"):
        encode_first_turns(read_entries(path, key="--prompts", with_answers=False), tokenizer, template)


def test_parquet_cells_become_what_json_holds(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "rows.parquet"
    pd.DataFrame({"prompt": ["a"], "day": [pd.Timestamp("2026-01-02")]}).to_parquet(path)
    (entry,) = read_entries(str(path), key="--prompts", with_answers=False)
    assert json.loads(json.dumps(entry.row)) == {"prompt": "a", "day": "2026-01-02T00:00:00"}
    pd.DataFrame({"prompt": ["a", "b"], "image": [None, b"\x00"]}).to_parquet(path)
    with pytest.raises(UserError, match=r"rows\.parquet row 2: column 'image' holds bytes, not text"):
        read_entries(str(path), key="--prompts", with_answers=False)
    pd.DataFrame({"prompt": [b"a"]}).to_parquet(path)
    with pytest.raises(UserError, match=r"rows\.parquet row 1: column 'prompt' holds bytes, not text"):
        read_entries(str(path), key="--prompts", with_answers=False)
