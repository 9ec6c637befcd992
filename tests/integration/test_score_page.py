"""The page of token rewards as a browser shows it: colours, contrast, layout, and hostile text."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dpr_lightning.analysis.page import write_page
from dpr_lightning.analysis.reward_scale import DARK, LIGHT, STEPS, contrast
from dpr_lightning.analysis.token_rewards import TokenRewards

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]

HOSTILE = [
    "<script>document.title='hacked'</script>", "<img src=x onerror=\"document.title='hacked'\">", '" onfocus=x y="',
    "</style></span><h3>injected</h3>", "\u202ereversed", "\u200b", "\n  ", "\U0001f600",
]  # fmt: skip
SCHEMES = {"light": (1, LIGHT), "dark": (0, DARK)}

# Test only, in a copy of the page: writes what the browser computed into the document.
_PROBE = """<script>
const colours = e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor];
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const all = s => [...document.querySelectorAll(s)];
const pages = all('.prompt, .facts, h1, p').map(e => {
  let owner = e; while (owner.parentElement && colours(owner)[1] === 'rgba(0, 0, 0, 0)') owner = owner.parentElement;
  return [colours(e)[0], colours(owner)[1]]; });
const first = document.querySelector('.t'); first.focus();
const found = {
  title: document.title, tokens: all('.t').map(colours), texts: all('.t').map(e => e.textContent),
  responses: all('.response').map(box), pages, legend: all('.legend span').map(colours),
  foreign: all('h3, img, iframe, a, [onfocus], [onerror]').length, scripts: document.scripts.length,
  tip: getComputedStyle(first, '::after').content, tip_colours: [getComputedStyle(first, '::after').color,
  getComputedStyle(first, '::after').backgroundColor], width: document.documentElement.scrollWidth,
  space: getComputedStyle(document.querySelector('.tokens')).whiteSpace };
const out = document.createElement('pre'); out.id = 'found'; out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


def response(row: int, prompt: str, tokens: list[str], rewards: list[float]) -> TokenRewards:
    ends = [len("".join(tokens[: index + 1])) for index in range(len(tokens))]
    size = len(tokens)
    return TokenRewards(
        row=row,
        prompt=prompt,
        response="".join(tokens),
        tokens=tokens,
        offsets=list(zip([0, *ends], ends, strict=False)),
        teacher_logp=[-1.0] * size,
        reference_logp=[-1.0 - reward for reward in rewards],
        rewards=rewards,
        sum=sum(rewards),
        mean=sum(rewards) / size,
        num_tokens=size,
        ends_by_eos=True,
    )


ROWS = [
    response(1, "one prompt", ["up", " down", " still"], [1.0, -1.0, 0.0]),
    response(2, "one prompt", [" half", " less"], [0.5, -0.25]),
    response(3, "".join(HOSTILE), HOSTILE, [0.1 * n for n in range(len(HOSTILE))]),
]


def dump(path: Path, *, scheme: int, width: int = 1400) -> str:
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--window-size={width},1000",
            f"--user-data-dir={path.parent / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )  # fmt: skip
    return done.stdout


def probe(directory: Path, *, scheme: int, width: int = 1400) -> dict[str, Any]:
    page = "".join(write_page(ROWS, title="Token rewards", num_rows=3))
    opened, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    path = directory / "probed.html"
    path.write_text(opened.replace("</body>", _PROBE + "</body>"), encoding="utf-8")
    found: dict[str, Any] = {}
    for _ in range(5):
        text = re.search(r'<pre id="found">(.*?)</pre>', dump(path, scheme=scheme, width=width), flags=re.DOTALL)
        assert text is not None
        found = json.loads(html.unescape(text.group(1)))
        # On a busy machine the window may get its focus, which the tip goes by, later than the probe looks.
        if found["tip"] != "none":
            break
    return found


def rgb(text: str) -> tuple[int, int, int]:
    red, green, blue = (int(number) for number in re.findall(r"\d+", text)[:3])
    return red, green, blue


@pytest.mark.parametrize("name", list(SCHEMES))
def test_colours_contrast_and_layout(name: str, tmp_path: Path) -> None:
    setting, scheme = SCHEMES[name]
    found = probe(tmp_path, scheme=setting)
    assert len(found["tokens"]) == sum(row.num_tokens for row in ROWS)
    backgrounds = [rgb(background) for _, background in found["tokens"]]
    # The limit is the 98% quantile, just below 1.
    assert backgrounds[:3] == [scheme.shade(STEPS), scheme.shade(-STEPS), scheme.shade(0)]
    everything = found["tokens"] + found["legend"] + found["pages"] + [found["tip_colours"]]
    assert min(contrast(rgb(text), rgb(background)) for text, background in everything) >= 4.5
    # The first two answer one prompt; the third begins below them.
    first, second, third = found["responses"]
    assert first[1] == pytest.approx(second[1])
    assert first[2] < second[0]
    assert third[1] > max(first[3], second[3])
    assert found["width"] <= 1400
    assert "token 1 of 3: \u201cup\u201d, reward +1.0000" in found["tip"]
    assert found["space"].startswith(("pre-wrap", "break-spaces", "preserve"))
    # Hostile text is text, although this copy allows scripts: the only one is the probe.
    assert (found["title"], found["foreign"], found["scripts"]) == ("Token rewards", 0, 1)
    assert found["texts"][5:9] == HOSTILE[:4]
    assert found["texts"][9:11] == ["U+202Ereversed", "U+200B"]
    assert found["texts"][11] == "\u21b5\n  "


def test_a_narrow_window_has_one_column(tmp_path: Path) -> None:
    found = probe(tmp_path, scheme=1, width=600)
    first, second, _ = found["responses"]
    assert first[0] == pytest.approx(second[0])
    assert second[1] > first[3]


def test_the_page_itself_runs_no_script(tmp_path: Path) -> None:
    page = "".join(write_page(ROWS, title="Token rewards", num_rows=3))
    # Even a script that got in would not run, and the style is let in by its checksum.
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", "<script>document.title = 'hacked'</script></body>"), encoding="utf-8")
    dom = dump(path, scheme=1)
    assert "<title>Token rewards</title>" in dom
    assert "default-src 'none'; style-src 'sha256-" in dom
    assert dom.count('class="response"') == len(ROWS)
