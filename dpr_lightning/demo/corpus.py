"""The noisy generic text on which the embedded backbone is pretrained.

It stands for the web: the same alphabet and problems as the tasks, several house styles, a large share of wrong
answers, documents that break off, and text that answers nothing. Only training problems occur in it. A clean part
may come first, from which the backbone learns to calculate; the noise after it teaches the distribution of the web.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

from dpr_lightning.demo.families import LETTERS
from dpr_lightning.demo.tasks import draw_problem, work_out
from dpr_lightning.demo.wording import ANSWER_MARK, OTHER_MARKS

WRONG_SHARE = 0.4
"""Share of worked documents with a slip that leads to a false answer."""

OTHER_SHARE = 0.1
"""Share of documents that are no question and answer."""

DIRECT_SHARE = 0.15
"""Share of answers without steps."""

BROKEN_SHARE = 0.05
"""Share of documents that break off at some word of the answer."""


def corpus_documents(*, seed: int, num_clean: int = 0) -> Iterator[str]:
    """Yield documents without end, the same ones for the same seed.

    Args:
        seed: Decides every document.
        num_clean: How many documents come first in which nothing is wrong or broken off.
    """
    rng = random.Random(f"corpus-{seed}")
    for index in count():
        is_clean = index < num_clean
        yield _running_text(rng) if rng.random() < OTHER_SHARE else _answered_question(rng, is_clean=is_clean)


def _answered_question(rng: random.Random, *, is_clean: bool) -> str:
    family, fields, prompt = draw_problem(rng, split="train")
    steps, answer = work_out(family, fields, rng, is_wrong=rng.random() < WRONG_SHARE and not is_clean)
    mark = ANSWER_MARK if rng.random() < 0.6 else rng.choice(OTHER_MARKS)
    last_line = f"{mark} {answer}"
    response = last_line if rng.random() < DIRECT_SHARE else f"{steps}\n{last_line}"
    if rng.random() < BROKEN_SHARE and not is_clean:
        words = response.split(" ")
        response = " ".join(words[: rng.randint(1, len(words))])
    return f"{prompt}\n{response}"


def _running_text(rng: random.Random) -> str:
    start, step = rng.randint(0, 60), rng.randint(1, 5)
    kind = rng.randrange(4)
    if kind == 0:
        return "count: " + " ".join(str(start + step * index) for index in range(rng.randint(4, 9)))
    if kind == 1:
        return "letters: " + " ".join(rng.choice(LETTERS) for _ in range(rng.randint(4, 9)))
    if kind == 2:
        return f"{start} + {step} = {start + step}, {start + step} - {step} = {start}"
    return f"{step} * {start % 10} = {step * (start % 10)}, {start} is more than {max(0, start - step)}"
