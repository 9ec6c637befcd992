"""IFEval: does a response follow the instructions that a program can check (arXiv 2311.07911)?

The programs are those of the ``if-verifiable`` package. How they are counted is IFEval's own: strict is the response
as it is; loose is any of eight forms of it, with and without its first line, its last line, and its asterisks. That
package leaves empty responses and unknown instructions out of its counts and cuts reasoning off; here the first fail,
the second are refused, and nothing is cut.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.metrics import ResponseMetric

_SENTENCES = (
    "NLTK's sentence tokenizer is missing: run python -m nltk.downloader punkt_tab, or set NLTK_DATA to a directory "
    "with tokenizers/punkt_tab"
)


class IFEval(ResponseMetric):
    """Shares of prompts whose instructions are all followed, and of instructions, strictly and loosely.

    Rows have IFEval's columns ``instruction_id_list`` and ``kwargs``, and ``prompt``.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Raises:
        UserError: The package is missing.
    """

    figures = ("ifeval/prompt_strict", "ifeval/prompt_loose", "ifeval/instruction_strict", "ifeval/instruction_loose")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        try:
            import langdetect  # type: ignore[import-untyped]
            from if_verifiable.ifeval import INSTRUCTION_DICT  # type: ignore[import-untyped]
        except ImportError as error:
            raise UserError("IFEval needs the 'if-verifiable' package; pip install 'dpr-lightning[ifeval]'") from error
        _warn_without_sentences()
        # It guesses a text's language by drawing samples: the same text must be judged the same every time.
        langdetect.DetectorFactory.seed = 0
        self.checkers: Mapping[str, Any] = INSTRUCTION_DICT

    @override
    def grade(self, row: Mapping[str, Any], response: str, *, is_truncated: bool) -> Sequence[tuple[float, float]]:
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not names or not arguments or len(names) != len(arguments):
            raise UserError(
                f"row {row.get('row', row.get('key', '?'))}: IFEval needs the columns instruction_id_list and kwargs, "
                "as long as each other; found "
                f"{names!r} and {arguments!r}; give IFEval's input_data.jsonl"
            )
        strict, loose = [], []
        forms = loose_forms(response)
        for name, given in zip(names, arguments, strict=True):
            checker = self._checker(name, given or {}, row)
            followed = [self._follows(checker, form, name) for form in forms]
            strict.append(followed[0])
            loose.append(any(followed))
        size = float(len(names))
        return [
            (float(all(strict)), 1.0),
            (float(all(loose)), 1.0),
            (float(sum(strict)), size),
            (float(sum(loose)), size),
        ]

    def _checker(self, name: str, given: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
        if name not in self.checkers:
            raise UserError(
                f"row {row.get('row', row.get('key', '?'))}: IFEval has no instruction '{name}'; it has "
                f"{', '.join(sorted(self.checkers))}"
            )
        checker = self.checkers[name](name)
        # Two of IFEval's rows count "#" and "!" where the program knows letters only, and draws one instead.
        state = random.getstate()
        random.seed(0)
        # Sets that went through a table have every argument in every row, most of them null.
        checker.build_description(**{key: value for key, value in given.items() if value is not None})
        arguments = checker.get_instruction_args()
        if arguments and "prompt" in arguments:
            checker.build_description(prompt=row["prompt"])
        random.setstate(state)
        return checker

    @staticmethod
    def _follows(checker: Any, text: str, name: str) -> bool:
        try:
            return bool(text.strip() and checker.check_following(text))
        except LookupError as error:
            if "nltk" not in str(error).lower():
                raise
            raise UserError(f"IFEval's instruction '{name}': {_SENTENCES}") from error


def _warn_without_sentences() -> None:
    """Say now what would otherwise end the first row that counts sentences."""
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        rank_zero_warn(f"IFEval: {_SENTENCES}; 64 of its 541 prompts count sentences and would be refused")


def loose_forms(response: str) -> list[str]:
    """Return the eight forms of a response that count loosely, the response itself first."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]
