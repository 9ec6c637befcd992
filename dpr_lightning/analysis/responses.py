"""Prompts and given responses for the analyses: worked answers, judged responses, and the run's own held-out prompts.

Shapes: N responses.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from rich.console import Console

from dpr_lightning.analysis.frozen import FrozenPolicies
from dpr_lightning.data.demonstrations import DemonstrationConfig, SplitName, load_demonstrations
from dpr_lightning.data.encoding import EncodedDemonstrations, encode_table
from dpr_lightning.data.presets import PresetName
from dpr_lightning.data.readers import open_records
from dpr_lightning.data.splitting import subsample
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.ranking import Pairs, pair_up
from dpr_lightning.evaluation.verifiers import Verifier

CHOSEN, REJECTED = "chosen", "rejected"
JUDGEMENTS = ("is_correct", "score")
"""Columns that say how good a row's response is; of several rows of one prompt the greater value is the better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Responses to prompts, encoded as SFT encodes them."""

    prompt_ids: list[list[int]]
    """Token ids of the prompt of each response."""
    response_ids: list[list[int]]
    """Token ids of each response, EOS included where it is complete."""
    rows: list[dict[str, Any]]
    """Columns of each response's source row."""
    prompt_index_N: npt.NDArray[np.int64]
    """[N] which prompt each answers, from 0; equal prompts have one number, whatever their rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def first_of_each_prompt(self) -> list[int]:
        """Return the number of the first response to every prompt."""
        _, first = np.unique(self.prompt_index_N, return_index=True)
        return [int(index) for index in first]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedResponses:
    """Responses of which some are known to be better than others."""

    responses: Responses
    pairs: Pairs
    quality_N: npt.NDArray[np.float64] | None
    """[N] the judge's value of each; None where there are preferences only."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which file is read, and how."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="file or hub data set of prompts with responses")
    group.add_argument("--preset", choices=get_args(PresetName), help="its columns; prompt_response if left out")
    group.add_argument("--columns", nargs="+", default=[], metavar="PART=COLUMN", help="columns unlike the preset's")
    group.add_argument("--num_prompts", type=int, default=200, help="drawn by --seed; all if there are no more")
    group.add_argument("--max_prompt_tokens", type=int, default=1024, help="longer prompts are dropped and counted")
    group.add_argument("--max_response_tokens", type=int, default=1024, help="longer given responses are cut")
    group.add_argument("--verifier", help="class path of a verifier, such as dpr_lightning.evaluation.FinalNumber")
    group.add_argument("--verifier_args", type=json.loads, default={}, help="its settings as a JSON object")
    group.add_argument("--seed", type=int, default=0)


def check_counts(parsed: argparse.Namespace, *names: str) -> None:
    """Refuse a count below 1, a seed that is none, and settings of ``--data`` without it.

    Raises:
        UserError: Naming the flag.
    """
    for name in names:
        if getattr(parsed, name) < 1:
            raise UserError(f"--{name}: found {getattr(parsed, name)}; give a whole number of at least 1")
    for name in ("preset", "columns"):
        if parsed.data is None and getattr(parsed, name):
            raise UserError(f"--{name}: found {getattr(parsed, name)}, but no --data that it could be about; give both")
    if not 0 <= parsed.seed < 2**32:
        raise UserError(f"--seed: found {parsed.seed}; give a whole number from 0 to {2**32 - 1}")


def data_config(parsed: argparse.Namespace, source: str) -> DemonstrationConfig:
    """Return how ``source`` is read, by the arguments of :func:`add_data_arguments`.

    Raises:
        UserError: An argument is malformed.
    """
    columns = {}
    for text in parsed.columns:
        part, is_split, column = text.partition("=")
        if not is_split or not part or not column:
            raise UserError(f"--columns: found '{text}'; write PART=COLUMN, such as prompt=question")
        columns[part] = column
    return DemonstrationConfig(
        source=source,
        preset=parsed.preset or "prompt_response",
        columns=columns or None,
        max_prompt_tokens=parsed.max_prompt_tokens,
        max_response_tokens=parsed.max_response_tokens,
    )


def make_verifier(class_path: str | None, settings: Mapping[str, Any]) -> Verifier | None:
    """Return the verifier that the command line names; None without a name.

    Raises:
        UserError: There is no such class, it is no verifier, or it refuses its settings.
    """
    if class_path is None:
        if settings:
            raise UserError("--verifier_args: found settings, but no --verifier; name one or leave them out")
        return None
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--verifier: no class '{class_path}' ({error}); give its whole class path") from error
    if not isinstance(found, type) or not issubclass(found, Verifier):
        raise UserError(f"--verifier: '{class_path}' is no Verifier; subclass dpr_lightning.evaluation.Verifier")
    try:
        return found(**dict(settings))
    except TypeError as error:
        raise UserError(f"--verifier_args: {error}; give a JSON object of the settings of {name}") from error


