from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from dpr_lightning.analysis.page import visible, write_page
from dpr_lightning.analysis.reward_scale import (
    DARK,
    LIGHT,
    STEPS,
    Scheme,
    contrast,
    in_words,
    is_hidden,
    robust_limit,
    step_of,
)
from dpr_lightning.analysis.token_rewards import TokenRewards

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onmouseover=x &amp; </style>"


def rewards_of(text: str, rewards: list[float], *, row: int = 1, prompt: str = "ask") -> TokenRewards:
    """A response whose tokens are its characters, and EOS."""
    tokens = [*text, "</s>"]
    offsets = [(index, index + 1) for index in range(len(text))] + [(len(text), len(text))]
    values = [rewards[index % len(rewards)] for index in range(len(tokens))]
    return TokenRewards(
        row=row,
        prompt=prompt,
        response=text,
        tokens=tokens,
        offsets=offsets,
        teacher_logp=[-1.25] * len(tokens),
        reference_logp=[-1.25 - value for value in values],
        rewards=values,
        sum=sum(values),
        mean=sum(values) / len(values),
        num_tokens=len(tokens),
        ends_by_eos=True,
    )


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(page)
    return parser.found


def page_of(*rows: TokenRewards, num_rows: int | None = None) -> str:
    return "".join(write_page(rows, title="Title", num_rows=len(rows) if num_rows is None else num_rows))


def test_every_token_is_a_span_that_says_its_numbers() -> None:
    page = page_of(rewards_of("ab", [1.0, -2.0, 0.0]))
    spans = [attributes for tag, attributes in elements(page) if tag == "span" and "aria-label" in attributes]
    assert [span["class"] for span in spans] == ["t p10", "t n20", "t p0"]
    assert all(span["tabindex"] == "0" for span in spans)
    assert spans[1]["aria-label"] == (
        "token 2 of 3: \u201cb\u201d, reward \u22122.0000, log \u03c0_SFT \u22121.2500, log \u03c0_ref +0.7500"
    )
    assert "\u201c</s>\u201d, reward 0.0000" in str(spans[2]["aria-label"])


def test_hostile_text_stays_text() -> None:
    page = page_of(rewards_of(HOSTILE, [0.5], prompt=HOSTILE))
    found = elements(page)
    assert {tag for tag, _ in found} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "sub", "div", "span", "b", "section",
        "article",
    }  # fmt: skip
    assert {name for _, attributes in found for name in attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "role", "aria-label", "dir", "tabindex",
    }  # fmt: skip
    text = re.sub("<[^>]*>", "", page.split("<article")[1].split('<div class="tokens')[1].split(">", 1)[1])
    assert html.unescape(text).strip() == HOSTILE + "</s>"
    policy = next(a["content"] for tag, a in found if tag == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in str(policy)
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize(
    "character", ["\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\x00", "\x1b", "\u00a0", "\ufe0f"]
)
def test_what_shows_nothing_is_shown(character: str) -> None:
    page = page_of(rewards_of(f"a{character}b", [0.5], prompt=character))
    assert character not in page
    assert page.count(f"U+{ord(character):04X}") >= 3
    assert is_hidden(character)


def test_white_space_is_kept() -> None:
    assert visible("a  b\t\nc") == 'a  b\t<b class="h e">\u21b5</b>\nc'
    assert in_words("a\n\tb\u200b") == "a\u21b5\u21e5bU+200B"


def test_half_a_surrogate_pair_can_be_written() -> None:
    page_of(rewards_of("a\ud800", [0.5])).encode()


def test_responses_of_one_prompt_lie_together() -> None:
    rows = [rewards_of("a", [1.0], row=n, prompt=f"p{n % 2}") for n in range(1, 6)]
    page = page_of(*rows, num_rows=9)
    sections = page.split('<section class="group">')[1:]
    assert [re.findall(r"row (\d)", section) for section in sections] == [["1", "3", "5"], ["2", "4"]]
    assert "5 of 9 scored responses; 4 more are not shown" in page
    assert "not shown" not in page_of(*rows)


def test_the_rest_of_a_cut_response_is_there_without_colour() -> None:
    whole = rewards_of("abc", [1.0])
    names = ("tokens", "offsets", "teacher_logp", "reference_logp", "rewards")
    values = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
    cut = TokenRewards(
        **{**values, **{name: values[name][:2] for name in names}, "num_tokens": 2, "ends_by_eos": False}
    )
    page = page_of(cut)
    assert '<span class="muted">c</span>' in page
    assert "cut, its end is not scored" in page


def test_a_part_of_a_character_shows_its_bytes() -> None:
    row = rewards_of("\U0001f600", [1.0])
    values = {name: getattr(row, name) for name in row.__dataclass_fields__}
    split = TokenRewards(**{**values, "tokens": ["<0xF0><0x9F>", "<0x98><0x80>"], "offsets": [(0, 0), (0, 1)]})
    page = page_of(split)
    assert '<b class="h e">&lt;0xF0&gt;&lt;0x9F&gt;</b>' in page
    assert ">\U0001f600</span>" in page


def test_the_limit_is_robust() -> None:
    assert robust_limit([0.1] * 99 + [50.0]) == pytest.approx(0.1)
    assert robust_limit([0.0] * 99 + [-3.0]) == 3.0
    assert robust_limit([0.0]) == robust_limit([]) == 1.0
    assert [step_of(value, 2.0) for value in (-9.0, -2.0, 0.0, 1.0, 2.0, 9.0)] == [
        -STEPS,
        -STEPS,
        0,
        STEPS // 2,
        STEPS,
        STEPS,
    ]


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_legible_on_every_shade(scheme: Scheme) -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21.0)
    shades = [scheme.shade(step) for step in range(-STEPS, STEPS + 1)]
    assert min(contrast(scheme.text, shade) for shade in shades) >= 4.5
    assert min(contrast(scheme.muted, paper) for paper in (scheme.paper, scheme.panel)) >= 4.5
    assert shades[STEPS] == scheme.panel
    # Further from zero stands out more from the paper.
    away = [contrast(shade, scheme.panel) for shade in shades]
    assert all(later > earlier for earlier, later in pairwise(away[STEPS:]))
    assert all(later < earlier for earlier, later in pairwise(away[: STEPS + 1]))
