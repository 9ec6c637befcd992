"""YAML as every command reads and records it: text stays text, and no file can take the program down."""

from __future__ import annotations

from typing import Any

import jsonargparse
import yaml
from typing_extensions import override

_MAX_NODES = 100_000
"""Largest expanded size of a document: a few hundred bytes of aliases to aliases can stand for billions of nodes."""
_MAX_DEPTH = 100
_NULLS = ("", "~", "null", "Null", "NULL")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses documents of unreasonable size before anything is built from them."""

    @override
    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {}, 0)
        return self.construct_document(node)


def load_yaml(text: str) -> Any:
    """Return what ``yaml.safe_load`` returns.

    Raises:
        yaml.YAMLError: It is no YAML, it refers to itself, or it is nested too deeply or too large once its aliases are
            expanded.
    """
    return _load(text, _Loader)


def dump_yaml(data: Any) -> str:
    """Return block-style YAML from which every loader of this program reads the same values, text as text."""
    return str(yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


def _load(text: str, loader: type) -> Any:
    _check_depth(text, loader)
    try:
        return yaml.load(text, Loader=loader)
    except (ValueError, OverflowError) as error:
        # Of a constructor: month 13, or an integer of 5000 digits.
        raise yaml.YAMLError(str(error)) from None


def _check_depth(text: str, loader: Any) -> None:
    """Refuse what libyaml would overflow the stack on: its events come without recursion, its nodes do not."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep")


def _expanded_size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return the number of nodes with every alias counted as what it stands for."""
    if depth > 2 * _MAX_DEPTH:
        # By aliases in aliases.
        raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep")
    size = known.get(id(node))
    if size == 0:
        raise yaml.YAMLError("an alias refers to what it stands in")
    if size is None:
        known[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        size = 1 + sum(_expanded_size(child, known, depth + 1) for child in children)
        known[id(node)] = size
    if size > _MAX_NODES:
        raise yaml.YAMLError(f"its aliases expand to more than {_MAX_NODES} values")
    return size


_arguments_loader: Any = jsonargparse.get_loader("yaml")


def _argument_classes() -> type:
    """Return jsonargparse's own loader class, with the limits of ours."""
    from jsonargparse._loaders_dumpers import get_yaml_default_loader

    return type("_ArgumentLoader", (_Loader, get_yaml_default_loader()), {})


_ArgumentLoader: Any = _argument_classes()


def load_argument(stream: str) -> Any:
    """Read a configuration or one value as jsonargparse does, within the limits of :func:`load_yaml`.

    ``#x`` and ``&a`` are text: to YAML they are a comment and an anchor, and the value null.
    """
    value = _load(stream, _ArgumentLoader)
    if value is None and stream.strip() not in _NULLS and "\n" not in stream:
        return stream
    if isinstance(value, dict) and value and all(inner is None for inner in value.values()):
        # Its own rule for "name:" and "{a, b}", which are text where they are a value.
        return _arguments_loader(stream)
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that one of the loaders would take for something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None
    if (not text.isprintable() and "\n" not in text) or any(mark in text for mark in "\x85\u2028\u2029\ufeff\r\t"):
        style = '"'
    elif _is_value(text):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_value(text: str) -> bool:
    """Return whether ``text``, written bare, is a number, a date, a boolean or null to one of the loaders."""
    for loader in (_ArgumentLoader, yaml.SafeLoader):
        resolvers = loader.yaml_implicit_resolvers
        if any(regexp.match(text) for _, regexp in [*resolvers.get(text[:1], ()), *resolvers.get(None, ())]):
            return True
    return text.strip().lower() in ("true", "false", "null", "none", "~", "y", "n")


_Dumper.add_representer(str, _represent_text)


def install() -> None:
    """Let jsonargparse read and record configurations by this module; for the whole process."""
    jsonargparse.set_loader("yaml", load_argument, (yaml.YAMLError,))
    jsonargparse.set_dumper("yaml", dump_yaml)