def recorded_demonstrations(policies: FrozenPolicies) -> tuple[DemonstrationConfig, SplitName, bool]:
    """Return the data that the teacher's run recorded, the split to use, and whether SFT left it out of training.

    Raises:
        UserError: The teacher is not a run of ours.
    """
    recorded = (policies.manifest or {}).get("data")
    if not recorded:
        raise UserError("--data: the teacher is no run of dpr-lightning, so its prompts are unknown; give a file")
    config = DemonstrationConfig(**recorded["demonstrations"])
    is_held_out = config.validation_source is not None or config.validation_fraction > 0
    return config, "validation" if is_held_out else "train", is_held_out


def read_responses(
    config: DemonstrationConfig,
    policies: FrozenPolicies,
    *,
    num_prompts: int,
    seed: int,
    console: Console,
    split: SplitName = "train",
    needs_response: bool = True,
) -> Responses:
    """Read and encode the responses to prompts drawn by ``seed``; what is left out is counted on ``console``.

    Args:
        config: The source.
        policies: Whose tokenizer and template are used.
        num_prompts: How many distinct prompts; all rows of each are taken.
        seed: Draws them.
        console: Where dropped and cut rows are told.
        split: Which split of the source.
        needs_response: False encodes prompts alone.

    Raises:
        UserError: The source cannot be used.
    """
    encoded = _encode(config, policies, split, console, needs_response=needs_response)
    return _draw(encoded, range(len(encoded)), num_prompts, seed)


def read_judged(
    config: DemonstrationConfig, policies: FrozenPolicies, *, num_prompts: int, seed: int, console: Console
) -> JudgedResponses | None:
    """Read responses with their judgements: columns ``chosen`` and ``rejected``, or ``is_correct``, or ``score``.

    Args:
        config: The source; its response column is replaced by ``chosen`` and ``rejected`` where these are there.
        policies: Whose tokenizer and template are used.
        num_prompts: How many distinct prompts.
        seed: Draws them.
        console: Where dropped and cut rows are told.

    Returns:
        None where the source has no such columns.

    Raises:
        UserError: A judgement cannot be read, two kinds of them are there, or no two responses to one prompt differ.
    """
    available = open_records(config.source, subset=config.subset, hub_split=config.hub_split, key="--data").columns
    kinds = [name for name in JUDGEMENTS if name in available]
    has_pairs = CHOSEN in available and REJECTED in available
    if len(kinds) + has_pairs > 1:
        names = ", ".join([*kinds, *([f"{CHOSEN} and {REJECTED}"] if has_pairs else [])])
        raise UserError(f"--data: '{config.source}' has the columns {names}; keep one kind of judgement")
    if has_pairs:
        return _read_pairs(config, policies, num_prompts, seed, console)
    if not kinds:
        return None
    responses = read_responses(config, policies, num_prompts=num_prompts, seed=seed, console=console)
    quality_N = np.array([_judgement(row, kinds[0]) for row in responses.rows], dtype=np.float64)
    pairs = pair_up(quality_N, responses.prompt_index_N)
    if len(pairs) == 0:
        raise UserError(
            f"--data: no prompt of '{config.source}' has two responses whose {kinds[0]} differs, so nothing can be "
            "ranked; give several responses to each prompt"
        )
    return JudgedResponses(responses=responses, pairs=pairs, quality_N=quality_N)


def worked_answers(responses: Responses, judged: JudgedResponses | None) -> list[int]:
    """Return the number of one response to each prompt that is right: the chosen one, or the first that is judged so.

    Args:
        responses: Responses without judgement, each taken for right.
        judged: The same with judgement, whose ``responses`` are then meant; among scores the best counts as right.
    """
    if judged is None:
        return responses.first_of_each_prompt()
    if judged.quality_N is None:
        _, first = np.unique(judged.pairs.prompt_M, return_index=True)
        return [int(judged.pairs.better_M[index]) for index in first]
    prompt_N, quality_N = judged.responses.prompt_index_N, judged.quality_N
    rows_of = [np.flatnonzero(prompt_N == prompt) for prompt in np.unique(prompt_N)]
    best = [int(rows[quality_N[rows].argmax()]) for rows in rows_of]
    is_verdict = "is_correct" in judged.responses.rows[0]
    return [index for index in best if not is_verdict or quality_N[index] > 0]


