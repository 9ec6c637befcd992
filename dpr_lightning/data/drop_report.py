"""Counts the rows of a split that were dropped or are worth a note, and says what to do about too many."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from dpr_lightning.data.chats import TRAILING_TURN, WEIGHT_ZERO
from dpr_lightning.data.demonstrations import CONFIG_KEY, DemonstrationTable
from dpr_lightning.errors import UserError

_NUM_EXAMPLES = 3
_MAX_REASONS = 50


class Reason(StrEnum):
    """Why a row was dropped or is worth a note; rows and templates add reasons of their own."""

    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    LONG_PROMPT = "prompt too long"
    NO_LABELS = "no response tokens"
    NOT_UNICODE = "text with half a surrogate pair"
    SPECIAL_IDS = "text became special ids"
    SPECIAL_FIELD = "control token in a tool call, function or reasoning"
    OTHER = "other reasons"
    TRUNCATED = "response cut, EOS not taught"
    SPELLS_SPECIAL = "special token spelt out, kept as text"
    TRAILING_TURN = TRAILING_TURN
    WEIGHT_ZERO = WEIGHT_ZERO


NOTES = frozenset({Reason.TRUNCATED, Reason.SPELLS_SPECIAL, Reason.TRAILING_TURN, Reason.WEIGHT_ZERO})
"""Reasons for which a row is kept."""


@dataclass(slots=True)
class DropReport:
    """Rows of one split, dropped and noted, by reason."""

    split: str
    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Where the first rows of each reason lie."""
    num_repeated: int = 0
    """Kept rows whose prompt is that of an earlier row."""
    longest_prompt: int = 0
    """Tokens of the longest prompt that was dropped for its length."""
    _digests: array[int] = field(default_factory=lambda: array("Q"))
    _rows: array[int] = field(default_factory=lambda: array("q"))

    @property
    def num_dropped(self) -> int:
        """Rows that are left out."""
        return sum(count for reason, count in self.counts.items() if reason not in NOTES)

    @property
    def num_kept(self) -> int:
        """Rows that are used."""
        return self.num_rows - self.num_dropped

    def add(self, reason: str, row: int, table: DemonstrationTable) -> None:
        """Count source row ``row`` of ``table``."""
        # A template may write the row's own text into its refusal; the list stays readable.
        if reason not in self.counts and len(self.counts) >= _MAX_REASONS:
            reason = Reason.OTHER
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(table.locate(row))

    def note_prompts(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Remember the prompts of kept rows, 16 bytes each, for :meth:`count_repeats`."""
        self._rows.extend(rows)
        for prompt in prompts:
            digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int32).tobytes(), digest_size=8).digest()
            self._digests.append(int.from_bytes(digest, "little"))

    def count_repeats(self, table: DemonstrationTable) -> None:
        """Count the noted rows whose prompt has occurred before."""
        _, first = np.unique(np.asarray(self._digests, dtype=np.uint64), return_index=True)
        is_repeated = np.ones(len(self._rows), dtype=bool)
        is_repeated[first] = False
        repeated = np.asarray(self._rows, dtype=np.int64)[is_repeated]
        self.num_repeated = len(repeated)
        if len(repeated):
            self.examples["repeated"] = [table.locate(int(row)) for row in repeated[:_NUM_EXAMPLES]]
        self._digests, self._rows = array("Q"), array("q")

    def table(self) -> str:
        """Return a few lines of text: rows, share and first places of each reason."""
        lines = [f"{self.split}: {self.num_rows} rows, {self.num_kept} kept, {self.num_dropped} dropped"]
        known = list(Reason)
        ordered = sorted(self.counts, key=lambda reason: known.index(reason) if reason in known else -1)  # type: ignore[arg-type]
        found = [(reason, self.counts[reason], self.examples[reason]) for reason in ordered]
        if self.num_repeated:
            found.append(("prompt repeats that of an earlier row", self.num_repeated, self.examples["repeated"]))
        for reason, count, places in found:
            what = "kept" if reason in NOTES or reason not in self.counts else "dropped"
            share = f"{count / self.num_rows:>6.2%}"
            lines.append(f"  {what:<8}{count:>9}  {share}  {reason} ({', '.join(places)})")
        return "\n".join(lines)

    def to_manifest(self) -> dict[str, Any]:
        """Return the counts as plain JSON values."""
        return {
            "rows": self.num_rows,
            "kept": self.num_kept,
            "dropped": self.num_dropped,
            "reasons": {str(reason): count for reason, count in self.counts.items()},
            "repeated_prompts": self.num_repeated,
        }

    def refuse_above(self, max_share: float, *, max_prompt_tokens: int) -> None:
        """Raise UserError if more than ``max_share`` of the rows were dropped, or if none is left.

        Args:
            max_share: Share of all rows.
            max_prompt_tokens: The limit on prompts, for the advice.
        """
        if self.num_kept > 0 and self.num_dropped <= max_share * self.num_rows:
            return
        dropped = [(reason, count) for reason, count in self.counts.most_common() if reason not in NOTES]
        reasons = "; ".join(
            f"{count} {reason} (first: {', '.join(self.examples[reason])})" for reason, count in dropped
        )
        # Advice on what rejected most rows: a larger share would only hide a limit that is too low.
        if dropped and dropped[0][0] == Reason.LONG_PROMPT:
            advice = f"raise max_prompt_tokens (now {max_prompt_tokens}, the longest prompt has {self.longest_prompt})"
        elif self.num_kept == 0:
            advice = "repair them, or choose another preset, columns or template"
        else:
            advice = f"repair them or raise max_rejected_share (now {max_share})"
        raise UserError(
            f"{CONFIG_KEY}: {self.num_dropped} of {self.num_rows} {self.split} rows cannot be used: "
            f"{reasons or 'there are none'}; {advice}"
        )
