"""Files of -c in an order that cannot work: the refusal says which one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_yaml_text import CONFIGS, recorded

from dpr_lightning.errors import UserError


def files(*names: str) -> list[str]:
    return [arg for name in names for arg in ("-c", str(CONFIGS / f"{name}.yaml"))]


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (("base", "backbone/tiny", "recipe/sft", "hardware/cpu"), "recipe/sft", "backbone/tiny"),
        (("backbone/tiny", "base", "recipe/sft"), "recipe/sft", "backbone/tiny"),
        (("base", "recipe/wo_baseline", "recipe/dpr"), "recipe/dpr", "recipe/wo_baseline"),
    ],
)
def test_the_class_comes_first(names: tuple[str, ...], first: str, second: str) -> None:
    with pytest.raises(UserError, match="it belongs to the class that") as error:
        recorded(*files(*names))
    message = str(error.value)
    assert "configs merge left to right: base, recipe, backbone, hardware" in message
    assert message.index(f"{first}.yaml") < message.index(f"comes after '{CONFIGS / second}.yaml'")


def test_relative_paths_and_classes_that_no_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("data:\n  init_args:\n    micro_batch_size: 2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"put one before 'mine.yaml', such as -c configs/recipe/sft.yaml"):
        recorded("-c", "mine.yaml")
    with pytest.raises(UserError, match="there is no such key"):
        recorded(*files("base", "recipe/sft", "backbone/tiny"), "--data.micro_batch_siz", "2")


@pytest.mark.parametrize("names", [("hardware/cpu", "base", "recipe/sft", "backbone/tiny"), ("recipe/sft", "base")])
def test_other_orders_that_work(names: tuple[str, ...]) -> None:
    more = (
        [] if "backbone/tiny" in names else ["--model.backbone.name_or_path", "x", "--data.demonstrations.source", "y"]
    )
    assert recorded(*files(*names), *more)["model"]["class_path"].endswith("SFTModule")
