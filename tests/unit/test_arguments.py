from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from dpr_lightning.arguments import Parser, nearest_key
from dpr_lightning.errors import UserError


class Base:
    pass


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Settings inside settings."""

    limit: int | None = 5
    names: dict[str, str] | None = None
    mode: Literal["first", "second"] = "first"


class Widget(Base):
    """Something to configure.

    Args:
        text: Any text.
        share: A number.
        inner: Settings that may be absent.
        outer: Settings that may not.
        choices: Numbers.
        part: Another object.
    """

    def __init__(
        self,
        text: str = "",
        share: float = 0.0,
        inner: Inner | None = None,
        outer: Inner = Inner(),
        choices: list[float] | None = None,
        part: Base | None = None,
    ) -> None:
        self.received = {"text": text, "share": share, "inner": inner, "outer": outer, "choices": choices}
        self.part = part


class Needy(Base):
    def __init__(self, name: str) -> None:
        self.name = name


@dataclass
class Given:
    parser: Parser = field(default_factory=Parser)

    def __post_init__(self) -> None:
        self.parser.add_argument("-c", "--config", action="config")
        self.parser.add_argument("--count", type=int, default=1)
        self.parser.add_subclass_arguments(Base, "thing", default={"class_path": f"{__name__}.Widget"})

    def thing(self, *args: str) -> Any:
        return self.parser.instantiate(self.parser.parse_args([*args])).thing

    def refusal(self, *args: str) -> str:
        with pytest.raises(UserError) as error:
            self.parser.parse_args([*args])
        message = str(error.value)
        assert message.isprintable(), "one line, no marks of ours"
        return message


@pytest.fixture
def given() -> Given:
    return Given()


WIDGET = f"--thing={__name__}.Widget"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        # What YAML would turn into something else on the way through the parsers of the classes.
        (["--thing.text", "{prompt}\n"], {"text": "{prompt}\n"}),
        (["--thing.text={prompt}"], {"text": "{prompt}"}),
        (["--thing.text", "null"], {"text": "null"}),
        (["--thing.outer.limit", "null"], {"outer": Inner(limit=None)}),
        (["--thing.outer.limit=null"], {"outer": Inner(limit=None)}),
        (["--thing.inner.limit=null"], {"inner": Inner(limit=None)}),
        (["--thing.inner.limit", "7"], {"inner": Inner(limit=7)}),
        (["--thing.inner.names", "{prompt: question}"], {"inner": Inner(names={"prompt": "question"})}),
        (["--thing.outer.names", "{prompt: question}"], {"outer": Inner(names={"prompt": "question"})}),
        (["--thing.outer.names.prompt", "question"], {"outer": Inner(names={"prompt": "question"})}),
        (["--thing.choices", "[0.3, 0.6]"], {"choices": [0.3, 0.6]}),
        (["--thing.choices=null"], {"choices": None}),
        (["--thing.share", "-1"], {"share": -1.0}),
        (["--thing.init_args.share=1e-5"], {"share": 1e-5}),
    ],
)
def test_values_arrive_as_written(given: Given, args: list[str], expected: dict[str, Any]) -> None:
    received = given.thing(WIDGET, *args).received
    assert {key: received[key] for key in expected} == expected


def test_null_reaches_an_object_inside_an_object(given: Given) -> None:
    thing = given.thing(WIDGET, f"--thing.part={__name__}.Widget", "--thing.part.inner.limit", "null")
    assert thing.part.received["inner"] == Inner(limit=None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cout", "3"], "cout: there is no such key; did you mean 'count'?"),
        (["--coun", "3"], "coun: there is no such key; did you mean 'count'?"),
        (["--count", "abc"], "count: found 'abc'; give a whole number"),
        (["--count"], "count: found no value; give one"),
        (["stray"], "found 'stray', which belongs to no key; write --key value"),
        (["--thing.share", "abc"], "thing.share: found 'abc'; give a number"),
        (["--thing.share"], "thing.share: found no value; give one"),
        (["--thing.shar", "1"], "thing.shar: there is no such key; did you mean 'thing.share'?"),
        (["--thing.init_args.shar", "1"], "thing.shar: there is no such key; did you mean 'thing.share'?"),
        (["--thig.share", "1"], "thig.share: there is no such key; did you mean 'thing.share'?"),
        (["--thing.inner.limt", "1"], "thing.inner.limt: there is no such key; did you mean 'thing.inner.limit'?"),
        (["--thing.outer.limt", "1"], "thing.outer.limt: there is no such key; did you mean 'thing.outer.limit'?"),
        (["--thing.inner.limit", "x"], "thing.inner.limit: found 'x'; give a whole number or null"),
        (
            ["--thing.outer.mode", "secnd"],
            "thing.outer.mode: found 'secnd'; give one of 'first', 'second'; did you mean 'second'?",
        ),
        (["--thing.choices", "x"], "thing.choices: found 'x'; give a list or null"),
        (
            ["--thing.zzz", "1"],
            "thing.zzz: there is no such key; here are choices, inner, outer, part, share, text",
        ),
        (
            [f"--thing={__name__}.Widgt"],
            f"thing: found class_path '{__name__}.Widgt', but there is no 'Widgt' in that module; "
            f"did you mean '{__name__}.Widget'?",
        ),
        (
            ["--thing=nowhere.at.All"],
            "thing: found class_path 'nowhere.at.All', which cannot be imported (No module named 'nowhere'); give an "
            "existing one",
        ),
        (
            [f"--thing={__name__}.Needy"],
            "thing.name: it is required, and not given; set it, or add the file that does with -c",
        ),
        (
            [f"--thing.part={__name__}.Given"],
            f"thing.part: found '{__name__}.Given'; give the class_path of a Base",
        ),
    ],
)
def test_refusals_name_key_finding_and_remedy(given: Given, args: list[str], message: str) -> None:
    prefix = [] if args[0].startswith("--thing=") else [WIDGET]
    assert given.refusal(*prefix, *args) == message


def test_unknown_key_in_a_file_is_located(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("count: 2\nthing:\n  init_args:\n    inner:\n      limt: 3\n")
    expected = f"thing.inner.limt: there is no such key; did you mean 'thing.inner.limit'? ({path} line 5)"
    assert given.refusal(WIDGET, "-c", str(path)) == expected


def test_file_that_is_no_yaml_is_named(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("count: [1, 2\n")
    assert given.refusal("-c", str(path)).startswith(f"'{path}' is no valid YAML (")


def test_missing_file_is_named(given: Given, tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in given.refusal("-c", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("trainr.max_epochs", "trainer.max_epochs"),
        ("max_epochs", "trainer.max_epochs"),
        ("modl.optimizer.lr", "model.optimizer.lr"),
        ("rundir", "run_dir"),
        ("nothing_like_it", None),
    ],
)
def test_nearest_key(key: str, nearest: str | None) -> None:
    assert nearest_key(key, ["trainer.max_epochs", "trainer.devices", "model", "run_dir"]) == nearest
