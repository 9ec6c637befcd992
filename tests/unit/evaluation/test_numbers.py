r"""Where the final number of a response stands and what it is worth; all values are read off the text by hand."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest

from dpr_lightning.evaluation import FinalNumber, final_number

CASES = [
    # Thousands.
    (r"\boxed{1{,}000}", 1000),
    (r"1{,}000{,}000 in all", 1_000_000),
    ("#### 1 000", 1000),
    ("1 000 000", 1_000_000),
    ("1\u00a0000", 1000),
    ("1\u202f234.5", Fraction("1234.5")),
    (r"\boxed{1\,000}", 1000),
    (r"$1\;250$", 1250),
    (r"1,\!000", 1000),
    (r"\boxed{1~000}", 1000),
    ("= 1,00,000", 100_000),
    ("\u20b912,34,567.50", Fraction("1234567.5")),
    ("1_000", 1000),
    ("1'000", 1000),
    ("\u20ac1.234.567", 1_234_567),
    ("1.000,50", Fraction("1000.5")),
    ("It costs $1,000.00.", 1000),
    (r"#### \$1,250", 1250),
    ("10 20 300", 300),
    ("1, 2,3", 3),
    ("(2,3)", 3),
    ("12,5", Fraction("12.5")),
    ("1 234,50", Fraction("1234.5")),
    ("\uff11\uff0c\uff10\uff10\uff10", 1000),
    ("it is 1e+3.", 1000),
    # Exponents and powers.
    ("x = 1e3", 1000),
    ("1.5e-3", Fraction("0.0015")),
    ("1E+06", 1_000_000),
    (r"$1.5 \times 10^3$", 1500),
    (r"\boxed{1 \times 10^{-2}}", Fraction(1, 100)),
    ("3*10^8", 300_000_000),
    ("5 \u00d7 10\u207b\u00b3", Fraction(5, 1000)),
    ("10^3", 1000),
    ("10**3", 1000),
    ("10\u00b3", 1000),
    ("#### 2^{10}", 1024),
    # Fractions and expressions.
    ("1/2", Fraction(1, 2)),
    ("2 1/2", Fraction(5, 2)),
    ("2\u00bd", Fraction(5, 2)),
    (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
    (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)),
    (r"\boxed{\frac{-3}{4}}", Fraction(-3, 4)),
    (r"$\frac34$", Fraction(3, 4)),
    (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
    (r"\boxed{\sqrt{16}}", 4),
    (r"\boxed{\frac{\sqrt{9}}{2}}", Fraction(3, 2)),
    (r"\boxed{0.1 + 0.2}", Fraction(3, 10)),
    (r"\boxed{10-5}", 5),
    # Signs, units and marks.
    ("#### -7", -7),
    ("\u22127", -7),
    (r"\boxed{x = -5}", -5),
    ("-1e-3", Fraction(-1, 1000)),
    (r"\boxed{12 \text{ cm}^2}", 12),
    ("an area of 12 cm^2", 12),
    ("12 cm\u00b2", 12),
    (r"\boxed{100^\circ}", 100),
    (r"\boxed{50\%}", 50),
    (r"\boxed{\$18.00}", 18),
    (r"\boxed{\text{12 apples}}", 12),
    ("The answer is **1,000**.", 1000),
    ("so the answer is 3.5.", Fraction("3.5")),
    ("\uff11\uff12", 12),
    # Which of several.
    ("#### 12 (see step 3)", 12),
    ("#### Step 3\nso \\boxed{7}", 7),
    ("\\boxed{3}\n#### 9", 9),
    (r"$\boxed{5}$ is final; 3 steps", 5),
    (r"\boxed{4}, no: \boxed{\boxed{5}}", 5),
    ("on 12/25/2020", 2020),
    ("4 = x_1", 4),
]


@pytest.mark.parametrize(("text", "value"), CASES)
def test_final_number(text: str, value: Fraction | int) -> None:
    assert final_number(text) == value


@pytest.mark.parametrize("text", [r"\boxed{\text{none}}", r"\boxed{9^{9^{9}}}", "1e999999999", "1/0", r"\boxed{\pi/0}"])
def test_no_number_that_could_be_compared(text: str) -> None:
    assert final_number(text) is None


def test_irrational_values_are_compared_in_any_form() -> None:
    judge = FinalNumber("answer")
    assert judge({"answer": r"\boxed{\frac{\sqrt{3}}{2}}"}, r"\boxed{\sqrt{\frac{3}{4}}}")
    assert not judge({"answer": r"\boxed{\frac{\sqrt{3}}{2}}"}, "0.866")


def test_numbers_of_any_length_are_exact() -> None:
    # Python's int refuses text of more than 4300 digits.
    assert final_number("9" * 5000) == Fraction(10**5000 - 1)


def test_expressions_are_evaluated_in_any_thread() -> None:
    # math-verify's own time limit is a signal, which only the main thread can set.
    found: list[Fraction | None] = []
    thread = threading.Thread(target=lambda: found.append(final_number(r"\boxed{\sqrt{25} + 2}")))
    thread.start()
    thread.join()
    assert found == [7]


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 5000, "{" * 9999, "\\(" * 5000, "1," * 9999, "1 " * 9999, "1/" * 9999, "\\frac" * 5000]
)
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    final_number(text)
    assert time.perf_counter() - start < 2


def test_thousands_of_answers_take_no_time() -> None:
    start = time.perf_counter()
    for number in range(3000):
        assert final_number(f"{number} + 0 = {number} apples\n" * 5 + f"#### {number:,}") == number
    assert time.perf_counter() - start < 5
