"""Prompts without their answers: for rollouts, prediction and evaluation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.demonstrations import CONFIG_KEY, DemonstrationConfig, SplitName, load_demonstrations
from dpr_lightning.data.encoding import DropReport, EncodedDemonstrations, encode_table
from dpr_lightning.data.loader import MicroBatchLoader
from dpr_lightning.data.templates import PromptTemplate
from dpr_lightning.errors import UserError

EVALUATION_KEY = "data.evaluation_prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Some prompts, unpadded: each sampler pads as it needs."""

    prompt_ids: list[list[int]]
    """Token ids of each prompt, BOS included."""
    rows: list[dict[str, Any]]
    """Columns of the source row of each prompt, with ``row``, prompt, system and response."""
    for_metrics: bool = True
    """Whether ``model.metrics`` judge the answers."""
    for_figures: bool = True
    """Whether the method's own figures are taken of the answers."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """Return self: there is no tensor to move; Lightning calls this to transfer a batch."""
        del device, kwargs
        return self


PromptLoader: TypeAlias = MicroBatchLoader[tuple[list[int], bool], PromptBatch]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of one split, in source order; a prompt that occurs in several rows occurs here as often."""

    encoded: EncodedDemonstrations
    report: DropReport

    def __len__(self) -> int:
        return len(self.encoded)

    def prompt_ids(self, index: int) -> list[int]:
        """Return the ids of prompt ``index``, BOS included."""
        return self.encoded.prompt_ids(index)

    def row(self, index: int) -> dict[str, Any]:
        """Return the columns of prompt ``index``'s row; read from disk."""
        return self.encoded.metadata(index)

    def batch(self, indices: Sequence[int], *, for_metrics: bool = True, for_figures: bool = True) -> PromptBatch:
        """Return the prompts at ``indices``; for the flags see ``PromptBatch``."""
        return PromptBatch(
            prompt_ids=[self.prompt_ids(index) for index in indices],
            rows=[self.row(index) for index in indices],
            for_metrics=for_metrics,
            for_figures=for_figures,
        )

    def loader(
        self,
        batch_size: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        limit: int | None = None,
        for_metrics: bool = True,
        for_figures: bool = True,
    ) -> PromptLoader:
        """Return a loader of this rank's share, in source order.

        Every rank gets equally many batches, because ranks of a sharded model generate together; where they do not
        divide, the first batches are served again (each row carries its number), and ``model.metrics`` leave them out.

        Args:
            batch_size: Prompts of one batch.
            world_size: Data-parallel ranks.
            rank: This data-parallel rank.
            limit: Serve only this many prompts, the first ones.
            for_metrics: See ``PromptBatch``.
            for_figures: See ``PromptBatch``.
        """
        num_prompts = len(self) if limit is None else min(limit, len(self))
        starts = list(range(0, num_prompts, batch_size))
        num_own = len(starts)
        starts += [starts[i % num_own] for i in range(-num_own % world_size)]
        served = [
            (list(range(start, min(start + batch_size, num_prompts))), place < num_own)
            for place, start in list(enumerate(starts))[rank::world_size]
        ]

        def make(chunk: tuple[list[int], bool]) -> PromptBatch:
            indices, is_first = chunk
            return self.batch(indices, for_metrics=for_metrics and is_first, for_figures=for_figures)

        return MicroBatchLoader(lambda _: served, make)

    @property
    def num_duplicates(self) -> int:
        """Rows whose prompt has occurred before."""
        return len(self) - len(self.encoded.distinct_prompts())


def load_prompts(
    config: DemonstrationConfig,
    *,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    splits: Collection[SplitName] = ("train", "validation", "test"),
    with_responses: Collection[SplitName] = (),
) -> dict[SplitName, Prompts]:
    """Return the prompts of the splits that ``config`` defines, encoded as SFT encodes them.

    Where responses are not asked for they are not needed, and rows whose response SFT could not use are kept; splits
    and subsample are those of SFT with the same configuration.

    Args:
        config: The source and how it is split.
        template: Renders prompts.
        tokenizer: The model's.
        splits: Leave others out.
        with_responses: Splits whose responses are encoded too, as SFT does; rows that it could not use are dropped and
            counted.

    Raises:
        UserError: See :func:`load_demonstrations` and :func:`encode_table`.
    """
    prompts: dict[SplitName, Prompts] = {}
    for split, table in load_demonstrations(config, needs_response=bool(with_responses)).items():
        if split not in splits:
            continue
        encoded, report = encode_table(
            table,
            tokenizer=tokenizer,
            template=template,
            config=config,
            split=split,
            needs_response=split in with_responses,
        )
        prompts[split] = Prompts(encoded, report)
    return prompts


def load_evaluation_prompts(
    config: DemonstrationConfig, *, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    """Return all prompts of ``data.evaluation_prompts``, which ``model.metrics`` judge the answers to.

    Raises:
        UserError: The source cannot be used, or is asked to be split.
    """
    if config.validation_fraction or config.test_fraction or config.validation_source or config.test_source:
        raise UserError(f"{EVALUATION_KEY}: all of its source is evaluated; leave fractions and further sources out")
    try:
        prompts = load_prompts(config, template=template, tokenizer=tokenizer)
    except UserError as error:
        # Worded for the demonstrations.
        raise UserError(str(error).replace(CONFIG_KEY, EVALUATION_KEY)) from error
    return prompts["train"]


def evaluation_split(splits: dict[SplitName, Prompts]) -> SplitName:
    """Return the split on which predictions are made: test, else validation.

    Raises:
        UserError: Neither is configured; answering training prompts would say nothing.
    """
    if "test" in splits:
        return "test"
    if "validation" in splits:
        return "validation"
    raise UserError(
        "data.demonstrations: no held-out prompts to answer; set test_source, test_fraction, validation_source or "
        "validation_fraction"
    )
