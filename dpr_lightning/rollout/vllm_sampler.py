"""Sampling with a vLLM engine that lives beside the trainer, on the trainer's own device.

The engine is built once, from the model's configuration alone, and takes the weights over in place before it samples,
one tensor at a time: there is no file in between, and an adapter is merged on the way or goes as a LoRA request.
It runs in the trainer's process, so its traces there are undone: random states, autocast, the number of threads.
"""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpr_lightning.errors import UserError
from dpr_lightning.models.adapters import ACTOR, has_adapters, lora_rank, plain_weights, save_adapter
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.vllm_requests import draw
from dpr_lightning.types import SamplingConfig

_KEY = "model.sampler"
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be built for."""
_OURS = frozenset(
    {
        "model",
        "tokenizer",
        "skip_tokenizer_init",
        "load_format",
        "generation_config",
        "logprobs_mode",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "enforce_eager",
        "enable_sleep_mode",
        "enable_lora",
        "max_lora_rank",
        "max_loras",
        "seed",
        "distributed_executor_backend",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
    }
)
"""Arguments of the engine that are set here, or that would part a rank's engine from its rank."""


class VLLMSampler:
    """Samples with vLLM (the extra ``vllm``); one engine on each data-parallel rank.

    The log-probabilities that come with the samples are the engine's. Updates never use them: they are there to be
    compared with the trainer's own (``rollout/sampler_gap``), and for ``model.importance_cap``.

    Args:
        max_model_len: Longest prompt and response together that the engine serves.
        max_num_seqs: Responses that it decodes together; ``sampling.batch_size`` has no say here.
        gpu_memory_utilization: Share of the device's memory that the engine may take for its weights and cache.
        kv_cache_gib: Size of its key-value cache instead, in GiB; on a CPU one is needed, and 1 taken if None.
        dtype: Type that it computes in; None is that of the trainer's own forward, mixed precision included.
        enforce_eager: Neither compile nor capture CUDA graphs: starts in seconds, decodes slower.
        sleep: Give the engine's memory back while the trainer trains; CUDA only. Not run by us yet.
        lora: How an adapter gets there: ``merge`` adds it to the weights that are handed over, ``request`` keeps it
            apart as vLLM's LoRA request, with the rounding of the trainer's own two products.
        engine: Further arguments of the engine by vLLM's own names, such as ``max_num_batched_tokens``.

    Raises:
        UserError: vLLM is not installed, or a setting cannot be used here.
    """

    has_own_weights = True
    """The trainer's are taken over, and need not be gathered for it."""

    def __init__(
        self,
        max_model_len: int = 2048,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.4,
        kv_cache_gib: float | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        enforce_eager: bool = False,
        sleep: bool = False,
        lora: Literal["merge", "request"] = "merge",
        engine: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"{_KEY}: VLLMSampler needs vllm, which is not installed here; install dpr-lightning[vllm] "
                "(docs/rollouts.md says how, also for CPUs), or leave model.sampler out"
            )
        for name, count in (("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs)):
            if count < 1:
                raise UserError(f"{_KEY}.{name}: found {count}; give a whole number of at least 1")
        if not 0.0 < gpu_memory_utilization < 1.0:
            raise UserError(
                f"{_KEY}.gpu_memory_utilization: found {gpu_memory_utilization}; give a share between 0 and 1, and "
                "leave the trainer the rest"
            )
        if kv_cache_gib is not None and not kv_cache_gib > 0.0:
            raise UserError(f"{_KEY}.kv_cache_gib: found {kv_cache_gib}; give a number above 0")
        if taken := sorted(_OURS & set(engine or {})):
            raise UserError(f"{_KEY}.engine: '{taken[0]}' is set by VLLMSampler itself; leave it out")
        if sleep and not torch.cuda.is_available():
            raise UserError(
                f"{_KEY}.sleep: vLLM can give memory back on CUDA only, and there is none here; leave it out"
            )
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gib = kv_cache_gib
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self.lora = lora
        self.engine = dict(engine or {})
        self._llm: Any = None
        self._resources = ExitStack()
        self._num_updates = 0

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        config: SamplingConfig,
        eos_token_id: int | Sequence[int],
        seed: int,
        on_progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Draw one response per prompt; see ``Sampler.sample``.

        Raises:
            UserError: A prompt with its response may not fit the engine, or the engine cannot be built.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt is empty: there is no state to sample from")
        self.check_length(max(map(len, prompts), default=0), config.max_new_tokens)
        dtype = self.dtype or str(_compute_dtype(model)).removeprefix("torch.")
        with _without_traces(model.device), ExitStack() as files:
            try:
                if self._llm is None:
                    self._llm = self._build(model, dtype)
                self._hand_over(model)
                request = self._lora_request(model, files) if self._by_request(model) else None
                samples = draw(
                    self._llm.llm_engine,
                    prompts,
                    config=config,
                    eos_token_id=eos_token_id,
                    seed=seed,
                    lora_request=request,
                    on_progress=on_progress,
                )
                if self.sleep:
                    # Level 2 forgets the weights, which come anew; the base of a request stays, on the host.
                    self._llm.sleep(level=1 if self._by_request(model) else 2)
            except BaseException:
                # It may hold half of the weights, or requests that nobody waits for.
                self.close()
                raise
        return samples

    def check_length(self, longest_prompt: int, max_new_tokens: int) -> None:
        """Refuse prompts whose responses the engine would cut before the length limit.

        Raises:
            UserError: Naming both.
        """
        if longest_prompt + max_new_tokens > self.max_model_len:
            raise UserError(
                f"{_KEY}.max_model_len: found {self.max_model_len}, but the longest prompt has {longest_prompt} tokens "
                f"and its response may take {max_new_tokens}; set it to {longest_prompt + max_new_tokens} or more"
            )

    def close(self) -> None:
        """Give everything back that the engine holds; a later call of ``sample`` builds it anew."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        self._resources.close()

    def _by_request(self, model: PreTrainedModel) -> bool:
        return self.lora == "request" and has_adapters(model)

    def _build(self, model: PreTrainedModel, dtype: str) -> Any:
        """Return an engine of the model's shape, whose weights are still to come."""
        device, world_size = model.device, _world_size()
        if world_size == 1 and device.index not in (None, 0):
            raise UserError(
                f"trainer.devices: vLLM takes the first visible device and the model is on {device}; choose it with "
                "CUDA_VISIBLE_DEVICES instead"
            )
        # In this process, where the weights are; threads are the trainer's business.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        if not torch.distributed.is_initialized():
            # The engine makes one of this process alone, in the way of a strategy that comes later.
            self._resources.callback(_end_process_group)
        directory = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="vllm_")))
        # FSDP2 makes a class of its own of each model's.
        own = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
        settings = model.config.to_dict() | {"architectures": [own.__name__]}
        type(model.config).from_dict(settings).save_pretrained(directory)
        arguments = self.engine | {
            "model": str(directory),
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            # Not the model's own sampling settings; its ends are asked for by each request.
            "generation_config": "vllm",
            # Those of the distribution that is drawn from, as the protocol has it.
            "logprobs_mode": "processed_logprobs",
            "dtype": dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": self.enforce_eager,
            "enable_sleep_mode": self.sleep,
            "seed": 0,
        }
        if self.kv_cache_gib is not None or device.type == "cpu":
            arguments["kv_cache_memory_bytes"] = int((self.kv_cache_gib or 1.0) * 2**30)
        if self._by_request(model):
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(model)}
        with ExitStack() as stack:
            if world_size > 1:
                arguments["distributed_executor_backend"] = "external_launcher"
                stack.enter_context(_launcher_environment(device))
            try:
                llm = vllm.LLM(**arguments)
            except (ValueError, TypeError, NotImplementedError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{_KEY}: vLLM cannot serve {own.__name__} with these settings: {reason}") from error
        # Weights that nobody hands over would be random, and the only sign a large gap.
        llm.apply_model(_forget)
        self._num_updates = 0
        return llm

    def _hand_over(self, model: PreTrainedModel) -> None:
        """Give the engine the model's current weights; of one whose adapter goes by request, the base, and once."""
        is_first, by_request = self._num_updates == 0, self._by_request(model)
        if self.sleep and not is_first:
            self._llm.wake_up(tags=["weights"])
        self._num_updates += 1
        if is_first or not by_request:
            weights = plain_weights(model, None if by_request else ACTOR)
            with torch.no_grad():
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if is_first:
            missing = [name for names in self._llm.apply_model(_forgotten) for name in names]
            if missing:
                raise UserError(
                    f"{_KEY}: vLLM's {type(model).__name__} has {len(missing)} weights that the trainer's has not "
                    f"(first: {missing[0]}); this family cannot be sampled with VLLMSampler, leave model.sampler out"
                )
        if self.sleep and not is_first:
            self._llm.wake_up(tags=["kv_cache"])
        # States of the weights before.
        self._llm.reset_prefix_cache()

    def _lora_request(self, model: PreTrainedModel, files: ExitStack) -> Any:
        """Write the adapter where the engine finds it while ``files`` is open, in memory where that can be."""
        from vllm.lora.request import LoRARequest

        shared = Path("/dev/shm")
        root = shared if os.access(shared, os.W_OK) else None
        directory = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="adapter_", dir=root)))
        save_adapter(model, ACTOR, model.state_dict(), directory, base="unused")
        # The engine keeps adapters by number: a new one is read.
        return LoRARequest(f"{ACTOR}-{self._num_updates}", self._num_updates, str(directory))


