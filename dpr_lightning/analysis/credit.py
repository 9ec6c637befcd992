"""``dpr-lightning credit``: does the dense reward find a corrupted token, and the better of two responses?

No training and no sampling of anything but the teacher: the two questions are asked of the token reward itself.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dpr_lightning.analysis.corruption import Corruption, FindItems, Place, corrupt, number_items
from dpr_lightning.analysis.frozen import (
    FrozenPolicies,
    add_policy_arguments,
    policies_from_arguments,
    score_responses,
)
from dpr_lightning.analysis.localisation import localisation_table, localise
from dpr_lightning.analysis.preferences import rank, ranking_table
from dpr_lightning.analysis.responses import (
    JudgedResponses,
    Responses,
    add_data_arguments,
    check_counts,
    data_config,
    make_verifier,
    read_judged,
    read_responses,
    worked_answers,
)
from dpr_lightning.analysis.teacher_samples import draw_and_score
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.tokenization import encode_responses, pad_id
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.ranking import pair_up
from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.functional.collate import collate
from dpr_lightning.manifest import atomic_write_json, environment
from dpr_lightning.terminal import make_console
from dpr_lightning.types import SamplingConfig

_MAX_TASKS = 2000
"""Embedded tasks at most; their validation split holds some thousands of prompts."""
_MIN_ROWS = 2
"""Fewer corrupted responses have no interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Material:
    """What the two benchmarks are made of."""

    responses: Responses
    judged: JudgedResponses | None
    verifier: Verifier | None
    find_items: FindItems
    what: str
    """The data in words."""


def main(args: Sequence[str] | None = None) -> None:
    """Ask how well the token reward finds a mistake, and the better of two responses; nothing is trained."""
    parser = argparse.ArgumentParser(prog="dpr-lightning credit", description=main.__doc__)
    add_policy_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--place", choices=["any", "last"], default="any", help="which number is corrupted")
    parser.add_argument("--num_samples", type=int, default=8, help="ranked samples of the teacher to each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest sample")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts sampled together")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parsed = parser.parse_args(args)
    names = ("num_prompts", "num_samples", "max_new_tokens", "batch_size", "max_prompt_tokens", "max_response_tokens")
    check_counts(parsed, *names)
    if parsed.data is None and parsed.num_prompts > _MAX_TASKS:
        raise UserError(f"--num_prompts: found {parsed.num_prompts}; without --data at most {_MAX_TASKS} can be made")
    verifier = make_verifier(parsed.verifier, parsed.verifier_args)
    policies = policies_from_arguments(parsed)
    console = make_console(160)
    with _material(parsed, policies, verifier, console) as material:
        result = {
            "teacher": policies.teacher,
            "references": policies.references,
            "data": material.what,
            "seed": parsed.seed,
            "localisation": _localisation(material, policies, parsed.place, parsed.seed, console),
            "pairs": _pairs(material, policies, parsed, console),
            "environment": environment(),
        }
    if parsed.out is not None:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(parsed.out, result)
        console.print(f"figures: {parsed.out}", soft_wrap=True, highlight=False)


@contextlib.contextmanager
def _material(
    parsed: argparse.Namespace, policies: FrozenPolicies, verifier: Verifier | None, console: Console
) -> Iterator[_Material]:
    """Read the file of ``--data``, or make embedded tasks of the validation split; no prompt of training is among them.

    The test split is left for final comparisons.
    """
    if parsed.data is None:
        # The demo stands above this package and is wanted here by the user who names no data.
        from dpr_lightning.demo.items import task_items
        from dpr_lightning.demo.tasks import make_rows, write_jsonl
        from dpr_lightning.demo.verifier import TaskVerifier

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "tasks.jsonl"
            rows = make_rows(num_rows=parsed.num_prompts, seed=parsed.seed, split="validation")
            write_jsonl(rows, path)
            responses = _read(DemonstrationConfig(source=str(path)), policies, parsed, console)
            yield _Material(
                responses=responses,
                judged=None,
                verifier=verifier or TaskVerifier(),
                find_items=task_items,
                what=f"{parsed.num_prompts} embedded tasks of the validation split",
            )
        return
    config = data_config(parsed, parsed.data)
    judged = read_judged(config, policies, num_prompts=parsed.num_prompts, seed=parsed.seed, console=console)
    yield _Material(
        responses=judged.responses if judged else _read(config, policies, parsed, console),
        judged=judged,
        verifier=verifier,
        find_items=number_items,
        what=parsed.data,
    )


def _read(
    config: DemonstrationConfig, policies: FrozenPolicies, parsed: argparse.Namespace, console: Console
) -> Responses:
    return read_responses(config, policies, num_prompts=parsed.num_prompts, seed=parsed.seed, console=console)


