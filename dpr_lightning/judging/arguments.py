"""The options of ``dpr-lightning judge``, and which of them go together."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from dpr_lightning.errors import UserError
from dpr_lightning.judging.client import Endpoint
from dpr_lightning.judging.paper import PaperPreset
from dpr_lightning.judging.presets import PRESETS

_DEFAULT = Endpoint(model="")


def judge_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(prog="dpr-lightning judge", description=description, allow_abbrev=False)
    data = parser.add_argument_group("what is judged")
    data.add_argument("--responses", help="responses of the model (JSON lines, JSON, CSV or Parquet)")
    data.add_argument("--baseline", help="responses that they are compared with")
    data.add_argument("--prompts", help="all prompts that should have been answered, with their categories")
    data.add_argument("--references", help="right answers, for MT-Bench (FastChat's reference_answer file)")
    data.add_argument("--match", choices=["auto", "id", "prompt"], default="auto", help="what rows must have in common")
    data.add_argument("--model", help="name of the model in reports; with --from_judgments the one that is wanted")
    data.add_argument("--baseline_name", help="name of the baseline in reports; with mt_bench_pair the wanted one")
    data.add_argument("--from_judgments", nargs="+", metavar="FILE", help="stored judgments to count; nothing is asked")
    judge = parser.add_argument_group("who judges")
    judge.add_argument("--preset", choices=list(PRESETS), default=PaperPreset.name, help="rules and statistics")
    judge.add_argument("--templates", type=Path, help="the judge's templates, for official presets")
    judge.add_argument("--gamed_baseline", type=Path, help="upstream's df_gamed.csv, for length-controlled win rates")
    judge.add_argument("--verifier", help="class path of a Verifier that judges instead of a model; needs --prompts")
    judge.add_argument("--verifier_args", type=_json_object, default={}, help="its settings, a JSON object")
    judge.add_argument("--judge_model", help="name of the model that judges (default: the preset's own)")
    judge.add_argument("--base_url", help="root of its API (default: the client's, or OPENAI_BASE_URL)")
    judge.add_argument(
        "--api_key_env",
        default=_DEFAULT.api_key_env,
        help="name of the environment variable with the key, 'none' for a server without (default: %(default)s)",
    )
    # A trap: what is written here would stand in the shell's history and in the list of processes.
    judge.add_argument("--api_key", help=argparse.SUPPRESS)
    judge.add_argument("--max_tokens", type=int, default=512, help="longest reply under preset paper")
    judge.add_argument(
        "--token_limit_key",
        choices=["max_tokens", "max_completion_tokens"],
        default="max_tokens",
        help="field that limits the reply; reasoning models want the second (default: %(default)s)",
    )
    judge.add_argument(
        "--temperature",
        choices=["preset", "default"],
        default="preset",
        help="the preset's, or none at all for models that refuse it (default: %(default)s)",
    )
    judge.add_argument("--concurrency", type=int, default=_DEFAULT.concurrency, help="most requests in flight")
    judge.add_argument("--timeout", type=float, default=_DEFAULT.timeout, help="seconds for one attempt")
    judge.add_argument("--max_retries", type=int, default=_DEFAULT.max_retries, help="further attempts of a request")
    cost = parser.add_argument_group("what it costs")
    cost.add_argument("--dry_run", action="store_true", help="say what would be asked, and stop")
    cost.add_argument("--price_in", type=float, help="price of a million tokens that are sent")
    cost.add_argument("--price_out", type=float, help="price of a million tokens that come back")
    cost.add_argument("--max_cost", type=float, help="do not begin where the estimate is higher")
    cost.add_argument("--cache", type=Path, help="file of paid replies (default: cache.sqlite in --out)")
    result = parser.add_argument_group("what comes out")
    result.add_argument("--max_failed", type=float, default=0.02, help="largest share of prompts without a verdict")
    result.add_argument("--seed", type=int, default=0, help="of the intervals' resampling")
    result.add_argument("--out", type=Path, default=Path("runs/judge"), help="directory of judgments and reports")
    return parser


def check(parsed: argparse.Namespace) -> None:
    """Refuse options that contradict each other or are out of range, before anything is read or paid for.

    Raises:
        UserError: With what to do.
    """
    if parsed.api_key is not None:
        raise UserError(
            "--api_key: a key does not belong on the command line; put it into an environment variable, and the "
            "variable's name into --api_key_env. Consider this key seen, and replace it"
        )
    _check_numbers(parsed)
    existing = next(path for path in [parsed.out.absolute(), *parsed.out.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--out: '{parsed.out}' cannot be written to ('{existing}' forbids it); choose another")
    if parsed.from_judgments is not None:
        for name in ("responses", "baseline", "references", "verifier", "base_url"):
            if getattr(parsed, name) is not None:
                raise UserError(f"--{name}: --from_judgments asks no judge; leave one of the two out")
        if parsed.dry_run:
            raise UserError("--dry_run: --from_judgments asks no judge; leave one of the two out")
        return
    if parsed.responses is None:
        raise UserError("--responses: it is required, and not given; give a file, or --from_judgments")
    num_sides = PRESETS[parsed.preset].num_sides
    if num_sides == 1 and parsed.baseline is not None:
        raise UserError(f"--baseline: --preset {parsed.preset} grades single answers; leave it out")
    if PRESETS[parsed.preset].needs_answers_in_turn > 1 and parsed.prompts is None:
        raise UserError(f"--prompts: --preset {parsed.preset} needs the questions with their turns and categories")
    if num_sides > 1 and parsed.baseline is None:
        raise UserError(f"--baseline: --preset {parsed.preset} compares two files of responses; give the second")
    if parsed.references is not None and not PRESETS[parsed.preset].uses_references:
        raise UserError(f"--references: --preset {parsed.preset} uses none; leave it out")
    if parsed.verifier is not None:
        if parsed.preset != PaperPreset.name:
            raise UserError(f"--verifier: found --preset {parsed.preset}; a program judges under preset paper only")
        if parsed.prompts is None:
            raise UserError("--prompts: a verifier compares with the rows of the prompts; give them")
        if parsed.dry_run:
            raise UserError("--dry_run: a verifier costs nothing; leave it out")
    elif parsed.verifier_args:
        raise UserError("--verifier_args: found settings, but no --verifier; name one or leave them out")


def _check_numbers(parsed: argparse.Namespace) -> None:
    for name, smallest in (("max_tokens", 1), ("concurrency", 1), ("max_retries", 0), ("seed", 0)):
        if getattr(parsed, name) < smallest:
            raise UserError(f"--{name}: found {getattr(parsed, name)}; give a whole number of at least {smallest}")
    if not (math.isfinite(parsed.timeout) and parsed.timeout > 0):
        raise UserError(f"--timeout: found {parsed.timeout}; give seconds above 0")
    if not 0 <= parsed.max_failed <= 1:
        raise UserError(f"--max_failed: found {parsed.max_failed}; give a share from 0 to 1")
    for name in ("price_in", "price_out", "max_cost"):
        value = getattr(parsed, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name}: found {value}; give a number of at least 0")
    if (parsed.price_in is None) != (parsed.price_out is None):
        raise UserError("--price_in: give both --price_in and --price_out, or neither")
    if parsed.max_cost is not None and parsed.price_in is None:
        raise UserError("--max_cost: it needs --price_in and --price_out")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"found {text!r}; give a JSON object")
    return value
