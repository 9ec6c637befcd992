"""IFEval's four figures (arXiv 2311.07911)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from dpr_lightning.evaluation.instructions import check_instructions, checkers
from dpr_lightning.evaluation.metrics import ResponseMetric


class IFEval(ResponseMetric):
    """Shares of prompts whose instructions are all followed, and of instructions that are; strictly and loosely.

    Rows have IFEval's columns ``instruction_id_list``, ``kwargs`` and ``prompt``. A truncated response is judged as it
    stands, as IFEval does.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Raises:
        UserError: The checks, or the sentence model that they need, are not installed.
    """

    figures = ("ifeval/prompt_strict", "ifeval/prompt_loose", "ifeval/instruction_strict", "ifeval/instruction_loose")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Now, and not after the first validation's sampling.
        checkers()

    @override
    def grade(self, row: Mapping[str, Any], response: str, *, is_truncated: bool) -> Sequence[tuple[float, float]]:
        verdicts = check_instructions(row, response)
        prompts = [(float(all(followed)), 1.0) for followed in verdicts]
        return prompts + [(float(sum(followed)), float(len(followed))) for followed in verdicts]
