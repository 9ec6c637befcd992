"""Token rewards as a picture: every token of a response is a box in the colour of its reward."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dpr_lightning.analysis.reward_scale import LIGHT, RGB, STEPS, code_point, in_words, step_of
from dpr_lightning.errors import UserError

_DPI = 100
_ROW, _MARGIN, _HEAD = 24, 12, 48
"""Pixels: a line of tokens, the edge, and the heading with its scale."""
_FONT, _POINTS = "DejaVu Sans Mono", 9
"""Matplotlib brings this font along."""
_CHARACTER = 0.6020508 * _POINTS * _DPI / 72
"""Pixels from one character of the font to the next."""
_MAX_TOKEN_CHARACTERS = 24

Image = npt.NDArray[np.uint8]


def draw_rewards(
    tokens: Sequence[str],
    rewards: Sequence[float],
    *,
    limit: float,
    title: str = "",
    width: int = 900,
    max_height: int = 600,
) -> Image:
    """Return [H, W, 3] the tokens of one response as coloured boxes; what does not fit is counted in the last line.

    Args:
        tokens: Text of each token.
        rewards: Reward of each.
        limit: The reward at the end of the scale.
        title: Heading, one line.
        width: Pixels.
        max_height: Pixels; the picture is as high as it has to be, up to this.

    Raises:
        UserError: The picture would be too small for one line.
    """
    max_lines = (max_height - _HEAD - 2 * _MARGIN) // _ROW
    if max_lines < 1 or width < 300:
        raise UserError(f"a picture of {width} x {max_height} pixels holds no token; give at least 300 x 96")
    lines = _lay_out([_shown(token) for token in tokens], int((width - 2 * _MARGIN) / _CHARACTER))
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], []]
    num_shown = sum(map(len, lines))
    height = _HEAD + 2 * _MARGIN + _ROW * max(1, len(lines))
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=_share(LIGHT.panel))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    heading = in_words(title)
    num_heading = int((width - 2 * _MARGIN) / _CHARACTER)
    heading = heading if len(heading) <= num_heading else heading[: num_heading - 1] + "\u2026"
    texts: list[tuple[float, float, str]] = [(_MARGIN, _MARGIN + 4.0, heading)]
    boxes: list[tuple[float, float, float, float]] = []
    shades: list[RGB] = []
    for place, step in enumerate((-STEPS, -STEPS // 2, 0, STEPS // 2, STEPS)):
        boxes.append((_MARGIN + 72.0 * place, _HEAD - 20.0, 72.0, 18.0))
        shades.append(LIGHT.shade(step))
        texts.append((_MARGIN + 72.0 * place + 10, _HEAD - 11.0, f"{limit * step / STEPS:+.2f}" if step else "   0"))
    reward = iter(rewards)
    for number, line in enumerate(lines):
        start, middle = 0, _HEAD + _MARGIN + _ROW * (number + 0.5)
        for text in line:
            size = len(text) + 1
            boxes.append((_MARGIN + start * _CHARACTER + 1, middle - 10, size * _CHARACTER - 2, 20.0))
            shades.append(LIGHT.shade(step_of(next(reward), limit)))
            start += size
        # One text a line is many times faster than one a token; the font gives each character the same width.
        texts.append((_MARGIN + _CHARACTER / 2, middle, " ".join(line)))
    if num_shown < len(tokens):
        texts[-1] = (*texts[-1][:2], f"and {len(tokens) - num_shown} tokens more")
    patches = [Rectangle((left, top), across, down) for left, top, across, down in boxes]
    colours = [_share(shade) for shade in shades]
    axes.add_collection(PatchCollection(patches, facecolors=colours, edgecolors=[_share(LIGHT.line)], linewidths=0.5))
    for left, middle, text in texts:
        # parse_math=False: a token is no formula.
        axes.text(
            left, middle, text, va="center", size=_POINTS, family=_FONT, color=_share(LIGHT.text), parse_math=False
        )
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba(), dtype=np.uint8)  # type: ignore[no-untyped-call]
    return np.ascontiguousarray(pixels[:, :, :3])


def stack(images: Sequence[Image]) -> Image:
    """Return pictures of one width below each other."""
    return np.concatenate(list(images), axis=0)


def _lay_out(texts: Sequence[str], num_characters: int) -> list[list[str]]:
    """Return the tokens of every line; each takes its characters and one more."""
    lines: list[list[str]] = []
    used = num_characters
    for text in texts:
        if used + len(text) + 1 > num_characters:
            lines.append([])
            used = 0
        lines[-1].append(text)
        used += len(text) + 1
    return lines


def _shown(token: str) -> str:
    """Return a token's text in characters of one width, a space made visible."""
    text = in_words(token).replace(" ", "\u00b7")
    text = "".join(character if _is_plain(character) else code_point(character) for character in text)
    return text if len(text) <= _MAX_TOKEN_CHARACTERS else text[: _MAX_TOKEN_CHARACTERS - 1] + "\u2026"


def _is_plain(character: str) -> bool:
    """Return whether the font has ``character``, as wide as the others and from left to right."""
    return character in "\u21b5\u21e5" or (ord(character) < 0x0530 and not unicodedata.combining(character))


def _share(colour: RGB) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255
