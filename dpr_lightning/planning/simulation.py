"""Runs the program's own training step, scoring and sampling on fake tensors, and says what each stage holds.

The module is the one that ``fit`` would build, and its ``training_step`` and scoring are called as they are. Around
them stands what Lightning does, in its order: gradients are given up between forward and backward, so the forward of a
step's first micro-batch still holds the last step's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpr_lightning.models import ragged
from dpr_lightning.models.adapters import ACTOR, add_adapter, train_only
from dpr_lightning.models.backbone import BackboneConfig, disable_dropout, lm_head
from dpr_lightning.models.critic import ValueModel
from dpr_lightning.models.policies import AdapterPolicy, CausalPolicy, FrozenPair
from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.pairs import PairModule
from dpr_lightning.modules.ppo import PPOModule
from dpr_lightning.planning.batches import Shape, rollouts, training_batch
from dpr_lightning.planning.decoding import BETWEEN, decode_padded, decode_slots
from dpr_lightning.planning.tracker import FROZEN, GRADIENTS, MOMENTS, WEIGHTS, Stage, Tracker
from dpr_lightning.rollout.scoring import token_values
from dpr_lightning.types import SamplingConfig

Kind = Literal["model", "adapter", "base"]

PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "32": (None, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "64-true": (torch.float64, None),
    "64": (torch.float64, None),
}
"""Of Lightning's names of precision: the type that trained weights are turned to, and that of autocast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """Which models a stage holds."""

    config: Any
    """Of the backbone (transformers)."""
    backbone: BackboneConfig
    """How it is loaded; ``lora`` holds the adapter's true size."""
    frozen: Mapping[str, Kind] = field(default_factory=dict)
    """Each frozen policy by name: a whole model of its own, the trained model with another adapter, or without one."""
    precision: str = "32-true"
    is_foreach: bool = False
    """The optimizer works on all weights at once, which it does by default on a GPU."""


