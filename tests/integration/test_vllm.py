"""The real vLLM engine on a CPU, in an environment that has it (docs/rollouts.md)."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpr_lightning.application import command_line
from dpr_lightning.errors import UserError
from dpr_lightning.models.adapters import ACTOR, LoRASettings, add_adapter, train_only
from dpr_lightning.models.backbone import locate
from dpr_lightning.models.policies import CausalPolicy, scatter_tokens
from dpr_lightning.rollout import Samples, TransformersSampler, VLLMSampler
from dpr_lightning.rollout.scoring import make_rollouts
from dpr_lightning.types import SamplingConfig

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.timeout(600),
]

EOS = 2
PROMPTS = [[1, 5, 6, 7]] * 4 + [[1, 9, 30, 40, 50, 60]] * 4 + [[1]] * 4
SMALL: dict[str, Any] = {"max_model_len": 64, "enforce_eager": True, "kv_cache_gib": 0.1}


@pytest.fixture
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(locate("dpr_lightning/demo/backbone"))
    return loaded


@pytest.fixture
def make_sampler() -> Iterator[Callable[..., VLLMSampler]]:
    made = []
    assert not torch.distributed.is_initialized()

    def make(**settings: Any) -> VLLMSampler:
        made.append(VLLMSampler(**(SMALL | settings)))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()
    assert not torch.distributed.is_initialized()


def draw(sampler: Any, model: PreTrainedModel, *, seed: int = 0, prompts: Any = PROMPTS, **config: Any) -> Samples:
    settings = SamplingConfig(**({"max_new_tokens": 24} | config))
    found: Samples = sampler.sample(model, prompts, config=settings, eos_token_id=EOS, seed=seed)
    return found


def gap(model: PreTrainedModel, samples: Samples, prompts: Any = PROMPTS) -> float:
    """Return the largest distance of the sampler's log-probabilities to a forward of the trainer's."""
    rollouts = make_rollouts(prompts, samples, range(len(prompts)), pad_id=0)
    with torch.no_grad():
        logp_BT = scatter_tokens(CausalPolicy(model)(rollouts).logp_N, rollouts.response_mask_BT)
    return float((logp_BT - rollouts.sampler_logp_BT).abs().max())


def move(model: PreTrainedModel) -> None:
    """Change every trained weight, as an optimizer does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("lora", [None, "merge", "request"])
def test_the_engine_follows_the_trainers_weights(
    lora: Any, model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]
) -> None:
    if lora is not None:
        add_adapter(model, ACTOR, LoRASettings(rank=4))
        train_only(model, ACTOR)
    sampler = make_sampler(**({} if lora is None else {"lora": lora}))
    for seed in range(3):
        samples = draw(sampler, model, seed=seed)
        # float32 products in another order.
        assert gap(model, samples) < 1e-4
        move(model)
        # What the engine said of the weights before is far from what the trainer says now.
        assert gap(model, samples) > 0.5


def test_every_family_is_served(
    family: str, tiny_model: Callable[..., PreTrainedModel], make_sampler: Callable[..., VLLMSampler]
) -> None:
    # The smallest heads that vLLM's CPU kernels know. Mistral's and Gemma's windows are of four tokens.
    heads = {} if family == "qwen2" else {"head_dim": 32}
    model = tiny_model(family, hidden_size=128, vocab_size=480, **heads)
    sampler = make_sampler()
    for _ in range(2):
        assert gap(model, draw(sampler, model)) < 1e-4
        move(model)


def test_no_state_of_the_weights_before_is_left(
    model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]
) -> None:
    # Longer than a block of the prefix cache, which is 128 tokens on a CPU; without its reset the gap is above 5.
    ids = torch.randint(3, 488, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = make_sampler(max_model_len=256)
    for _ in range(2):
        samples = draw(sampler, model, prompts=[ids] * 4)
        assert gap(model, samples, [ids] * 4) < 1e-4
        move(model)


def test_greedy_responses_are_those_of_the_transformers_sampler(
    model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]
) -> None:
    found = draw(make_sampler(), model, temperature=0.0)
    expected = draw(TransformersSampler(), model, temperature=0.0)
    assert (found.response_ids, found.is_truncated) == (expected.response_ids, expected.is_truncated)
    assert gap(model, found) < 1e-4


