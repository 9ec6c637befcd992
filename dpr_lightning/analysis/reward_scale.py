"""The colours of token rewards: blue above zero, orange below, the paper's own colour in the middle.

Blue and orange differ for every common kind of colour blindness. All text on them has a contrast of 4.5 or more (WCAG
2, AA) in both schemes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

QUANTILE = 0.98
"""Share of the tokens whose reward lies inside the scale; the colour of the others is that of its end."""
STEPS = 20
"""Shades on each side of zero."""

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Colours of one scheme."""

    paper: RGB
    text: RGB
    muted: RGB
    """Text that stands back; never on a shade."""
    line: RGB
    panel: RGB
    positive: RGB
    """The shade at the upper end of the scale."""
    negative: RGB
    """The same at the lower end."""

    def shade(self, step: int) -> RGB:
        """Return the colour of ``step``, from ``-STEPS`` to ``STEPS``."""
        end, share = (self.positive if step > 0 else self.negative), abs(step) / STEPS
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(self.panel, end, strict=True))
        return red, green, blue


LIGHT = Scheme(
    paper=(246, 247, 249),
    text=(17, 20, 24),
    muted=(84, 92, 102),
    line=(216, 220, 226),
    panel=(255, 255, 255),
    positive=(86, 160, 226),
    negative=(240, 146, 60),
)
DARK = Scheme(
    paper=(18, 21, 26),
    text=(242, 244, 247),
    muted=(160, 168, 180),
    line=(58, 64, 74),
    panel=(27, 31, 38),
    positive=(28, 98, 174),
    negative=(164, 80, 12),
)


def robust_limit(rewards: Iterable[float]) -> float:
    """Return the reward at the ends of the scale: the ``QUANTILE`` quantile of the absolute rewards.

    Where that is 0 it is the largest one, and where all are 0 (or there are none) it is 1.
    """
    size_N = np.abs(np.fromiter(rewards, dtype=np.float64))
    if len(size_N) == 0 or size_N.max() == 0:
        return 1.0
    return float(np.quantile(size_N, QUANTILE)) or float(size_N.max())


def step_of(reward: float, limit: float) -> int:
    """Return the shade of ``reward``, from ``-STEPS`` to ``STEPS``."""
    return round(max(-1.0, min(1.0, reward / limit)) * STEPS)


def contrast(one: RGB, other: RGB) -> float:
    """Return the contrast ratio of two colours by WCAG 2, from 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: RGB) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def css(colour: RGB) -> str:
    """Return ``colour`` as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


# Default-ignorable code points of other categories than Cf, which no font shows.
_INVISIBLE = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x3164, 0x3164), (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
)  # fmt: skip
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})


def is_hidden(character: str) -> bool:
    """Return whether ``character`` shows nothing of itself: controls (bidi too), zero width, odd spaces, surrogates.

    A space, a tab and a line end are not hidden.
    """
    if character in " \t\n":
        return False
    code = ord(character)
    return unicodedata.category(character) in _HIDDEN_CATEGORIES or any(low <= code <= high for low, high in _INVISIBLE)


def code_point(character: str) -> str:
    """Return ``U+200B`` and the like."""
    return f"U+{ord(character):04X}"


def in_words(text: str) -> str:
    """Return ``text`` with line ends, tabs and hidden characters spelt out, on one line."""
    marks = {"\n": "\u21b5", "\t": "\u21e5"}
    return "".join(
        marks.get(character) or (code_point(character) if is_hidden(character) else character) for character in text
    )
