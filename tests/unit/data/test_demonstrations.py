from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from jsonargparse import ArgumentParser

from dpr_lightning.data.demonstrations import DemonstrationConfig, DemonstrationTable, load_demonstrations
from dpr_lightning.data.presets import Demonstration
from dpr_lightning.errors import UserError

Write = Callable[..., str]
PAIRS = [{"prompt": f"p{i}", "response": f"r{i}", "family": i % 3} for i in range(20)]


def demonstrations(table: DemonstrationTable) -> list[Demonstration]:
    return [item for _, chunk in table.chunks() for item in chunk]


def load(source: str, **kwargs: Any) -> dict[str, DemonstrationTable]:
    return dict(load_demonstrations(DemonstrationConfig(source=source, **kwargs)))


def texts(table: DemonstrationTable) -> list[tuple[str, str, str]]:
    return [(item.system, item.prompt, item.response) for item in demonstrations(table)]


def test_jsonl_rows_with_their_metadata(write_jsonl: Write) -> None:
    table = load(write_jsonl(PAIRS))["train"]
    assert texts(table)[:2] == [("", "p0", "r0"), ("", "p1", "r1")]
    # Numbers stay numbers, also where other rows hold something else in that column.
    assert table.metadata(4) == {"row": 5, "prompt": "p4", "system": "", "response": "r4", "family": 1}


def test_columns_may_hold_other_types_in_other_rows(write_jsonl: Write) -> None:
    rows = [{"prompt": "a", "response": "b", "answer": 5}, {"prompt": "c", "response": "d", "answer": [1, "x"]}]
    table = load(write_jsonl(rows))["train"]
    assert [table.metadata(i)["answer"] for i in (0, 1)] == [5, [1, "x"]]


def test_json_array_csv_and_parquet_say_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": 'a "quoted", line\nbreak', "response": "007"}, {"prompt": "é\u2028ß", "response": "NA"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "lines.json").write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    expected = [("", row["prompt"], row["response"]) for row in rows]
    for name in ("rows.json", "lines.json", "rows.csv", "rows.parquet"):
        assert texts(load(str(tmp_path / name))["train"]) == expected, name


