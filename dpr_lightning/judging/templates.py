"""Judge templates of the official presets, from the installed upstream package or the user's files; none are ours."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpr_lightning.errors import UserError
from dpr_lightning.yaml_text import load_yaml

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


def alpaca_eval_template(path: Path | None, packaged: str) -> list[dict[str, str]]:
    """Return the messages of an AlpacaEval template.

    Args:
        path: The user's file in ChatML; None takes the one of the ``alpaca-eval`` package.
        packaged: Its name below the package's ``evaluators_configs``.

    Raises:
        UserError: There is none, or it lacks a mark.
    """
    if path is None:
        # The package is found and not imported: its code wants pkg_resources, which setuptools no longer has.
        spec = importlib.util.find_spec("alpaca_eval")
        if spec is None or spec.origin is None:
            raise UserError(
                "--templates: AlpacaEval's templates come with its package; pip install 'dpr-lightning[judge]', or "
                f"give the file {packaged} of tatsu-lab/alpaca_eval"
            )
        path = Path(spec.origin).parent / "evaluators_configs" / packaged
    text = _read(path)
    messages = [{"role": role, "content": content.strip()} for role, content in _CHATML.findall(text)]
    marks = ("{instruction}", "{output_1}", "{output_2}")
    missing = [mark for mark in marks if not any(mark in message["content"] for message in messages)]
    if missing:
        raise UserError(f"--templates: '{path}' is no AlpacaEval template, it lacks {', '.join(missing)}; give another")
    return messages


def arena_hard_template(path: Path | None) -> tuple[str, str]:
    """Return the system prompt and the user's part of an Arena-Hard judge configuration (YAML).

    Raises:
        UserError: There is none, or it lacks a key.
    """
    if path is None:
        raise UserError("--templates: give Arena-Hard's judge configuration (judge_config.yaml of arena-hard-auto)")
    try:
        found: Any = load_yaml(_read(path))
    except yaml.YAMLError as error:
        raise UserError(f"--templates: '{path}' is no YAML ({error}); give a judge configuration") from None
    found = found if isinstance(found, Mapping) else {}
    template = found.get("prompt_template")
    template = template[0] if isinstance(template, list) and template else template
    system = found.get("system_prompt")
    if not isinstance(template, str) or not isinstance(system, str):
        raise UserError(
            f"--templates: '{path}' should have the keys system_prompt and prompt_template; newer configurations of "
            "arena-hard-auto keep system_prompt in utils/judge_utils.py: add it"
        )
    if not {"{answer_1}", "{ANSWER_A}"} & set(re.findall(r"\{\w+\}", template)):
        raise UserError(f"--templates: prompt_template of '{path}' has no place for the answers; give another")
    return system, template


def mt_bench_templates(path: Path | None, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return FastChat's templates of these names, from its ``judge_prompts.jsonl``.

    Raises:
        UserError: There is none, or one is missing.
    """
    if path is None:
        raise UserError("--templates: give FastChat's judge_prompts.jsonl (fastchat/llm_judge/data)")
    try:
        rows = [json.loads(line) for line in _read(path).splitlines() if line.strip()]
        found = {row["name"]: {key: str(row[key]) for key in ("system_prompt", "prompt_template")} for row in rows}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"--templates: '{path}' is no judge_prompts.jsonl; give FastChat's") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"--templates: '{path}' lacks {', '.join(missing)}; give FastChat's judge_prompts.jsonl")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--templates: '{path}' cannot be read ({error}); give another file") from None
