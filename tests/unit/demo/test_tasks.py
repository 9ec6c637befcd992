import json
import random
from pathlib import Path

import pytest

from dpr_lightning.demo.families import FAMILIES
from dpr_lightning.demo.tasks import is_correct, make_rows, split_of, work_out, write_jsonl
from dpr_lightning.demo.wording import QUESTIONS

# Problems solved by hand: fields, the right answer as text, a wrong one of the same kind.
BY_HAND = {
    "sum": ({"a": 17, "b": 25, "c": 9}, "51", "50"),
    "sort": ({"items": [9, 2, 14, 7]}, "2 7 9 14", "2 9 7 14"),
    "spread": ({"items": [9, 2, 14, 7]}, "12", "7"),
    "reverse": ({"items": ["b", "k", "t", "m"]}, "m t k b", "b k t m"),
    "compare": ({"a": 3, "b": 7, "c": 21}, "no", "yes"),
    "remainder": ({"a": 29, "b": 6}, "5", "4"),
    "clock": ({"hour": 9, "minute": 40, "minutes": 35}, "10:15", "9:75"),
    "shop": ({"price": 7, "count": 3, "paid": 30}, "9", "21"),
}


def test_every_family_is_worded_and_solved_by_hand() -> None:
    assert set(BY_HAND) == set(FAMILIES) == set(QUESTIONS)
    assert min(len(templates) for templates in QUESTIONS.values()) >= 4


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_verifier_agrees_with_the_hand(family: str) -> None:
    fields, right, wrong = BY_HAND[family]
    row = {"family": family, "fields": fields}
    assert is_correct(row, f"any steps at all\nanswer: {right}")
    assert is_correct(row, f"answer: {right}")
    assert not is_correct(row, f"any steps at all\nanswer: {wrong}")


@pytest.mark.parametrize("response", ["", "51", "answer:", "answer: 51 or so", "answer: 51\nanswer: 51", "answer: -51"])
def test_verifier_refuses_what_is_no_single_answer(response: str) -> None:
    assert not is_correct({"family": "sum", "fields": {"a": 17, "b": 25, "c": 9}}, response)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_worked_answers_are_right_and_slips_are_wrong(family: str) -> None:
    rng = random.Random(3)
    for _ in range(100):
        fields = FAMILIES[family].draw(rng)
        for is_wrong in (False, True):
            steps, answer = work_out(family, fields, rng, is_wrong=is_wrong)
            assert is_correct({"family": family, "fields": fields}, f"{steps}\nanswer: {answer}") is not is_wrong


def test_rows_depend_on_the_seed_alone_and_prompts_differ() -> None:
    rows = make_rows(num_rows=300, seed=5, split="train")
    assert rows == make_rows(num_rows=300, seed=5, split="train")
    assert rows != make_rows(num_rows=300, seed=6, split="train")
    assert len({row["prompt"] for row in rows}) == 300
    assert {row["family"] for row in rows} == set(FAMILIES)


def test_splits_share_no_problem() -> None:
    problems = {}
    for split in ("train", "validation", "test"):
        rows = make_rows(num_rows=400, seed=1, split=split)
        # The key ignores wording, the order of interchangeable numbers, and the family.
        problems[split] = {FAMILIES[row["family"]].key(row["fields"]) for row in rows}
    assert not problems["train"] & problems["test"]
    assert not problems["train"] & problems["validation"]
    assert not problems["validation"] & problems["test"]


def test_the_split_ignores_the_order_of_interchangeable_numbers() -> None:
    for low in range(40):
        assert split_of("sort", {"items": [low, 41, 42, 43]}) == split_of("spread", {"items": [43, 42, low, 41]})


def test_slip_share_is_the_share_of_false_demonstrations() -> None:
    rows = make_rows(num_rows=1000, seed=2, split="train", slip_share=0.2)
    wrong = sum(not is_correct(row, row["response"]) for row in rows)
    # Binomial(1000, 0.2): four standard deviations are 51.
    assert 149 <= wrong <= 251
    assert all(is_correct(row, f"answer: {row['answer']}") for row in rows)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="slip_share must be in"):
        make_rows(num_rows=1, seed=0, split="train", slip_share=1.5)


def test_rows_survive_json_lines(tmp_path: Path) -> None:
    rows = make_rows(num_rows=20, seed=0, split="validation")
    write_jsonl(rows, tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
