"""The argument parser: jsonargparse's, with refusals in one line that name the key, what was found and what to do.

jsonargparse checks a class's settings with a parser of its own, inside the parser of the class that holds it, and
reports a mistake as the messages of all of them nested in each other. Here the innermost parser, which knows its keys,
words the refusal; those around it put their key in front.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from dpr_lightning.config_order import explain_order
from dpr_lightning.errors import UserError
from dpr_lightning.paths import is_file
from dpr_lightning.yaml_text import install, load_yaml

# Before any parser is made.
install()

_MARKED = re.compile("\x00(.*?)\x01(.*?)\x02")
"""A refusal on its way out through nested messages: key below the parser that refused, and what is wrong."""
_HERE = "\x03"
"""Stands before a suggested key until the parsers around have put theirs in front."""
_VERBATIM = "@\ue003"
"""Stands before a value that must arrive as it was written; YAML reads nothing that begins with "@"."""
_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN = re.compile(
    r"(?:Option|(?:Group|Subcommand) '(?P<parent>[\w.]+)' does not accept option) '(?P<key>[^']+)'"
    r"|unrecognized arguments: ?(?P<argument>\S*)"
)
_REQUIRED = re.compile(r"following arguments are required: (.+)")
_ARGUMENT = re.compile(r"^argument (?:-\S+/)?-*([\w.+-]+): (.+)")
_CLASS = re.compile(r"Problem with given class_path '([^']*)': (.+?)(?= - | Given value|$)")
_NO_CONFIG = re.compile(r"Unable to load config '([^']*)'")
_IMPORT = re.compile(r"Expected a dot import path string: (\S+)")
_SUBTYPES = re.compile(r"Subtypes: \[(.*?)\] Errors:")
_EXPECTED = re.compile(r"Expected a (<class '[\w.]+'>|[\w.]+\[[^\]]*\])")
_TYPE = re.compile(r"<class '[\w.]+'>|[\w.]+\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]")
_GOT = re.compile(r"Got value: (.*?)(?= Given value| Subclass types expect| - |$)")
_NESTED = re.compile(r"^NestedArg\(key='.*?', val=(.*)\)$")
_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
_MAX_SHOWN = 80


class Parser(LightningArgumentParser):
    """Refuses bad input by ``UserError`` instead of printing usage and leaving; keys must be written in full."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._given: list[str] = []
        # jsonargparse parses a file from inside its directory, where relative paths are of other files.
        self._started_in = Path.cwd()

    @override
    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        if args is not None:
            self._given, self._started_in = list(args), Path.cwd()
            args = self._keep_nested(self._given)
        try:
            return super().parse_args(args, *rest, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"Problems parsing config: {error}", error)

    @override
    def parse_object(self, cfg_obj: Any, *rest: Any, **kwargs: Any) -> Any:
        # Some keys inside classes come this way, as an object of one key.
        values = cfg_obj if isinstance(cfg_obj, dict) else vars(cfg_obj)
        for key, value in values.items():
            if isinstance(value, str):
                values[key] = value.removeprefix(_VERBATIM)
        return super().parse_object(cfg_obj, *rest, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for mark in (_VERBATIM, _VERBATIM.encode("unicode_escape").decode()):
            message = str(message).replace(mark, "")
        key, problem = self._explain(" ".join(message.split()))
        if getattr(self, "_inner_parser", False):
            raise UserError(f"\x00{key}\x01{problem}\x02") from ex
        problem = problem.replace(_HERE, "")
        if "there is no such key" in problem:
            problem = explain_order(key, self._config_files(), self._given) or problem
        raise UserError(f"{key}: {problem}" if key else problem) from ex

    def _explain(self, text: str) -> tuple[str, str]:
        """Return the key that a message is about, as far as this parser knows it, and what is wrong with it."""
        found = _KEY.search(text)
        key = found.group(1) if found else ""
        refusals = _MARKED.findall(text)
        if refusals:
            # Of the alternatives of a union the first is about the class that the user named.
            inner_key, problem = refusals[0]
            problem = problem.replace(_HERE, f"{_HERE}{key}." if key else _HERE)
            key = ".".join(part for part in (key, inner_key) if part)
            return key, problem + self._locate(key) if _HERE in problem else problem
        body = text[found.end() :].lstrip(": ") if found else text
        if unknown := _UNKNOWN.search(body):
            inner_key, problem = self._explain_unknown(unknown)
            prefix = f"{key}." if key else ""
            return prefix + inner_key, problem.replace(_HERE, _HERE + prefix) + self._locate(inner_key)
        if required := _REQUIRED.search(body):
            names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in required.group(1).split(", ")]
            also = f", and so is {' and '.join(names[1:])}" if names[1:] else ""
            return names[0], f"it is required{also}, and not given; set it, or add the file that does with -c"
        if argument := _ARGUMENT.search(body):
            reason = argument.group(2).replace("expected one argument", "found no value; give one")
            return argument.group(1), reason
        if value := _NO_CONFIG.search(body):
            return key, f"found '{value.group(1)}'; set the keys below it, or give a YAML file of them"
        if "parsing config" in body or "Unexpected config" in body:
            return key, self._explain_yaml(body)
        return key, _explain_value(body)

    def _explain_unknown(self, found: re.Match[str]) -> tuple[str, str]:
        """Return an unknown key below this parser, and advice that names the nearest known one."""
        parent, key, argument = found.group("parent"), found.group("key"), found.group("argument")
        if argument is not None:
            if not argument.startswith("--"):
                return "", f"found '{argument}', which belongs to no key; write --key value"
            key = argument.removeprefix("--").partition("=")[0]
        parser: Any = self
        for action in self._actions:
            if parent is not None and isinstance(action.choices, dict) and parent in action.choices:
                parser, parent = action.choices[parent], None
        key = f"{parent}.{key}" if parent else key
        keys = [action.dest for action in parser._actions if action.dest not in ("help", "print_shtab")]
        nearest = nearest_key(key, keys)
        if nearest is not None:
            return key, f"there is no such key; did you mean '{_HERE}{nearest}'?"
        if getattr(self, "_inner_parser", False):
            names = sorted({name.partition(".")[0] for name in keys})
            return key, f"there is no such key; here are {', '.join(names) or 'none'}"
        return key, "there is no such key; see --help for those that exist"

    def _explain_yaml(self, body: str) -> str:
        for path, file in self._config_files().items():
            try:
                config = load_yaml(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                return f"'{path}' is no valid YAML ({_shorten(' '.join(str(error).split()), limit=200)}); repair it"
            if not isinstance(config, dict):
                return f"'{path}' holds a {type(config).__name__}, not a mapping of keys to values; repair it"
        return f"{_shorten(body, limit=200)}; repair the file"

    def _locate(self, key: str) -> str:
        """Say in which file an unknown key stands, unless it was given on the command line."""
        leaf = key.rpartition(".")[2]
        if any(arg.startswith("--") and arg.partition("=")[0].endswith(leaf) for arg in self._given):
            return ""
        for path, file in reversed(self._config_files().items()):
            for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
                if re.search(rf"(?:^|[\s{{,-])['\"]?{re.escape(leaf)}['\"]?\+?\s*:", line):
                    return f" ({path} line {number})"
        return ""

    def _config_files(self) -> dict[str, Path]:
        """Return the files of ``-c``, by what was written, in their order."""
        names = [value for flag, value in pairwise(self._given) if flag in ("-c", "--config")]
        names += [arg.partition("=")[2] for arg in self._given if arg.startswith("--config=")]
        return {name: self._started_in / name for name in names if is_file(self._started_in / name)}

    def _keep_nested(self, args: list[str]) -> list[str]:
        """Mark values of keys inside classes that would not arrive as they were written.

        Each parser on the way loads such a value as YAML and hands the Python text of what it got to the next: null
        arrives as "None", and a template "{prompt}" as "{'prompt': None}". Marked, it is text until it is there.
        """
        kept: list[str] = []
        waiting = ""
        for arg in args:
            name, equals, value = arg.partition("=")
            if waiting and not name.startswith("--"):
                kept.append(_mark(arg, self._holds_class(waiting)))
                waiting = ""
                continue
            if waiting:
                break
            is_nested = name.startswith("--") and name not in self._option_string_actions and "." in name
            if is_nested and not equals:
                waiting = name
            elif is_nested or value.startswith(_VERBATIM):
                arg = f"{name}={_mark(value, is_nested and self._holds_class(name))}"
            kept.append(arg)
        if waiting:
            self.error(f"argument {waiting}: expected one argument")
        return kept

    def _holds_class(self, name: str) -> bool:
        """Return whether the nested key ``name`` lies inside a class of this parser, and not inside a mapping."""
        parts = name.split(".")
        for n in range(len(parts) - 1, 0, -1):
            action = self._option_string_actions.get(".".join(parts[:n]))
            if action is not None:
                return "dict" not in str(getattr(action, "_typehint", "dict")).lower()
        return False


def _mark(text: str, is_kept: bool) -> str:
    """Return ``text`` marked where it ``is_kept`` and YAML would make null, a list or a mapping of it; else bare."""
    text = text.removeprefix(_VERBATIM)
    if not is_kept:
        return text
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    return _VERBATIM + text if value is None or isinstance(value, dict | list) else text


def nearest_key(key: str, keys: Sequence[str]) -> str | None:
    """Return the one of ``keys`` that ``key`` was probably meant to be, or None.

    A mistyped first part of a dotted key is replaced; a key that stands in the wrong place is found by its last part.
    """
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    head, _, tail = key.partition(".")
    heads = sorted({known.partition(".")[0] for known in keys})
    close = difflib.get_close_matches(head, heads, n=1, cutoff=0.6)
    if close and close[0] != head:
        return f"{close[0]}.{tail}" if tail else close[0]
    by_leaf = {known.rpartition(".")[2]: known for known in keys}
    close = difflib.get_close_matches(key.rpartition(".")[2], list(by_leaf), n=1, cutoff=0.75)
    return by_leaf[close[0]] if close else None


def _explain_value(body: str) -> str:
    """Say what was found in place of what, of a message about a value."""
    if found := _CLASS.search(body):
        return _explain_class(*found.groups())
    if found := _IMPORT.search(body):
        return f"found '{found.group(1)}'; give the whole path of a class, its module included"
    value = _found_value(body)
    if value is None:
        return _shorten(body, limit=300)
    subtypes = _SUBTYPES.search(body)
    types = _TYPE.findall(subtypes.group(1)) if subtypes else _EXPECTED.findall(body)
    names = [_type_name(text) for text in dict.fromkeys(types)]
    if any(name.startswith("the class_path") for name in names):
        names = [name for name in names if name != "null"]
    shown = _shorten(value)
    return f"found '{shown}'; give {' or '.join(names) or 'another value'}{_nearest_choice(body, value)}"


def _found_value(body: str) -> str | None:
    given = body.rpartition(" Given value: ")
    got = _GOT.search(body)
    if not given[1] and got is None:
        return None
    text = given[2] if given[1] or got is None else got.group(1)
    nested = _NESTED.match(text)
    return (nested.group(1) if nested else text).strip("'\"")


def _explain_class(path: str, reason: str) -> str:
    module_name, _, name = path.rpartition(".")
    try:
        names = [other for other in dir(importlib.import_module(module_name)) if not other.startswith("_")]
    except (ImportError, ValueError):
        return f"found class_path '{path}', which cannot be imported ({_shorten(reason)}); give an existing one"
    if name in names:
        return f"found class_path '{path}' ({_shorten(reason)}); give another class"
    close = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean '{module_name}.{close[0]}'?" if close else "give an existing one"
    return f"found class_path '{path}', but there is no '{name}' in that module; {advice}"


def _type_name(text: str) -> str:
    inner = text[text.find("[") + 1 : -1]
    if "Literal[" in text:
        return f"one of {inner}"
    name = text.removeprefix("<class '").removesuffix("'>")
    if name in _TYPE_NAMES or name.partition("[")[0] in ("list", "tuple", "dict"):
        return _TYPE_NAMES.get(name) or _TYPE_NAMES[name.partition("[")[0]]
    if text.startswith("type["):
        name = inner
    return f"the class_path of a {name.rpartition('.')[2].rstrip(']')}" if "." in name else f"a {name}"


def _nearest_choice(body: str, value: str) -> str:
    choices = re.findall(r"'([\w.-]+)'", body.partition("Literal[")[2].partition("]")[0])
    close = difflib.get_close_matches(value, choices, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _shorten(text: str, *, limit: int = _MAX_SHOWN) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
