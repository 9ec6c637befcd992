"""SFT, its reference and DPR on SmolLM2-135M with rows of GSM8K: real weights, a real tokenizer, pad == EOS."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from smollm2 import convert, needs_smollm2
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpr_lightning.application import command_line
from dpr_lightning.main import main
from dpr_lightning.manifest import read_json, read_manifest

pytestmark = [
    pytest.mark.real_model,
    needs_smollm2,
    pytest.mark.timeout(600),
]

GSM8K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"
NUM_STEPS = 4
NUM_PROMPTS = 4
MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Runs:
    """Two finished runs, and what the second rolled out."""

    sft: Path
    dpr: Path
    sft_data: Any
    experience: Any
    eos_id: int


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    # 2.7 GB, which pytest's own temporary directories would keep for three sessions.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model_dir = convert(root / "model")
        rows = root / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in demonstrations(2 * NUM_STEPS)))
        sft = fit(
            "sft",
            root / "sft",
            f"--model.backbone.name_or_path={model_dir}",
            f"--data.demonstrations.source={rows}",
            "--data.demonstrations.preset=gsm8k",
            "--data.demonstrations.subsample=null",
            "--data.global_batch_size=2",
            "--data.micro_batch_size=1",
            # Large enough that teacher and reference differ well above rounding.
            "--model.optimizer.lr=1e-4",
        )
        dpr = fit(
            "dpr",
            root / "dpr",
            f"--model.backbone.name_or_path={model_dir}",
            f"--model.teacher={root / 'sft'}",
            f"--data.prompts_per_rollout={NUM_PROMPTS}",
            f"--data.sampling.max_new_tokens={MAX_NEW_TOKENS}",
            "--data.global_batch_size=2",
            "--data.micro_batch_size=1",
            "--trainer.max_epochs=1",
        )
        yield Runs(
            sft=root / "sft",
            dpr=root / "dpr",
            sft_data=sft.datamodule,
            experience=dpr.datamodule.experience,
            eos_id=dpr.model.tokenizer.eos_token_id,
        )


def demonstrations(num_rows: int) -> list[dict[str, str]]:
    """Return short rows of GSM8K, or rows like them where the shared data are not there."""
    if not GSM8K.exists():
        return [
            {"question": f"Ann has {n} pens and buys {n + 1}. How many?", "answer": f"{n}+{n + 1}={2 * n + 1}\n#### x"}
            for n in range(num_rows)
        ]
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    return sorted(rows, key=lambda row: len(row["question"]) + len(row["answer"]))[:num_rows]


def fit(recipe: str, run_dir: Path, *more: str) -> Any:
    files = ("base", f"recipe/{recipe}", "backbone/smollm2_135m", "hardware/cpu")
    overlays = [argument for file in files for argument in ("-c", f"configs/{file}.yaml")]
    cli = command_line(["fit", *overlays, f"--run_dir={run_dir}", *more])
    # Three models and an optimizer: 2.7 GB that the test no longer needs.
    cli.model.policy = None
    if recipe == "dpr":
        cli.model.frozen.clear()
    cli.trainer.strategy.optimizers = []
    return cli


def logged(run_dir: Path) -> dict[str, list[Any]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("stage", ["sft", "dpr"])
def test_every_logged_number_is_finite(runs: Runs, stage: str) -> None:
    scalars = logged(getattr(runs, stage))
    for tag, events in scalars.items():
        assert all(math.isfinite(event.value) for event in events), tag
    expected = {"sft": {"train/loss"}, "dpr": {"policy/loss", "reward/mean", "return/mean", "logp/old"}}[stage]
    groups = {tag.partition("/")[0] for tag in scalars}
    assert {tag.partition("/")[0] for tag in expected} <= groups
    num_steps = {"sft": NUM_STEPS, "dpr": NUM_PROMPTS // 2}[stage]
    # Lightning counts the first step 0.
    assert [event.step for event in scalars["policy/grad_norm"]] == list(range(num_steps))


def test_snapshot_lies_at_half(runs: Runs) -> None:
    reference = read_manifest(runs.sft / "reference" / "alpha_0.5")
    final = read_manifest(runs.sft / "final")
    assert (reference["step"], reference["planned_steps"]) == (NUM_STEPS // 2, NUM_STEPS)
    assert final["step"] == NUM_STEPS
    assert reference["weights_sha256"] != final["weights_sha256"]
    assert read_json(runs.dpr / "run.json")["optimizer_steps"] == NUM_PROMPTS // 2


def test_demonstrations_teach_eos_although_it_is_the_padding(runs: Runs) -> None:
    encoded = runs.sft_data.encoded["train"]
    for row in range(len(encoded)):
        ids = list(encoded.response_ids(row))
        assert ids[-1] == runs.eos_id
        assert ids.count(runs.eos_id) == 1


def test_padding_is_no_response_although_it_is_eos(runs: Runs) -> None:
    rollouts = runs.experience.rollouts
    is_eos_BT = rollouts.input_ids_BT == runs.eos_id
    assert bool((is_eos_BT & ~rollouts.attention_mask_BT).any()), "no row is padded: the test shows nothing"
    assert not bool((rollouts.response_mask_BT & ~rollouts.attention_mask_BT).any())
    for row in range(NUM_PROMPTS):
        response_T = rollouts.input_ids_BT[row][rollouts.response_mask_BT[row]]
        assert 1 <= len(response_T) <= MAX_NEW_TOKENS
        ends = int(response_T[-1]) == runs.eos_id
        assert int((response_T == runs.eos_id).sum()) == int(ends)
        assert bool(rollouts.is_truncated_B[row]) == (not ends)


def test_rewards_are_the_difference_of_two_independent_forward_passes(runs: Runs) -> None:
    rollouts = runs.experience.rollouts
    expected = [
        torch.cat(response_logp(directory, rollouts))
        for directory in (runs.sft / "final", runs.sft / "reference" / "alpha_0.5")
    ]
    # The KL term in the reward is 1e-5 * (log pi_old - log pi_SFT), and the policy starts as pi_SFT.
    reward_N = runs.experience.reward_BT[rollouts.response_mask_BT]
    torch.testing.assert_close(reward_N, expected[0] - expected[1], rtol=0, atol=1e-3)
    assert float(reward_N.abs().max()) > 0.02, "teacher and reference do not differ: the test shows nothing"


@pytest.mark.shared_data
@pytest.mark.skipif(not GSM8K.exists(), reason="the shared data are not there")
def test_credit_finds_wrong_numbers_in_worked_answers(runs: Runs, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in demonstrations(24)[8:]))
    main(["credit", f"--teacher={runs.sft}", f"--data={rows}", "--preset=gsm8k", f"--out={tmp_path / 'out.json'}"])
    found = read_json(tmp_path / "out.json")["localisation"]
    assert (found["num_rows"], found["mean_num_corrupted"]) == (16, 1.0)
    mrr = {row["score"]: row["mrr"]["value"] for row in found["scores"]}
    # A model of English knows a wrong copy of a number, or a wrong sum, far better than chance does.
    assert mrr["log pi_SFT"] > 3 * mrr["chance"]
    assert mrr["log pi_ref"] > 3 * mrr["chance"]
    assert all(math.isfinite(value) for value in mrr.values())


@torch.no_grad()
def response_logp(directory: Path, rollouts: Any) -> list[Tensor]:
    """Return log-probabilities of each response, one unpadded sequence at a time, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    found = []
    for row in range(len(rollouts.input_ids_BT)):
        ids_T = rollouts.input_ids_BT[row][rollouts.attention_mask_BT[row]]
        num_response = int(rollouts.response_mask_BT[row].sum())
        logp_TV = model(input_ids=ids_T[None]).logits[0].double().log_softmax(dim=-1)
        logp_T = logp_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)
        found.append(logp_T[-num_response:].float())
    return found
