"""``dpr-lightning score``: what the dense reward says of every token of the responses in a file.

Nothing is sampled or trained. Rows are scored in blocks, each written to a part file of its own, so that memory is
bounded and a killed run goes on where it stopped; the manifest comes last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from matplotlib.image import imsave
from rich.console import Console
from tqdm import tqdm

from dpr_lightning.analysis.frozen import FrozenPolicies, add_policy_arguments, policies_from_arguments
from dpr_lightning.analysis.page import write_page
from dpr_lightning.analysis.responses import data_config
from dpr_lightning.analysis.reward_image import draw_rewards, stack
from dpr_lightning.analysis.reward_scale import robust_limit
from dpr_lightning.analysis.score_blocks import (
    Blocks,
    Format,
    Tally,
    part_path,
    read_part,
    replace_file,
    write_part,
)
from dpr_lightning.analysis.score_summary import Summary
from dpr_lightning.analysis.token_rewards import TokenLocator, score_rows
from dpr_lightning.data.demonstrations import DemonstrationTable, load_demonstrations
from dpr_lightning.data.presets import PresetName
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.errors import NonFiniteError, UserError
from dpr_lightning.manifest import (
    MANIFEST,
    atomic_write_json,
    environment,
    now,
    read_json,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from dpr_lightning.terminal import make_console

_SETTINGS = "settings.json"
_PAGE, _IMAGE = "rewards.html", "rewards.png"


def main(args: Sequence[str] | None = None) -> None:
    """Score every token of the responses in a file, and write them as a table, a page and a picture."""
    parser = argparse.ArgumentParser(prog="dpr-lightning score", description=main.__doc__)
    add_policy_arguments(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, help="file or hub data set of prompts with responses")
    group.add_argument("--preset", choices=get_args(PresetName), help="its columns; prompt_response if left out")
    group.add_argument("--columns", nargs="+", default=[], metavar="PART=COLUMN", help="columns unlike the preset's")
    limits = "; as the run recorded, else 1024"
    group.add_argument("--max_prompt_tokens", type=int, help=f"longer prompts are dropped and counted{limits}")
    group.add_argument("--max_response_tokens", type=int, help=f"longer responses are cut{limits}")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, help="directory; a killed run goes on in it")
    group.add_argument("--format", choices=get_args(Format), default="parquet", help="of the part files")
    group.add_argument("--block_rows", type=int, default=500, help="rows of one part file, in memory at one time")
    group.add_argument("--page_rows", type=int, default=100, help=f"responses on {_PAGE}, the first ones")
    parsed = parser.parse_args(args)
    if parsed.reference is None and parsed.alpha is None:
        parsed.alpha = [0.5]
    _check(parsed)
    policies = policies_from_arguments(parsed)
    console = make_console(160)
    score(parsed, policies, console)


def _check(parsed: argparse.Namespace) -> None:
    """Refuse what no run could do.

    Raises:
        UserError: Naming the flag.
    """
    for name, smallest in (("block_rows", 1), ("page_rows", 0), ("max_prompt_tokens", 1), ("max_response_tokens", 1)):
        value = getattr(parsed, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name}: found {value}; give a whole number of at least {smallest}")
    if parsed.alpha is not None and len(parsed.alpha) > 1:
        raise UserError(f"--alpha: found {len(parsed.alpha)} values; a token has one reward here, so give one")
    out: Path = parsed.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: '{out}' is a file where a directory should be written; move it away")
    if out.is_dir() and any(out.iterdir()) and not (out / _SETTINGS).is_file():
        raise UserError(f"--out: '{out}' holds files but no {_SETTINGS}, so score did not write it; choose another")


def score(parsed: argparse.Namespace, policies: FrozenPolicies, console: Console) -> None:
    """Score the file of ``--data`` into ``--out``; blocks whose part file is there already are not scored again.

    Raises:
        UserError: The data cannot be used, or ``--out`` holds the blocks of other data or settings.
        NonFiniteError: A reward is no number.
    """
    out: Path = parsed.out
    locator = TokenLocator(policies.tokenizer)
    blocks = _blocks(parsed, policies)
    tally = blocks.survey()
    for line in tally.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if tally.num_scored == 0:
        reasons = ", ".join(tally.dropped)
        raise UserError(f"--data: none of the {tally.num_rows} rows can be scored ({reasons}); repair them")
    settings = _settings(parsed, policies, blocks, tally)
    _claim(out, settings)
    parts = [part_path(out, number, parsed.format) for number in range(len(blocks))]
    _score_missing(blocks, parts, policies, locator)
    summary = Summary(page_rows=parsed.page_rows)
    for path in parts:
        for row in read_part(path):
            summary.add(row)
    (reference,) = policies.references.values()
    notes = [f"Teacher: {policies.teacher}", f"Reference: {reference}", f"Data: {parsed.data}", *tally.lines()]
    partial = out / f".{_PAGE}.partial"
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(
            write_page(summary.shown, title="Token rewards", num_rows=summary.num_rows, notes=notes),
        )
    replace_file(partial, out / _PAGE)
    _write_image(out / _IMAGE, summary)
    record = {
        "teacher": policies.teacher,
        "reference": reference,
        "data": parsed.data,
        "settings": settings,
        "rows": {
            "read": tally.num_rows,
            "scored": tally.num_scored,
            "dropped": dict(tally.dropped),
            "noted": dict(tally.noted),
            "first": tally.examples,
        },
        "parts": [path.name for path in parts],
        "summary": summary.figures(),
        "created": now(),
        "environment": environment(),
    }
    atomic_write_json(out / MANIFEST, record)
    console.print(summary.table())
    console.print(f"token rewards: {out}, page: {out / _PAGE}", highlight=False, markup=False, soft_wrap=True)


def _blocks(parsed: argparse.Namespace, policies: FrozenPolicies) -> Blocks:
    """Return the data in blocks; limits that are not given are those that the teacher was trained with."""
    recorded = ((policies.manifest or {}).get("data") or {}).get("demonstrations", {})
    for name in ("max_prompt_tokens", "max_response_tokens"):
        if getattr(parsed, name) is None:
            setattr(parsed, name, recorded.get(name, 1024))
    config = data_config(parsed, parsed.data)
    try:
        table: DemonstrationTable = load_demonstrations(config)["train"]
    except UserError as error:
        # Worded for the keys of fit.
        words = str(error).replace("data.demonstrations.source", "--data").replace("data.demonstrations", "--data")
        raise UserError(words) from error
    return Blocks(table=table, config=config, policies=policies, block_rows=parsed.block_rows)


def _settings(parsed: argparse.Namespace, policies: FrozenPolicies, blocks: Blocks, tally: Tally) -> dict[str, Any]:
    """Return all that the part files depend on, as plain JSON values."""
    (reference,) = policies.references.values()
    values = {
        "data": tally.fingerprint,
        "rows": len(blocks.table),
        "teacher": weights_fingerprint(policies.teacher),
        "reference": weights_fingerprint(reference),
        "tokenizer": tokenizer_fingerprint(policies.tokenizer),
        "template": policies.template.to_manifest(),
        **{name: getattr(parsed, name) for name in ("max_prompt_tokens", "max_response_tokens", "block_rows")},
        **{name: getattr(parsed, name) for name in ("micro_batch_size", "dtype", "device", "format")},
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make ``out`` this run's directory, or check that it is already.

    Raises:
        UserError: It holds the blocks of other data or settings.
    """
    if not (out / _SETTINGS).is_file():
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_json(out / _SETTINGS, settings)
        return
    recorded = read_json(out / _SETTINGS)
    changed = sorted(name for name in {*recorded, *settings} if recorded.get(name) != settings.get(name))
    if changed:
        found = ", ".join(f"{name} (was {recorded.get(name)}, is {settings.get(name)})" for name in changed)
        raise UserError(f"--out: '{out}' was begun with other input: {found}; choose another, or delete it")
    (out / MANIFEST).unlink(missing_ok=True)


