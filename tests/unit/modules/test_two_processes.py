from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import start_ranks
from transformers import AutoTokenizer

from dpr_lightning.data.templates import TextTemplate
from dpr_lightning.data.tokenization import encode_prompts

pytestmark = pytest.mark.multiprocess

WORKER = Path(__file__).parent / "ddp_worker.py"
NUM_STEPS = {"sft": 3, "dpr_two_steps": 2, "ppo": 2, "pairs": 3}


def run_ranks(directory: Path, *sources: str, worker: Path = WORKER) -> list[dict[str, Any]]:
    """Run the worker as two ranks, and return what each left."""
    outs = [directory / f"rank{rank}.pt" for rank in range(2)]
    start_ranks(worker, [[str(out), *sources] for out in outs], directory)
    return [torch.load(out, weights_only=False) for out in outs]


@pytest.fixture(scope="module")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, frozen_dirs: tuple[str, str], demonstrations_file: str
) -> dict[str, Any]:
    """What one process does."""
    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    directory = tmp_path_factory.mktemp("one_process")
    return worker.run(directory, "auto", *frozen_dirs, demonstrations_file, world_size=1)


@pytest.fixture(params=["ddp", "fsdp"])
def strategy(request: pytest.FixtureRequest) -> str:
    """How two processes share the work."""
    return str(request.param)


@pytest.fixture(scope="module")
def two_processes(
    tmp_path_factory: pytest.TempPathFactory, frozen_dirs: tuple[str, str], demonstrations_file: str
) -> list[dict[str, Any]]:
    """What each of two does, by strategy."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), *frozen_dirs, demonstrations_file)


@pytest.fixture
def found(
    strategy: str, one_process: dict[str, Any], two_processes: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process did, and what each of two did."""
    return one_process, [rank[strategy] for rank in two_processes]