def _encode(
    config: DemonstrationConfig,
    policies: FrozenPolicies,
    split: SplitName,
    console: Console,
    *,
    needs_response: bool = True,
    name: str | None = None,
) -> EncodedDemonstrations:
    try:
        encoded, report = encode_table(
            load_demonstrations(config, needs_response=needs_response)[split],
            tokenizer=policies.tokenizer,
            template=policies.template,
            config=config,
            split=name or split,
            needs_response=needs_response,
        )
    except UserError as error:
        # Worded for the keys of fit.
        raise UserError(
            str(error).replace("data.demonstrations.source", "--data").replace("data.demonstrations", "--data")
        ) from error
    if report.counts:
        console.print(report.table(), highlight=False)
    return encoded


def _draw(encoded: EncodedDemonstrations, candidates: Sequence[int], num_prompts: int, seed: int) -> Responses:
    """Return the candidates that answer ``num_prompts`` prompts, in source order."""
    number: dict[tuple[int, ...], int] = {}
    prompt_of = [number.setdefault(tuple(encoded.prompt_ids(index)), len(number)) for index in candidates]
    drawn = {int(prompt): place for place, prompt in enumerate(subsample(len(number), num_prompts, seed))}
    kept = [(index, drawn[prompt]) for index, prompt in zip(candidates, prompt_of, strict=True) if prompt in drawn]
    return Responses(
        prompt_ids=[encoded.prompt_ids(index) for index, _ in kept],
        response_ids=[encoded.response_ids(index) for index, _ in kept],
        rows=[encoded.metadata(index) for index, _ in kept],
        prompt_index_N=np.array([prompt for _, prompt in kept], dtype=np.int64),
    )


def _read_pairs(
    config: DemonstrationConfig, policies: FrozenPolicies, num_prompts: int, seed: int, console: Console
) -> JudgedResponses:
    sides = {}
    for side in (CHOSEN, REJECTED):
        changed = {**(config.columns or {}), "response": side}
        values = {name: getattr(config, name) for name in config.__dataclass_fields__}
        sides[side] = _encode(
            DemonstrationConfig(**{**values, "columns": changed}), policies, "train", console, name=side
        )
    index_of = {side: {int(row): i for i, row in enumerate(encoded.rows)} for side, encoded in sides.items()}
    both = sorted(set(index_of[CHOSEN]) & set(index_of[REJECTED]))
    one_sided = len(set(index_of[CHOSEN]) ^ set(index_of[REJECTED]))
    if one_sided:
        console.print(f"{one_sided} pairs dropped: one of their responses cannot be used", highlight=False)
    # A response that is equal to its rival has no rank beside it.
    differing = [
        row
        for row in both
        if sides[CHOSEN].response_ids(index_of[CHOSEN][row]) != sides[REJECTED].response_ids(index_of[REJECTED][row])
    ]
    if len(differing) < len(both):
        console.print(f"{len(both) - len(differing)} pairs dropped: both responses are the same", highlight=False)
    if not differing:
        raise UserError(f"--data: '{config.source}' holds no usable pair of chosen and rejected; repair its rows")
    chosen = _draw(sides[CHOSEN], [index_of[CHOSEN][row] for row in differing], num_prompts, seed)
    rejected = _draw(sides[REJECTED], [index_of[REJECTED][row] for row in differing], num_prompts, seed)
    num = len(chosen)
    return JudgedResponses(
        responses=Responses(
            prompt_ids=chosen.prompt_ids + rejected.prompt_ids,
            response_ids=chosen.response_ids + rejected.response_ids,
            rows=chosen.rows + rejected.rows,
            prompt_index_N=np.concatenate([chosen.prompt_index_N, rejected.prompt_index_N]),
        ),
        pairs=Pairs(
            better_M=np.arange(num, dtype=np.int64),
            worse_M=np.arange(num, 2 * num, dtype=np.int64),
            prompt_M=chosen.prompt_index_N,
        ),
        quality_N=None,
    )


_WORDS = {"true": 1.0, "false": 0.0}


def _judgement(row: Mapping[str, Any], column: Literal["is_correct", "score"] | str) -> float:
    value = row.get(column)
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (column == "is_correct" and number not in (0.0, 1.0)):
        wanted = "true or false" if column == "is_correct" else "a finite number"
        raise UserError(f"--data: row {row['row']}: column '{column}' holds {value!r}; write {wanted}")
    return number
