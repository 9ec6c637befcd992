"""Encodes a table of demonstrations into flat arrays, and counts what had to be left out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.chats import Demonstration
from dpr_lightning.data.demonstrations import DemonstrationConfig, DemonstrationTable
from dpr_lightning.data.drop_report import NOTES, DropReport, Reason
from dpr_lightning.data.ends import response_end
from dpr_lightning.data.splitting import IndexArray
from dpr_lightning.data.templates import PromptTemplate, TemplateRefusalError, without_opening
from dpr_lightning.data.tokenization import (
    default_prefix,
    encode_responses,
    finish_response,
    special_ids,
    special_pattern,
    try_encode_prompts,
)

__all__ = ["NOTES", "DropReport", "EncodedDemonstrations", "Reason", "encode_table", "usable_answer"]


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
        """Return 16 hexadecimal digits of the ids: equal for equal data in equal order, whatever the files' names."""
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
        report.refuse_above(config.max_rejected_share, max_prompt_tokens=config.max_prompt_tokens)
    encoded = EncodedDemonstrations(
        table=table,
        rows=np.asarray(rows, dtype=np.int64),
        prompt_flat=prompts_flat.flat(),
        prompt_offsets=prompts_flat.offsets(),
        response_flat=responses_flat.flat(),
        response_offsets=responses_flat.offsets(),
    )
    report.count_repeats(table, encoded.rows, encoded.prompt_flat, encoded.prompt_offsets)
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
        candidates: list[tuple[int, Demonstration, str]] = []
        for row, item in zip(rows.tolist(), chunk, strict=True):
            reason, text = self._read(item)
            if reason:
                self.report.add(reason, row, self.table)
            else:
                candidates.append((row, item, text))
        prompts = try_encode_prompts(
            self.tokenizer,
            self.template,
            [item.messages for _, item, _ in candidates],
            [item.tools for _, item, _ in candidates],
        )
        if self.needs_response:
            responses = encode_responses(self.tokenizer, [text for _, _, text in candidates])
        else:
            responses = [[] for _ in candidates]
        kept = []
        for (row, item, text), prompt, response in zip(candidates, prompts, responses, strict=True):
            if isinstance(prompt, TemplateRefusalError):
                self.report.add(prompt.reason, row, self.table)
                continue
            if (objection := self._objection(prompt, response)) is not None:
                self.report.add(objection, row, self.table)
                continue
            texts = [message["content"] for message in item.messages]
            if any(self.special_pattern.search(part) for part in [*texts, text]):
                self.report.add(Reason.SPELLS_SPECIAL, row, self.table)
            for note in item.notes:
                self.report.add(note, row, self.table)
            if self.needs_response:
                response, is_complete = finish_response(
                    response, eos_id=self.end_id, max_tokens=self.config.max_response_tokens
                )
                if not is_complete:
                    self.report.add(Reason.TRUNCATED, row, self.table)
            kept.append((row, prompt, response))
        return kept

    def _read(self, item: Demonstration) -> tuple[str, str]:
        """Return why an item cannot be used, empty if it can, and the text of its response."""
        reason = prompt_objection(self.tokenizer, self.template, item, self.special_pattern)
        if reason or not self.needs_response:
            return reason, item.response
        return usable_answer(self.tokenizer, self.template, item, self.special_pattern)

    def _objection(self, prompt: list[int], response: list[int]) -> Reason | None:
        if not prompt:  # column 0 of a batch is never part of a response, so a response needs a token before it
            return Reason.EMPTY_PROMPT
        if len(prompt) > self.config.max_prompt_tokens:
            self.report.longest_prompt = max(self.report.longest_prompt, len(prompt))
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


def prompt_objection(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, item: Demonstration, special: re.Pattern[str]
) -> str:
    """Return why a row's prompt cannot be given to the model, empty if it can."""
    if item.prompt_problem:
        return item.prompt_problem
    if not item.messages:
        return Reason.EMPTY_PROMPT
    parts = [message["content"] for message in item.messages]
    beside = ""
    if item.prompt_fields:
        if lost := template.unrendered(tokenizer, item.prompt_fields):
            return _unrendered(lost)
        extra = [{**message, "content": ""} for message in item.messages if len(message) > 2]
        beside = json.dumps([extra, item.tools], ensure_ascii=False, default=str)
    if not _is_unicode([*parts, item.response, beside]):
        return Reason.NOT_UNICODE
    # Fields are rendered by the template, among its own control tokens.
    return Reason.SPECIAL_FIELD if beside and special.search(beside) else ""


def usable_answer(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, item: Demonstration, special: re.Pattern[str]
) -> tuple[str, str]:
    """Return why a row's answer cannot be trained on, empty if it can, and its text as the prompt continues."""
    response = item.response
    if item.response_problem:
        return item.response_problem, response
    if item.answer is not None:
        if lost := template.unrendered(tokenizer, item.answer_fields):
            return _unrendered(lost), response
        try:
            response = template.render_answer(tokenizer, item.messages, item.answer, item.tools)
        except TemplateRefusalError as refusal:
            return refusal.reason, response
        if not _is_unicode([response]):
            return Reason.NOT_UNICODE, ""
        if special.search(response):
            return Reason.SPECIAL_FIELD, response
    response = without_opening(response, template.opening(tokenizer))
    return ("" if response.strip() else Reason.EMPTY_RESPONSE), response


def _unrendered(fields: Sequence[str]) -> str:
    shown = ["messages of role 'tool'" if name == "tool" else repr(name) for name in fields]
    return f"{' and '.join(shown)} that the prompt template does not write"


def _is_unicode(texts: Sequence[str]) -> bool:
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