def test_ends_lengths_and_seeds(model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]) -> None:
    sampler, seen = make_sampler(), []
    state, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    config = SamplingConfig(max_new_tokens=12)
    prompts = PROMPTS * 8
    samples = sampler.sample(model, prompts, config=config, eos_token_id=EOS, seed=3, on_progress=seen.append)
    assert sum(seen) == len(prompts)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.set_num_threads is set_num_threads
    assert set(samples.is_truncated) == {True, False}
    for ids, logp, is_truncated in zip(samples.response_ids, samples.logp, samples.is_truncated, strict=True):
        assert 1 <= len(ids) <= 12
        assert len(ids) == len(logp)
        assert max(logp) <= 0.0
        assert ids.count(EOS) == (0 if is_truncated else 1)
        assert len(ids) == 12 if is_truncated else ids[-1] == EOS
    # The samples of one prompt differ, and a seed gives the same ones again.
    assert len({tuple(ids) for ids in samples.response_ids[:4]}) > 1
    assert draw(sampler, model, seed=3, prompts=prompts, max_new_tokens=12).response_ids == samples.response_ids
    assert draw(sampler, model, seed=4, prompts=prompts, max_new_tokens=12).response_ids != samples.response_ids


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 5}, {"temperature": 2.0, "top_p": 0.6}], ids=str
)
def test_draws_follow_the_exact_distribution(
    settings: dict[str, Any], model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]
) -> None:
    prompt, num_draws = PROMPTS[4], 2000
    sampler = make_sampler(max_num_seqs=512)
    samples = draw(sampler, model, prompts=[prompt] * num_draws, max_new_tokens=1, **settings)
    with torch.no_grad():
        prob_V = (model(torch.tensor([prompt])).logits[0, -1].double() / settings.get("temperature", 1.0)).softmax(0)
    order_V = prob_V.argsort(descending=True)
    # The nucleus: tokens before which less than top_p lies.
    num_kept = int(((prob_V[order_V].cumsum(0) - prob_V[order_V]) < settings.get("top_p", 1.0)).sum())
    num_kept = min(num_kept, settings.get("top_k") or num_kept)
    kept_V = torch.zeros_like(prob_V)
    kept_V[order_V[:num_kept]] = prob_V[order_V[:num_kept]]
    prob_V = kept_V / kept_V.sum()
    token_B = torch.tensor([ids[0] for ids in samples.response_ids])
    logp_B = torch.tensor([logp[0] for logp in samples.logp], dtype=torch.float64)
    torch.testing.assert_close(logp_B, prob_V[token_B].log(), rtol=0, atol=1e-4)
    count_V = torch.bincount(token_B, minlength=len(prob_V)).double()
    expected_V = prob_V * num_draws
    is_common_V = expected_V >= 5
    expected_C = torch.cat([expected_V[is_common_V], expected_V[~is_common_V].sum()[None]])
    count_C = torch.cat([count_V[is_common_V], count_V[~is_common_V].sum()[None]])
    is_used_C = expected_C > 1e-9
    statistic = float(((count_C - expected_C).square() / expected_C)[is_used_C].sum())
    # chi-square: mean df, variance 2 df. Seeded, so that this either always or never passes.
    df = int(is_used_C.sum()) - 1
    assert statistic < df + 4 * (2 * df) ** 0.5


def test_prompts_that_are_read_in_parts(model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 488, (n,), generator=generator).tolist() for n in (40, 7, 33, 50, 21, 48)]
    sampler = make_sampler(max_num_seqs=4, engine={"max_num_batched_tokens": 32, "enable_chunked_prefill": True})
    samples = draw(sampler, model, prompts=prompts, max_new_tokens=12)
    assert gap(model, samples, prompts) < 1e-4
    assert draw(sampler, model, prompts=prompts, max_new_tokens=12).response_ids == samples.response_ids


def test_the_engine_computes_in_the_trainers_type(
    model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]
) -> None:
    sampler = make_sampler()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples = draw(sampler, model)
    # bfloat16's seven bits, against float32: a gap to see, and no more.
    assert 1e-3 < gap(model, samples) < 0.3


def test_sequences_that_may_not_fit_are_refused(
    model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]
) -> None:
    sampler = make_sampler()
    with pytest.raises(UserError, match=r"max_model_len: found 64, but the longest prompt has 6 .* set it to 66"):
        draw(sampler, model, max_new_tokens=60)
    assert all(len(ids) <= 58 for ids in draw(sampler, model, max_new_tokens=58).response_ids)


def test_what_vllm_refuses_is_the_users_to_change(
    model: PreTrainedModel, make_sampler: Callable[..., VLLMSampler]
) -> None:
    with pytest.raises(UserError, match=r"^model\.sampler: vLLM cannot serve LlamaForCausalLM with these settings: "):
        draw(make_sampler(engine={"block_size": 7}), model)