def _localisation(
    material: _Material, policies: FrozenPolicies, place: Place, seed: int, console: Console
) -> dict[str, Any]:
    """Corrupt one item of each worked answer and see which score finds it."""
    responses, prompts, answers, marks = material.responses, [], [], []
    dropped = {"not right": 0, "cut": 0, "nothing to corrupt": 0}
    num_tokens_differ = 0
    indices = worked_answers(responses, material.judged)
    for index in indices:
        row, ids = responses.rows[index], responses.response_ids[index]
        text: str = row["response"]
        if material.verifier is not None and not material.verifier(row, text):
            dropped["not right"] += 1
        elif ids[-1] != policies.eos_token_id or encode_responses(policies.tokenizer, [text])[0] != ids[:-1]:
            dropped["cut"] += 1
        elif (corruption := _corrupt(material, row, text, policies, place, f"{seed}-{index}")) is None:
            dropped["nothing to corrupt"] += 1
        else:
            prompts.append(responses.prompt_ids[index])
            answers.append([*corruption.response_ids, policies.eos_token_id])
            marks.append([*corruption.is_corrupted, False])
            num_tokens_differ += not corruption.is_same_length
    if len(answers) < _MIN_ROWS:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(
            f"--data: of {len(indices)} worked answers of {material.what} {len(answers)} could be corrupted "
            f"({counts}); give right answers with numbers in them"
        )
    scored = score_responses(
        policies, collate(prompts, answers, pad_id=pad_id(policies.tokenizer)), with_expectations=True
    )
    rows = localise(scored, marks, seed=seed)
    mean_corrupted = sum(map(sum, marks)) / len(marks)
    mean_length = sum(map(len, marks)) / len(marks)
    kind = "the last" if place == "last" else "one"
    console.print(
        localisation_table(
            rows,
            title=f"Finding a mistake: {len(answers)} worked answers ({material.what}), {kind} number wrong, "
            f"{mean_corrupted:.2f} of {mean_length:.1f} tokens; 95% intervals over answers",
        )
    )
    for reason, count in dropped.items():
        if count:
            console.print(f"{count} of {len(indices)} worked answers left out: {reason}", highlight=False)
    if num_tokens_differ:
        console.print(f"{num_tokens_differ} corrupted answers differ in their number of tokens", highlight=False)
    return {
        "num_rows": len(answers),
        "dropped": dropped,
        "place": place,
        "mean_num_tokens": mean_length,
        "mean_num_corrupted": mean_corrupted,
        "num_of_other_length": num_tokens_differ,
        "scores": rows,
    }


def _corrupt(
    material: _Material, row: dict[str, Any], text: str, policies: FrozenPolicies, place: Place, seed: str
) -> Corruption | None:
    verifier = material.verifier
    # A verifier reads the result only, so it can vouch for a mistake there and for no other.
    is_right = (lambda wrong: verifier(row, wrong)) if verifier is not None and place == "last" else None
    return corrupt(
        text,
        tokenizer=policies.tokenizer,
        rng=random.Random(seed),
        find_items=material.find_items,
        place=place,
        is_right=is_right,
    )


def _pairs(
    material: _Material, policies: FrozenPolicies, parsed: argparse.Namespace, console: Console
) -> dict[str, Any] | None:
    """Rank pairs of responses of one prompt: the judged ones, else samples of the teacher, verified."""
    if material.judged is not None:
        judged = material.judged
        given = judged.responses
        batch = collate(given.prompt_ids, given.response_ids, pad_id=pad_id(policies.tokenizer))
        scored, pairs, what = score_responses(policies, batch), judged.pairs, f"judged responses of {material.what}"
    elif material.verifier is not None:
        first = material.responses.first_of_each_prompt()
        drawn = draw_and_score(
            policies,
            [material.responses.prompt_ids[index] for index in first],
            [material.responses.rows[index] for index in first],
            verifier=material.verifier,
            sampling=SamplingConfig(max_new_tokens=parsed.max_new_tokens, batch_size=parsed.batch_size),
            num_samples=parsed.num_samples,
            seed=parsed.seed,
        )
        assert drawn.is_correct_N is not None
        scored, pairs = drawn.scored, pair_up(drawn.is_correct_N, drawn.prompt_index_N)
        what = f"{parsed.num_samples} samples of the teacher a prompt, {drawn.is_correct_N.mean():.3f} right"
    else:
        console.print(
            "No pairs to rank: the data have neither chosen and rejected nor is_correct nor score, and no --verifier "
            "judges samples of the teacher."
        )
        return None
    rows = rank(scored, pairs, seed=parsed.seed)
    title = f"Better first: {len(pairs)} pairs of {pairs.num_prompts} prompts ({what}); chance 0.5"
    console.print(ranking_table(rows, title=title))
    return {"source": what, "num_pairs": len(pairs), "num_prompts": pairs.num_prompts, "scores": rows}
