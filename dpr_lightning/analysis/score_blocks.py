"""A file of responses as blocks of rows, and the part file that each block's token rewards become."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from dpr_lightning.analysis.frozen import FrozenPolicies
from dpr_lightning.analysis.token_rewards import EncodedRow, TokenRewards
from dpr_lightning.data.demonstrations import DemonstrationConfig, DemonstrationTable
from dpr_lightning.data.encoding import NOTES, Reason, encode_table, usable_answer
from dpr_lightning.data.tokenization import special_pattern
from dpr_lightning.errors import UserError

Format = Literal["parquet", "jsonl"]

NOT_UNICODE = Reason.NOT_UNICODE.value
_NUM_EXAMPLES = 3

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt", pa.large_string()),
        ("response", pa.large_string()),
        ("tokens", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.list_(pa.int64()))),
        ("teacher_logp", pa.list_(pa.float32())),
        ("reference_logp", pa.list_(pa.float32())),
        ("rewards", pa.list_(pa.float64())),
        ("sum", pa.float64()),
        ("mean", pa.float64()),
        ("num_tokens", pa.int64()),
        ("ends_by_eos", pa.bool_()),
    ]
)
assert _SCHEMA.names == [item.name for item in dataclasses.fields(TokenRewards)]


@dataclass(slots=True)
class Tally:
    """What all blocks together hold, and what they leave out."""

    num_rows: int = 0
    num_scored: int = 0
    num_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be scored, by reason."""
    noted: Counter[str] = field(default_factory=Counter)
    """Rows that are scored and worth a note, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Where the first rows of each reason lie."""
    fingerprint: str = ""
    """Of every prompt and response as they are scored."""

    def add(self, reason: str, places: Sequence[str], *, count: int, is_note: bool) -> None:
        """Count rows for one reason."""
        (self.noted if is_note else self.dropped)[reason] += count
        found = self.examples.setdefault(reason, [])
        found.extend(places[: _NUM_EXAMPLES - len(found)])

    def lines(self) -> list[str]:
        """Return a line for every reason."""
        return [
            f"{count} of {self.num_rows} rows {what}: {reason} (first: {', '.join(self.examples[reason])})"
            for what, counts in (("not scored", self.dropped), ("scored", self.noted))
            for reason, count in sorted(counts.items())
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The rows of a file in blocks, one in memory at a time."""

    table: DemonstrationTable
    config: DemonstrationConfig
    policies: FrozenPolicies
    block_rows: int

    def __len__(self) -> int:
        return -(-len(self.table) // self.block_rows)

    def encode(self, number: int, tally: Tally | None = None) -> list[EncodedRow]:
        """Return the rows of block ``number`` that can be scored, encoded as SFT encodes them.

        Args:
            number: From 0.
            tally: Where the block's rows are counted.

        Raises:
            UserError: A cell is not text.
        """
        rows = self.table.rows[number * self.block_rows : (number + 1) * self.block_rows]
        block = dataclasses.replace(self.table, rows=rows)
        texts = {int(row): item for numbers, chunk in block.chunks() for row, item in zip(numbers, chunk, strict=True)}
        encoded, report = encode_table(
            block,
            tokenizer=self.policies.tokenizer,
            template=self.policies.template,
            config=self.config,
            split="data",
            refuse_rejected=False,
        )
        special = special_pattern(self.policies.tokenizer)
        found = [
            EncodedRow(
                row=int(row) + 1,
                prompt="\n\n".join(filter(None, (texts[int(row)].system, texts[int(row)].prompt))),
                # The text that was encoded: without a tag that the prompt ends with, with fields that it renders.
                response=usable_answer(self.policies.tokenizer, self.policies.template, texts[int(row)], special)[1],
                prompt_ids=encoded.prompt_ids(index),
                response_ids=encoded.response_ids(index),
            )
            for index, row in enumerate(encoded.rows)
        ]
        if tally is not None:
            tally.num_rows += len(texts)
            tally.num_scored += len(found)
            tally.num_tokens += sum(len(row.response_ids) for row in found)
            for reason, count in report.counts.items():
                tally.add(str(reason), report.examples[reason], count=count, is_note=reason in NOTES)
        return found

    def survey(self) -> Tally:
        """Read and encode every block once: bad cells are found before weights load, and the data get a name."""
        tally, digest = Tally(), hashlib.sha256()
        for number in range(len(self)):
            for row in self.encode(number, tally):
                line = [row.row, row.prompt, row.response, row.prompt_ids, row.response_ids]
                digest.update(json.dumps(line).encode())
        tally.fingerprint = digest.hexdigest()[:16]
        return tally


def part_path(directory: Path, number: int, form: Format) -> Path:
    """Return the name of a block's part file."""
    return directory / f"part-{number:05d}.{form}"


def write_part(path: Path, rows: Sequence[TokenRewards]) -> None:
    """Write one part file; it is there complete, or not at all."""
    records = [dataclasses.asdict(row) for row in rows]
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records, schema=_SCHEMA), partial)
    else:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial.write_text("".join(lines), encoding="utf-8")
    replace_file(partial, path)


def replace_file(partial: Path, path: Path) -> None:
    """Give a finished file its name, once it is on the disk."""
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)


def read_part(path: Path) -> Iterator[TokenRewards]:
    """Yield the rows of a part file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            records: list[dict[str, Any]] = pq.read_table(path, schema=_SCHEMA).to_pylist()
        else:
            # Not splitlines: it would also break at the line separators inside a text.
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        rows = [
            TokenRewards(**{**record, "offsets": [(start, stop) for start, stop in record["offsets"]]})
            for record in records
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise UserError(f"--out: '{path}' cannot be read ({error}); delete it and run the command again") from error
    yield from rows