@pytest.mark.parametrize("lora", [False, True])
def test_dpr_fits_with_rollouts_of_vllm(lora: bool, tmp_path: Path) -> None:
    rows = [{"prompt": f"draw {n}.\n", "response": f"{7 * n} it is"} for n in range(32)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overlays = ("lora",) if lora else ()
    fit("sft", tmp_path / "sft", *overlays, more=sft_settings(tmp_path / "train.jsonl"))
    curves: list[dict[str, float]] = []
    cli = fit(
        "dpr",
        tmp_path / "dpr",
        *overlays,
        "rollout/vllm",
        curves=curves,
        more=[
            f"--model.teacher={tmp_path / 'sft'}",
            "--model.sampler.max_model_len=128",
            "--model.sampler.enforce_eager=true",
            "--model.sampler.kv_cache_gib=0.1",
            "--model.importance_cap=2",
            "--model.decoding.max_new_tokens=16",
            f"--data.demonstrations.source={tmp_path / 'train.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.validation_fraction=0.25",
            "--data.prompts_per_rollout=16",
            "--data.samples_per_prompt=2",
            "--data.global_batch_size=8",
            "--data.micro_batch_size=4",
            "--data.sampling.max_new_tokens=16",
            "--model.optimizer.lr=1e-3",
            "--trainer.max_epochs=2",
        ],
    )
    cli.model.sampler.close()
    first, second = curves
    for stats in curves:
        assert all(math.isfinite(value) for value in stats.values())
        assert stats["rollout/sampler_gap"] < stats["rollout/sampler_gap_max"] < 1e-3
        assert abs(stats["rollout/sampler_kl"]) < 1e-6
        assert stats["rollout/importance_mean"] == pytest.approx(1.0, abs=1e-3)
        assert stats["rollout/importance_capped"] == 0.0
    # The second rollout is of weights that moved away from the teacher; the gap above says that they are the engine's.
    assert abs(first["policy/teacher_kl"]) < 1e-3
    assert second["policy/teacher_kl"] > 0.01
    assert cli.trainer.callback_metrics["val/length"] > 0.0


def sft_settings(source: Path) -> list[str]:
    return [
        f"--data.demonstrations.source={source}",
        "--data.demonstrations.preset=prompt_response",
        "--data.demonstrations.subsample=null",
        "--data.global_batch_size=8",
        "--data.micro_batch_size=8",
        "--trainer.max_epochs=4",
        "--model.optimizer.lr=1e-2",
    ]


def fit(
    recipe: str, run_dir: Path, *overlays: str, more: list[str], curves: list[dict[str, float]] | None = None
) -> Any:
    files = ("base", f"recipe/{recipe}", "backbone/tiny", *overlays, "hardware/cpu")
    arguments = [argument for file in files for argument in ("-c", f"configs/{file}.yaml")]
    from dpr_lightning.modules.on_policy import OnPolicyModule

    before = OnPolicyModule.on_train_epoch_start

    def keep(self: OnPolicyModule) -> None:
        if curves is not None:
            curves.append(self.trainer.datamodule.experience.stats)  # type: ignore[attr-defined]
        before(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnPolicyModule, "on_train_epoch_start", keep)
        return command_line(["fit", *arguments, f"--run_dir={run_dir}", *more])


@pytest.mark.multiprocess
def test_each_rank_has_an_engine_of_its_own(model: PreTrainedModel, demonstrations_file: str, tmp_path: Path) -> None:
    # vLLM's CPU kernels know no heads as small as those of the random models.
    teacher, reference = locate("dpr_lightning/demo/backbone"), tmp_path / "reference"
    move(model)
    model.save_pretrained(reference)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(reference)
    worker = Path(__file__).with_name("vllm_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    found = subprocess.run(
        [*command, str(worker), teacher, str(reference), demonstrations_file, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(2):
        stats = [rank[epoch]["stats"] for rank in ranks]
        assert stats[0] == stats[1]
        assert stats[0]["rollout/num_responses"] == 8
        assert stats[0]["rollout/sampler_gap_max"] < 1e-3
        # Ranks answer different prompts.
        assert ranks[0][epoch]["responses"] != ranks[1][epoch]["responses"]
        assert [len(rank[epoch]["responses"]) for rank in ranks] == [4, 4]
    assert abs(ranks[0][1]["stats"]["policy/teacher_kl"]) > 1e-3
