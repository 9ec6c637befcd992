"""``dpr-lightning judge``: win rates and ratings of responses, from a judge model, a verifier or stored judgments."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from dpr_lightning.data.entries import Entry, read_entries
from dpr_lightning.errors import UserError
from dpr_lightning.judging.arguments import check, judge_parser
from dpr_lightning.judging.cache import ReplyCache
from dpr_lightning.judging.client import NO_KEY, ChatClient, Endpoint
from dpr_lightning.judging.games import BASELINE, Game, Judge
from dpr_lightning.judging.length_control import LengthControl
from dpr_lightning.judging.matching import Matched, match
from dpr_lightning.judging.model_judge import Estimate, ModelJudge
from dpr_lightning.judging.page import render_page
from dpr_lightning.judging.preset import Context, Preset, Record
from dpr_lightning.judging.presets import make_preset
from dpr_lightning.judging.report import judged_model, print_result
from dpr_lightning.judging.stored import by_model, read_judgments, repeated
from dpr_lightning.judging.verifier_judge import VerifierJudge
from dpr_lightning.manifest import atomic_write_json, atomic_write_text, environment, now
from dpr_lightning.terminal import make_console

_INTERRUPTED = 130
"""The exit status that shells expect after Ctrl-C."""


def main(args: Sequence[str] | None = None) -> None:
    """Compare two files of responses, or grade one, by a judge; or count judgments that are already there."""
    parser = judge_parser(str(main.__doc__))
    parsed = parser.parse_args(args)
    check(parsed)
    console = make_console(160)
    prompts = None if parsed.prompts is None else read_entries(parsed.prompts, key="--prompts", with_answers=False)
    order = None if prompts is None else [str(entry.prompt) for entry in prompts]
    preset = make_preset(
        parsed.preset,
        templates=parsed.templates,
        will_ask=parsed.from_judgments is None and parsed.verifier is None,
        length_control=None if parsed.gamed_baseline is None else LengthControl(parsed.gamed_baseline, order),
        max_tokens=parsed.max_tokens,
    )
    if parsed.from_judgments is not None:
        _count_stored(parsed, preset, prompts, console)
    else:
        _judge(parsed, preset, prompts, console)


def _count_stored(
    parsed: argparse.Namespace, preset: Preset, prompts: Sequence[Entry] | None, console: Console
) -> None:
    asked = prompts or ()
    context = Context(
        model=parsed.model or "model",
        baseline=parsed.baseline_name or "baseline",
        judge=parsed.judge_model or "unknown",
        categories={entry.id: entry.category for entry in asked if entry.id and entry.category},
        chosen_baseline=parsed.baseline_name,
    )
    records: list[Record] = []
    num_others = 0
    for path in parsed.from_judgments:
        found, others = read_judgments(path, preset, context)
        records += found
        num_others += others
    if not records:
        raise UserError(f"--baseline_name: no judgments of a pair with '{parsed.baseline_name}'; give another, or none")
    if num_others:
        console.print(f"{num_others} rows are of pairs without {parsed.baseline_name}", markup=False, highlight=False)
    models = []
    for of_model in by_model(records, model=parsed.model).values():
        keys = {record.key for record in of_model}
        missing = sum(entry.id not in keys and entry.prompt not in keys for entry in asked)
        lost = Counter({"missing in the judgments": missing}) if missing else Counter[str]()
        models.append(
            judged_model(
                of_model,
                preset,
                lost=lost,
                repeated=repeated(of_model),
                max_failed=parsed.max_failed,
                seed=parsed.seed,
            )
        )
    source = {"from_judgments": parsed.from_judgments, "rows_of_other_pairs": num_others}
    _finish(parsed, preset, parsed.judge_model or "of the stored judgments", models, records, source, console)


def _judge(parsed: argparse.Namespace, preset: Preset, prompts: Sequence[Entry] | None, console: Console) -> None:
    sides = [read_entries(parsed.responses, key="--responses", with_answers=True)]
    sources = [parsed.responses]
    if preset.num_sides > BASELINE:
        sides.append(read_entries(parsed.baseline, key="--baseline", with_answers=True))
        sources.append(parsed.baseline)
    references = None
    if parsed.references is not None:
        references = read_entries(parsed.references, key="--references", with_answers=True)
    matched = match(
        sides,
        names=("responses", "baseline")[: len(sides)],
        prompts=prompts,
        references=references,
        by=parsed.match,
        num_turns=preset.needs_answers_in_turn,
    )
    games = [preset.games(item) for item in matched.items]
    flat = [game for of_item in games for game in of_item]
    names = [_model_name(side, source) for side, source in zip(sides, sources, strict=True)]
    if len(names) > BASELINE and names[0] == names[BASELINE]:
        names[BASELINE] = f"{names[BASELINE]} (baseline)"
    if parsed.verifier is not None:
        # Wanted here only, and slow to import.
        from dpr_lightning.analysis.responses import make_verifier

        verifier = make_verifier(parsed.verifier, parsed.verifier_args)
        assert verifier is not None
        judge: Judge = VerifierJudge(verifier)
        _ask(parsed, preset, judge, matched, games, flat, names, None, console)
        return
    endpoint = Endpoint(
        model=parsed.judge_model or preset.judge_model,
        base_url=parsed.base_url,
        # Nothing is sent, so no key is needed.
        api_key_env=NO_KEY if parsed.dry_run else parsed.api_key_env,
        concurrency=parsed.concurrency,
        timeout=parsed.timeout,
        max_retries=parsed.max_retries,
    )
    client = ChatClient(endpoint)
    path = parsed.cache or parsed.out / "cache.sqlite"
    with ReplyCache(path if path.exists() or not parsed.dry_run else Path(":memory:")) as cache:
        model_judge = ModelJudge(
            preset,
            client,
            cache,
            token_limit_key=parsed.token_limit_key,
            with_temperature=parsed.temperature == "preset",
        )
        estimate = model_judge.estimate(flat)
        _print_estimate(estimate, parsed, console)
        if not parsed.dry_run:
            _ask(parsed, preset, model_judge, matched, games, flat, names, model_judge, console)


def _ask(
    parsed: argparse.Namespace,
    preset: Preset,
    judge: Judge,
    matched: Matched,
    games: Sequence[Sequence[Game]],
    flat: Sequence[Game],
    names: Sequence[str],
    model_judge: ModelJudge | None,
    console: Console,
) -> None:
    """Judge, keep the judgments in the preset's own format, and report on what that file says."""
    try:
        with tqdm(total=len(flat), desc="judging", unit="game", disable=None) as bar:
            outcomes = iter(judge.judge(flat, on_progress=bar.update))
    except KeyboardInterrupt:
        print("stopped; what was answered is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    baseline = parsed.baseline_name or (names[BASELINE] if len(names) > BASELINE else "")
    context = Context(model=parsed.model or names[0], baseline=baseline, judge=judge.name)
    rows = [
        row
        for item, of_item in zip(matched.items, games, strict=True)
        for row in preset.rows(item, of_item, [next(outcomes) for _ in of_item], context)
    ]
    path = parsed.out / "judgments.jsonl"
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    records = [preset.record(json.loads(json.dumps(row)), context, str(path)) for row in rows]
    model = judged_model(
        records,
        preset,
        lost=matched.lost,
        repeated=matched.repeated,
        repeated_keys=matched.repeated_keys,
        max_failed=parsed.max_failed,
        seed=parsed.seed,
    )
    source: dict[str, Any] = {
        "responses": parsed.responses,
        "baseline": parsed.baseline,
        "prompts": parsed.prompts,
        "matched_by": matched.by,
    }
    if model_judge is not None:
        endpoint = model_judge.client.endpoint
        source["judge_model"] = {
            "model": endpoint.model,
            "base_url": model_judge.client.base_url,
            "is_the_presets": endpoint.model == preset.judge_model,
            "token_limit_key": parsed.token_limit_key,
            "temperature": parsed.temperature,
            "prompt_tokens": model_judge.prompt_tokens,
            "completion_tokens": model_judge.completion_tokens,
        }
    _finish(parsed, preset, judge.name, [model], records, source, console)


def _finish(
    parsed: argparse.Namespace,
    preset: Preset,
    judge: str,
    models: Sequence[dict[str, Any]],
    records: Sequence[Record],
    source: dict[str, Any],
    console: Console,
) -> None:
    """Show and keep the result.

    Raises:
        UserError: The score of a model is refused.
    """
    result = {
        "preset": preset.name,
        "judge": judge,
        "source": source,
        "seed": parsed.seed,
        "max_failed": parsed.max_failed,
        "models": list(models),
        "created": now(),
        "environment": environment(),
    }
    print_result(result, console)
    parsed.out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(parsed.out / "report.json", result)
    atomic_write_text(parsed.out / "report.html", render_page(result, records))
    console.print(f"report: {parsed.out / 'report.html'}", soft_wrap=True, highlight=False, markup=False)
    refused = [model for model in models if model["refused"] is not None]
    if refused:
        who = f"{len(refused)} of {len(models)} models: " if len(models) > 1 else ""
        raise UserError(
            f"--max_failed: no score, {who}{refused[0]['refused']}; the same command asks again for what failed, see "
            f"{parsed.out / 'report.json'} for the counts, or allow a larger share"
        )


def _print_estimate(estimate: Estimate, parsed: argparse.Namespace, console: Console) -> None:
    """Say what will be asked and what it may cost.

    Raises:
        UserError: It may cost more than is allowed.
    """
    text = (
        f"{estimate.num_games} games: {estimate.num_settled} need no question, {estimate.num_cached} requests are "
        f"answered on disk, {estimate.num_requests} to send: about {estimate.prompt_tokens} tokens in, at most "
        f"{estimate.max_completion_tokens} out"
    )
    if parsed.price_in is not None:
        cost = estimate.cost(parsed.price_in, parsed.price_out)
        text += f"; at most about {cost:.2f} at your prices"
        if parsed.max_cost is not None and cost > parsed.max_cost:
            raise UserError(
                f"--max_cost: {text}, and {parsed.max_cost:.2f} is allowed; raise it or judge fewer prompts"
            )
    console.print(text, highlight=False, markup=False)


def _model_name(entries: Sequence[Entry], source: str) -> str:
    names = {entry.model for entry in entries}
    return str(names.pop()) if len(names) == 1 and None not in names else Path(source).stem
