from __future__ import annotations

from decimal import Decimal

import pytest
from jsonargparse import ArgumentParser

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.verifiers import ExactMatch, FinalNumber, Verifier, final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "7"),
        ("#### 5 is wrong, so\n#### 72", "72"),
        ("#### 1,234 dollars for 3 days", "1234"),
        ("#### $18.00", "18"),
        ("#### -5", "-5"),
        ("####72.", "72"),
        ("#### -$3.50", "-3.5"),
        ("#### $-3.50", "-3.5"),
        ("the answer is $1,250,000.50.", "1250000.5"),
        ("so 10 - 4 = 6.", "6"),
        ("pages 3-5", "5"),
        ("x=-5", "-5"),
        ("(-2)", "-2"),
        ("\u22127", "-7"),
        ("about .5", "0.5"),
        ("50%", "50"),
        ("1, 2,3", "3"),
        ("version 1.2.3", "3"),
        ("007", "7"),
        ("The cart holds:\n- 12 apples", "12"),
        ("so it is 10 - 5", "5"),
        ("owes - $5", "5"),
        ("-$ 5", "-5"),
        ("-.5", "-0.5"),
        # One digit more than decimal arithmetic keeps.
        ("-12345678901234567890123456789", "-12345678901234567890123456789"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none here", "12 apples ####", "#### seven"])
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


def test_final_number_compares_by_value_with_the_demonstration() -> None:
    verifier = FinalNumber()
    row = {"row": 3, "prompt": "How many?", "response": "6 * 3 = 18\n#### 18"}
    assert verifier(row, "It costs $18.00.")
    assert verifier(row, "first 5, then\n#### 18")
    assert not verifier(row, "18 at first\n#### 5")
    assert not verifier(row, "no idea")
    assert FinalNumber("answer")({"answer": 7}, "7")


def test_final_number_needs_something_to_compare_with() -> None:
    with pytest.raises(UserError, match="rows have no column 'answer'; they have prompt, response"):
        FinalNumber("answer")({"prompt": "?", "response": "1"}, "1")
    with pytest.raises(UserError, match="row 4: column 'response' holds no number"):
        FinalNumber()({"row": 4, "response": "none"}, "1")


def test_exact_match() -> None:
    row = {"answer": "red  green"}
    assert ExactMatch("answer")(row, " red green\n")
    assert not ExactMatch("answer")(row, "Red green")
    worked = ExactMatch("answer", after="Answer:")
    assert worked(row, "Answer: blue? No. Answer: red green")
    assert not worked(row, "red green")
    assert not worked(row, "Answer: red green Answer: blue")


class Loose(Verifier):
    """A user's, with annotations of its own."""

    def __call__(self, row, response: str):  # type: ignore[no-untyped-def]
        return response == row["answer"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"class_path": "dpr_lightning.evaluation.verifiers.FinalNumber"}, FinalNumber),
        (
            {"class_path": "dpr_lightning.evaluation.verifiers.ExactMatch", "init_args": {"column": "answer"}},
            ExactMatch,
        ),
        ({"class_path": f"{__name__}.Loose"}, Loose),
    ],
)
def test_is_named_in_yaml_by_class_path(given: dict[str, object], expected: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--verifier", type=Verifier | None)
    built = parser.instantiate_classes(parser.parse_object({"verifier": given}))
    assert isinstance(built.verifier, expected)
