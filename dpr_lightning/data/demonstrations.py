"""Demonstrations from a source: read, mapped, subsampled and split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dpr_lightning.data.chats import Demonstration
from dpr_lightning.data.presets import PresetName, build_demonstration, resolve_columns
from dpr_lightning.data.readers import Records, open_records
from dpr_lightning.data.splitting import IndexArray, prompt_hashes, split_by_prompt, subsample
from dpr_lightning.errors import UserError

CONFIG_KEY = "data.demonstrations"
SplitName = Literal["train", "validation", "test"]
CHUNK_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationConfig:
    """Where demonstrations come from and which of them are used (ALGORITHM.md section 6)."""

    source: str
    """A .jsonl, .json, .csv or .parquet file, a glob pattern of such files, or the name of a hub data set."""
    subset: str | None = None
    """Configuration of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set that is read as ``source``."""
    preset: PresetName = "prompt_response"
    """Layout of the source: prompt_response, open_orca, alpaca, gsm8k, messages or sharegpt."""
    columns: dict[str, str] | None = None
    """Columns that differ from the preset's: keys prompt, response, system, messages, tools (and input for alpaca)."""
    subsample: int | None = None
    """Rows drawn by ``seed`` before anything is split off; null keeps all. The paper draws 100,000."""
    seed: int = 0
    """Draws the subsample and the splits."""
    validation_fraction: float = 0.0
    """Share of prompts held out for validation, at least one prompt if positive. Splits go by prompt text."""
    test_fraction: float = 0.0
    """Share of prompts held out for test, likewise."""
    validation_source: str | None = None
    """Files or hub data set for validation in place of a fraction, with the same layout."""
    test_source: str | None = None
    """Files or hub data set for test in place of a fraction, with the same layout."""
    max_prompt_tokens: int = 1024
    """Rows with a longer prompt (BOS included) are dropped and counted."""
    max_response_tokens: int = 1024
    """Longer responses (EOS included) are cut here, and then do not teach EOS."""
    max_rejected_share: float = 0.05
    """Refuse to run when a larger share of the rows had to be dropped."""

    def __post_init__(self) -> None:
        """Refuse values that no data could satisfy."""
        for name in ("validation_fraction", "test_fraction", "max_rejected_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UserError(f"{CONFIG_KEY}.{name}: found {value}; give a share between 0 and 1")
        for name in ("subsample", "max_prompt_tokens", "max_response_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{CONFIG_KEY}.{name}: found {value}; give a whole number of at least 1")
        for split in ("validation", "test"):
            if getattr(self, f"{split}_source") is not None and getattr(self, f"{split}_fraction") > 0:
                raise UserError(f"{CONFIG_KEY}: {split}_source and {split}_fraction are both set; keep one")
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise UserError(
                f"{CONFIG_KEY}: validation_fraction + test_fraction is "
                f"{self.validation_fraction + self.test_fraction}; leave some rows for training"
            )


@dataclass(frozen=True, slots=True)
class DemonstrationTable:
    """Some rows of a source; nothing is held in memory but their numbers."""

    records: Records
    columns: Mapping[str, str]
    """Column of each part of a demonstration."""
    rows: IndexArray
    """Row numbers (0-based) in ``records``."""

    def __len__(self) -> int:
        return len(self.rows)

    def chunks(self) -> Iterator[tuple[IndexArray, list[Demonstration]]]:
        """Yield row numbers and demonstrations, up to ``CHUNK_ROWS`` at a time.

        Raises:
            UserError: A cell is not text; the message names the row.
        """
        for start in range(0, len(self.rows), CHUNK_ROWS):
            rows = self.rows[start : start + CHUNK_ROWS]
            yield rows, [self._build(record, int(row)) for row, record in zip(rows, self._read(rows), strict=True)]

    def metadata(self, row: int) -> dict[str, Any]:
        """Return every column of source row ``row``, with ``row`` (1-based), prompt, system and response beside them.

        The three texts win over columns of the same names, so that verifiers find them there whatever the preset.
        """
        record = self._read(np.asarray([row]))[0]
        demonstration = self._build(record, row)
        return {
            **record,
            "row": row + 1,
            "prompt": demonstration.prompt,
            "system": demonstration.system,
            "response": demonstration.response,
        }

    def locate(self, row: int) -> str:
        """Say where source row ``row`` lies, for messages."""
        return self.records.place(row)

    def _read(self, rows: IndexArray) -> list[dict[str, Any]]:
        return self.records.read([int(row) for row in rows])

    def _build(self, record: dict[str, Any], row: int) -> Demonstration:
        try:
            return build_demonstration(record, self.columns, where="")
        except UserError:  # finding the line number is slow, so it is done for the row that is refused only
            return build_demonstration(record, self.columns, where=self.locate(row))


def load_demonstrations(
    config: DemonstrationConfig, *, needs_response: bool = True
) -> dict[SplitName, DemonstrationTable]:
    """Return a table for each split that the configuration asks for; ``train`` is always there.

    Args:
        config: The source and how it is split.
        needs_response: False where prompts alone will do; the response column may then be absent.

    Raises:
        UserError: The source cannot be read, lacks a column, or is too small to be split.
    """
    full = _open(config, config.source, f"{CONFIG_KEY}.source", needs_response)
    rows = subsample(len(full), config.subsample, config.seed)
    table = DemonstrationTable(full.records, full.columns, rows)
    tables: dict[SplitName, DemonstrationTable] = {"train": table}
    if config.validation_fraction > 0 or config.test_fraction > 0:
        prompts = (demonstration.prompt for _, chunk in table.chunks() for demonstration in chunk)
        splits = split_by_prompt(
            rows,
            prompt_hashes(prompts, config.seed),
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            key=CONFIG_KEY,
        )
        tables["train"] = DemonstrationTable(full.records, full.columns, splits.train)
        if config.validation_fraction > 0:
            tables["validation"] = DemonstrationTable(full.records, full.columns, splits.validation)
        if config.test_fraction > 0:
            tables["test"] = DemonstrationTable(full.records, full.columns, splits.test)
    if config.validation_source is not None:
        key = f"{CONFIG_KEY}.validation_source"
        tables["validation"] = _open(config, config.validation_source, key, needs_response)
    if config.test_source is not None:
        tables["test"] = _open(config, config.test_source, f"{CONFIG_KEY}.test_source", needs_response)
    return tables


def prepare_sources(config: DemonstrationConfig, *, key: str = CONFIG_KEY) -> None:
    """Download or convert every source into the local cache of ``datasets``, so that other ranks find it there.

    Args:
        config: Where they lie.
        key: Key of ``config``, for messages.

    Raises:
        UserError: A source cannot be read.
    """
    for name in ("source", "validation_source", "test_source"):
        if (source := getattr(config, name)) is not None:
            open_records(source, subset=config.subset, hub_split=config.hub_split, key=f"{key}.{name}")


def _open(config: DemonstrationConfig, source: str, key: str, needs_response: bool) -> DemonstrationTable:
    records = open_records(source, subset=config.subset, hub_split=config.hub_split, key=key)
    columns = resolve_columns(
        config.preset, config.columns, records.columns, key=CONFIG_KEY, needs_response=needs_response
    )
    return DemonstrationTable(records, columns, np.arange(len(records), dtype=np.int64))
