"""VLLMSampler with an engine that is none: a transformers model behind vLLM's names, which ends requests backwards."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpr_lightning.errors import UserError
from dpr_lightning.models.adapters import ACTOR, LoRASettings, add_adapter, merged_state, train_only
from dpr_lightning.models.policies import CausalPolicy, scatter_tokens
from dpr_lightning.rollout import Samples, TransformersSampler, VLLMSampler
from dpr_lightning.rollout.sampler import BoundedSampler
from dpr_lightning.rollout.scoring import make_rollouts
from dpr_lightning.types import SamplingConfig

PROMPTS = [[1, 7, 9], [1, 7, 9], [1, 7, 9], [5], [3, 4, 6, 8]]


class FakeEngine:
    """What is used of ``vllm.LLM`` and of its ``llm_engine``."""

    made: list[FakeEngine]
    leaves_out: str = "nothing"
    finish_reason: str | None = None

    def __init__(self, **arguments: Any) -> None:
        # The traces of the real one.
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        torch.set_num_threads = lambda num: None
        self.was_autocast = torch.is_autocast_enabled("cpu")
        self.environment = dict(os.environ)
        self.arguments = arguments
        self.config = AutoConfig.from_pretrained(arguments["model"])
        self.model = AutoModelForCausalLM.from_config(self.config).eval()
        self.llm_engine = self.engine_core = self
        self.calls: list[str] = []
        self.requests: list[tuple[str, Any, Any, Any]] = []
        self.handed_over: list[dict[str, torch.Tensor]] = []
        self.is_shut_down = False
        self.made.append(self)

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self.model)]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        weights = {name: value for name, value in kwargs["weights_iterator"] if self.leaves_out not in name}
        self.handed_over.append({name: value.clone() for name, value in weights.items()})
        self.model.load_state_dict(weights, strict=False)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any) -> None:
        self.requests.append((request_id, prompt["prompt_token_ids"], params, lora_request))

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        self.calls.append("step")
        number, prompt, params, _ = self.requests.pop()
        config = SamplingConfig(max_new_tokens=params.max_tokens, temperature=params.temperature)
        samples = TransformersSampler().sample(
            self.model,
            [prompt],
            config=config,
            eos_token_id=params.stop_token_ids,
            seed=int(torch.randint(9999, ())),
        )
        found = SimpleNamespace(
            token_ids=tuple(samples.response_ids[0]),
            logprobs=[
                {token: SimpleNamespace(logprob=logp), 0: SimpleNamespace(logprob=9.0)}
                if token
                else {0: SimpleNamespace(logprob=logp)}
                for token, logp in zip(samples.response_ids[0], samples.logp[0], strict=True)
            ],
            finish_reason=self.finish_reason or ("length" if samples.is_truncated[0] else "stop"),
            stop_reason=None,
        )
        return [SimpleNamespace(request_id=number, finished=True, outputs=[found])]

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """Install a module ``vllm`` that has the fake engine."""

    class Engine(FakeEngine):
        made: list[FakeEngine] = []  # noqa: RUF012

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("vllm", LLM=Engine, SamplingParams=SimpleNamespace)
    module("vllm.sampling_params", RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    module("vllm.lora")
    module(
        "vllm.lora.request",
        LoRARequest=lambda name, number, path: SimpleNamespace(name=name, number=number, path=Path(path)),
    )
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL"):
        # Deleted, and noted for the teardown even where there was none.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return Engine


@pytest.fixture
def sampler(engines: type[FakeEngine]) -> Iterator[VLLMSampler]:
    made = VLLMSampler(max_model_len=64)
    yield made
    made.close()


def sample(sampler: VLLMSampler, model: PreTrainedModel, *, seed: int = 0, **config: Any) -> Samples:
    settings = SamplingConfig(**({"max_new_tokens": 12} | config))
    return sampler.sample(model, PROMPTS, config=settings, eos_token_id=2, seed=seed)


def gap(model: PreTrainedModel, samples: Samples) -> float:
    rollouts = make_rollouts(PROMPTS, samples, range(len(PROMPTS)), pad_id=0)
    with torch.no_grad():
        logp_BT = scatter_tokens(CausalPolicy(model)(rollouts).logp_N, rollouts.response_mask_BT)
    return float((logp_BT - rollouts.sampler_logp_BT).abs().max())


def test_without_vllm_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"^model\.sampler: VLLMSampler needs vllm.* install dpr-lightning\[vllm\]"):
        VLLMSampler()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 0}, r"^model\.sampler\.max_model_len: found 0; give"),
        ({"max_num_seqs": 0}, r"^model\.sampler\.max_num_seqs: found 0; give"),
        ({"gpu_memory_utilization": 1.0}, r"gpu_memory_utilization: found 1\.0; give a share"),
        ({"kv_cache_gib": 0.0}, r"kv_cache_gib: found 0\.0; give a number above 0"),
        ({"engine": {"seed": 3}}, r"^model\.sampler\.engine: 'seed' is set by VLLMSampler itself"),
        ({"engine": {"tensor_parallel_size": 2}}, "'tensor_parallel_size' is set by VLLMSampler itself"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: Any, message: str, engines: type[FakeEngine]) -> None:
    with pytest.raises(UserError, match=message):
        VLLMSampler(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_sleep_without_cuda_is_refused(engines: type[FakeEngine]) -> None:
    with pytest.raises(UserError, match=r"^model\.sampler\.sleep: .* CUDA only"):
        VLLMSampler(sleep=True)


def test_responses_are_those_of_the_current_weights_in_the_order_of_the_prompts(
    sampler: VLLMSampler, engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    for seed in range(3):
        samples = sample(sampler, model, seed=seed)
        assert gap(model, samples) < 1e-4
        for ids, logp, is_truncated in zip(samples.response_ids, samples.logp, samples.is_truncated, strict=True):
            assert len(ids) == len(logp)
            assert ids.count(2) == (0 if is_truncated else 1)
            assert len(ids) == 12 if is_truncated else ids[-1] == 2
        # Three samples of one prompt.
        assert len({tuple(ids) for ids in samples.response_ids[:3]}) > 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        assert gap(model, samples) > 1e-2
    (engine,) = engines.made
    update = ["reload_weights", "reset_prefix_cache"] + ["step"] * len(PROMPTS)
    assert engine.calls == update * 3


def test_a_seed_says_what_is_drawn(sampler: VLLMSampler, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    first = sample(sampler, model, seed=5)
    assert dataclasses.asdict(sample(sampler, model, seed=5)) == dataclasses.asdict(first)
    assert sample(sampler, model, seed=6).response_ids != first.response_ids


def test_nothing_of_vllms_own_defaults_gets_in(
    sampler: VLLMSampler, engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("qwen2")
    model.generation_config.temperature, model.generation_config.top_p = 0.3, 0.5
    requests: list[Any] = []
    add = FakeEngine.add_request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "add_request", lambda self, *args, **kw: (requests.append(args), add(self, *args, **kw)))
        sample(sampler, model, temperature=0.5, max_new_tokens=4)
    (engine,) = engines.made
    wanted = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 256,
        "kv_cache_memory_bytes": 2**30,
        "seed": 0,
    }
    assert {name: engine.arguments[name] for name in wanted} == wanted
    assert "distributed_executor_backend" not in engine.arguments
    assert engine.config.architectures == ["Qwen2ForCausalLM"]
    assert not list(Path(engine.arguments["model"]).glob("generation_config*"))
    assert engine.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert engine.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert len(requests) == len(PROMPTS)
    for _, _, params in requests:
        assert vars(params) == {
            "n": 1,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": 0,
            "max_tokens": 4,
            "logprobs": 0,
            "stop_token_ids": [2],
            "detokenize": False,
            "output_kind": "final",
        }


def test_the_trainers_process_is_left_as_it_was(
    sampler: VLLMSampler, engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.set_num_threads
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(sampler, model)
        assert torch.is_autocast_enabled("cpu")
    (engine,) = engines.made
    assert not engine.was_autocast
    # The type of the trainer's products, not of its weights.
    assert engine.arguments["dtype"] == "bfloat16"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert torch.set_num_threads is states[3]


def test_progress_counts_every_response(sampler: VLLMSampler, tiny_model: Callable[..., PreTrainedModel]) -> None:
    seen: list[int] = []
    config = SamplingConfig(max_new_tokens=3)
    sampler.sample(tiny_model(), PROMPTS, config=config, eos_token_id=2, seed=0, on_progress=seen.append)
    assert sum(seen) == len(PROMPTS)
    assert sampler.sample(tiny_model(), [], config=config, eos_token_id=2, seed=0).response_ids == []


def test_sequences_that_may_not_fit_are_refused_before_there_is_an_engine(
    sampler: VLLMSampler, engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    assert isinstance(sampler, BoundedSampler)
    assert not isinstance(TransformersSampler(), BoundedSampler)
    with pytest.raises(UserError, match=r"max_model_len: found 64, but the longest prompt has 4 tokens.* set it to 65"):
        sample(sampler, tiny_model(), max_new_tokens=61)
    with pytest.raises(ValueError, match="a prompt is empty"):
        sampler.sample(tiny_model(), [[1], []], config=SamplingConfig(max_new_tokens=1), eos_token_id=2, seed=0)
    assert engines.made == []


def test_weights_that_nobody_hands_over_are_noticed(
    sampler: VLLMSampler, engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    engines.leaves_out = "layers.1.mlp.up_proj"
    with pytest.raises(UserError, match=r"LlamaForCausalLM has 1 weights that the trainer's has not .*1\.mlp\.up_proj"):
        sample(sampler, tiny_model())
    engines.leaves_out = "nothing"
    model = tiny_model()
    assert gap(model, sample(sampler, model)) < 1e-4
    # The first engine was given up.
    assert [engine.is_shut_down for engine in engines.made] == [True, False]


@pytest.mark.parametrize("reason", ["abort", "stop"])
def test_another_end_than_eos_or_the_limit_is_an_error(
    reason: str, sampler: VLLMSampler, engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model()
    samples = sample(sampler, model, max_new_tokens=2)
    assert any(samples.is_truncated)
    engines.finish_reason = reason
    with pytest.raises(RuntimeError, match=rf"after 2 of 2 tokens by '{reason}'"):
        sample(sampler, model, max_new_tokens=2)


def adapted(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = tiny_model("llama", tie_word_embeddings=False)
    add_adapter(model, ACTOR, LoRASettings(rank=4))
    train_only(model, ACTOR)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_an_adapter_is_merged_into_what_is_handed_over(
    sampler: VLLMSampler, engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = adapted(tiny_model)
    assert gap(model, sample(sampler, model)) < 1e-4
    (engine,) = engines.made
    expected = merged_state(model, ACTOR)
    assert engine.handed_over[0].keys() == expected.keys()
    assert all(torch.equal(engine.handed_over[0][name], value) for name, value in expected.items())
    assert "enable_lora" not in engine.arguments


def test_an_adapter_is_handed_over_as_a_request(
    engines: type[FakeEngine], tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = adapted(tiny_model), tiny_model("llama", tie_word_embeddings=False)
    requests: list[Any] = []
    add = FakeEngine.add_request

    def watch(self: FakeEngine, *args: Any, lora_request: Any) -> None:
        requests.append((lora_request, sorted(path.name for path in lora_request.path.iterdir())))
        add(self, *args, lora_request=lora_request)

    monkeypatch.setattr(engines, "add_request", watch)
    sampler = VLLMSampler(max_model_len=64, lora="request")
    for _ in range(2):
        sample(sampler, model)
    (engine,) = engines.made
    assert {name: engine.arguments[name] for name in ("enable_lora", "max_loras", "max_lora_rank")} == {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": 8,
    }
    # The base goes once, and without the adapter.
    (base,) = engine.handed_over
    assert all(torch.equal(base[name], value) for name, value in plain.state_dict().items())
    assert engine.calls.count("reset_prefix_cache") == 2
    assert sorted({(request.number, *files) for request, files in requests}) == [
        (1, "adapter_config.json", "adapter_model.safetensors"),
        (2, "adapter_config.json", "adapter_model.safetensors"),
    ]
    # Adapters do not pile up.
    assert not any(request.path.exists() for request, _ in requests)
    sampler.close()
    assert engine.is_shut_down
    assert not Path(engine.arguments["model"]).exists()


def test_several_ranks_keep_the_trainers_process_group(
    sampler: VLLMSampler,
    engines: type[FakeEngine],
    tiny_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    sample(sampler, tiny_model())
    (engine,) = engines.made
    assert engine.arguments["distributed_executor_backend"] == "external_launcher"
    told = {name: engine.environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    assert told == {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert "RANK" not in os.environ


def test_every_end_ends_a_response(tiny_model: Callable[..., PreTrainedModel], sampler: VLLMSampler) -> None:
    config = SamplingConfig(max_new_tokens=12)
    samples = sampler.sample(tiny_model(), PROMPTS * 8, config=config, eos_token_id=[2, 7, 11], seed=0)
    lasts = [ids[-1] for ids in samples.response_ids]
    assert samples.is_truncated == [last not in (2, 7, 11) for last in lasts]
    assert {2, 7, 11} <= set(lasts)
    assert not any({2, 7, 11} & set(ids[:-1]) for ids in samples.response_ids)
