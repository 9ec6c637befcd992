from __future__ import annotations

import numpy as np
import pytest

from dpr_lightning.analysis.reward_image import draw_rewards, stack
from dpr_lightning.analysis.reward_scale import LIGHT, STEPS
from dpr_lightning.errors import UserError


def count(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of exactly this colour, below the legend."""
    return int((image[60:] == np.array(colour)).all(axis=-1).sum())


def test_boxes_have_the_colours_of_the_rewards() -> None:
    image = draw_rewards(["up", "down", "still"], [2.0, -2.0, 0.0], limit=1.0, title="row 1")
    assert (image.shape, image.dtype) == ((96, 900, 3), np.uint8)
    # A box is some hundred pixels, less those of its text.
    assert count(image, LIGHT.shade(STEPS)) > 150
    assert count(image, LIGHT.shade(-STEPS)) > 150
    only_up = draw_rewards(["up"], [2.0], limit=1.0)
    assert count(only_up, LIGHT.shade(-STEPS)) == 0


@pytest.mark.parametrize("num_tokens", [0, 1, 5000])
def test_the_size_is_bounded(num_tokens: int) -> None:
    image = draw_rewards(["token"] * num_tokens, [0.5] * num_tokens, limit=1.0, max_height=300, width=500)
    assert image.shape[1] == 500
    assert 96 <= image.shape[0] <= 300


def test_any_text_is_drawn() -> None:
    tokens = ["$x^", "\\frac", "\U0001f600", "\n", "\u202e", "\x00", "\ud800", "a" * 1000, "", "\u6570"]
    with np.errstate(all="raise"):
        image = draw_rewards(tokens, [0.1] * len(tokens), limit=1.0, title="$" * 999)
    assert image.shape[1] == 900


@pytest.mark.parametrize("settings", [{"width": 299}, {"max_height": 95}])
def test_a_picture_too_small_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="holds no token; give at least 300 x 96"):
        draw_rewards(["a"], [0.0], limit=1.0, **settings)


def test_pictures_are_stacked() -> None:
    one, two = (draw_rewards(["a"] * n, [0.0] * n, limit=1.0) for n in (1, 150))
    both = stack([one, two])
    assert both.shape == (len(one) + len(two), 900, 3)
