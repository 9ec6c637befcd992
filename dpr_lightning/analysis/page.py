"""Token rewards as one HTML page: no script, nothing from elsewhere, and all text from outside is escaped."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterator, Sequence

from dpr_lightning.analysis.reward_scale import (
    DARK,
    LIGHT,
    QUANTILE,
    STEPS,
    Scheme,
    code_point,
    css,
    in_words,
    is_hidden,
    robust_limit,
    step_of,
)
from dpr_lightning.analysis.token_rewards import TokenRewards

_LEGEND_STEPS = (-STEPS, -STEPS * 3 // 4, -STEPS // 2, -STEPS // 4, 0, STEPS // 4, STEPS // 2, STEPS * 3 // 4, STEPS)


def _variables(scheme: Scheme) -> str:
    shades = "".join(f"--{_shade(step)}:{css(scheme.shade(step))};" for step in range(-STEPS, STEPS + 1))
    names = ("paper", "text", "muted", "line", "panel")
    return "".join(f"--{name}:{css(getattr(scheme, name))};" for name in names) + shades


def _shade(step: int) -> str:
    return f"n{-step}" if step < 0 else f"p{step}"


_STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n"
    + """*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:96rem;padding:1.5rem 1.5rem 5rem;
 color:var(--text);background:var(--paper)}
h1{font-size:1.5rem;margin:0 0 .25rem}
h2{font-size:.8rem;font-weight:600;color:var(--muted);margin:0 0 .25rem;text-transform:uppercase;letter-spacing:.04em}
p{margin:.25rem 0;max-width:60rem}
.muted{color:var(--muted)}
.legend{display:flex;margin:1rem 0;max-width:42rem;border:1px solid var(--line);border-radius:6px;overflow:hidden}
.legend span{flex:1;text-align:center;padding:.25rem 0;font-size:.8rem;font-variant-numeric:tabular-nums}
.group{margin:2rem 0}
.prompt{max-height:10rem;overflow:auto;padding:.5rem .75rem;border-left:3px solid var(--line);margin-bottom:.75rem}
.responses{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1rem;align-items:start}
.response{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.75rem 1rem;min-width:0}
.facts{color:var(--muted);font-size:.85rem;font-variant-numeric:tabular-nums;margin:0 0 .5rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
.tokens{font:15px/1.9 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.t{padding:.15em 0;border-radius:3px;box-shadow:inset -1px 0 var(--panel)}
.t:hover,.t:focus{outline:2px solid var(--text);outline-offset:0;position:relative;z-index:1}
.t:hover::after,.t:focus::after{content:attr(aria-label);position:fixed;left:0;right:0;bottom:0;z-index:2;
 padding:.6rem 1.5rem;font:15px/1.4 system-ui,sans-serif;color:var(--paper);background:var(--text);
 white-space:normal;overflow-wrap:anywhere;direction:ltr;font-variant-numeric:tabular-nums}
.t:hover::after{z-index:3}
.h{font-size:.72em;font-weight:400;border:1px dotted currentColor;border-radius:3px;padding:0 .2em;margin:0 .1em;
 unicode-bidi:isolate;direction:ltr}
.e{user-select:none}
"""
    + "".join(f".{_shade(step)}{{background:var(--{_shade(step)})}}\n" for step in range(-STEPS, STEPS + 1))
)


def write_page(rows: Sequence[TokenRewards], *, title: str, num_rows: int, notes: Sequence[str] = ()) -> Iterator[str]:
    """Yield the page piece by piece: the responses of one prompt side by side, prompts below each other.

    Args:
        rows: The responses to show.
        title: Heading.
        num_rows: How many were scored; the page says how many of them it does not show.
        notes: Lines below the heading.
    """
    limit = robust_limit(reward for row in rows for reward in row.rewards)
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style></head><body>\n<h1>{_escape(title)}</h1>\n"
    )
    for note in notes:
        yield f'<p class="muted">{_escape(note)}</p>\n'
    hidden = num_rows - len(rows)
    more = f"; {hidden} more are not shown (--page_rows)" if hidden else ""
    yield f'<p class="muted">{len(rows)} of {num_rows} scored responses{more}.</p>\n'
    yield (
        "<p>Reward of a token: log &pi;<sub>SFT</sub> &minus; log &pi;<sub>ref</sub>, in nats. Blue: SFT made the token"
        " likelier; orange: less likely. Point at a token, or reach it by the Tab key, to read its numbers.</p>\n"
    )
    swatches = "".join(
        f'<span class="{_shade(step)}">{_number(limit * step / STEPS, digits=2)}</span>' for step in _LEGEND_STEPS
    )
    yield (
        f'<div class="legend" role="group" aria-label="colours of rewards">{swatches}</div>\n<p class="muted">'
        f"The scale ends at {limit:.3g}, the {QUANTILE:.0%} quantile of the shown tokens&rsquo; absolute rewards; "
        "tokens beyond have the colour of its end.</p>\n"
    )
    groups: dict[str, list[TokenRewards]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    for prompt, members in groups.items():
        yield '<section class="group"><h2>Prompt</h2>\n'
        yield f'<div class="prompt text" dir="auto" tabindex="0">{visible(prompt)}</div>\n<div class="responses">\n'
        for row in members:
            yield from _response(row, limit)
        yield "</div></section>\n"
    yield "</body></html>\n"


def _response(row: TokenRewards, limit: float) -> Iterator[str]:
    end = "" if row.ends_by_eos else " &middot; cut, its end is not scored"
    yield (
        f'<article class="response"><p class="facts">row {row.row} &middot; {row.num_tokens} tokens &middot; sum '
        f"{_number(row.sum, digits=3)} &middot; mean {_number(row.mean, digits=4)}{end}</p>\n"
        '<div class="tokens text" dir="auto">'
    )
    for index, reward in enumerate(row.rewards):
        start, stop = row.offsets[index]
        text, name = row.response[start:stop], row.tokens[index]
        label = (
            f"token {index + 1} of {row.num_tokens}: \u201c{in_words(name)}\u201d, reward {_number(reward, digits=4)}, "
            f"log \u03c0_SFT {_number(row.teacher_logp[index], digits=4)}, "
            f"log \u03c0_ref {_number(row.reference_logp[index], digits=4)}"
        )
        # A token without a character of its own (EOS, or a part of one) shows its name.
        shown = visible(text) if text else f'<b class="h e">{_escape(in_words(name))}</b>'
        shade = _shade(step_of(reward, limit))
        yield f'<span class="t {shade}" tabindex="0" role="img" aria-label="{_escape(label)}">{shown}</span>'
    rest = row.response[row.offsets[-1][1] :] if row.offsets else row.response
    if rest:
        yield f'<span class="muted">{visible(rest)}</span>'
    yield "</div></article>\n"


def visible(text: str) -> str:
    """Return ``text`` as HTML that shows every character of it: what shows nothing becomes its code point."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return '<b class="h e">\u21b5</b>\n'
    if is_hidden(character):
        return f'<b class="h">{code_point(character)}</b>'
    return html.escape(character)


def _escape(text: str) -> str:
    return html.escape(in_words(text))


def _number(value: float, *, digits: int) -> str:
    """Return ``value`` with its sign, by a proper minus sign; what rounds to 0 has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "\u2212")
