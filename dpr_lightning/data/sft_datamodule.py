"""Demonstrations for SFT, as a Lightning DataModule."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from dpr_lightning.data.batching import PADDING_ROW, MicroBatchPlan, plan_micro_batches
from dpr_lightning.data.demonstrations import (
    CONFIG_KEY,
    DemonstrationConfig,
    SplitName,
    load_demonstrations,
    prepare_sources,
)
from dpr_lightning.data.encoding import DropReport, EncodedDemonstrations, encode_table
from dpr_lightning.data.loader import MicroBatchLoader, data_parallel_rank, running_epoch, set_accumulation
from dpr_lightning.data.positions import warn_beyond_positions
from dpr_lightning.data.prompts import (
    EVALUATION_KEY,
    PromptLoader,
    Prompts,
    evaluation_split,
    load_evaluation_prompts,
    load_prompts,
)
from dpr_lightning.data.templates import PromptTemplate, TextTemplate
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.types import SFTBatch

if TYPE_CHECKING:
    from dpr_lightning.modules.base import CausalLMModule

_STAGE_SPLITS: dict[str, tuple[SplitName, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class SFTDataModule(LightningDataModule):
    """Serves demonstrations in micro-batches of like length, the same optimizer steps whatever the number of ranks.

    Everything that can be refused is refused in ``setup``, which runs before the model's weights are loaded. It reads
    the tokenizer from ``trainer.lightning_module.tokenizer`` and sets ``trainer.accumulate_grad_batches``.

    Args:
        demonstrations: Where demonstrations come from, how they are split and how long they may be.
        template: Renders prompts; by default plain text, for base models.
        global_batch_size: Demonstrations of one optimizer step over all ranks.
        micro_batch_size: Demonstrations of one forward on one rank.
        seed: Orders each epoch.
        drop_last: Leave an incomplete last optimizer step of an epoch out.
        evaluation_prompts: Prompts of their own for ``model.metrics``, all rows of its source; None takes the held-out
            ones.
        num_validation_prompts: Held-out prompts that ``model.metrics`` are taken on; None takes all.
    """

    def __init__(
        self,
        demonstrations: DemonstrationConfig,
        template: PromptTemplate | None = None,
        global_batch_size: int = 256,
        micro_batch_size: int = 8,
        seed: int = 0,
        drop_last: bool = False,
        evaluation_prompts: DemonstrationConfig | None = None,
        num_validation_prompts: int | None = None,
    ) -> None:
        super().__init__()
        self.demonstrations = demonstrations
        self._has_default_template = template is None
        self.template = template if template is not None else TextTemplate()
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.evaluation_prompts = evaluation_prompts
        self.num_validation_prompts = num_validation_prompts
        self.encoded: dict[SplitName, EncodedDemonstrations] = {}
        self.drop_reports: dict[SplitName, DropReport] = {}
        self.prompts: dict[SplitName, Prompts] = {}
        self.metric_prompts: Prompts | None = None
        self.num_leaked_prompts = 0
        self.resumed = (-1, 0)
        """Epoch that was resumed with other sizes of steps, and its first row."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        assert self.trainer is not None
        assert self.trainer.lightning_module is not None
        tokenizer = self.trainer.lightning_module.tokenizer
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, known from ``setup`` on.

        The module counts with this and not with the Trainer's estimate, which would build the training loader before
        a resumed run's place in it is restored.
        """
        assert self.trainer is not None
        return math.ceil(len(self._plan_rows(0, 0)) / self.trainer.accumulate_grad_batches)

    @override
    def prepare_data(self) -> None:
        prepare_sources(self.demonstrations)
        if self.evaluation_prompts is not None:
            prepare_sources(self.evaluation_prompts, key=EVALUATION_KEY)

    @override
    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        if stage == "predict":
            self.prompts = load_prompts(
                self.demonstrations,
                template=self.template,
                tokenizer=self.tokenizer,
                splits=("validation", "test"),
            )
            evaluation_split(self.prompts)
            return
        if stage == "fit":
            set_accumulation(
                self.trainer, global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size
            )
        self._encode(_STAGE_SPLITS[stage])
        self._check_lengths()
        if stage == "fit":
            self._warn_of_template()
            self._warn_of_positions()
        if stage == "fit" and self.drop_last and len(self.encoded["train"]) < self.global_batch_size:
            raise UserError(
                f"data.global_batch_size: {self.global_batch_size} is more than the {len(self.encoded['train'])} "
                "training rows, and drop_last leaves no step; lower it or set data.drop_last to false"
            )
        if self.evaluation_prompts is not None and self.metric_prompts is None:
            self.metric_prompts = load_evaluation_prompts(
                self.evaluation_prompts, template=self.template, tokenizer=self.tokenizer
            )
        needed = _STAGE_SPLITS[stage][0]
        if needed not in self.encoded and not (stage != "fit" and self._has_metric_prompts):
            raise UserError(f"{CONFIG_KEY}: no {needed} rows; set {needed}_fraction or {needed}_source")

    def _check_lengths(self) -> None:
        """Let the model refuse rows that it cannot read before weights are loaded."""
        assert self.trainer is not None
        check: Any = getattr(self.trainer.lightning_module, "check_rows", None)
        if check is None:
            return
        for encoded in self.encoded.values():
            lengths = encoded.prompt_lengths + encoded.response_lengths
            largest_id = max(int(encoded.prompt_flat.max()), int(encoded.response_flat.max()))
            check(int(lengths.max()), largest_id, f"{CONFIG_KEY}.max_prompt_tokens and max_response_tokens")

    @override
    def train_dataloader(self) -> MicroBatchLoader[MicroBatchPlan, SFTBatch]:
        trainer = self.trainer
        assert trainer is not None
        return MicroBatchLoader(self.plan_epoch, self._train_batch, epoch=lambda: running_epoch(trainer))

    @override
    def val_dataloader(self) -> list[Any]:
        # Lightning takes an empty list for "no validation".
        return self._evaluation_loaders("validation", self.num_validation_prompts)

    @override
    def test_dataloader(self) -> list[Any]:
        return self._evaluation_loaders("test", None)

    @override
    def predict_dataloader(self) -> PromptLoader:
        """Serve held-out prompts in source order; see :meth:`Prompts.loader`."""
        assert self.trainer is not None
        world_size, rank = data_parallel_rank(self.trainer)
        prompts = self.prompts[evaluation_split(self.prompts)]
        return prompts.loader(self.micro_batch_size, world_size=world_size, rank=rank)

    def plan_epoch(self, epoch: int) -> list[MicroBatchPlan]:
        """Return this rank's micro-batches of ``epoch``: a function of the data, the sizes, the seed and ``epoch``.

        Of an epoch that was resumed with other sizes they are those of the rows that are left.
        """
        resumed_epoch, first_row = self.resumed
        return self._plan_rows(epoch, first_row if epoch == resumed_epoch else 0)

    def _plan_rows(self, epoch: int, first_row: int) -> list[MicroBatchPlan]:
        assert self.trainer is not None
        encoded = self.encoded["train"]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(encoded))
        world_size, rank = data_parallel_rank(self.trainer)
        return plan_micro_batches(
            order[first_row:].tolist(),
            (encoded.prompt_lengths + encoded.response_lengths).tolist(),
            encoded.response_lengths.tolist(),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            world_size=world_size,
            rank=rank,
            drop_last=self.drop_last,
        )

    def resume_at(self, epoch: int, first_row: int) -> None:
        """Let ``epoch`` hold the rows of its order from ``first_row`` on, and later epochs all of them."""
        assert self.trainer is not None
        self.resumed = (epoch, first_row)
        # Epochs are of unequal length now, and Lightning counts batches.
        self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def data_manifest(self) -> dict[str, Any]:
        """Return, as plain JSON values, what a later stage or reader needs to know of the data of this run."""
        return {
            "demonstrations": dataclasses.asdict(self.demonstrations),
            "template": self.template.to_manifest(),
            "template_fingerprint": self.template.fingerprint(),
            "global_batch_size": self.global_batch_size,
            "order_seed": self.seed,
            "splits": {
                split: {"fingerprint": encoded.fingerprint(), **self.drop_reports[split].to_manifest()}
                for split, encoded in self.encoded.items()
            },
            "validation_prompts_seen_in_training": self.num_leaked_prompts,
        }

    def _encode(self, splits: tuple[SplitName, ...]) -> None:
        missing = [split for split in splits if split not in self.encoded]
        if not missing:
            return
        tables = load_demonstrations(self.demonstrations)
        for split in missing:
            if split not in tables:
                continue
            self.encoded[split], self.drop_reports[split] = encode_table(
                tables[split],
                tokenizer=self.tokenizer,
                template=self.template,
                config=self.demonstrations,
                split=split,
            )
            rank_zero_info(self.drop_reports[split].table())
        if "train" in missing and "validation" in self.encoded:
            self._count_leaked_prompts()

    def _warn_of_template(self) -> None:
        if self._has_default_template and self.tokenizer.chat_template:
            rank_zero_warn(
                "the tokenizer has a chat template, but data.template is left at TextTemplate: the model is trained on "
                "plain text, and the export gets a chat template that writes plain text. For a chat model set "
                "--data.template dpr_lightning.data.ChatTemplate"
            )

    def _warn_of_positions(self) -> None:
        assert self.trainer is not None
        encoded = self.encoded["train"]
        warn_beyond_positions(
            encoded.prompt_lengths + encoded.response_lengths,
            getattr(self.trainer.lightning_module, "max_positions", None),
            what="training rows",
            advice=f"lower {CONFIG_KEY}.max_prompt_tokens or {CONFIG_KEY}.max_response_tokens",
        )

    def _count_leaked_prompts(self) -> None:
        """A split by prompt shares none; a validation source of its own, or a template that drops text, may."""
        held_out = self.encoded["validation"].distinct_prompts()
        self.num_leaked_prompts = len(held_out & self.encoded["train"].distinct_prompts())
        if self.num_leaked_prompts:
            rank_zero_warn(
                f"{self.num_leaked_prompts} of {len(held_out)} distinct validation prompts are training prompts too: "
                "the validation loss will look better than it is"
            )

    @property
    def _has_metric_prompts(self) -> bool:
        """Whether there is something to evaluate beside demonstrations."""
        assert self.trainer is not None
        return (
            self.metric_prompts is not None and len(getattr(self.trainer.lightning_module, "response_metrics", ())) > 0
        )

    def _evaluation_loaders(self, split: SplitName, limit: int | None) -> list[Any]:
        """Return the loader of demonstrations, and one of prompts where ``model.metrics`` ask for answers."""
        assert self.trainer is not None
        loaders: list[Any] = [self._evaluation_loader(split)] if split in self.encoded else []
        module = self.trainer.lightning_module
        if len(getattr(module, "response_metrics", ())) == 0:
            return loaders
        prompts = self.metric_prompts
        if prompts is None and split in self.encoded:
            prompts = Prompts(self.encoded[split], self.drop_reports[split])
        if prompts is not None:
            world_size, rank = data_parallel_rank(self.trainer)
            limit = limit if self.metric_prompts is None else None
            batch_size = cast("CausalLMModule", module).decoding.batch_size
            loaders.append(prompts.loader(batch_size, world_size=world_size, rank=rank, limit=limit))
        return loaders

    def _evaluation_loader(self, split: SplitName) -> MicroBatchLoader[MicroBatchPlan, SFTBatch]:
        assert self.trainer is not None
        encoded = self.encoded[split]
        total_lengths = encoded.prompt_lengths + encoded.response_lengths
        world_size, rank = data_parallel_rank(self.trainer)
        plans = plan_micro_batches(
            np.argsort(-total_lengths, kind="stable").tolist(),
            total_lengths.tolist(),
            encoded.response_lengths.tolist(),
            global_batch_size=self.micro_batch_size * world_size,
            micro_batch_size=self.micro_batch_size,
            world_size=world_size,
            rank=rank,
        )

        def make_batch(plan: MicroBatchPlan) -> SFTBatch:
            own = sum(int(encoded.response_lengths[row]) for row in plan.rows if row != PADDING_ROW)
            # A micro-batch of padding rows alone adds 0 to every sum; a denominator of 1 keeps it finite.
            return self._batch(encoded, plan.rows, num_tokens=max(own, 1))

        return MicroBatchLoader(lambda _: plans, make_batch)

    def _train_batch(self, plan: MicroBatchPlan) -> SFTBatch:
        return self._batch(self.encoded["train"], plan.rows, num_tokens=plan.num_tokens)

    def _batch(self, encoded: EncodedDemonstrations, rows: list[int], *, num_tokens: int) -> SFTBatch:
        tokens = collate(
            [[] if row == PADDING_ROW else encoded.prompt_ids(row) for row in rows],
            [[] if row == PADDING_ROW else encoded.response_ids(row) for row in rows],
            pad_id=pad_id(self.tokenizer),
        )
        return SFTBatch(
            input_ids_BT=tokens.input_ids_BT,
            attention_mask_BT=tokens.attention_mask_BT,
            response_mask_BT=tokens.response_mask_BT,
            num_tokens=num_tokens,
        )
