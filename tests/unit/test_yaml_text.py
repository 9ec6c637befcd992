"""What ``fit`` records, ``fit -c`` takes; and no YAML takes the program down."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dpr_lightning.application
from dpr_lightning.application import CommandLine, command_line
from dpr_lightning.yaml_text import dump_yaml, load_argument, load_yaml

CONFIGS = Path(dpr_lightning.application.__file__).parent / "configs"
NUMBERS = [
    "1e5",
    "1e-5",
    "1E5",
    "1.e5",
    "1_000",
    "0x10",
    "0o7",
    "0b1",
    "1:30",
    "3",
    "007",
    "1.0",
    ".inf",
    "+1",
    "1e400",
]
DATES_AND_BOOLS = ["2024-01-01", "2001-12-14t21:59:43.10-05:00", "true", "False", "yes", "no", "on", "Off", "y"]
MARKS = [
    "@x",
    "!x",
    "*a",
    "&a",
    "#x",
    "|",
    "> x",
    "a: b",
    "a #b",
    "'q'",
    "-",
    "- a",
    "?",
    "%",
    "=",
    "<<",
    "x:",
    "{p}",
    "{}",
]
CHARACTERS = ["", " lead", "trail ", "two\nlines", "\ttab", "\u00e9\U0001f600", "\x07", "\x85", "\u2028", "\ufeff"]
ODD = [*NUMBERS, *DATES_AND_BOOLS, *MARKS, *CHARACTERS]

NOT_TEXT = frozenset(
    (
        "benchmark clip_high clip_low columns demonstrations deterministic dtype enable_checkpointing "
        "enable_progress_bar evaluation_prompts every_n_epochs foreach importance_cap kl_estimator "
        "limit_predict_batches limit_test_batches limit_train_batches limit_val_batches logger lora max_time "
        "metrics min_epochs min_steps model_class num_validation_prompts old_logp plugins precision preset "
        "quantization sampler save_last save_on_train_epoch_end score_micro_batch_size stop_on teacher_kl_budget "
        "template train_time_interval val_check_interval verifier weights_only "
    ).split()
)
"""Keys that hold no text, or text of a fixed choice: numbers, switches, objects. Every other key is tried."""


class ParseOnly(CommandLine):
    """Parses as the program does and builds nothing."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def recorded(*args: str) -> dict[str, Any]:
    """Return what ``fit`` would write to config.yaml, as a document."""
    cli = command_line(["fit", *args], kind=ParseOnly)
    text = cli._parser("fit").dump(cli.config["fit"], skip_none=False)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where text stands or could stand."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))
    elif (node is None or isinstance(node, str)) and path[-1] != "class_path":
        yield path


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def put(document: Any, path: tuple[Any, ...], value: str) -> None:
    at(document, path[:-1])[path[-1]] = value


@pytest.mark.parametrize("recipe", ["sft", "dpr"])
def test_every_key_that_takes_text_comes_back_as_the_text_it_was(recipe: str, tmp_path: Path) -> None:
    files = ["base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu"]
    more = [] if recipe == "sft" else ["--model.teacher", "t"]
    plain = recorded(*[arg for file in files for arg in ("-c", str(CONFIGS / f"{file}.yaml"))], *more)
    path = tmp_path / "config.yaml"

    def through(document: dict[str, Any]) -> dict[str, Any]:
        path.write_text(dump_yaml(document), encoding="utf-8")
        return recorded("-c", str(path))

    takes_text = [place for place in places(plain) if place[-1] not in NOT_TEXT]
    names = {str(place[-1]) for place in takes_text}
    assert {"run_dir", "ckpt_path", "revision", "name_or_path", "attn_implementation", "monitor", "dirpath"} <= names
    # Each round gives every key another text; together each text is somewhere.
    for start in range(0, len(ODD), len(takes_text)):
        document = copy.deepcopy(plain)
        expected = {place: ODD[(start + n) % len(ODD)] for n, place in enumerate(takes_text)}
        # A list, where it looks like one: several references.
        expected = {place: "1e5" if place[-1] == "reference" else text for place, text in expected.items()}
        for place, text in expected.items():
            put(document, place, text)
        found = through(document)
        assert {place: at(found, place) for place in takes_text} == expected


@pytest.mark.parametrize("text", [*ODD, "null", "~", "Null", "None"])
def test_text_is_text_to_every_loader(text: str) -> None:
    document = {"a": text, "b": [text], text or "c": {"d": text}}
    written = dump_yaml(document)
    for load in (load_yaml, load_argument, yaml.safe_load):
        assert load(written) == document


def test_other_values_stay_as_they_are() -> None:
    document = {"a": 1, "b": 1e-5, "c": None, "d": True, "e": [0.5, "plain text"], "f": {}, "g": float("inf")}
    assert load_argument(dump_yaml(document)) == document
    assert "- plain text\n" in dump_yaml(document)


def chain(first: str, link: str) -> str:
    return f"a0: &a0 {first}\n" + "".join(f"a{n}: &a{n} {link.replace('@', f'*a{n - 1}')}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (chain("[x]", f"[{', '.join('@' * 9)}]"), "its aliases expand to more than"),
        (chain("{k: 1}", f"{{<<: [{', '.join('@' * 9)}]}}"), "its aliases expand to more than"),
        ("a: &a [*a]", "an alias refers to what it stands in"),
        ("[" * 100_000, "nested more than"),
        ("{a: " * 100_000, "nested more than"),
        ("- " * 100_000, "nested more than"),
        ("? " * 50_000, "nested more than"),
        ("\n".join(" " * depth + "a:" for depth in range(2000)), "nested more than"),
        (f"a: {'9' * 5000}", "limit"),
        ("a: !!timestamp 2024-13-45", "timestamp|month|constructor"),
        ("a: \x00", "control characters"),
    ],
)
def test_hostile_documents_are_refused_at_once(text: str, problem: str) -> None:
    for load in (load_yaml, load_argument):
        start = time.perf_counter()
        with pytest.raises(yaml.YAMLError, match=problem):
            load(text)
        assert time.perf_counter() - start < 2


def test_anchors_of_ordinary_use_work() -> None:
    text = "a: &a {k: [1, 2]}\nb: *a\nc: {<<: *a, d: 3}\n"
    assert load_yaml(text) == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}, "c": {"k": [1, 2], "d": 3}}
