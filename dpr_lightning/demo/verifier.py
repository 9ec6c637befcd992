"""The embedded tasks' verifier, as YAML names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from dpr_lightning.demo.tasks import is_correct
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.verifiers import Verifier


class TaskVerifier(Verifier):
    """Right where the response's last line states the result that the row's fields have."""

    @override
    def __call__(self, row: Mapping[str, Any], response: str) -> bool:
        for column in ("family", "fields"):
            if column not in row:
                raise UserError(
                    f"row {row.get('row', '?')}: no column '{column}', so it is no embedded task; name another verifier"
                )
        return is_correct(row, response)
