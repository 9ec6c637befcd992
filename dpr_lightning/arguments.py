"""The argument parser: jsonargparse's, with refusals in one line that names the nearest key."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from dpr_lightning.errors import UserError

_UNKNOWN_KEY = re.compile(r"[Kk]ey ['\"]?([\w.]+)['\"]? is not expected|[Uu]nrecognized arguments?: --([\w.+-]+)")
_CLASS_PATH = re.compile(r"\b((?:dpr_lightning|lightning|torch|transformers)(?:\.\w+)+)\b")


class Parser(LightningArgumentParser):
    """Refuses bad input by ``UserError`` instead of printing usage and leaving."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
        found = _UNKNOWN_KEY.search(text)
        if found is not None:
            unknown = (found.group(1) or found.group(2)).split("=")[0]
            nearest = _nearest(unknown, _known_keys(self, text))
            advice = f"did you mean '{nearest}'?" if nearest else "see --help for the keys that exist"
            raise UserError(f"unknown key '{unknown}': {advice} ({text})") from ex
        raise UserError(text) from ex


def _known_keys(parser: ArgumentParser, message: str) -> list[str]:
    """Return the parser's keys and the parameters of every class that the message names."""
    keys = [action.dest for action in parser._actions]
    for path in _CLASS_PATH.findall(message):
        keys += _parameters(path)
    return keys


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        cls: Any = getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError, ValueError):
        return []
    if not inspect.isclass(cls):
        return []
    return [key for base in cls.__mro__ for key in inspect.signature(base.__init__).parameters if key != "self"]


def _nearest(unknown: str, keys: list[str]) -> str | None:
    leaf = unknown.rpartition(".")[2]
    by_leaf = {key.rpartition(".")[2]: key for key in keys}
    close = difflib.get_close_matches(unknown, keys, n=1) or difflib.get_close_matches(leaf, list(by_leaf), n=1)
    return by_leaf.get(close[0], close[0]) if close else None