def _score_missing(blocks: Blocks, parts: Sequence[Path], policies: FrozenPolicies, locator: TokenLocator) -> None:
    """Write the part file of every block that has none; both policies are in memory meanwhile, or neither."""
    missing = [number for number, path in enumerate(parts) if not path.is_file()]
    if not missing:
        return
    teacher = policies.load(policies.teacher)
    (reference,) = (policies.load(path) for path in policies.references.values())
    # disable=None: a bar on a terminal only.
    bar = tqdm(missing, desc="blocks", initial=len(parts) - len(missing), total=len(parts), disable=None, leave=False)
    for number in bar:
        scored = score_rows(
            blocks.encode(number),
            teacher=teacher,
            reference=reference,
            locator=locator,
            eos_id=policies.eos_token_id,
            pad_id=pad_id(policies.tokenizer),
            micro_batch_size=policies.micro_batch_size,
        )
        for row in scored:
            if not abs(row.sum) < float("inf"):
                raise NonFiniteError(f"--data: row {row.row}: its reward is {row.sum}; try --dtype float32")
        write_part(parts[number], scored)


def _write_image(path: Path, summary: Summary) -> None:
    """Draw the rows of lowest and highest mean reward per token."""
    picked = [("lowest", row) for row in summary.lowest] + [("highest", row) for row in summary.highest]
    limit = robust_limit(reward for _, row in picked for reward in row.rewards)
    images = [
        draw_rewards(
            row.tokens,
            row.rewards,
            limit=limit,
            title=f"{what}: row {row.row}, mean {row.mean:+.4f}, sum {row.sum:+.3f}, {row.num_tokens} tokens",
            max_height=400,
        )
        for what, row in picked
    ]
    partial = path.with_name(f".{path.name}.partial")
    imsave(partial, stack(images), format="png")
    replace_file(partial, path)
