"""Encodes a table of demonstrations into flat arrays, and counts what had to be left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.demonstrations import CONFIG_KEY, DemonstrationConfig, DemonstrationTable
from dpr_lightning.data.ends import response_end
from dpr_lightning.data.presets import Demonstration
from dpr_lightning.data.splitting import IndexArray
from dpr_lightning.data.templates import PromptTemplate
from dpr_lightning.data.tokenization import (
    default_prefix,
    encode_prompts,
    encode_responses,
    finish_response,
    special_ids,
    special_pattern,
)
from dpr_lightning.errors import UserError

_NUM_EXAMPLES = 3


class Reason(StrEnum):
    """Why a row was dropped or is worth a note."""

    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    LONG_PROMPT = "prompt too long"
    NO_LABELS = "no response tokens"
    SPECIAL_IDS = "text became special ids"
    TRUNCATED = "response cut, EOS not taught"
    SPELLS_SPECIAL = "special token spelt out, kept as text"


NOTES = frozenset({Reason.TRUNCATED, Reason.SPELLS_SPECIAL})
"""Reasons for which a row is kept."""


@dataclass(slots=True)
class DropReport:
    """Rows of one split, dropped and noted, by reason."""

    split: str
    num_rows: int = 0
    counts: Counter[Reason] = field(default_factory=Counter)
    examples: dict[Reason, list[str]] = field(default_factory=dict)
    """Where the first rows of each reason lie."""

    @property
    def num_dropped(self) -> int:
        """Rows that are left out."""
        return sum(count for reason, count in self.counts.items() if reason not in NOTES)

    @property
    def num_kept(self) -> int:
        """Rows that are used."""
        return self.num_rows - self.num_dropped

    def add(self, reason: Reason, row: int, table: DemonstrationTable) -> None:
        """Count source row ``row`` of ``table``."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(table.locate(row))

    def table(self) -> str:
        """Return a few lines of text: rows, share and first places of each reason."""
        lines = [f"{self.split}: {self.num_rows} rows, {self.num_kept} kept, {self.num_dropped} dropped"]
        for reason in Reason:
            if count := self.counts[reason]:
                what = "kept" if reason in NOTES else "dropped"
                places = ", ".join(self.examples[reason])
                lines.append(f"  {what:<8}{count:>9}  {count / self.num_rows:>6.2%}  {reason.value} ({places})")
        return "\n".join(lines)

    def to_manifest(self) -> dict[str, Any]:
        """Return the counts as plain JSON values."""
        counts = {reason.value: count for reason, count in self.counts.items()}
        return {"rows": self.num_rows, "kept": self.num_kept, "dropped": self.num_dropped, "reasons": counts}

    def refuse_above(self, max_share: float) -> None:
        """Raise UserError if more than ``max_share`` of the rows were dropped, or if none is left."""
        if self.num_kept > 0 and self.num_dropped <= max_share * self.num_rows:
            return
        reasons = "; ".join(
            f"{count} {reason.value} (first: {', '.join(self.examples[reason])})"
            for reason, count in self.counts.most_common()
            if reason not in NOTES
        )
        raise UserError(
            f"{CONFIG_KEY}: {self.num_dropped} of {self.num_rows} {self.split} rows cannot be used: "
            f"{reasons or 'there are none'}; repair them or raise max_rejected_share (now {max_share})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDemonstrations:
    """Token ids of many demonstrations laid end to end: 4 bytes a token."""

    table: DemonstrationTable
    """Where the texts lie, for metadata."""
    rows: IndexArray
    """[num] int64, source row (0-based) of each demonstration."""
    prompt_flat: npt.NDArray[np.int32]
    """All prompts' ids."""
    prompt_offsets: npt.NDArray[np.int64]
    """[num + 1], prompt ``i`` lies at ``prompt_offsets[i] : prompt_offsets[i + 1]``."""
    response_flat: npt.NDArray[np.int32]
    """All responses' ids, EOS included where the response is complete."""
    response_offsets: npt.NDArray[np.int64]
    """[num + 1], likewise."""

    def __len__(self) -> int:
        return len(self.rows)

    def prompt_ids(self, index: int) -> list[int]:
        """Return the ids of prompt ``index``, BOS included."""
        ids: list[int] = self.prompt_flat[self.prompt_offsets[index] : self.prompt_offsets[index + 1]].tolist()
        return ids

    def response_ids(self, index: int) -> list[int]:
        """Return the ids of response ``index``, EOS included unless it was cut."""
        ids: list[int] = self.response_flat[self.response_offsets[index] : self.response_offsets[index + 1]].tolist()
        return ids

    def metadata(self, index: int) -> dict[str, Any]:
        """Return the columns of the row that demonstration ``index`` came from."""
        return self.table.metadata(int(self.rows[index]))

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """[num] tokens of each prompt."""
        return np.diff(self.prompt_offsets)

    @property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """[num] tokens of each response, EOS included."""
        return np.diff(self.response_offsets)

    def distinct_prompts(self) -> frozenset[bytes]:
        """Return the ids of each prompt as bytes, equal prompts once."""
        pairs = zip(self.prompt_offsets[:-1], self.prompt_offsets[1:], strict=True)
        return frozenset(self.prompt_flat[start:stop].tobytes() for start, stop in pairs)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of the ids: equal for equal training data, whatever the files were called."""
        digest = hashlib.sha256()
        for array, kind in (
            (self.prompt_offsets, "<i8"),
            (self.prompt_flat, "<i4"),
            (self.response_offsets, "<i8"),
            (self.response_flat, "<i4"),
        ):
            digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
        return digest.hexdigest()[:16]


class _Flat:
    """Grows flat ids and their offsets chunk by chunk."""

    def __init__(self) -> None:
        self.chunks: list[npt.NDArray[np.int32]] = []
        self.lengths: list[int] = []

    def add(self, sequences: Sequence[list[int]]) -> None:
        self.lengths.extend(map(len, sequences))
        self.chunks.append(np.asarray([i for ids in sequences for i in ids], dtype=np.int32))

    def flat(self) -> npt.NDArray[np.int32]:
        return np.concatenate(self.chunks) if self.chunks else np.zeros(0, dtype=np.int32)

    def offsets(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)


def encode_table(
    table: DemonstrationTable,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    config: DemonstrationConfig,
    split: str,
    needs_response: bool = True,
    refuse_rejected: bool = True,
) -> tuple[EncodedDemonstrations, DropReport]:
    """Encode every usable row of ``table``, in its order.

    Args:
        table: Rows of one split.
        tokenizer: The model's.
        template: Renders prompts; checked against the tokenizer here.
        config: Limits on lengths and on the share of dropped rows.
        split: Name of the split, for messages.
        needs_response: False encodes prompts alone; every response is then empty.
        refuse_rejected: False leaves it to the caller how many rows may be dropped, even all of them.

    Raises:
        UserError: The template does not fit, a cell is not text, there is no EOS, or too many rows are unusable.
    """
    template.check(tokenizer)
    report = DropReport(split=split, num_rows=len(table))
    prompts_flat, responses_flat = _Flat(), _Flat()
    rows: list[int] = []
    encoder = _ChunkEncoder(tokenizer, template, config, table, report, needs_response)
    # disable=None: a bar on a terminal only.
    progress = tqdm(total=len(table), desc=f"encoding {split}", unit=" rows", disable=None, leave=False)
    for chunk_rows, chunk in table.chunks():
        kept = encoder.encode(chunk_rows, chunk)
        progress.update(len(chunk))
        rows.extend(row for row, _, _ in kept)
        prompts_flat.add([prompt for _, prompt, _ in kept])
        responses_flat.add([response for _, _, response in kept])
    progress.close()
    if refuse_rejected:
        report.refuse_above(config.max_rejected_share)
    encoded = EncodedDemonstrations(
        table=table,
        rows=np.asarray(rows, dtype=np.int64),
        prompt_flat=prompts_flat.flat(),
        prompt_offsets=prompts_flat.offsets(),
        response_flat=responses_flat.flat(),
        response_offsets=responses_flat.offsets(),
    )
    return encoded, report


class _ChunkEncoder:
    """Encodes chunks of one table and reports what it leaves out."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        config: DemonstrationConfig,
        table: DemonstrationTable,
        report: DropReport,
        needs_response: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.config = config
        self.table = table
        self.report = report
        self.needs_response = needs_response
        self.end_id = response_end(tokenizer, template)
        self.special_ids = special_ids(tokenizer) | {self.end_id}
        self.special_pattern = special_pattern(tokenizer)
        self.num_prefix_ids = len(default_prefix(tokenizer))

    def encode(self, rows: IndexArray, chunk: list[Demonstration]) -> list[tuple[int, list[int], list[int]]]:
        """Return source row, prompt ids and response ids of every usable demonstration."""
        candidates = [(int(row), item) for row, item in zip(rows, chunk, strict=True) if self._has_text(int(row), item)]
        prompts = encode_prompts(self.tokenizer, self.template, [item.messages for _, item in candidates])
        if self.needs_response:
            responses = encode_responses(self.tokenizer, [item.response for _, item in candidates])
        else:
            responses = [[] for _ in candidates]
        kept = []
        for (row, item), prompt, response in zip(candidates, prompts, responses, strict=True):
            if (reason := self._objection(prompt, response)) is not None:
                self.report.add(reason, row, self.table)
                continue
            texts = [message["content"] for message in item.messages]
            if any(self.special_pattern.search(text) for text in [*texts, item.response]):
                self.report.add(Reason.SPELLS_SPECIAL, row, self.table)
            if self.needs_response:
                response, is_complete = finish_response(
                    response, eos_id=self.end_id, max_tokens=self.config.max_response_tokens
                )
                if not is_complete:
                    self.report.add(Reason.TRUNCATED, row, self.table)
            kept.append((row, prompt, response))
        return kept

    def _has_text(self, row: int, item: Demonstration) -> bool:
        if not item.messages:
            self.report.add(Reason.EMPTY_PROMPT, row, self.table)
            return False
        if self.needs_response and not item.response.strip():
            self.report.add(Reason.EMPTY_RESPONSE, row, self.table)
            return False
        return True

    def _objection(self, prompt: list[int], response: list[int]) -> Reason | None:
        if not prompt:  # column 0 of a batch is never part of a response, so a response needs a token before it
            return Reason.EMPTY_PROMPT
        if len(prompt) > self.config.max_prompt_tokens:
            return Reason.LONG_PROMPT
        if self.needs_response and not response:
            return Reason.NO_LABELS
        # A vocabulary of whole words can hold "</s>" as a word, which no setting of the tokenizer splits.
        is_plain = not self.template.writes_control_tokens
        if not self.special_ids.isdisjoint(response) or (
            is_plain and not self.special_ids.isdisjoint(prompt[self.num_prefix_ids :])
        ):
            return Reason.SPECIAL_IDS
        return None
