r"""The final number of a response: where it stands, and its exact value.

Expressions (roots, nested fractions, sums in a ``\boxed``) are evaluated by ``math-verify``. It does not find the
number in prose or read plain literals: ``1e3`` is 1 to it, ``1,00,000`` is 1.00, ``1{,}000`` outside of a formula 1,
``50%`` a half, and of ``#### 12 (see step 3)`` it takes the 3. So location and literals are this module's.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from dpr_lightning.evaluation.reasoning import final_answer

_MARK = "####"
_BOX = re.compile(r"\\f?boxed\s*(?=\{)")
_PUNCTUATION = {"\uff0c": ",", "\uff0e": ".", "\u066c": ",", "\u066b": "."}
"""Full-width and Arabic separators."""
_BRACE = re.compile(r"(?<!\\)[{}]")
_MAX_EXPONENT = 999
"""Larger powers are no number of an answer, and evaluating them can take for ever."""
_MAX_EXPRESSION = 200

_SPACED = re.compile(r"(?<=\d)(?:\{,\}|\\?,\\!|,\{\})(?=\d)")
_THIN = re.compile(r"(?<=\d)(?:\\[,!:; ]|~|\{\\,\}|\{\s\}|\\thinspace(?:\{\}|\s)?)(?=\d{3}(?!\d))")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm|mathit|bf|rm)\s*(?=\{)")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}|(\d)\s*(\d))")
_POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|\u00d7|\u00b7|\u22c5|\*|[xX])\s*10\s*(?:\^|\*\*)\s*")

_DIGITS = (
    # 1.000.000,50 and 1.000,50: points between thousands, a decimal comma.
    r"(?P<points>\d{1,3}(?:\.\d{3})+,\d+(?![\d,])|[1-9]\d{0,2}(?:\.\d{3}){2,}(?![\d.]))"
    # 1,00,000: lakhs and crores.
    r"|(?P<indian>\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])(?:\.\d+)?)"
    # 1,000 and 1 000, also by an underscore or an apostrophe; one separator throughout.
    r"|(?P<grouped>\d{1,3}(?P<mark>[,_'])\d{3}(?:(?P=mark)\d{3})*(?!\d)(?:\.\d+)?)"
    r"|(?P<spaced>(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?![\d/^]| \d)(?:\.\d+|,\d{1,2}(?!\d))?)"
    # 12,5: a decimal comma, unless it stands in a list.
    r"|(?P<comma>(?<!\d, )(?<!\d,)(?<!\.)(?<![(\[{])\d+,(?:\d{1,2}|\d{4,})(?![\d,.]|,? \d))"
    r"|(?P<plain>\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)
_NUMBER = re.compile(
    # A minus is a sign only where no number or word stands before it ("3-5" is a difference), and where it touches the
    # number or its currency ("- 5" is an item of a list, or the end of "10 - 5").
    r"(?P<sign>(?<![\w).}])[-+](?=[$€£¥₹.\d]|US\$|Rs))?(?:(?:US)?[$€£¥₹]\s?|Rs\.?\s?)?"
    r"(?P<sign_2>(?<=[$€£¥₹])-)?"
    # An exponent or an index is no number of its own: "12 cm^2", "x_1".
    r"(?<!\^)(?<!\^[{(-])(?<!\^[{(]-)(?<!\w\*\*)(?<![^\W\d_]_)(?<![^\W\d_]_\{)"
    rf"(?:{_DIGITS})"
    r"(?:[eE](?P<exponent>[-+]?\d+)(?!\w|\.\d)"
    r"|(?:\s*(?:\*|[xX])\s*10\s*\^(?P<ten>[-+]?\d+))"
    r"|\s?\^(?P<power>-?\d+)(?![\d.])"
    # "3/4" and "1 1/2", but neither "1/2/2024" nor "7/x".
    r"|(?<![\d/]/\d)(?:\s(?P<whole_over>\d+)\s?/\s?(?P<whole_under>\d+)(?![\d/.])|(?P<under>\s?/\s?\d+(?:\.\d+)?)(?![\d/])))?"
)
_EXPRESSION = re.compile(
    r"(?:[\d\s+\-*/^.(){}]|\\(?:[dtc]?frac|sqrt|cdot|times|div|pi|left|right)(?![a-zA-Z])|\[\d\])+"
)
_MATH = re.compile(r"\$\$(.{1,400}?)\$\$|\$([^$]{1,400})\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL)

# Its warning that no time limit is set: there is none because signals work in the main thread only, and because
# ``_EXPRESSION`` lets nothing through that could take long.
logging.getLogger("math_verify.parser").setLevel(logging.ERROR)


def final_number(text: str) -> Fraction | None:
    r"""Return the final number of ``text``; None where there is none.

    It is the last ``\boxed``, else the first number after the last ``####``, else the last number of the text. What
    stands in a reasoning block does not count, nor does a ``\boxed`` before the last ``####``. Values are exact;
    irrational ones are rounded to 30 digits.
    """
    _, mark, tail = final_answer(text).text.rpartition(_MARK)
    box = _last_box(tail)
    if box is not None:
        return _boxed_number(box)
    if not mark:
        formula = _last_formula(tail)
        if formula is not None:
            return formula
    numbers = _numbers(_plain(tail), first_only=bool(mark))
    return numbers[0 if mark else -1] if numbers else None


def _boxed_number(box: str) -> Fraction | None:
    """Return what a box holds: the right side of an equation, as one literal, as an expression, or with its unit."""
    right = re.split(r"=|\\approx|≈", box)[-1].strip()
    text = _plain(right).strip()
    match = _NUMBER.fullmatch(text.rstrip(". %"))
    if match is not None:
        return _value(match)
    value = _evaluate(right)
    if value is not None or _EXPRESSION.fullmatch(right):
        return value
    numbers = _numbers(text, first_only=True)
    return numbers[0] if numbers else None


def _last_formula(text: str) -> Fraction | None:
    """Return the value of the formula that holds the last number, where only an evaluation can say it."""
    formulas = list(_MATH.finditer(text))
    last = formulas[-1] if formulas else None
    if last is None or _NUMBER.search(_plain(text[last.end() :])):
        return None
    inner = next(group for group in last.groups() if group is not None)
    right = re.split(r"=|\\approx|≈", inner)[-1].strip()
    return _evaluate(right) if "\\" in right and not _NUMBER.fullmatch(_plain(right).strip()) else None


def _last_box(text: str) -> str | None:
    r"""Return what the last closed ``\boxed{...}`` of ``text`` holds."""
    starts = {match.end() for match in _BOX.finditer(text)}
    if not starts:
        return None
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    closed = starts & closing.keys()
    return text[max(closed) + 1 : closing[max(closed)]] if closed else None


def _plain(text: str) -> str:
    """Return ``text`` with digits, signs, separators and simple LaTeX in the one form that literals are read in."""
    text = "".join(_plain_character(text[index - 1] if index else "", mark) for index, mark in enumerate(text))
    text = re.sub(r"\^(\d)\^(?=\d)", r"^\1", text)
    text = re.sub(r"(?<=\d)\^(\d(?:\^\d)+)", lambda match: "^" + match[1].replace("^", ""), text)
    text = _THIN.sub(" ", _SPACED.sub(",", text)).replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°", text)
    # A date is no chain of fractions.
    text = re.sub(r"\d+(?:/\d+){2,}", lambda match: match[0].replace("/", " ; "), text)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,!;: ]", "", text)
    text = _FRACTION.sub(lambda match: f" {match[1] or match[3]}/{match[2] or match[4]}", _LATEX_TEXT.sub("", text))
    text = re.sub(r"(?<=[-+])\s(?=\d+/\d)", "", text)
    text = _POWER_OF_TEN.sub("*10^", text).replace("**", "^") if "10" in text else text
    return re.sub(r"\^\s*[{(]\s*([-+]?\d+)\s*[})]", r"^\1", text)


def _plain_character(before: str, mark: str) -> str:
    if mark.isascii():
        return mark
    if mark in "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d":
        return "-"
    if mark in "\u2019\u02bc":
        return "'"
    if mark in _PUNCTUATION:
        return _PUNCTUATION[mark]
    decomposition = unicodedata.decomposition(mark)
    if decomposition.startswith("<super>"):
        found = unicodedata.normalize("NFKC", mark).replace("\u2212", "-")
        return (
            f"^{found}"
            if before not in "\u207b\u2070\u00b9\u00b2\u00b3" and not "\u2074" <= before <= "\u2079"
            else found
        )
    if decomposition.startswith("<fraction>"):
        found = unicodedata.normalize("NFKC", mark).replace("\u2044", "/")
        return f" {found}" if before.isdigit() else found
    if unicodedata.category(mark) == "Nd":
        return str(unicodedata.digit(mark))
    return " " if unicodedata.category(mark) == "Zs" else mark


def _numbers(text: str, *, first_only: bool) -> list[Fraction]:
    found = []
    for match in _NUMBER.finditer(text):
        # A power that cannot be read: its base alone is not the answer.
        value = None if text[match.end() : match.end() + 1] == "^" else _value(match)
        if value is not None:
            found.append(value)
            if first_only:
                break
    return found[-1:]


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the value of one literal; None where its exponent is out of bounds or its denominator 0."""
    if match["spaced"]:
        digits = match["spaced"].replace(" ", "").replace(",", ".")
    elif match["points"]:
        digits = match["points"].replace(".", "").replace(",", ".")
    elif match["comma"]:
        digits = match["comma"].replace(",", ".")
    else:
        digits = re.sub("[,_' ]", "", next(match[name] for name in ("indian", "grouped", "plain") if match[name]))
    # By way of Decimal: ``int`` refuses text of more than 4300 digits.
    value = Fraction(Decimal(digits))
    exponents = [match[name] for name in ("exponent", "ten", "power") if match[name]]
    if exponents:
        if len(exponents[0]) > 5 or abs(int(exponents[0])) > _MAX_EXPONENT:
            return None
        exponent = int(exponents[0])
        if match["power"] and value == 0 and exponent < 0:
            return None
        value = value**exponent if match["power"] else value * Fraction(10) ** exponent
    under = match["under"] or match["whole_under"]
    if under:
        denominator = Fraction(Decimal(under.strip(" /\t\n")))
        if denominator == 0:
            return None
        value = value + Fraction(int(match["whole_over"])) / denominator if match["whole_over"] else value / denominator
    return -value if "-" in (match["sign"], match["sign_2"]) else value


