"""Two processes that share out one model: what they write, and where it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from ranks import start_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpr_lightning.main import main
from dpr_lightning.manifest import verify

pytestmark = pytest.mark.multiprocess

WORKER = Path(__file__).parent / "cli_worker.py"
EVERY_STEP = """
trainer:
  callbacks+:
    - class_path: dpr_lightning.callbacks.checkpoint.RunCheckpoint
      init_args: {every_n_train_steps: 1, keep: 100}
"""
WHOLE = [
    "--trainer.strategy=dpr_lightning.strategy.FullyShardedStrategy",
    "--trainer.strategy.save_distributed_checkpoint=false",
]


def files(recipe: str, hardware: str, *more: str) -> list[str]:
    names = ["base", f"recipe/{recipe}", "backbone/tiny", *more, f"hardware/{hardware}"]
    return [argument for name in names for argument in ("-c", f"configs/{name}.yaml")]


def weights(directory: Path) -> dict[str, Tensor]:
    verify(directory)
    return load_file(directory / "model.safetensors")


def assert_same(directory: Path, expected: Path, *, exactly: bool = False) -> None:
    found, wanted = weights(directory), weights(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if exactly:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def checkpoint(root: Path, run: str, step: int) -> str:
    return f"--ckpt_path={root / run / 'checkpoints' / f'step={step}.ckpt'}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, each from the start, and then from each other's checkpoints."""
    root = tmp_path_factory.mktemp("sharding")
    numbers = np.random.default_rng(0).integers(1000, size=30).tolist()
    rows = [{"prompt": f"draw {i}.\n", "response": f"{number} it is"} for i, number in enumerate(numbers)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "every_step.yaml").write_text(EVERY_STEP)

    def sft(run: str, hardware: str, *more: str, lora: bool = False) -> list[str]:
        return [
            "fit",
            *files("sft", hardware, *(["lora"] if lora else [])),
            *("-c", str(root / "every_step.yaml")),
            f"--run_dir={root / run}",
            f"--data.demonstrations.source={root / 'train.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.subsample=null",
            "--data.demonstrations.validation_fraction=0.2",
            "--data.global_batch_size=6",
            "--data.micro_batch_size=3",
            "--trainer.max_epochs=2",
            "--model.optimizer.lr=1e-2",
            *more,
        ]

    def dpr(run: str, teacher: str, *more: str, lora: bool = False) -> list[str]:
        return [
            "fit",
            *files("dpr", "cpu2", *(["lora"] if lora else [])),
            f"--run_dir={root / run}",
            f"--model.teacher={root / teacher}",
            "--model.score_micro_batch_size=1",
            "--model.backbone.gradient_checkpointing=true",
            "--data.prompts_per_rollout=8",
            "--data.global_batch_size=4",
            "--data.micro_batch_size=2",
            "--data.sampling.max_new_tokens=12",
            "--model.decoding.max_new_tokens=12",
            "--trainer.max_epochs=2",
            "--trainer.check_val_every_n_epoch=1",
            *more,
        ]

    main(sft("one", "cpu"))
    commands = [
        sft("sharded", "cpu2"),
        sft("whole", "cpu2", *WHOLE),
        sft("sharded_again", "cpu2", checkpoint(root, "sharded", 2)),
        sft("from_one", "cpu2", checkpoint(root, "one", 2)),
        # The end of an epoch, whose last step is incomplete: as many micro-batches of one rank as of two.
        sft("from_one_at_its_end", "cpu2", checkpoint(root, "one", 4)),
        sft("adapter", "cpu2", lora=True),
        sft("adapter_again", "cpu2", checkpoint(root, "adapter", 2), lora=True),
        sft("adapter_whole", "cpu2", *WHOLE, lora=True),
        dpr("dpr", "sharded", "--model.offload_frozen=true"),
        dpr("dpr_adapter", "adapter", "--model.optimizer.lr=1e-2", lora=True),
    ]
    (root / "two.json").write_text(json.dumps(commands))
    start_ranks(WORKER, [[str(root / "two.json")]] * 2, root)
    # One rank is a group of its own, which this process must not become.
    one_rank = "--trainer.devices=1"
    commands = [
        sft("one_from_sharded", "cpu2", one_rank, checkpoint(root, "sharded", 2)),
        sft("adapter_from_sharded", "cpu2", one_rank, checkpoint(root, "adapter", 2), lora=True),
    ]
    (root / "one.json").write_text(json.dumps(commands))
    start_ranks(WORKER, [[str(root / "one.json")]], root)
    main(sft("one_from_whole", "cpu", checkpoint(root, "whole", 2)))
    main(sft("adapter_from_whole", "cpu", checkpoint(root, "adapter_whole", 2), lora=True))
    return root


@pytest.mark.parametrize("run", ["sharded", "whole"])
@pytest.mark.parametrize("part", ["final", "reference/alpha_0.5"])
def test_two_ranks_write_what_one_process_writes(root: Path, run: str, part: str) -> None:
    assert_same(root / run / part, root / "one" / part)
    model = AutoModelForCausalLM.from_pretrained(root / run / part)
    assert model.dtype == torch.float32


def test_checkpoints_are_shards_or_one_file(root: Path) -> None:
    sharded, whole = (root / run / "checkpoints" / "step=2.ckpt" for run in ("sharded", "whole"))
    sizes = [path.stat().st_size for path in sorted(sharded.glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.6 * whole.stat().st_size
    assert whole.is_file()
    adapter = sum(path.stat().st_size for path in (root / "adapter/checkpoints/step=2.ckpt").glob("*.distcp"))
    assert adapter < 0.5 * sum(sizes)


def test_a_resumed_run_ends_as_if_it_had_never_stopped(root: Path) -> None:
    assert_same(root / "sharded_again/final", root / "sharded/final", exactly=True)
    assert_same(root / "adapter_again/final", root / "adapter/final", exactly=True)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("from_one", "one"),
        ("from_one_at_its_end", "one"),
        ("one_from_sharded", "one"),
        ("one_from_whole", "one"),
        ("adapter_from_sharded", "adapter"),
        ("adapter_from_whole", "adapter"),
    ],
)
def test_resumes_on_another_number_of_ranks(root: Path, run: str, expected: str) -> None:
    assert_same(root / run / "final", root / expected / "final")


def test_adapters_are_exported_from_shards(root: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained("dpr_lightning/demo/backbone")
    ids_BT = torch.arange(3, 40).unsqueeze(0)
    plain = base(ids_BT).logits
    adapted = PeftModel.from_pretrained(base, root / "adapter/final/adapter").eval()(ids_BT).logits
    merged = AutoModelForCausalLM.from_pretrained(root / "adapter/final")(ids_BT).logits
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("run", "teacher"), [("dpr", "sharded"), ("dpr_adapter", "adapter")])
def test_dpr_trains_on_its_own_samples(root: Path, run: str, teacher: str) -> None:
    found, start = weights(root / run / "final"), weights(root / teacher / "final")
    moved = {name for name, value in start.items() if not torch.equal(found[name], value)}
    assert len(moved) > 0.5 * len(start)
    assert all(torch.isfinite(value).all() for value in found.values())
