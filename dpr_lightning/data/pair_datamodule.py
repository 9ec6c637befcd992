"""Pairs of a demonstration and a sample of the current policy to the same prompt: the data of SPIN and GSIL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dpr_lightning.data.batching import PADDING_ROW, MicroBatchPlan
from dpr_lightning.data.demonstrations import DemonstrationConfig, SplitName
from dpr_lightning.data.loader import data_parallel_rank, set_accumulation
from dpr_lightning.data.prompts import Prompts, load_prompts
from dpr_lightning.data.rollout_datamodule import RolloutDataModule
from dpr_lightning.data.templates import PromptTemplate
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.types import PairBatch, PairExperience, RolloutBatch, SampledExperience, TokenBatch, pack

if TYPE_CHECKING:
    from dpr_lightning.modules.pairs import PairModule


_PAIRED: tuple[SplitName, ...] = ("train",)
"""Splits whose demonstrations are trained on."""


class PairDataModule(RolloutDataModule):
    """Samples one response to each prompt once per epoch and serves it beside the prompt's demonstration.

    Demonstrations are encoded as SFT encodes them: with EOS, or cut to ``max_response_tokens`` without one. Rows that
    SFT would drop are dropped here too, and counted in the run's record.

    Args:
        prompts_per_rollout: Pairs of one epoch over all ranks; None takes every training prompt.
        passes_per_rollout: How often an epoch's pairs are trained on, in another order each time. The passes are laid
            end to end: only the epoch's last optimizer step may be incomplete.
        keep_previous: From the second epoch on, train on the pairs of the epoch before once more, scored anew.
        global_batch_size: Pairs of one optimizer step over all ranks.
        micro_batch_size: Pairs of one forward on one rank; a pair is two sequences.
        kwargs: See ``RolloutDataModule``.
    """

    serves = PairExperience

    def __init__(
        self,
        prompts_per_rollout: int | None = None,
        passes_per_rollout: int = 1,
        keep_previous: bool = False,
        global_batch_size: int = 64,
        micro_batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            # Not known before the prompts are: _check_num_prompts counts them.
            prompts_per_rollout=prompts_per_rollout or 0,
            samples_per_prompt=1,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            **kwargs,
        )
        self.num_prompts_wanted = prompts_per_rollout
        self.passes_per_rollout = passes_per_rollout
        self.keep_previous = keep_previous

    def steps_of_epoch(self, epoch: int) -> int:
        """Return the optimizer steps of ``epoch``, known from ``setup`` on."""
        num_pairs = self.prompts_per_rollout * (2 if self.keep_previous and epoch > 0 else 1)
        return -(-num_pairs * self.passes_per_rollout // self.global_batch_size)

    @override
    def data_manifest(self) -> dict[str, Any]:
        return {
            **super().data_manifest(),
            "passes_per_rollout": self.passes_per_rollout,
            "keep_previous": self.keep_previous,
        }

    @override
    def _load_prompts(self, config: DemonstrationConfig, template: PromptTemplate) -> dict[SplitName, Prompts]:
        return load_prompts(config, template=template, tokenizer=self.module.tokenizer, with_responses=_PAIRED)

    @override
    def _roll_out(self, epoch: int) -> SampledExperience:
        previous = None
        if self.keep_previous and epoch > 0:
            assert self.experience is not None
            previous = self._share(self.experience.rollouts)
        rollouts, seconds = self._sample(epoch)
        indices = [batch.prompt_index_B for batch in (rollouts, previous) if batch is not None]
        prompts, demonstration_P = torch.cat(indices).unique(return_inverse=True)
        return cast("PairModule", self.module).build_pairs(
            rollouts,
            previous,
            demonstrations=self._demonstrations(prompts.tolist()),
            demonstration_P=demonstration_P,
            rollout_seconds=seconds,
        )

    def _share(self, rollouts: RolloutBatch) -> RolloutBatch:
        """Return this rank's share of all ranks' samples."""
        assert self.trainer is not None
        world_size, rank = data_parallel_rank(self.trainer)
        if world_size == 1:
            return rollouts
        share = len(rollouts.prompt_index_B) // world_size
        rows = slice(rank * share, (rank + 1) * share)
        return RolloutBatch(**{name: value[rows] for name, value in pack(rollouts).items()})

    @override
    def _merge(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        merged = super()._merge(parts)
        # Each rank numbers its own samples' pairs first, then those of the epoch before; so do all together.
        num_own = len(parts[0]["rollouts"]["prompt_index_B"])
        for name in ("demonstration_logp_P", "sample_logp_P"):
            merged[name] = torch.cat(
                [part[name][:num_own] for part in parts] + [part[name][num_own:] for part in parts]
            )
        return merged

    @override
    def _rows(self, experience: SampledExperience, epoch: int) -> tuple[list[int], list[int], list[int]]:
        assert isinstance(experience, PairExperience)
        encoded = self.prompts["train"].encoded
        parts = [batch for batch in (experience.rollouts, experience.previous) if batch is not None]
        prompt_P = torch.cat([batch.prompt_index_B for batch in parts]).numpy()
        demonstration_P = encoded.response_lengths[prompt_P]
        sample_P = torch.cat([batch.response_mask_BT.sum(dim=1) for batch in parts]).numpy()
        longest_P = encoded.prompt_lengths[prompt_P] + np.maximum(demonstration_P, sample_P)
        order = [
            row
            for number in range(self.passes_per_rollout)
            for row in np.random.default_rng([self.seed, 2, epoch, 0, number]).permutation(len(prompt_P)).tolist()
        ]
        return order, longest_P.tolist(), (demonstration_P + sample_P).tolist()

    @override
    def _prompts_of_rows(self, experience: SampledExperience) -> None:
        # Both responses of a pair are in its micro-batch anyway.
        return None

    @override
    def _make_batch(self, plan: MicroBatchPlan) -> TokenBatch:
        experience = self.experience
        assert isinstance(experience, PairExperience)
        pairs = [self._pair(experience, row) for row in plan.rows]
        prompts, demonstrations, samples = ([pair[part] for pair in pairs] for part in range(3))
        tokens = collate(prompts * 2, demonstrations + samples, pad_id=pad_id(self.module.tokenizer))
        return PairBatch(
            input_ids_BT=tokens.input_ids_BT,
            attention_mask_BT=tokens.attention_mask_BT,
            response_mask_BT=tokens.response_mask_BT,
            old_logp_B=torch.cat(
                [_take(logp_P, plan.rows) for logp_P in (experience.demonstration_logp_P, experience.sample_logp_P)]
            ),
            iteration=self._experience_epoch,
            num_pairs=plan.num_sequences,
        )

    def _pair(self, experience: PairExperience, row: int) -> tuple[list[int], list[int], list[int]]:
        """Return prompt, demonstration and sample of one pair; nothing but empty lists for a padding row."""
        if row == PADDING_ROW:
            return [], [], []
        part: RolloutBatch | None = experience.rollouts
        num_own = len(experience.rollouts.prompt_index_B)
        if row >= num_own:
            part, row = experience.previous, row - num_own
        assert part is not None
        encoded = self.prompts["train"].encoded
        index = int(part.prompt_index_B[row])
        sample: list[int] = part.input_ids_BT[row][part.response_mask_BT[row]].tolist()
        return encoded.prompt_ids(index), encoded.response_ids(index), sample

    def _demonstrations(self, indices: list[int]) -> TokenBatch:
        encoded = self.prompts["train"].encoded
        return collate(
            [encoded.prompt_ids(index) for index in indices],
            [encoded.response_ids(index) for index in indices],
            pad_id=pad_id(self.module.tokenizer),
        )

    @override
    def check_sizes(self) -> None:
        assert self.trainer is not None
        for name, value in (
            ("prompts_per_rollout", self.num_prompts_wanted),
            ("passes_per_rollout", self.passes_per_rollout),
        ):
            if value is not None and value < 1:
                raise UserError(f"data.{name}: found {value}; give a whole number of at least 1")
        set_accumulation(self.trainer, global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size)

    @override
    def _check_num_prompts(self) -> None:
        assert self.trainer is not None
        num_prompts = len(self.prompts["train"])
        wanted = self.num_prompts_wanted if self.num_prompts_wanted is not None else num_prompts
        if wanted > num_prompts:
            raise UserError(
                f"data.prompts_per_rollout: found {wanted}, but there are {num_prompts} training prompts with a "
                "usable demonstration, and none may repeat within an epoch; lower it, or leave it out to take all"
            )
        world_size, _ = data_parallel_rank(self.trainer)
        if wanted % world_size:
            raise UserError(
                f"data.prompts_per_rollout: {wanted} pairs are no multiple of {world_size} data-parallel ranks; set "
                f"it to {wanted // world_size * world_size}"
            )
        self.prompts_per_rollout = wanted


def _take(logp_P: Tensor, rows: list[int]) -> Tensor:
    """Return the entries of ``rows``; 0 for padding rows."""
    row_P = torch.tensor(rows)
    return torch.where(row_P == PADDING_ROW, 0.0, logp_P[row_P.clamp(min=0)])
