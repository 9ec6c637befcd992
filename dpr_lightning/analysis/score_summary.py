"""The figures of many scored responses, row by row: what is kept does not grow with the rows."""

from __future__ import annotations

import math
from typing import Any

from dpr_lightning.analysis.token_rewards import TokenRewards
from dpr_lightning.terminal import Table

NUM_EXTREME = 3
"""Rows shown at each end."""
_MAX_CHARACTERS = 80


class Summary:
    """Sums over the rows, the first ones, and those of lowest and highest mean reward per token.

    Args:
        page_rows: How many of the first ones are kept.
    """

    def __init__(self, *, page_rows: int) -> None:
        self.num_rows = 0
        self.num_tokens = 0
        self.num_cut = 0
        self.shown: list[TokenRewards] = []
        self.lowest: list[TokenRewards] = []
        self.highest: list[TokenRewards] = []
        self._page_rows = page_rows
        self._total = 0.0
        # Welford's running means and products of deviations, of sum and length.
        self._mean_sum = self._mean_length = 0.0
        self._sum_sum = self._sum_length = self._length_length = 0.0

    def add(self, row: TokenRewards) -> None:
        """Count one row; rows come in the order of the source, which breaks ties."""
        self.num_rows += 1
        self.num_tokens += row.num_tokens
        self.num_cut += not row.ends_by_eos
        self._total += row.sum
        gap_sum, gap_length = row.sum - self._mean_sum, row.num_tokens - self._mean_length
        self._mean_sum += gap_sum / self.num_rows
        self._mean_length += gap_length / self.num_rows
        self._sum_sum += gap_sum * (row.sum - self._mean_sum)
        self._sum_length += gap_sum * (row.num_tokens - self._mean_length)
        self._length_length += gap_length * (row.num_tokens - self._mean_length)
        if len(self.shown) < self._page_rows:
            self.shown.append(row)
        self.lowest = sorted([*self.lowest, row], key=lambda item: item.mean)[:NUM_EXTREME]
        self.highest = sorted([*self.highest, row], key=lambda item: -item.mean)[:NUM_EXTREME]

    @property
    def mean_per_token(self) -> float:
        """Mean reward of all tokens, in nats."""
        return self._total / self.num_tokens

    @property
    def length_correlation(self) -> float | None:
        """Pearson's correlation of a response's sum with its length; None where either is constant."""
        scale = math.sqrt(self._sum_sum * self._length_length)
        return max(-1.0, min(1.0, self._sum_length / scale)) if scale > 0 else None

    def figures(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "rows": self.num_rows,
            "tokens": self.num_tokens,
            "cut": self.num_cut,
            "mean_per_token": self.mean_per_token,
            "mean_sum": self._mean_sum,
            "sum_length_correlation": self.length_correlation,
            "lowest": [_figures(row) for row in self.lowest],
            "highest": [_figures(row) for row in self.highest],
        }

    def table(self) -> Table:
        """Return the figures as a table for the terminal."""
        correlation = self.length_correlation
        words = "none, one of them is constant" if correlation is None else f"{correlation:+.3f}"
        table = Table(
            title=f"Token rewards of {self.num_rows} responses, {self.num_tokens} tokens: mean "
            f"{self.mean_per_token:+.4f} nats a token; correlation of a response's sum with its length: {words}",
            title_justify="left",
        )
        for name in ("", "row", "mean", "sum", "tokens"):
            table.add_column(name, justify="right" if name else "left")
        table.add_column("response", overflow="ellipsis", no_wrap=True)
        for what, rows in (("lowest", self.lowest), ("highest", self.highest)):
            for row in rows:
                cells = (what, str(row.row), f"{row.mean:+.4f}", f"{row.sum:+.3f}", str(row.num_tokens))
                # repr: one line, without what could steer a terminal.
                table.add_row(*cells, _plain(row.response))
        return table


def _plain(text: str) -> str:
    return ascii(text[:_MAX_CHARACTERS])[1:-1]


def _figures(row: TokenRewards) -> dict[str, Any]:
    return {"row": row.row, "mean": row.mean, "sum": row.sum, "num_tokens": row.num_tokens}