def _compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the type of the products in a forward of the trainer, here and now."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _lora_rank(model: PreTrainedModel) -> int:
    rank = lora_rank(model, ACTOR)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError(f"{_KEY}.lora: 'request' cannot gather a sharded adapter; take 'merge'")
    if rank > _LORA_RANKS[-1]:
        raise UserError(f"{_KEY}.lora: vLLM serves ranks up to {_LORA_RANKS[-1]}, found {rank}; take 'merge'")
    return next(served for served in _LORA_RANKS if served >= rank)


def _end_process_group() -> None:
    if torch.distributed.is_initialized():
        from vllm.distributed import parallel_state

        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def _forget(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)


def _forgotten(model: torch.nn.Module) -> list[str]:
    """Return the names of the weights that are still as :func:`_forget` left them, wholly or in part."""
    return [name for name, parameter in model.named_parameters() if bool(parameter.isnan().any())]


@contextmanager
def _launcher_environment(device: torch.device) -> Iterator[None]:
    """Say what vLLM wants to know of ranks, as a launcher would; the process group is the trainer's own."""
    told = {
        "RANK": str(torch.distributed.get_rank()),
        "WORLD_SIZE": str(_world_size()),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(device.index or 0)),
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_traces(device: torch.device) -> Iterator[None]:
    """Leave random states and thread settings as they were, and keep the trainer's autocast out of the engine."""
    states = random.getstate(), np.random.get_state()
    set_num_threads = torch.set_num_threads
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        # On a CPU the engine puts a function there that does nothing.
        torch.set_num_threads = set_num_threads
