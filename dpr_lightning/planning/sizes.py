"""How many rows a run has and how long they are: from flags, from local files, or assumed, and which of these."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dpr_lightning.data.demonstrations import CONFIG_KEY, DemonstrationConfig, DemonstrationTable, load_demonstrations
from dpr_lightning.data.encoding import encode_table
from dpr_lightning.data.readers import local_files
from dpr_lightning.data.templates import TextTemplate
from dpr_lightning.errors import UserError
from dpr_lightning.models.backbone import load_tokenizer, locate
from dpr_lightning.modules.on_policy import OnPolicyModule
from dpr_lightning.planning.settings import PlannedRun

_MAX_BYTES = 2**28
"""Of files that are read for the sake of a plan."""
_NUM_MEASURED = 512
"""Rows whose lengths are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Rows and tokens of a run."""

    num_rows: int | None
    """Training rows; None where nothing says."""
    longest_prompt: int
    longest_response: int
    mean_prompt: float
    mean_response: float
    notes: tuple[str, ...]
    """Where these were found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the user says of them; None is nothing."""

    num_rows: int | None = None
    longest_prompt: int | None = None
    longest_response: int | None = None
    mean_prompt: float | None = None
    mean_response: float | None = None


def find_sizes(run: PlannedRun, given: Given) -> Sizes:
    """Return the sizes of a run's data.

    Raises:
        UserError: What was given contradicts itself, or a file cannot be used.
    """
    config = _demonstrations(run)
    limits = (config or DemonstrationConfig(source="")).max_prompt_tokens, _longest_response(run, config)
    notes: list[str] = []
    num_rows, prompts, responses = _measured(run, config) if config is not None else (None, [], [])
    if num_rows is not None:
        notes.append(f"{num_rows:,} training rows in '{config.source}'" if config is not None else "")
    elif config is not None and config.subsample is not None:
        num_rows = config.subsample
        notes.append(f"{num_rows:,} training rows: data.demonstrations.subsample")
    if given.num_rows is not None:
        num_rows = given.num_rows
    longest_prompt = given.longest_prompt or limits[0]
    longest_response = given.longest_response or limits[1]
    if prompts and not run.is_on_policy:
        longest_prompt = given.longest_prompt or min(limits[0], max(prompts))
    mean_prompt, mean_response = given.mean_prompt, given.mean_response
    if mean_prompt is None:
        mean_prompt = sum(prompts) / len(prompts) if prompts else longest_prompt / 2
    if mean_response is None:
        mean_response = sum(responses) / len(responses) if responses else longest_response / 2
    if prompts:
        notes.append(
            f"lengths of the first {len(prompts)} rows: {mean_prompt:.0f} + {mean_response:.0f} tokens on average"
        )
    elif given.mean_prompt is None or given.mean_response is None:
        notes.append(
            f"lengths not measured: prompts of {mean_prompt:.0f} and responses of {mean_response:.0f} tokens on average"
        )
    for name, mean, longest in (("prompt", mean_prompt, longest_prompt), ("response", mean_response, longest_response)):
        if not 0 < mean <= longest:
            raise UserError(
                f"--mean_{name}_tokens: found {mean:g}; give more than 0 and at most {longest}, the longest"
            )
    return Sizes(
        num_rows=num_rows,
        longest_prompt=longest_prompt,
        longest_response=longest_response,
        mean_prompt=mean_prompt,
        mean_response=mean_response,
        notes=tuple(note for note in notes if note),
    )


def _demonstrations(run: PlannedRun) -> DemonstrationConfig | None:
    found: DemonstrationConfig | None = getattr(run.data, "demonstrations", None)
    if found is not None or not isinstance(run.module, OnPolicyModule):
        return found
    try:
        recorded = (run.module.teacher_manifest or {}).get("data")
    except UserError:
        return None
    return DemonstrationConfig(**recorded["demonstrations"]) if recorded else None


def _longest_response(run: PlannedRun, config: DemonstrationConfig | None) -> int:
    sampled = run.data.sampling.max_new_tokens if run.is_on_policy else 0
    taught = 0 if config is None else config.max_response_tokens
    is_paired = hasattr(run.data, "passes_per_rollout")
    return int(max(sampled, taught) if is_paired or not run.is_on_policy else sampled)


def _measured(run: PlannedRun, config: DemonstrationConfig) -> tuple[int | None, list[int], list[int]]:
    """Return the number of training rows, and lengths of the first of them, as far as small local files say."""
    files = [Path(file) for file in local_files(config.source, f"{CONFIG_KEY}.source")]
    if not files or sum(file.stat().st_size for file in files) > _MAX_BYTES:
        return None, [], []
    table = load_demonstrations(config, needs_response=not run.is_on_policy)["train"]
    start, template = run.start, run.data.template
    if not Path(locate(start)).is_dir():
        return len(table), [], []
    few = DemonstrationTable(table.records, table.columns, table.rows[:_NUM_MEASURED])
    encoded, _ = encode_table(
        few,
        tokenizer=load_tokenizer(start, run.module.backbone),
        template=template or TextTemplate(),
        config=dataclasses.replace(config, max_rejected_share=1.0),
        split="train",
        needs_response=not run.is_on_policy,
        refuse_rejected=False,
    )
    responses = [] if run.is_on_policy else encoded.response_lengths.tolist()
    return len(table), encoded.prompt_lengths.tolist(), responses