def test_glob_reads_files_in_the_order_of_their_names(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl(PAIRS[2:4], "part-2.jsonl")
    write_jsonl(PAIRS[:2], "part-1.jsonl")
    table = load(str(tmp_path / "part-*.jsonl"))["train"]
    assert [prompt for _, prompt, _ in texts(table)] == ["p0", "p1", "p2", "p3"]
    assert table.locate(2) == f"{tmp_path}/part-2.jsonl line 1"


def test_edited_file_is_read_again(write_jsonl: Write) -> None:
    assert len(load(write_jsonl(PAIRS))["train"]) == 20
    assert len(load(write_jsonl(PAIRS[:3]))["train"]) == 3


@pytest.mark.parametrize(
    ("preset", "row", "expected"),
    [
        ("open_orca", {"system_prompt": "S", "question": "Q", "response": "R", "id": "x"}, ("S", "Q", "R")),
        ("open_orca", {"system_prompt": "", "question": "Q", "response": "R"}, ("", "Q", "R")),
        ("alpaca", {"instruction": "I", "input": "", "output": "O"}, ("", "I", "O")),
        ("alpaca", {"instruction": "I", "input": "J", "output": "O"}, ("", "I\n\nJ", "O")),
        ("gsm8k", {"question": "Q", "answer": "A #### 4"}, ("", "Q", "A #### 4")),
        ("prompt_response", {"prompt": "P", "response": "R", "system": None}, ("", "P", "R")),
    ],
)
def test_presets(write_jsonl: Write, preset: str, row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert texts(load(write_jsonl([row]), preset=preset)["train"]) == [expected]


def test_chat_answers_with_its_last_assistant_turn(write_jsonl: Write) -> None:
    chat = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Q3")]
    row = {"messages": [{"role": role, "content": content} for role, content in chat]}
    [item] = demonstrations(load(write_jsonl([row]), preset="messages")["train"])
    assert [message["content"] for message in item.messages] == ["S", "Q1", "A1", "Q2"]
    assert item.response == "A2"
    assert item.prompt == "Q1\n\nA1\n\nQ2"


def test_chat_without_an_answer_or_a_question_is_empty(write_jsonl: Write) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Q"}]},
        {"messages": [{"role": "assistant", "content": "A"}]},
        {"messages": None},
    ]
    items = demonstrations(load(write_jsonl(rows), preset="messages")["train"])
    assert [(len(item.messages), item.response) for item in items] == [(1, ""), (0, "A"), (0, "")]


def test_columns_are_mapped_over_the_preset(write_jsonl: Write) -> None:
    path = write_jsonl([{"ask": "Q", "reply": "R", "role": "S"}])
    columns = {"prompt": "ask", "response": "reply", "system": "role"}
    assert texts(load(path, columns=columns)["train"]) == [("S", "Q", "R")]


def test_subsample_is_drawn_by_seed(write_jsonl: Write) -> None:
    path = write_jsonl(PAIRS)
    first, again, other = (load(path, subsample=8, seed=seed)["train"].rows.tolist() for seed in (1, 1, 2))
    assert first == again == sorted(set(first))
    assert len(first) == 8
    assert first != other
    assert len(load(path, subsample=50)["train"]) == 20


def test_one_prompt_is_never_on_two_sides(write_jsonl: Write) -> None:
    # 60 prompts, each asked twice with different system messages, answers and space at the end.
    rows = [{"prompt": f"p{i % 60}" + " " * (i // 60), "response": f"r{i}", "system": f"s{i}"} for i in range(120)]
    tables = load(write_jsonl(rows), validation_fraction=0.25, test_fraction=0.25, seed=3)
    prompts = {name: {item.prompt.strip() for item in demonstrations(table)} for name, table in tables.items()}
    assert sum(len(table) for table in tables.values()) == 120
    assert sum(len(names) for names in prompts.values()) == 60
    assert all(len(tables[name]) == 2 * len(prompts[name]) for name in tables)
    # Binomial with n = 60, p = 1/4: 15 expected, 4 and 26 lie more than three deviations away.
    assert 4 < len(prompts["validation"]) < 26


def test_a_prompts_side_does_not_depend_on_other_rows(write_jsonl: Write) -> None:
    full = load(write_jsonl(PAIRS, "a.jsonl"), validation_fraction=0.4)
    half = load(write_jsonl(PAIRS[10:], "b.jsonl"), validation_fraction=0.4)
    held = {prompt for _, prompt, _ in texts(full["validation"])}
    assert {prompt for _, prompt, _ in texts(half["validation"])} == held & {f"p{i}" for i in range(10, 20)}


def test_small_fractions_get_one_prompt(write_jsonl: Write) -> None:
    tables = load(write_jsonl(PAIRS), validation_fraction=1e-9, test_fraction=1e-9)
    assert [len(tables[name]) for name in ("train", "validation", "test")] == [18, 1, 1]
    with pytest.raises(UserError, match="1 distinct prompts leave none for training"):
        load(write_jsonl(PAIRS[:1]), validation_fraction=0.1)


def test_sources_of_their_own_for_validation_and_test(write_jsonl: Write) -> None:
    held = write_jsonl(PAIRS[:3], "held.jsonl")
    tables = load(write_jsonl(PAIRS[3:]), validation_source=held, test_source=held, subsample=5)
    assert [len(tables[name]) for name in ("train", "validation", "test")] == [5, 3, 3]


def test_prompts_alone_need_no_response_column(write_jsonl: Write) -> None:
    config = DemonstrationConfig(source=write_jsonl([{"prompt": "a"}]))
    assert len(load_demonstrations(config, needs_response=False)["train"]) == 1
    with pytest.raises(UserError, match="no column 'response'"):
        load_demonstrations(config)


def test_broken_json_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": "c" "response": "d"}\n')
    with pytest.raises(UserError, match=r"data\.demonstrations\.source: .*rows\.jsonl line 3: broken JSON .*column 16"):
        load(str(path))
    path.write_text('[1, 2]\n"x"\n')
    with pytest.raises(UserError, match="line 2: broken JSON"):
        load(str(path))
    path.write_text('{"prompt": "a"}\n["b"]\n')
    with pytest.raises(UserError, match="line 2 holds list, not an object"):
        load(str(path))


def test_broken_array_and_csv_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a",\n "response" "b"}]')
    with pytest.raises(UserError, match=r"rows\.json line 2: broken JSON"):
        load(str(path))
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\na,b\nc,d,e\n")
    with pytest.raises(UserError, match=r"rows\.csv line 3 has 3 cells, the header 2"):
        load(str(path))
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(UserError, match="names a column twice"):
        load(str(path))


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is empty|holds no rows"):
        load(str(path))


def test_unreadable_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    for source, match in (
        ("absent.jsonl", "no file"),
        ("rows.txt", "is not one of"),
        ("", "is a directory"),
        ("*.none", "no file"),
        ("latin.jsonl", "not UTF-8"),
        ("bad.parquet", "cannot be read as Parquet"),
        ("*.*", "mixes|is not one of"),
    ):
        with pytest.raises(UserError, match=match):
            load(str(tmp_path / source))


def test_missing_column_names_those_that_exist_and_the_nearest(write_jsonl: Write) -> None:
    path = write_jsonl([{"promt": "a", "response": "b"}])
    with pytest.raises(UserError, match=r"no column 'prompt' for prompt \(nearest: 'promt'\).*has promt, response"):
        load(path)
    with pytest.raises(UserError, match=r"unknown key 'respnse' \(nearest: 'response'\)"):
        load(path, columns={"respnse": "response"})
    with pytest.raises(UserError, match="no column 'sys' for system"):
        load(path, columns={"prompt": "promt", "system": "sys"})
    with pytest.raises(UserError, match="messages needs preset: messages"):
        load(path, columns={"messages": "promt"})


def test_cell_that_is_not_text_names_its_row(write_jsonl: Write, tmp_path: Path) -> None:
    path = write_jsonl([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": 7}])
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: column 'response' holds int 7, not text"):
        demonstrations(load(path)["train"])
    datasets.Dataset.from_dict({"prompt": ["a"], "response": [1.5]}).to_parquet(tmp_path / "n.parquet")
    with pytest.raises(UserError, match=r"row 1: column 'response' holds float 1\.5"):
        demonstrations(load(str(tmp_path / "n.parquet"))["train"])
    path = write_jsonl([{"messages": [{"role": "human", "content": "a"}]}])
    with pytest.raises(UserError, match="line 1: message 1 in 'messages' has role 'human'"):
        demonstrations(load(path, preset="messages")["train"])
    path = write_jsonl([{"messages": "hello"}])
    with pytest.raises(UserError, match="holds str, not a list of messages"):
        demonstrations(load(path, preset="messages")["train"])


def test_messages_come_through_parquet(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    datasets.Dataset.from_dict({"messages": [chat]}).to_parquet(tmp_path / "m.parquet")
    assert texts(load(str(tmp_path / "m.parquet"), preset="messages")["train"]) == [("", "Q", "A")]


def test_hub_data_set_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'some/name' is no local file, and the hub did not give it: no route$"):
        load("some/name")


def test_hub_data_set_is_read_with_its_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def hub(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"question": ["Q"], "answer": ["A"]})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    tables = load("openai/gsm8k", preset="gsm8k", subset="main", hub_split="test")
    assert texts(tables["train"]) == [("", "Q", "A")]
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"validation_fraction": 1.5}, "validation_fraction: found 1.5"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave some rows"),
        ({"validation_fraction": 0.5, "validation_source": "x"}, "both set"),
        ({"subsample": 0}, "subsample: found 0"),
        ({"max_response_tokens": 0}, "max_response_tokens: found 0"),
    ],
)
def test_settings_that_no_data_satisfies_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        DemonstrationConfig(source="x", **settings)


def test_settings_parse_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--demonstrations", type=DemonstrationConfig)
    parsed = parser.parse_string(
        "demonstrations:\n  source: rows.jsonl\n  preset: alpaca\n  subsample: 100000\n  columns: {response: out}\n"
    )
    config = parser.instantiate(parsed).demonstrations
    assert config == DemonstrationConfig(
        source="rows.jsonl", preset="alpaca", subsample=100_000, columns={"response": "out"}
    )


def test_subsample_equals_a_draw_made_by_hand(write_jsonl: Write) -> None:
    expected = sorted(np.random.default_rng([9]).permutation(20)[:4].tolist())
    assert load(write_jsonl(PAIRS), subsample=4, seed=9)["train"].rows.tolist() == expected
