from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpr_lightning.data.entries import Entry, read_entries
from dpr_lightning.errors import UserError
from dpr_lightning.judging.matching import match

NAMES = ("responses", "baseline")


def entries(tmp_path: Path, rows: list[dict[str, Any]], *, with_answers: bool = True) -> list[Entry]:
    path = tmp_path / f"rows_{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_entries(str(path), key="--responses", with_answers=with_answers)


def answer(prompt: str, response: str | None, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **more}


def test_everything_that_does_not_fit_is_counted(tmp_path: Path) -> None:
    ours = [answer(name, name) for name in "abcdf"] + [answer("a", "a"), answer("b", "other"), answer("g", None)]
    theirs = [answer(name, name.upper()) for name in "gfedcba"]
    matched = match([entries(tmp_path, ours), entries(tmp_path, theirs)], names=NAMES)
    assert [item.key for item in matched.items] == ["a", "c", "d", "f"]
    assert [item.answers for item in matched.items][1] == (("c",), ("C",))
    assert matched.lost == {"missing in responses": 1, "different rows in responses": 1, "no response in responses": 1}
    assert matched.repeated == {"repeated row in responses": 1}
    assert (matched.num_prompts, matched.by) == (7, "prompt")


def test_a_file_of_prompts_says_what_should_be_there(tmp_path: Path) -> None:
    prompts = entries(tmp_path, [{"instruction": name, "dataset": f"set {name}"} for name in "cab"], with_answers=False)
    sides = [entries(tmp_path, [answer("b", "1"), answer("c", "2"), answer("x", "3")])] * 2
    matched = match(sides, names=NAMES, prompts=prompts)
    assert [(item.key, item.category) for item in matched.items] == [("c", "set c"), ("b", "set b")]
    assert matched.lost == {"missing in responses": 1}
    assert matched.repeated == {
        "row of responses outside of the prompts": 1,
        "row of baseline outside of the prompts": 1,
    }
    # A verifier sees the prompt's own columns, and no answer.
    assert matched.items[0].row == {"instruction": "c", "dataset": "set c", "prompt": "c"}


def test_ids_join_files_and_their_prompts_must_agree(tmp_path: Path) -> None:
    ours = [answer("p", "1", id=1), answer("q", "2", id=2), answer("r", "3", id=3)]
    theirs = [answer("r", "3", id="3"), answer("p", "1", id="1"), answer("changed", "2", id="2")]
    matched = match([entries(tmp_path, ours), entries(tmp_path, theirs)], names=NAMES, by="id")
    assert [item.key for item in matched.items] == ["1", "3"]
    assert matched.lost == {"different prompts under one id": 1}


def test_an_id_names_an_item_only_where_it_names_one(tmp_path: Path) -> None:
    theirs = entries(tmp_path, [answer("p", "1"), answer("q", "2")])
    for ids, keys in (((7, 8), ["7", "8"]), ((7, 7), ["p", "q"])):
        ours = entries(tmp_path, [answer("p", "1", id=ids[0]), answer("q", "2", id=ids[1])])
        assert [item.key for item in match([ours, theirs], names=NAMES, by="prompt").items] == keys


def test_published_shapes(tmp_path: Path) -> None:
    old = {
        "question_id": "q",
        "model_id": "m",
        "choices": [{"index": 0, "turns": [{"content": "old", "token_len": 1}]}],
    }
    new = {
        "uid": "q",
        "model": "n",
        "messages": [{"role": "user", "content": "do"}, {"role": "assistant", "content": {"answer": "new"}}],
    }
    questions = entries(tmp_path, [{"uid": "q", "prompt": "do", "category": "hard"}], with_answers=False)
    sides = [entries(tmp_path, [old]), entries(tmp_path, [new])]
    (item,) = match(sides, names=NAMES, prompts=questions).items
    assert (item.turns, item.answers, item.category) == (("do",), (("old",), ("new",)), "hard")
    assert [side[0].model for side in sides] == ["m", "n"]
    (lima,) = entries(tmp_path, [{"conversations": "hi"}], with_answers=False)
    assert lima.turns == ("hi",)
    table = tmp_path / "x.parquet"
    pd.DataFrame([answer("a", "b", row=4)]).to_parquet(table)
    (found,) = read_entries(str(table), key="--responses", with_answers=True)
    assert (found.id, found.prompt, found.answers) == ("4", "a", ("b",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"line 1: no response; needs one of the columns response, output, answer"),
        ({"prompt": 3, "response": "a"}, r"line 1: a prompt should be text or a list of texts, found 3"),
        ({"prompt": "a", "response": 3}, r"line 1: a response should be text or a list of texts, found 3"),
        ({"choices": []}, r"line 1: 'choices' should hold 'turns'"),
        ({"prompt": "a", "response": "b", "id": 1.5}, r"line 1: an id should be text or a whole number, found 1.5"),
    ],
)
def test_rows_of_no_known_shape_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        entries(tmp_path, [row])


def test_files_without_anything_in_common_are_refused(tmp_path: Path) -> None:
    ours, theirs = entries(tmp_path, [answer("a", "1")]), entries(tmp_path, [answer("b", "1")])
    with pytest.raises(UserError, match="no row of one file has the same prompt as a row of the others"):
        match([ours, theirs], names=NAMES)
    with pytest.raises(UserError, match=r"line 1: no id to match by; give --match prompt"):
        match([ours, theirs], names=NAMES, by="id")
    bare = entries(tmp_path, [{"response": "a"}])
    with pytest.raises(UserError, match="neither ids nor prompts"):
        match([bare, bare], names=NAMES)
