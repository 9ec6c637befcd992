"""What the methods share that start from an SFT teacher and learn from the policy's own samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from dpr_lightning.data.prompts import PromptBatch
from dpr_lightning.data.tokenization import pad_id
from dpr_lightning.errors import UserError
from dpr_lightning.models.adapters import find_source
from dpr_lightning.models.parallel import is_sharded, release
from dpr_lightning.models.policies import AdapterPolicy, CausalPolicy, FrozenTeacher, find_teacher
from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.rollout.scoring import make_rollouts
from dpr_lightning.types import RolloutBatch, SampledExperience


class OnPolicyModule(CausalLMModule):
    """A policy that starts as pi_SFT and learns from its own samples; subclasses say with which loss.

    Args:
        teacher: A run of SFT of ours, or any transformers directory or hub name: pi_SFT, and the start of the policy.
        score_micro_batch_size: Rows of one scoring forward; None is twice the training micro-batch: no gradients.
        offload_frozen: Keep frozen policies, or their shards, in the host's memory while they are not asked.
        kwargs: See ``CausalLMModule``.
    """

    experience_type: ClassVar[type[SampledExperience]]
    """What this method keeps of an epoch's samples."""

    def __init__(
        self,
        teacher: str,
        score_micro_batch_size: int | None = None,
        offload_frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher
        self.score_micro_batch_size = score_micro_batch_size
        self.offload_frozen = offload_frozen
        self._found_teacher: FrozenTeacher | None = None
        self.evaluation_metrics = torch.nn.ModuleDict(
            {name: MeanMetric() for name in ("teacher_kl", "length", "truncated_share")}
        )

    @property
    def found_teacher(self) -> FrozenTeacher:
        """Where the teacher lies; checked on first use, before any weights are read."""
        if self._found_teacher is None:
            self._found_teacher = find_teacher(self.teacher)
        return self._found_teacher

    @override
    def setup(self, stage: str) -> None:
        """Refuse, before weights are loaded, a teacher whose adapter would be trained as a whole model."""
        super().setup(stage)
        if stage == "fit" and self.backbone.lora is None and find_source(self.initial_weights).adapter is not None:
            raise UserError(
                f"model.teacher: '{self.teacher}' was trained with LoRA, but model.backbone.lora is not set, so all "
                "weights would be trained; add -c configs/lora.yaml to continue its adapter, or give a copy of the "
                "merged model without its 'adapter' folder to train all weights"
            )

    @property
    def initial_weights(self) -> str:
        """The teacher: the policy starts as pi_SFT."""
        return self.found_teacher.teacher

    @property
    def teacher_manifest(self) -> dict[str, Any] | None:
        """What the teacher's run recorded of its data and template; None for another trainer's model."""
        return self.found_teacher.manifest

    @property
    @override
    def draws_responses(self) -> bool:
        return True

    @override
    def frozen_sources(self) -> dict[str, str]:
        return {} if self.trainer.state.fn == "predict" else self.scoring_sources

    @property
    def scoring_sources(self) -> dict[str, str]:
        """Where each frozen policy lies that scores samples, by name."""
        return {"teacher": self.found_teacher.teacher}

    @contextmanager
    def frozen_policies(self) -> Iterator[dict[str, CausalPolicy]]:
        """Give the frozen policies by name, on this module's device while the block lasts."""
        own = [policy for policy in self.frozen.values() if not isinstance(policy, AdapterPolicy)]
        for policy in own:
            # Lightning moves only what is in the tree.
            if policy.device != self.device:
                policy.to(self.device)
        try:
            yield self.frozen
        finally:
            for policy in own:
                release(policy)
                if self.offload_frozen and not is_sharded(policy):
                    policy.to("cpu")

    @property
    def scoring_rows(self) -> int:
        """Rows of one scoring forward."""
        if self.score_micro_batch_size is not None:
            return self.score_micro_batch_size
        return 2 * int(getattr(self.trainer.datamodule, "micro_batch_size", 8))  # type: ignore[attr-defined]

    def reduce_sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over all ranks."""
        reduced = self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced.to(value.device)

    def _gather(self, rows_BK: Tensor) -> Tensor:
        """Return the rows of all ranks."""
        gathered = self.all_gather(rows_BK.to(self.device))
        assert isinstance(gathered, Tensor)
        return gathered.reshape(-1, rows_BK.shape[1]).to(rows_BK.device)

    @override
    def on_train_epoch_start(self) -> None:
        """Log the figures of the epoch's rollouts once, at x = the optimizer steps that made the policy of them."""
        experience = getattr(self.trainer.datamodule, "experience", None)  # type: ignore[attr-defined]
        if experience is None:
            return
        for logger in self.trainer.loggers:
            logger.log_metrics(experience.stats, step=self.trainer.global_step)
        # For checkpoints that watch a figure, and for the progress bar. The figures are of all ranks already; syncing
        # changes nothing, but without it Lightning warns of each.
        self.log_dict(experience.stats, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=True)

    @override
    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, "val")

    @override
    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, "test")

    def evaluation_scores(self, rollouts: RolloutBatch) -> dict[str, Tensor]:
        """Return [B] figures of held-out answers, each under a name of ``evaluation_metrics``."""
        raise NotImplementedError

    def _evaluate(self, batch: PromptBatch, batch_idx: int, stage: str) -> None:
        """Answer held-out prompts; log the method's figures of the answers, and what the metrics say of them."""
        samples = self.sample(batch.prompt_ids, self.decoding, seed=self.evaluation_seed(batch_idx))
        self.update_response_metrics(batch, samples)
        if not batch.for_figures:
            return
        rollouts = make_rollouts(batch.prompt_ids, samples, range(len(batch)), pad_id=pad_id(self.tokenizer))
        values = {
            **self.evaluation_scores(rollouts),
            "length": rollouts.response_mask_BT.sum(dim=1).float(),
            "truncated_share": rollouts.is_truncated_B.float(),
        }
        for name, values_B in values.items():
            metric = self.evaluation_metrics[name]
            assert isinstance(metric, MeanMetric)
            metric.update(values_B.to(self.device))
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=1, add_dataloader_idx=False)