class Simulation:
    """A module with fake weights.

    Args:
        module: As ``fit`` makes it, without weights; this object's from here on.
        policies: Which models it is to hold.
        seconds_of: See ``Tracker``.
    """

    def __init__(
        self, module: CausalLMModule, policies: Policies, seconds_of: Callable[[float, float, bool], float]
    ) -> None:
        self.module = module
        self.policies = policies
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Tracker(self.fake, seconds_of)
        self._place = ""
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        weight_type, self.autocast_type = PRECISIONS[policies.precision]
        policy = self._policy().train()
        frozen: dict[str, CausalPolicy] = {}
        lora = policies.backbone.lora
        if lora is not None:
            with torch.device("meta"):
                for name in (ACTOR, *(name for name, kind in policies.frozen.items() if kind == "adapter")):
                    add_adapter(policy.model, name, lora)
            train_only(policy.model, ACTOR)
        for name, kind in policies.frozen.items():
            if kind == "model":
                frozen[name] = self._policy().freeze()
            else:
                adapter = name if kind == "adapter" else None
                frozen[name] = AdapterPolicy(policy, adapter)
        module.policy = policy
        module.__dict__["frozen"] = frozen
        self.trained: list[nn.Module] = [policy]
        if isinstance(module, PPOModule):
            module.value_model = self._critic().train()
            self.trained.append(module.value_model)
        for model in self.trained:
            if weight_type is not None:
                model.to(weight_type)
        for model in (*self.trained, *frozen.values()):
            self._make_fake(model)
        if isinstance(module, DPRModule):
            # So that it does not look for them on the disk.
            references = tuple(name for name in policies.frozen if name != "teacher")
            module._pair = FrozenPair(teacher="teacher", references=references, manifest=None)
        module.finish_step = _loss_alone  # type: ignore[method-assign]
        self._tag_weights(frozen)

    def _policy(self) -> CausalPolicy:
        return CausalPolicy(self._model(), chunk_size=self.module.logprob_chunk_size)

    def _model(self) -> PreTrainedModel:
        backbone = self.policies.backbone
        maker: Any = backbone.model_class or AutoModelForCausalLM
        settings = {"dtype": getattr(torch, backbone.dtype), "attn_implementation": backbone.attn_implementation}
        make = maker._from_config if backbone.model_class is not None else maker.from_config
        with torch.device("meta"):
            model: PreTrainedModel = make(self.policies.config, **settings)
        disable_dropout(model)
        if backbone.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _critic(self) -> ValueModel:
        model = self._model()
        decoder = model.get_decoder()
        assert isinstance(decoder, PreTrainedModel)
        with torch.device("meta"):
            return ValueModel(decoder, hidden_size=lm_head(model).weight_VD.shape[1])

    def _make_fake(self, model: nn.Module) -> None:
        """Put a fake on the CPU in the place of every weight on the meta device; what was shared stays shared."""
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta and not isinstance(tensor, FakeTensor):
                        tensors[name] = self._fake_of(tensor)  # type: ignore[assignment]

    def _fake_of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._fakes:
            with self.fake:
                made = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            # The original is kept, so that no other gets its number.
            self._fakes[id(tensor)] = (tensor, made)
        return self._fakes[id(tensor)][1]

    def _tag_weights(self, frozen: dict[str, CausalPolicy]) -> None:
        for policy in frozen.values():
            self.tracker.tag(_tensors(policy), FROZEN)
        # Shared weights are the trained model's.
        for model in self.trained:
            self.tracker.tag(_tensors(model), WEIGHTS)

    @property
    def num_parameters(self) -> int:
        """Weights of the trained policy's model, adapters included."""
        return sum(parameter.numel() for parameter in self.module.actor.parameters())

    @property
    def num_trained(self) -> int:
        """Weights that the optimizer changes."""
        return sum(parameter.numel() for parameter in self._trained_parameters())

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for model in self.trained for parameter in model.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        dtype = self.autocast_type
        with torch.autocast("cpu", dtype=dtype) if dtype is not None else contextlib.nullcontext():
            yield

    def train(self, shape: Shape, *, accumulates: bool, clips: bool = True) -> dict[str, Stage]:
        """Return the stages of one optimizer step that is not the first, of one micro-batch.

        Args:
            shape: Of the micro-batch.
            accumulates: The step has several micro-batches; this is the last, with gradients of those before. Without,
                the step before's gradients live until the backward begins.
            clips: Whether gradients' norms are clipped.
        """
        parameters = self._trained_parameters()
        hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: self.tracker.tag([parameter.grad], GRADIENTS)
            )
            for parameter in parameters
        ]
        optimizer = self.module.optimizer(self.module.trained_parameters())
        if self.policies.is_foreach and not optimizer.defaults.get("fused"):
            for group in optimizer.param_groups:
                if "foreach" in group and group["foreach"] is None:
                    group["foreach"] = True
        hooks += self._mark_blocks()
        tracker = self.tracker
        tracker.stages.clear()
        with tracker:
            batch = training_batch(self.module, shape)
            # The step before left these.
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            tracker.tag((parameter.grad for parameter in parameters if parameter.grad is not None), GRADIENTS)
            optimizer.step()
            states = (value for state in optimizer.state.values() for value in state.values())
            tracker.tag((value for value in states if isinstance(value, Tensor)), MOMENTS)
            tracker.stages.clear()
            tracker.begin("forward")
            with self._forward():
                loss = self.module.training_step(batch, 0)
            if not accumulates:
                optimizer.zero_grad()
            tracker.begin("backward of the output layer")
            assert isinstance(loss, Tensor)
            loss.backward()
            del loss, batch
            tracker.begin("gradient norms")
            torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            if clips:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            tracker.begin("optimizer")
            optimizer.step()
        for hook in hooks:
            hook.remove()
        optimizer.zero_grad()
        return dict(tracker.stages)

    def _mark_blocks(self) -> list[Any]:
        """Let the backward through the first and the last block be stages of their own: what grows with depth.

        In between memory grows or falls from block to block, so one of these two holds the peak.
        """
        hooks = []
        for model in self.trained:
            layers = find_layers(model)
            for number, layer in enumerate(layers):
                place = "last" if number == len(layers) - 1 else "first" if number == 0 else "middle"
                hooks.append(layer.register_forward_hook(self._marker(place)))
        return hooks

    def _marker(self, place: str) -> Any:
        def at_backward(_: Tensor) -> None:
            self.tracker.begin(f"backward of the {place} block")

        def at_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(at_backward)

        return at_forward

    def score(self, shape: Shape) -> dict[str, Stage]:
        """Return the stage in which one micro-batch of samples is scored under every policy."""
        module = self.module
        assert isinstance(module, DPRModule | PairModule)
        self._attach(shape.rows)
        self.tracker.stages.clear()
        with self.tracker:
            samples = rollouts(shape)
            self.tracker.begin("scoring")
            if isinstance(module, PairModule):
                for number, policy in enumerate((module.actor, module.frozen["teacher"])):
                    module.logprobs(policy, samples, with_entropy=number == 0)
            else:
                module.score(samples, old_logp_BT=module.known_old_logp(samples))
            if isinstance(module, PPOModule):
                self.tracker.begin("scoring by the critic")
                with self._forward():
                    token_values(samples, module.critic, micro_batch_size=shape.rows)
        return dict(self.tracker.stages)

    def _attach(self, rows: int) -> None:
        """Stand in for the Trainer where scoring asks it for the precision and the sizes."""
        stand_in = SimpleNamespace(
            precision_plugin=SimpleNamespace(forward_context=self._forward),
            datamodule=SimpleNamespace(micro_batch_size=rows),
        )
        self.module.score_micro_batch_size = rows  # type: ignore[assignment]
        self.module._trainer = stand_in  # type: ignore[assignment]

    def roll_out(self, shape: Shape, sampling: SamplingConfig, *, late_tokens: int | None = None) -> dict[str, Stage]:
        """Return two stages of sampling: reading the prompts, and one token when ``late_tokens`` are there.

        Args:
            shape: Rows that are decoded together, and their longest prompt and response.
            sampling: Settings of the draw.
            late_tokens: Tokens of prompt and response before the token; None is all but the last.
        """
        model = self.module.actor.model
        late = late_tokens if late_tokens is not None else shape.prompt_tokens + shape.response_tokens - 1
        self.tracker.stages.clear()
        model.eval()
        place = ""

        def begin(name: str) -> None:
            nonlocal place
            place = name
            self.tracker.begin(name)

        # Keys and values of all blocks are there when the last one begins; in a first block there are none.
        last = find_layers(model)[-1].register_forward_pre_hook(lambda *_: self.tracker.begin(f"{place}, last block"))
        decode = decode_slots if ragged.is_enabled(model) else decode_padded
        with torch.no_grad(), self.tracker, self._forward():
            decode(model, self.tracker, begin, shape, late, sampling)
        last.remove()
        model.train()
        return {name: stage for name, stage in self.tracker.stages.items() if not name.startswith(BETWEEN)}


def _loss_alone(out: Any, batch: Any, batch_idx: int) -> Tensor:
    loss: Tensor = out.loss
    return loss


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of a decoder: the longest list of modules in it."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)
