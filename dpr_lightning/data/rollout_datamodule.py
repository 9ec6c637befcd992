"""On-policy data: every epoch is one rollout batch, sampled from the current policy and scored before it is served."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed
from typing_extensions import override

from dpr_lightning.data.batching import PADDING_ROW, MicroBatchPlan, plan_micro_batches
from dpr_lightning.data.demonstrations import DemonstrationConfig, SplitName, prepare_sources
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
from dpr_lightning.data.templates import PromptTemplate, TextTemplate, template_from_manifest
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.errors import UserError
from dpr_lightning.rollout.sampler import BoundedSampler
from dpr_lightning.rollout.scoring import make_rollouts
from dpr_lightning.types import (
    Experience,
    RolloutBatch,
    SampledExperience,
    SamplingConfig,
    TokenBatch,
    concatenate,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from dpr_lightning.modules.dpr import DPRModule
    from dpr_lightning.modules.on_policy import OnPolicyModule


class RolloutDataModule(LightningDataModule):
    """Samples responses to training prompts once per epoch and serves them as shuffled micro-batches.

    Prompts come in a seeded order, each once before any comes again. Everything that can be refused is refused in
    ``setup``, before weights are loaded. Mid-epoch checkpoints carry the epoch's rollouts, so a resumed run trains on
    the same ones.

    Args:
        demonstrations: Where prompts come from; None takes the teacher's run's own.
        template: Renders prompts; None takes the teacher's, or plain text where the teacher is not a run of ours.
        sampling: How rollouts are drawn.
        prompts_per_rollout: Prompts of one epoch over all ranks.
        samples_per_prompt: Responses drawn for each of them.
        global_batch_size: Responses of one optimizer step over all ranks.
        micro_batch_size: Responses of one forward on one rank.
        num_validation_prompts: Held-out prompts answered in each validation; None takes all.
        seed: Orders prompts and mini-batches and draws the samples.
        evaluation_prompts: Prompts of their own for ``model.metrics``, all rows of its source; None takes the held-out
            ones.
    """

    serves: ClassVar[type[SampledExperience]] = Experience
    """What the module must make of an epoch's samples."""

    def __init__(
        self,
        demonstrations: DemonstrationConfig | None = None,
        template: PromptTemplate | None = None,
        sampling: SamplingConfig | None = None,
        prompts_per_rollout: int = 1024,
        samples_per_prompt: int = 1,
        global_batch_size: int = 128,
        micro_batch_size: int = 8,
        num_validation_prompts: int | None = None,
        seed: int = 0,
        evaluation_prompts: DemonstrationConfig | None = None,
    ) -> None:
        super().__init__()
        self.demonstrations = demonstrations
        self.template = template
        self.sampling = sampling if sampling is not None else SamplingConfig()
        self.prompts_per_rollout = prompts_per_rollout
        self.samples_per_prompt = samples_per_prompt
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_validation_prompts = num_validation_prompts
        self.seed = seed
        self.evaluation_prompts = evaluation_prompts
        self.prompts: dict[SplitName, Prompts] = {}
        self.metric_prompts: Prompts | None = None
        self.experience: SampledExperience | None = None
        self._experience_epoch = -1

    @property
    def module(self) -> OnPolicyModule:
        """The module that samples and scores."""
        assert self.trainer is not None
        return cast("OnPolicyModule", self.trainer.lightning_module)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one rollout batch."""
        return self.prompts_per_rollout * self.samples_per_prompt // self.global_batch_size

    @override
    def prepare_data(self) -> None:
        prepare_sources(self._resolve_demonstrations())
        if self.evaluation_prompts is not None:
            prepare_sources(self.evaluation_prompts, key=EVALUATION_KEY)

    @override
    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        demonstrations = self._resolve_demonstrations()
        self.demonstrations, self.template = demonstrations, self._resolve_template()
        if stage == "fit":
            if not issubclass(getattr(self.module, "experience_type", type(None)), self.serves):
                raise UserError(
                    f"data.class_path: {type(self).__name__} does not fit model.class_path "
                    f"{type(self.module).__name__}; take both from one recipe"
                )
            self.check_sizes()
        if not self.prompts:
            self.prompts = self._load_prompts(demonstrations, self.template)
            for prompts in self.prompts.values():
                rank_zero_info(prompts.report.table())
        if self.evaluation_prompts is not None and self.metric_prompts is None:
            self.metric_prompts = load_evaluation_prompts(
                self.evaluation_prompts, template=self.template, tokenizer=self.module.tokenizer
            )
        self._check_lengths(stage)
        if stage == "fit":
            self._check_num_prompts()
            # One rollout per epoch: the loader is asked for again at the start of each.
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        elif stage == "predict" or not self._has_metric_prompts:
            evaluation_split(self.prompts)

    @override
    def train_dataloader(self) -> MicroBatchLoader[MicroBatchPlan, TokenBatch]:
        """Roll out and score with the weights as they are now, unless this epoch's rollouts were just restored."""
        trainer = self.trainer
        assert trainer is not None
        epoch = running_epoch(trainer)
        max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        is_over = 0 <= max_epochs <= epoch or 0 <= trainer.max_steps <= trainer.global_step
        # Lightning asks also where a resumed run has nothing left to train.
        if self.experience is None or (self._experience_epoch != epoch and not is_over):
            self.experience = self._of_all_ranks(self._roll_out(epoch))
            self._experience_epoch = epoch
        plans = self._plan_updates(self.experience, epoch)
        return MicroBatchLoader(lambda _: plans, self._make_batch, epoch=lambda: running_epoch(trainer))

    @override
    def val_dataloader(self) -> list[PromptLoader]:
        # Lightning takes an empty list for "no validation".
        return self._evaluation_loaders(self.prompts.get("validation"), self.num_validation_prompts)

    @override
    def test_dataloader(self) -> list[PromptLoader]:
        return self._evaluation_loaders(self.prompts.get("test", self.prompts.get("validation")), None)

    @override
    def predict_dataloader(self) -> PromptLoader:
        return self._prompt_loader(self.prompts[evaluation_split(self.prompts)], None)

    def row(self, index: int) -> dict[str, Any]:
        """Return the columns of training prompt ``index``."""
        return self.prompts["train"].row(index)

    def data_manifest(self) -> dict[str, Any]:
        """Return, as plain JSON values, what a later stage or reader needs to know of the data of this run."""
        assert self.demonstrations is not None
        assert self.template is not None
        return {
            "demonstrations": dataclasses.asdict(self.demonstrations),
            "template": self.template.to_manifest(),
            "template_fingerprint": self.template.fingerprint(),
            "prompts_per_rollout": self.prompts_per_rollout,
            "samples_per_prompt": self.samples_per_prompt,
            "global_batch_size": self.global_batch_size,
            "sampling": dataclasses.asdict(self.sampling),
            "order_seed": self.seed,
            "splits": {
                split: {"fingerprint": prompts.encoded.fingerprint(), **prompts.report.to_manifest()}
                for split, prompts in self.prompts.items()
            },
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the running epoch's experience, so that a run killed in the middle of it goes on with the same."""
        if self.experience is None:
            return {}
        return {"epoch": self._experience_epoch, **pack(self.experience)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the experience of :meth:`state_dict` back."""
        if not state_dict:
            return
        self._experience_epoch = int(state_dict["epoch"])
        self.experience = unpack(self.module.experience_type, state_dict)

    def prompt_indices(self, epoch: int) -> list[int]:
        """Return the training prompts of ``epoch``'s rollout over all ranks: seeded, no repeat within a pass."""
        num_prompts, size = len(self.prompts["train"]), self.prompts_per_rollout
        positions = range(epoch * size, (epoch + 1) * size)
        passes = {
            number: np.random.default_rng([self.seed, 0, number]).permutation(num_prompts)
            for number in {position // num_prompts for position in positions}
        }
        return [int(passes[position // num_prompts][position % num_prompts]) for position in positions]

    def _load_prompts(self, config: DemonstrationConfig, template: PromptTemplate) -> dict[SplitName, Prompts]:
        return load_prompts(config, template=template, tokenizer=self.module.tokenizer)

    def _of_all_ranks(self, experience: SampledExperience) -> SampledExperience:
        """Return every rank's experience, in the order of prompts: updates are then dealt as one process deals them.

        A checkpoint of any rank holds it all, and resumes on another number of ranks.
        """
        assert self.trainer is not None
        if self.trainer.world_size == 1:
            return experience
        parts: list[Any] = [None] * self.trainer.world_size
        distributed.all_gather_object(parts, pack(experience))
        merged = self._merge(parts)
        merged["seconds"] = {name: max(part["seconds"][name] for part in parts) for name in experience.seconds}
        return unpack(type(experience), merged)

    def _merge(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one packed experience of all ranks', in the order of ranks."""
        merged: dict[str, Any] = concatenate(parts)
        return merged

    def _roll_out(self, epoch: int) -> SampledExperience:
        """Return this rank's share of the epoch's samples with all that the module's updates need."""
        rollouts, seconds = self._sample(epoch)
        return cast("DPRModule", self.module).build_experience(rollouts, rollout_seconds=seconds)

    def _sample(self, epoch: int) -> tuple[RolloutBatch, float]:
        """Return this rank's samples of ``epoch`` from the current policy, and the seconds that they took."""
        trainer = self.trainer
        assert trainer is not None
        world_size, rank = data_parallel_rank(trainer)
        share = self.prompts_per_rollout // world_size
        mine = self.prompt_indices(epoch)[rank * share : (rank + 1) * share]
        repeated = [index for index in mine for _ in range(self.samples_per_prompt)]
        prompt_ids = [self.prompts["train"].prompt_ids(index) for index in repeated]
        # Ranks draw differently, and a resumed epoch draws as the first time.
        seed = int(np.random.SeedSequence([self.seed, 1, epoch, rank]).generate_state(1)[0])
        start = time.perf_counter()
        # Our progress bar shows rollouts; the Trainer may have another, or none.
        show = getattr(trainer.progress_bar_callback, "rollout_bar", lambda total: nullcontext())
        with show(len(prompt_ids)) as advance:
            samples = self.module.sample(prompt_ids, self.sampling, seed=seed, on_progress=advance)
        rollouts = make_rollouts(prompt_ids, samples, repeated, pad_id=pad_id(self.module.tokenizer))
        return rollouts, time.perf_counter() - start

    def _rows(self, experience: SampledExperience, epoch: int) -> tuple[list[int], list[int], list[int]]:
        """Return the order in which rows are trained on, and by row number its tokens and its response tokens."""
        rollouts = experience.rollouts
        order = np.random.default_rng([self.seed, 2, epoch, 0]).permutation(len(rollouts.prompt_index_B))
        return (
            order.tolist(),
            rollouts.attention_mask_BT.sum(dim=1).tolist(),
            rollouts.response_mask_BT.sum(dim=1).tolist(),
        )

    def _plan_updates(self, experience: SampledExperience, epoch: int) -> list[MicroBatchPlan]:
        """Deal all ranks' rows to optimizer steps and micro-batches; return those of this rank."""
        assert self.trainer is not None
        world_size, rank = data_parallel_rank(self.trainer)
        return plan_micro_batches(
            *self._rows(experience, epoch),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            world_size=world_size,
            rank=rank,
            prompts=self._prompts_of_rows(experience),
        )

    def _prompts_of_rows(self, experience: SampledExperience) -> list[int] | None:
        """Return by row number which prompt it answers, or None where each row has a prompt of its own."""
        return experience.rollouts.prompt_index_B.tolist()

    def _make_batch(self, plan: MicroBatchPlan) -> TokenBatch:
        # The responses divide into whole micro-batches (checked in setup), so there are no padding rows.
        assert PADDING_ROW not in plan.rows
        assert isinstance(self.experience, Experience)
        return cast("DPRModule", self.module).make_batch(self.experience, plan)

    def _prompt_loader(self, prompts: Prompts, limit: int | None, **flags: bool) -> PromptLoader:
        assert self.trainer is not None
        world_size, rank = data_parallel_rank(self.trainer)
        return prompts.loader(self.sampling.batch_size, world_size=world_size, rank=rank, limit=limit, **flags)

    @property
    def _has_metric_prompts(self) -> bool:
        """Whether ``model.metrics`` have prompts of their own."""
        return self.metric_prompts is not None and len(self.module.response_metrics) > 0

    def _evaluation_loaders(self, held_out: Prompts | None, limit: int | None) -> list[PromptLoader]:
        """Return the loader of held-out prompts, and that of the metrics' own, where there are any."""
        has_own = self._has_metric_prompts
        loaders = []
        if held_out is not None:
            loaders.append(self._prompt_loader(held_out, limit, for_metrics=not has_own))
        if has_own:
            assert self.metric_prompts is not None
            loaders.append(self._prompt_loader(self.metric_prompts, None, for_figures=False))
        return loaders

    def _resolve_demonstrations(self) -> DemonstrationConfig:
        if self.demonstrations is not None:
            return self.demonstrations
        recorded = (self.module.teacher_manifest or {}).get("data")
        if not recorded:
            raise UserError(
                "data.demonstrations: the teacher is not a run of dpr-lightning, so its prompts are unknown; set "
                "data.demonstrations.source to a file of prompts"
            )
        return DemonstrationConfig(**recorded["demonstrations"])

    def _resolve_template(self) -> PromptTemplate:
        recorded = (self.module.teacher_manifest or {}).get("data")
        taught = template_from_manifest(recorded["template"]) if recorded else None
        if taught is not None and self.template is not None and self.template != taught:
            raise UserError(
                f"data.template: found {self.template}, but the teacher was trained with {taught}; leave it out"
            )
        return taught or self.template or TextTemplate()

    def check_sizes(self) -> None:
        """Refuse sizes that do not divide; make the Trainer accumulate as they say."""
        trainer = self.trainer
        assert trainer is not None
        for name in ("prompts_per_rollout", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}: found {getattr(self, name)}; give a whole number of at least 1")
        world_size, _ = data_parallel_rank(trainer)
        set_accumulation(trainer, global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size)
        num_responses = self.prompts_per_rollout * self.samples_per_prompt
        if num_responses % self.global_batch_size or self.prompts_per_rollout % world_size:
            raise UserError(
                f"data.prompts_per_rollout: {self.prompts_per_rollout} prompts x {self.samples_per_prompt} samples = "
                f"{num_responses} responses are no multiple of data.global_batch_size {self.global_batch_size}, or the "
                f"prompts none of {world_size} ranks; change one so that they divide"
            )

    def _check_lengths(self, stage: str) -> None:
        """Before weights load, let model and sampler refuse what is too long for them, and warn of what may be."""
        if stage == "fit":
            warn_beyond_positions(
                self.prompts["train"].encoded.prompt_lengths + self.sampling.max_new_tokens,
                getattr(self.module, "max_positions", None),
                what="prompts, with the longest response,",
                advice="lower data.sampling.max_new_tokens or data.demonstrations.max_prompt_tokens",
            )
        sampler = self.module.sampler
        for split, prompts in self.prompts.items():
            if split == "train" and stage != "fit":
                continue
            decoding = self.sampling if split == "train" else self.module.decoding
            longest = int(prompts.encoded.prompt_lengths.max())
            key = "data.sampling" if split == "train" else "model.decoding"
            largest_id = int(prompts.encoded.prompt_flat.max())
            self.module.check_rows(longest + decoding.max_new_tokens, largest_id, f"{key}.max_new_tokens")
            if isinstance(sampler, BoundedSampler):
                sampler.check_length(longest, decoding.max_new_tokens)

    def _check_num_prompts(self) -> None:
        num_prompts = len(self.prompts["train"])
        if self.prompts_per_rollout > num_prompts:
            raise UserError(
                f"data.prompts_per_rollout: found {self.prompts_per_rollout}, but there are {num_prompts} training "
                "prompts and none may repeat within a rollout; lower it, or raise data.samples_per_prompt instead"
            )