@lru_cache(maxsize=4096)
def _evaluate(expression: str) -> Fraction | None:
    """Return the value of an arithmetic expression in LaTeX, by ``math-verify``; None where it is none."""
    expression = _THIN.sub("", _SPACED.sub("", expression)).replace("\\!", "").replace("\\,", " ").strip(" .$")
    exponents = re.findall(r"\^\s*(\{[^{}]*\}|.)", expression)
    is_bounded = len(expression) <= _MAX_EXPRESSION and len(exponents) == expression.count("^") <= 2
    if not is_bounded or any(not re.fullmatch(r"\{?\s*-?[\d/.]{1,3}\s*\}?", found) for found in exponents):
        return None
    if not _EXPRESSION.fullmatch(expression) or not re.search(r"\d|\\pi", expression) or "**" in expression:
        return None
    # Slow to import, and wanted for few answers.
    from math_verify import LatexExtractionConfig, parse

    # A decimal as a fraction: sympy's own would be rounded to 15 digits.
    exact = re.sub(
        r"\d*\.\d+",
        lambda match: rf"\frac{{{match[0].replace('.', '')}}}{{1{'0' * len(match[0].partition('.')[2])}}}",
        expression,
    )
    parsed = parse(f"\\boxed{{{exact}}}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    value: Any = parsed[0] if parsed else None
    if not getattr(value, "is_number", False) or not value.is_real or not value.is_finite:
        return None
    if value.is_Rational:
        return Fraction(int(value.p), int(value.q))
    return Fraction(Decimal(f"{Decimal(str(value.evalf(40))):.30e}"))
