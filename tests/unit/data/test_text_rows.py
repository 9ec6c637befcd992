"""Every key of a source is a column, whatever the order of its rows; rows that nothing can hold are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from dpr_lightning.data import text_rows
from dpr_lightning.data.readers import Records, open_records
from dpr_lightning.errors import UserError


def read(source: Path | str) -> Records:
    return open_records(str(source), subset=None, hub_split="train", key="source")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = json.dumps(rows, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("place", [0, 99, 100, 1999])
def test_a_key_of_one_row_is_a_column_wherever_the_row_stands(tmp_path: Path, suffix: str, place: int) -> None:
    rows: list[dict[str, Any]] = [{"prompt": str(number)} for number in range(2000)]
    rows[place]["system"] = "S"
    records = read(write(tmp_path / f"rows{suffix}", rows))
    assert sorted(records.columns) == ["prompt", "system"]
    assert records.read(range(2000)) == rows
    # From the cache of datasets, where no row is parsed again.
    assert read(tmp_path / f"rows{suffix}").columns == records.columns


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_a_glob_may_have_columns_of_their_own(tmp_path: Path, suffix: str) -> None:
    parts = ({"prompt": "a"}, {"prompt": "b", "system": "S"}, {"tag": "t", "prompt": "c"})
    for number, row in enumerate(parts):
        path = tmp_path / f"part_{number}{suffix}"
        if suffix == ".csv":
            path.write_text("".join(",".join(cells) + "\n" for cells in (row.keys(), row.values())))
        elif suffix == ".parquet":
            datasets.Dataset.from_list([row]).to_parquet(path)
        else:
            write(path, [row])
    records = read(tmp_path / f"part_*{suffix}")
    assert sorted(records.columns) == ["prompt", "system", "tag"]
    found = [{name: cell for name, cell in row.items() if cell is not None} for row in records.read(range(3))]
    assert found == list(parts)
    if suffix == ".parquet":
        assert records.place(2) == f"{tmp_path}/part_2.parquet row 1"


def test_parquet_files_may_differ_in_the_width_of_a_type(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.null())):
        cells = pa.array([None if kind == pa.null() else "a"], type=kind)
        pq.write_table(pa.table({"prompt": ["p"], "system": cells}), tmp_path / f"{number}.parquet")
    rows = read(tmp_path / "*.parquet").read(range(3))
    assert [row["system"] for row in rows] == ["a", "a", None]


def test_each_row_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": str(number)} for number in range(300)])
    texts: list[str] = []
    loads = json.loads

    def count(text: str) -> Any:
        texts.append(text)
        return loads(text)

    monkeypatch.setattr(text_rows.json, "loads", count)
    read(path)
    # datasets parses records of its own beside ours.
    assert sum(text.startswith('{"prompt": ') for text in texts) == 300


DEEP = '{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
HOSTILE = [
    (DEEP, "JSON nested more than 200 deep"),
    ('{"prompt": "a", "x": ' + '{"y":' * 100_000 + "1" + "}" * 100_001, "JSON nested more than 200 deep"),
    ('{"prompt": "a", "x": ' + "[" * 400 + "]" * 400 + "}", "JSON nested more than 200 deep"),
    ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "a whole number of thousands of digits"),
    ('{"prompt": "a", "x": [-' + "1" * 9000 + "]}", "a whole number of thousands of digits"),
]


@pytest.mark.parametrize(("row", "reason"), HOSTILE)
def test_a_row_beyond_all_limits_is_one_line_with_its_place(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + row + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl line 2: {reason}") as caught:
        read(tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    (tmp_path / "rows.json").write_text('[{"prompt": "a"},\n' + row + "]")
    with pytest.raises(UserError, match=rf"rows\.json row 2: {reason}"):
        read(tmp_path / "rows.json")


def test_brackets_within_text_are_no_nesting(tmp_path: Path) -> None:
    row = {"prompt": '"[{\\"' * 500, "x": [[1]] * 300}
    assert read(write(tmp_path / "rows.jsonl", [row])).read([0]) == [row]


@pytest.mark.parametrize(
    "text", ["[]x", '[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": 1}]]', '[{"a": 1}, {"a" 2}]']
)
def test_arrays_break_where_the_json_module_says(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(UserError, match=rf"line 1: broken JSON .*column {expected.value.colno}\)"):
        read(tmp_path / "rows.json")


def test_bytes_that_are_no_utf8_are_found_in_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "' + b"a" * 200_000 + b'"}\n{"prompt": "\xed\xa0\xbd"}\n')
    with pytest.raises(UserError, match=r"not UTF-8 text \(line 2, byte 13 of the line\)"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("delimiter", "name"), [(";", "';'"), ("\t", "a tab"), ("|", "'|'")])
def test_another_delimiter_is_named(tmp_path: Path, delimiter: str, name: str) -> None:
    for rows in (
        [["prompt", "response"], ["What ?", "That , this ."]],
        [["prompt", "a,b", "response"], ["x", "y", "z"]],
    ):
        (tmp_path / "rows.csv").write_text("".join(delimiter.join(cells) + "\n" for cells in rows))
        with pytest.raises(UserError, match=rf"rows\.csv is separated by {re.escape(name)}"):
            read(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("prompt,response;note\na,b\n")
    assert read(tmp_path / "rows.csv").columns == ("prompt", "response;note")
