"""Judgments from files, ours or published ones, as records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dpr_lightning.data.readers import open_records
from dpr_lightning.errors import UserError
from dpr_lightning.judging.preset import Context, Preset, Record
from dpr_lightning.judging.records import PairRecord

REPEATED_JUDGMENT = "repeated judgment"


def read_judgments(source: str, preset: Preset, context: Context) -> tuple[list[Record], int]:
    """Return the records of one file, or of all files of a glob pattern, and how many rows are of other pairs.

    Args:
        source: JSON lines, JSON or Parquet in the preset's published format.
        preset: Knows the format.
        context: Fills what rows do not say.

    Raises:
        UserError: The file or a row cannot be read.
    """
    key = "--from_judgments"
    records = open_records(source, subset=None, hub_split="test", key=key)
    rows = records.read(range(len(records)))
    found = [preset.records(row, context, f"{key}: {records.locate(number)}") for number, row in enumerate(rows)]
    return [record for of_row in found for record in of_row], sum(not of_row for of_row in found)


def by_model(records: Sequence[Record], *, model: str | None = None) -> Mapping[str, list[Record]]:
    """Group records by the judged model, in order of first appearance.

    Args:
        records: Any number of models.
        model: The only one that is wanted; None takes all.

    Raises:
        UserError: That model is not among them.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.model, []).append(record)
    if model is None:
        return found
    if model not in found:
        raise UserError(f"--model: no judgments of '{model}'; the file has {', '.join(sorted(found))}")
    return {model: found[model]}


def repeated(records: Sequence[Record]) -> Counter[str]:
    """Return how many judgments are of a prompt (and turn) that has an earlier one."""
    seen = Counter(
        (record.key, record.turn, record.baseline if isinstance(record, PairRecord) else "") for record in records
    )
    again = sum(count - 1 for count in seen.values())
    return Counter({REPEATED_JUDGMENT: again}) if again else Counter()
