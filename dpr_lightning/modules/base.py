"""What every training stage shares: weights, optimizer, schedule, honest loss scaling, and answers to prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, get_cosine_with_min_lr_schedule_with_warmup
from typing_extensions import override

from dpr_lightning.data.loader import data_parallel_rank
from dpr_lightning.errors import NonFiniteError, UserError
from dpr_lightning.evaluation.metrics import ResponseMetric, VerifierAccuracy
from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.functional.losses import LossOutput
from dpr_lightning.manifest import tokenizer_fingerprint
from dpr_lightning.models.adapters import find_source
from dpr_lightning.models.backbone import BackboneConfig, check_token_ids, load_config, locate, of_base
from dpr_lightning.models.critic import ValueModel
from dpr_lightning.models.parallel import whole
from dpr_lightning.models.policies import AdapterPolicy, CausalPolicy, load_policies
from dpr_lightning.models.positions import check_row_length
from dpr_lightning.modules.export import Export
from dpr_lightning.modules.optimization import Settings, apply_settings, few_steps_warning, group_settings
from dpr_lightning.modules.responding import RespondingModule
from dpr_lightning.modules.resume import random_states, restore_place, restore_random_state
from dpr_lightning.precision import replace_precision_plugin, weights_dtype
from dpr_lightning.rollout.sampler import Sampler
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.run_directory import RunLogger
from dpr_lightning.strategy import FullyShardedStrategy
from dpr_lightning.types import SamplingConfig, TokenBatch, as_ends


class CausalLMModule(RespondingModule):
    """Trains one causal language model; subclasses say from which weights and with which loss.

    Args:
        backbone: Which model, and how it is loaded.
        optimizer: Optimizer of the trained weights.
        warmup_ratio: Share of the planned optimizer steps in which the learning rate rises from 0.
        min_lr_ratio: Share of the learning rate that the schedule ends at.
        decoding: How ``validate``, ``test`` and ``predict`` draw responses.
        sampler: What draws them, and the rollouts.
        logprob_chunk_size: Response tokens in one tile of logits, which are 2**22 (16 MiB in float32) whatever V.
        prediction_seed: Seed of ``predict`` and of sampled validation.
        metrics: Figures of the responses to ``data.evaluation_prompts``, or to the held-out prompts where there are
            none; logged by ``validate`` and ``test`` under their names.
        verifier: The same as the metric ``VerifierAccuracy`` of this verifier, logged as accuracy.
    """

    frozen: dict[str, CausalPolicy]
    """Policies that are never trained, by name."""

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: OptimizerCallable = AdamW,
        warmup_ratio: float = 0.03,
        min_lr_ratio: float = 0.1,
        decoding: SamplingConfig | None = None,
        sampler: Sampler | None = None,
        logprob_chunk_size: int = 1024,
        prediction_seed: int = 0,
        metrics: list[ResponseMetric] | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("warmup_ratio", warmup_ratio), ("min_lr_ratio", min_lr_ratio)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"model.{name}: found {value}; give a share between 0 and 1")
        self.backbone = backbone
        self.optimizer = optimizer
        self.warmup_ratio = warmup_ratio
        self.min_lr_ratio = min_lr_ratio
        self.decoding = decoding if decoding is not None else SamplingConfig(temperature=0.7)
        self.sampler: Sampler = sampler if sampler is not None else TransformersSampler()
        self.logprob_chunk_size = logprob_chunk_size
        self.prediction_seed = prediction_seed
        self.metrics = torch.nn.ModuleList(metrics or [])
        if verifier is not None:
            self.metrics.append(VerifierAccuracy(verifier))
        names = [name for metric in self.response_metrics for name in metric.figures]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"model.metrics: two figures are called '{twice[0]}'; give one metric another name")
        self.policy: CausalPolicy | None = None
        # Outside the module tree on purpose: frozen policies have no place in parameters(), optimizer or checkpoints.
        self.__dict__["frozen"] = {}
        self.trained_weights: str | None = None
        """Directory of a finished run's weights, for ``validate``, ``test`` and ``predict`` in place of the start."""
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._response_ends: int | list[int] | None = None
        self._step_metrics: dict[str, Tensor] = {}
        self._configured: list[Settings] = []
        self._random_states: list[dict[str, Any]] | None = None
        """Every rank's, of the checkpoint that the run resumes from, until training starts."""
        self.token_counts = {"trained": 0, "rolled_out": 0, "scored": 0}
        """Prompt and response tokens of this rank, prompts counted with them: trained on, sampled, and put through a
        forward without gradient, once for each model that was trained on them or scored them."""

    @property
    def loading(self) -> BackboneConfig:
        """How weights are loaded: as ``backbone`` says, in the Trainer's type where it names one for all weights."""
        dtype: Any = None if self._trainer is None else weights_dtype(self._trainer.precision)
        return self.backbone if dtype is None else dataclasses.replace(self.backbone, dtype=dtype)

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for, by its configuration; None where it names none."""
        config = load_config(self.initial_weights, self.backbone).get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @override
    def setup(self, stage: str) -> None:
        replace_precision_plugin(self.trainer)

    @override
    def configure_model(self) -> None:
        sources = self.frozen_sources()
        if self.policy is not None and sources.keys() <= self.frozen.keys():
            return
        start = self.trained_weights or self.initial_weights
        policy, frozen = load_policies(start, sources, self.loading, chunk_size=self.logprob_chunk_size)
        self.check_frozen(frozen)
        for other in frozen.values():
            if not isinstance(other, AdapterPolicy):
                self.shard(other, offload=getattr(self, "offload_frozen", False))
        self.frozen.update(frozen)
        if self.policy is not None:
            # It was there for ``predict``, which needs no other.
            return
        self.policy = policy
        if self.draws_responses and hasattr(self.sampler, "check_model"):
            # Before weights are sharded, and not after the first epoch.
            self.sampler.check_model(policy.model)
        model, num_trained = policy.model, sum(parameter.numel() for parameter in self.actor_parameters())
        rank_zero_info(
            f"{type(model).__name__} from '{start}': {model.num_parameters() / 1e6:,.2f}M parameters, "
            f"{model.dtype}; {num_trained / 1e6:,.2f}M are trained"
        )
        self.shard(policy)
        self.policy.train()

    def shard(self, module: CausalPolicy | ValueModel, *, offload: bool = False) -> None:
        """Shard a module over ranks where the Trainer's strategy asks for it; otherwise leave it as it is."""
        strategy = getattr(self._trainer, "strategy", None)
        if isinstance(strategy, FullyShardedStrategy):
            module.shard(strategy.mesh, compute_dtype=strategy.compute_dtype, offload=offload)

    @override
    def configure_optimizers(self) -> Any:
        num_steps = self.planned_optimizer_steps()
        optimizer = self.optimizer(self.trained_parameters())
        # A fused optimizer says that it would unscale gradients by itself, and with mixed precision Lightning then
        # refuses to clip them. It takes gradients that are unscaled and clipped as any other does.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        schedule = self.make_schedule(optimizer, num_steps)
        self._configured = group_settings(optimizer)
        size = getattr(self.trainer.datamodule, "global_batch_size", None)  # type: ignore[attr-defined]
        warning = few_steps_warning(schedule, num_steps, global_batch_size=size, max_epochs=self.trainer.max_epochs)
        if warning is not None:
            rank_zero_warn(warning)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def check_frozen(self, frozen: Mapping[str, CausalPolicy]) -> None:
        """Refuse frozen policies, loaded and not yet sharded, that this stage cannot use."""

    @property
    def draws_responses(self) -> bool:
        """Whether this stage samples from the policy."""
        return bool(self.response_metrics) or (self._trainer is not None and self.trainer.state.fn == "predict")

    def check_rows(self, num_tokens: int, largest_id: int, settings: str) -> None:
        """Refuse rows that the model cannot read, before weights load: too long for its positions, or unknown ids."""
        config = load_config(self.initial_weights, self.backbone)
        ends = as_ends(self.response_ends)
        check_token_ids(max(largest_id, *ends, 0), config, f"the tokenizer of '{self.initial_weights}'")
        check_row_length(num_tokens, config, settings)

    def frozen_sources(self) -> dict[str, str]:
        """Return where each policy lies that this stage needs and never trains, by name."""
        return {}

    def actor_parameters(self) -> list[Parameter]:
        """Return what is trained of the policy: all of it, or its adapter."""
        return [parameter for parameter in self.actor.parameters() if parameter.requires_grad]

    def trained_parameters(self) -> Iterable[Any]:
        """Return what the optimizer trains: parameters, or groups of them with settings of their own."""
        return self.actor_parameters()

    def make_schedule(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        """Return the learning rate of each of ``num_steps`` optimizer steps: warm-up, then a cosine."""
        schedule: LambdaLR = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=round(self.warmup_ratio * num_steps),
            num_training_steps=num_steps,
            min_lr_rate=self.min_lr_ratio,
        )
        return schedule

    def first_learning_rate(self, num_steps: int) -> float:
        """Return the learning rate of the first of ``num_steps`` optimizer steps as a share of its peak."""
        schedule = self.make_schedule(SGD([Parameter(torch.zeros(1))], lr=1.0), num_steps)
        return float(schedule.get_last_lr()[0])

    def planned_optimizer_steps(self) -> int:
        """Return N, the optimizer steps of the whole run, known before the first.

        Raises:
            UserError: Neither ``trainer.max_steps`` nor ``trainer.max_epochs`` bounds the run.
        """
        trainer = self.trainer
        steps_per_epoch = getattr(trainer.datamodule, "steps_per_epoch", None)  # type: ignore[attr-defined]
        if steps_per_epoch is None:
            num_steps = float(trainer.estimated_stepping_batches)
        else:
            max_epochs = trainer.max_epochs
            num_steps = float("inf") if max_epochs is None or max_epochs < 0 else float(max_epochs * steps_per_epoch)
            if trainer.max_steps >= 0:
                num_steps = min(num_steps, trainer.max_steps)
        if num_steps == float("inf"):
            raise UserError(
                "trainer.max_epochs and trainer.max_steps: both are unbounded, so the number of optimizer steps is "
                "unknown; set one of them"
            )
        return int(num_steps)

    @property
    def loss_scale(self) -> float:
        """What a loss that is already divided by the whole optimizer step's tokens must be multiplied by.

        Lightning divides by the number of accumulated micro-batches and DDP and FSDP average over ranks; our
        denominators are global, so both are undone here, and 1xN micro-batches give what Nx1 gives.
        """
        world_size, _ = data_parallel_rank(self.trainer)
        return float(self.trainer.accumulate_grad_batches * world_size)

    def finish_step(self, out: LossOutput, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Check and log one micro-batch's loss; return what Lightning is to differentiate.

        Metrics are shares of the optimizer step, so they are added up over its micro-batches and ranks and logged
        once per step.

        Raises:
            NonFiniteError: The loss of some rank is NaN or infinite.
        """
        self._refuse_non_finite(out.loss, "loss", f"micro-batch {batch_idx}")
        self.token_counts["trained"] += int(batch.attention_mask_BT.sum())
        for name, value in out.metrics.items():
            self._step_metrics[name] = self._step_metrics.get(name, torch.zeros_like(value)) + value
        if self.trainer.is_last_batch or (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            for name, value in self._step_metrics.items():
                is_loss = name.endswith("/loss")
                self.log(name, value, on_step=True, on_epoch=False, prog_bar=is_loss, reduce_fx="sum", sync_dist=True)
            self._step_metrics = {}
        return out.loss * self.loss_scale

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.log_gradients("policy", self.actor, rate=optimizer.param_groups[0]["lr"])

    def log_gradients(self, name: str, model: torch.nn.Module, *, rate: float) -> None:
        """Check and log the norm of a model's gradients before they are clipped, and log its learning rate.

        Raises:
            NonFiniteError: The norm is NaN or infinite on some rank.
        """
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        # float16 finds its loss scale by overflowing now and then, and skips those steps itself.
        if self.trainer.precision != "16-mixed":
            self._refuse_non_finite(norm, "gradient norm", "all micro-batches of the step")
        self.log(f"{name}/grad_norm", norm, on_step=True, on_epoch=False)
        self.log(f"{name}/learning_rate", torch.tensor(rate), on_step=True, on_epoch=False, rank_zero_only=True)

    def total_token_counts(self) -> dict[str, int]:
        """Return ``token_counts`` summed over ranks; every rank must call it."""
        counts = torch.tensor(list(self.token_counts.values()), dtype=torch.float64, device=self.device)
        total = self.trainer.strategy.reduce(counts, reduce_op="sum")
        assert isinstance(total, Tensor)
        return {name: int(value) for name, value in zip(self.token_counts, total.tolist(), strict=True)}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["token_counts"] = self.total_token_counts()
        checkpoint["steps"] = self._step_sizes()
        checkpoint["random_states"] = random_states()
        if self.backbone.lora is not None:
            # The base is where the run found it; a checkpoint holds what was trained.
            trained = self._trained_weights()
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weights[name] for name in weights if name in trained}

    def _step_sizes(self) -> dict[str, int]:
        """Return what a run that resumes must know of this one's optimizer steps to find its place in the epoch."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        resumed_epoch, first_row = getattr(data, "resumed", (-1, 0))
        return {
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "global_batch_size": getattr(data, "global_batch_size", 0),
            "resumed_epoch": resumed_epoch,
            "first_row": first_row,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            restore_place(checkpoint, data, before=checkpoint["steps"], now=self._step_sizes())
            self._random_states = checkpoint.get("random_states", [])
        # The sum of all ranks goes on with the first.
        if self.global_rank == 0:
            self.token_counts = dict(checkpoint["token_counts"])

    @override
    def on_train_start(self) -> None:
        if self._random_states is not None:
            # As late as can be: nothing that happens once more when a run resumes may draw from it.
            restore_random_state(self._random_states, rank=self.global_rank, step=self.trainer.global_step)
            self._random_states = None
            schedules: Any = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            if changes := apply_settings(self.trainer.optimizers, schedules, self._configured):
                rank_zero_info(f"The run resumes with new optimizer settings: {', '.join(changes)}")
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.begin_at(self.trainer.global_step)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's weights: with adapters, all but the base's and the frozen adapters' must be there."""
        if self.backbone.lora is None or not strict:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        if wrong := [*found.unexpected_keys, *(self._trained_weights() & set(found.missing_keys))]:
            raise UserError(
                f"ckpt_path: {len(wrong)} weights of the checkpoint do not fit this run's adapter (first: "
                f"{min(wrong)}); resume with the run's own model.backbone"
            )
        return found

    def _trained_weights(self) -> set[str]:
        """Return the names of the weights in the tree that are trained."""
        named = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if parameter.requires_grad}

    def _refuse_non_finite(self, value: Tensor, what: str, where: str) -> None:
        is_finite = bool(torch.isfinite(value.detach()).all())
        if self.trainer.strategy.reduce_boolean_decision(is_finite, all=True):
            return
        found = "stopped being finite on another rank"
        if not is_finite:
            found = f"became {float(value.detach()):g} on rank {self.global_rank}"
        raise NonFiniteError(
            f"{what} {found} at optimizer step "
            f"{self.trainer.global_step}, epoch {self.current_epoch}, {where}; this step was not applied. Checkpoints "
            "written before it are good: lower the learning rate or look at this batch, then resume with --ckpt_path"
        )

    def save_pretrained(self, directory: Path) -> None:
        """Write the current weights, configuration and tokenizer as a transformers directory (safetensors).

        An adapter is added to its base's weights, and lies beside them in ``adapter/`` too.
        """
        self._export().save_model(directory, is_writer=self.trainer.is_global_zero)

    def save_snapshot(self, directory: Path) -> None:
        """Write the current weights and tokenizer: a transformers directory, or the adapter alone in peft's format."""
        self._export().save_snapshot(directory, is_writer=self.trainer.is_global_zero)

    def _export(self) -> Export:
        return Export(
            model=self.actor.model,
            tokenizer=self.tokenizer,
            template=self._template,
            base=None if self.backbone.lora is None else locate(find_source(self.initial_weights).base),
            revision=self._revision,
        )

    @property
    def _revision(self) -> str | None:
        """Of the model on the hub that was trained, or that carries the adapter."""
        return of_base(find_source(self.initial_weights), self.backbone).revision

    def model_manifest(self) -> dict[str, Any]:
        """Return what a later stage must know of weights trained here: their start, tokenizer, template and data."""
        describe = getattr(self.trainer.datamodule, "data_manifest", None)  # type: ignore[attr-defined]
        return {
            "initial_weights": self.initial_weights,
            "revision": self._revision,
            "tokenizer_fingerprint": tokenizer_fingerprint(self.tokenizer),
            "data": describe() if describe is not None else None,
        }
