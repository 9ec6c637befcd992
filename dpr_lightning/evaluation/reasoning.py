"""The final answer of a response that thinks aloud first: what stands outside of its reasoning blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think|antml:thinking"
_TAG = re.compile(
    # A tag in quotes or code is talked about, not used. Besides XML: Magistral's [THINK], Kimi's triangles, and
    # <|begin_of_thought|>.
    rf"(?<![`'\"])(?:<(?P<xml>/?)(?:{_NAMES})(?:\s[^<>]*)?>|\[(?P<square>/?)think\]|\u25c1(?P<kimi>/?)think\u25b7"
    r"|<\|(?P<word>begin|end)_of_(?:thought|think|thinking|reasoning)\|>)",
    re.IGNORECASE,
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>")
"""Of the Harmony format: ``analysis`` and ``commentary`` are not shown to users, ``final`` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalAnswer:
    """A response without its reasoning."""

    text: str
    """What stands outside of the blocks; empty where the reasoning never ends."""
    has_reasoning: bool
    """Whether there was any block."""


def final_answer(text: str) -> FinalAnswer:
    """Return ``text`` without its reasoning blocks.

    A block whose opening is missing (templates write it into the prompt) begins with the text; one that is never
    closed ends with it.
    """
    channels = list(_CHANNEL.finditer(text))
    if channels:
        final = [match for match in channels if match[1].lower() == "final"]
        return FinalAnswer(text=text[final[-1].end() :] if final else "", has_reasoning=True)
    kept: list[str] = []
    depth = start = 0
    has_reasoning = False
    for tag in _TAG.finditer(text):
        has_reasoning = True
        is_closing = "/" in (tag["xml"], tag["square"], tag["kimi"]) or (tag["word"] or "").lower() == "end"
        if not is_closing:
            if depth == 0:
                kept.append(text[start : tag.start()])
            depth += 1
        elif depth <= 1:
            if depth == 0:
                # Never opened: all before it is reasoning.
                kept.clear()
            depth, start = 0, tag.end()
        else:
            depth -= 1
    if depth == 0:
        kept.append(text[start:])
    return FinalAnswer(text="".join(kept), has_reasoning=has_reasoning)
