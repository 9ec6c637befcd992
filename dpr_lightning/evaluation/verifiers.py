"""Verifiers: programs that say whether a response answers its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.numbers import final_number


class Verifier(ABC):
    """Judges one response; a subclass can be named in YAML by its ``class_path``.

    A base class and no protocol: jsonargparse holds a protocol's classes, its subclasses among them, to the very
    annotations of the call.
    """

    @abstractmethod
    def __call__(self, row: Mapping[str, Any], response: str) -> bool:
        """Return whether ``response`` is right.

        Args:
            row: Columns of the prompt's source row; ``prompt`` and ``response`` (the demonstration) among them.
            response: Text of the response, without its EOS.

        Raises:
            UserError: The row lacks what the verifier compares with.
        """


class FinalNumber(Verifier):
    r"""Compares the final number of a response with that of the demonstration, by value (GSM8K's rule).

    The final number is the last ``\boxed{...}``, else the first number after the last ``####``, else the last number.
    Separators between thousands (1,000, 1 000, 1{,}000, 1,00,000), currency, percent signs and units do not matter;
    7, 7.00 and 14/2 are equal, and so are 1e3 and 10^3. LaTeX expressions are evaluated by ``math-verify``.

    Args:
        column: Column with the right answer, worked or bare.
    """

    def __init__(self, column: str = "response") -> None:
        self.column = column

    @override
    def __call__(self, row: Mapping[str, Any], response: str) -> bool:
        """Return whether both have a final number and the two are equal; see ``Verifier``."""
        expected = final_number(_column(row, self.column))
        if expected is None:
            raise UserError(
                f"row {row.get('row', '?')}: column '{self.column}' holds no number, so FinalNumber cannot judge "
                "responses to it; name the answer's column, or another verifier"
            )
        return final_number(response) == expected


class ExactMatch(Verifier):
    """Compares a response with a column as text; white space at the ends and runs of it do not matter.

    Args:
        column: Column with the right answer.
        after: Compare what follows the last occurrence of this text in the response; None compares all of it. A
            response without it is wrong.
    """

    def __init__(self, column: str = "response", after: str | None = None) -> None:
        self.column = column
        self.after = after

    @override
    def __call__(self, row: Mapping[str, Any], response: str) -> bool:
        """Return whether the two texts are equal; see ``Verifier``."""
        expected = _column(row, self.column)
        if self.after is not None:
            _, mark, response = response.rpartition(self.after)
            if not mark:
                return False
        return response.split() == expected.split()


def _column(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise UserError(f"model.verifier: rows have no column '{column}'; they have {', '.join(sorted(map(str, row)))}")
    return str(row[column])