def test_there_were_two_ranks(found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, ranks = found
    for stage in one:
        assert [rank[stage]["rank"] for rank in ranks] == [0, 1]
        assert {rank[stage]["world_size"] for rank in ranks} == {2}
        # The same optimizer step from half as many micro-batches on each rank.
        assert ranks[0][stage]["accumulation"] * 2 == one[stage]["accumulation"]
        assert ranks[0][stage]["loss_scale"] == one[stage]["loss_scale"]


def test_weights_are_whole_or_halves(strategy: str, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, ranks = found
    for stage in one:
        of_ranks = [rank[stage]["num_local"] for rank in ranks]
        if strategy == "ddp":
            assert of_ranks == [one[stage]["num_local"]] * 2
        else:
            assert sum(of_ranks) == one[stage]["num_local"]
            assert max(of_ranks) < 0.52 * one[stage]["num_local"]


@pytest.mark.parametrize("stage", ["sft", "dpr_one_step", "dpr_two_steps", "dpr_greedy", "dpr_lora", "ppo", "pairs"])
def test_the_same_steps_are_taken(stage: str, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, ranks = found
    keys = {
        "sft": ("train/loss",),
        "ppo": ("policy/loss", "value/loss", "value/grad_norm"),
        "pairs": ("policy/loss", "pairs/margin"),
    }.get(stage, ("policy/loss", "policy/ratio_mean"))
    for rank in ranks:
        assert len(rank[stage]["metrics"]) == len(one[stage]["metrics"]) == NUM_STEPS.get(stage, 1)
        for step, metrics in enumerate(one[stage]["metrics"]):
            for key in (*keys, "policy/grad_norm"):
                # The whitened policy loss starts at 0 up to rounding.
                assert rank[stage]["metrics"][step][key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key
        for name, value in one[stage]["weights"].items():
            torch.testing.assert_close(rank[stage]["weights"][name], value, rtol=1e-4, atol=2e-6, msg=name)
            assert torch.equal(rank[stage]["weights"][name], ranks[0][stage]["weights"][name])


def test_the_last_incomplete_step_counts_what_it_has(found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, ranks = found
    # One process counts a step in each of its micro-batches, two in each rank's only one. The last of 24 rows in
    # steps of 10 has 4, which fit one micro-batch of one process.
    counts = [tokens for tokens, _ in one["sft"]["counts"]]
    assert len(counts) == 5
    for rank in ranks:
        assert [tokens for tokens, _ in rank["sft"]["counts"]] == [counts[0], counts[2], counts[4]]


@pytest.mark.parametrize("stage", ["dpr_one_step", "dpr_two_steps", "dpr_greedy", "dpr_lora", "ppo"])
def test_advantages_are_those_of_one_process(stage: str, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, ranks = found
    if stage == "ppo":
        assert abs(one[stage]["stats"]["value/mean"]) > 1e-3
    # Whitened over both ranks, and not on each.
    half = ranks[0][stage]["advantages"][: len(ranks[0][stage]["prompts"]) // 2]
    assert abs(float(torch.cat(half).mean())) > 1e-3
    for rank in ranks:
        assert rank[stage]["prompts"] == one[stage]["prompts"]
        for row, expected in zip(rank[stage]["advantages"], one[stage]["advantages"], strict=True):
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
        for name, value in one[stage]["stats"].items():
            assert rank[stage]["stats"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("stage", ["dpr_one_step", "dpr_two_steps"])
def test_denominators_are_of_the_whole_step(stage: str, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, ranks = found
    num_tokens = int(one[stage]["stats"]["rollout/num_tokens"])
    assert ranks[0][stage]["counts"] == ranks[1][stage]["counts"]
    for part, per_step in ((one, 16 // 4 if stage == "dpr_one_step" else 8 // 4), (ranks[0], None)):
        accumulation = per_step or part[stage]["accumulation"]
        steps = part[stage]["counts"][::accumulation]
        # Each step is counted in full in every one of its micro-batches, and together they are the rollout batch.
        assert part[stage]["counts"] == [count for count in steps for _ in range(accumulation)]
        assert sum(tokens for tokens, _ in steps) == num_tokens
        assert {sequences for _, sequences in steps} == {16 // len(steps)}


def test_pairs_are_those_of_one_process(found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, ranks = found
    for rank in ranks:
        assert rank["pairs"]["prompts"] == one["pairs"]["prompts"]
        tokens, expected = rank["pairs"]["tokens"], one["pairs"]["tokens"]
        # A demonstration may be scored on both ranks: beside this epoch's sample, and beside that of the one before.
        assert expected["scored"] <= tokens["scored"] < 1.2 * expected["scored"]
        assert tokens == expected | {"scored": tokens["scored"]}
        for name, value in one["pairs"]["stats"].items():
            assert rank["pairs"]["stats"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_one_ranks_nan_stops_both(strategy: str, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    messages = [rank["poisoned"]["message"] for rank in found[1]]
    # A shard of one rank is part of every rank's weights.
    first = "loss became nan on rank 0" if strategy == "fsdp" else "loss stopped being finite on another rank"
    assert messages[0].startswith(f"{first} at optimizer step 1, epoch 0")
    assert messages[1].startswith("loss became nan on rank 1 at optimizer step 1, epoch 0")


def test_metrics_of_answers_count_every_prompt_once(
    tmp_path: Path, frozen_dirs: tuple[str, str], demonstrations_file: str
) -> None:
    worker = Path(__file__).parent / "metrics_worker.py"
    ranks = run_ranks(tmp_path, *frozen_dirs, demonstrations_file, worker=worker)
    rows = [json.loads(line) for line in Path(demonstrations_file).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(frozen_dirs[0])
    prompts = encode_prompts(tokenizer, TextTemplate(), [[{"role": "user", "content": row["prompt"]}] for row in rows])
    responses = []
    for prompt in prompts:
        rng = random.Random(str(prompt))
        responses.append([rng.randrange(3, 200) for _ in range(rng.randrange(9))])
    is_even = [len(text) % 2 == 0 for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]
    assert 0 < sum(is_even) < len(is_even)
    for rank in ranks:
        for stage in ("dpr", "sft"):
            assert rank[stage] == pytest.approx(sum(is_even) / len(rows))
