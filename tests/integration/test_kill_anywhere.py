"""Runs that are killed at many moments end, by the same command again, bit for bit where one that was not ends."""

from __future__ import annotations

import json
import math
import random
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import Death, Forks, Job
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerBase

from dpr_lightning.manifest import read_json, verify

OVERLAY = """
trainer:
  callbacks+:
    - class_path: dpr_lightning.callbacks.checkpoint.RunCheckpoint
      init_args: {every_n_train_steps: 2, keep: 2}
"""
TIMES = ("time/", "perf/")
"""Log keys of what no two runs have in common."""


@dataclass(frozen=True)
class Bench:
    """Commands on a tiny model with dropout, and what they leave."""

    root: Path
    forks: Forks

    def sft(self, run: str, *more: str) -> list[str]:
        return [
            *self._files("sft"),
            f"--run_dir={self.root / run}",
            f"--model.backbone.name_or_path={self.root / 'model'}",
            f"--data.demonstrations.source={self.root / 'train.jsonl'}",
            "--data.demonstrations.preset=prompt_response",
            "--data.demonstrations.subsample=null",
            "--data.demonstrations.validation_fraction=0.2",
            "--data.global_batch_size=4",
            "--data.micro_batch_size=2",
            "--trainer.max_epochs=2",
            "--model.optimizer.lr=1e-2",
            *more,
        ]

    def dpr(self, run: str, *more: str) -> list[str]:
        return [
            *self._files("dpr"),
            f"--run_dir={self.root / run}",
            f"--model.teacher={self.root / 'sft'}",
            "--data.prompts_per_rollout=6",
            "--data.global_batch_size=2",
            "--data.micro_batch_size=1",
            "--data.sampling.max_new_tokens=5",
            "--model.decoding.max_new_tokens=3",
            "--data.num_validation_prompts=2",
            "--trainer.max_epochs=3",
            "--model.optimizer.lr=1e-3",
            *more,
        ]

    def _files(self, recipe: str) -> list[str]:
        names = [f"configs/{name}.yaml" for name in ("base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")]
        return ["fit", *(part for name in [*names, str(self.root / "overlay.yaml")] for part in ("-c", name))]

    def run_ranks(self, args: list[str], deaths: Sequence[Death | None] = (None, None)) -> list[int]:
        """Run one process for each rank, and return how each ended by itself."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = int(server.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        size = str(len(deaths))
        shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
        running = [
            self.forks.start(
                Job(args, self.root / f"log.{rank}.txt", shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, death)
            )
            for rank, death in enumerate(deaths)
        ]
        try:
            for process in running:
                process.join(120)
            assert all(process.exitcode is not None for process in running), "a rank waits for one that is dead"
        finally:
            for process in running:
                process.kill()
                process.join()
        return [int(process.exitcode) for process in running]

    def run(self, args: list[str], death: Death | None = None, *, seconds: float | None = None) -> int:
        job = Job(args, self.root / "log.txt", {"OMP_NUM_THREADS": "1"}, death)
        return self.forks.run(job, seconds=seconds)

    def finish(self, args: list[str]) -> None:
        assert self.run(args) == 0, (self.root / "log.txt").read_text()[-5000:]

    def assert_same(self, run: str, expected: str) -> None:
        found, wanted = scalars(self.root / run), scalars(self.root / expected)
        assert found.keys() == wanted.keys()
        for tag, points in wanted.items():
            assert found[tag] == points, tag
        parts = ["final", *(["reference/alpha_0.5"] if (self.root / expected / "reference").exists() else [])]
        for part in parts:
            directory = self.root / run / part
            verify(directory)
            weights = load_file(directory / "model.safetensors")
            for name, value in load_file(self.root / expected / part / "model.safetensors").items():
                assert bool((weights[name] == value).all()), name
        records = [read_json(self.root / name / "run.json") for name in (run, expected)]
        for key in ("status", "optimizer_steps", "tokens", "data"):
            assert records[0][key] == records[1][key], key
        left = [path for path in (self.root / run).rglob(".*") if path.name != ".lock"]
        assert left == []


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float | str]]]:
    """What TensorBoard shows of a run: step and value of every point, by tag."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        # A text, as NaN is not equal to itself.
        tag: [(event.step, "nan" if math.isnan(event.value) else event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(TIMES)
    }


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: object, tiny_tokenizer: PreTrainedTokenizerBase
) -> Bench:
    root = tmp_path_factory.mktemp("kills")
    # Dropout draws from the random state that a checkpoint has to hold.
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer), initializer_range=0.02, attention_dropout=0.2)  # type: ignore[operator]
    model.save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    rows = [{"prompt": f"{n} and {n * n}", "response": " ".join(["ok"] * (1 + n % 5)) + f" {n}"} for n in range(24)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "overlay.yaml").write_text(OVERLAY)
    bench = Bench(root, Forks())
    bench.finish(bench.sft("sft"))
    bench.finish(bench.dpr("dpr"))
    return bench


DEATHS = {
    "sft": [
        Death("micro-batch", 3),
        Death("write", 1),
        Death("update", 3),
        Death("rename", 4, after=True),
        Death("snapshot", after=True),
        Death("validation"),
        Death("removal", 1),
        Death("link", 1),
        Death("export", after=True),
        Death("record"),
    ],
    # Before the first rollout, a process draws five tokens to check that the model decodes as it scores.
    "dpr": [
        Death("rollout", 8),
        Death("scoring", 2),
        Death("micro-batch", 2),
        Death("update", 3),
        Death("rollout", 7),
        Death("write", 2),
        Death("scoring", 4),
        Death("update", 1),
        Death("removal", 2, after=True),
        Death("checksum"),
    ],
}


KILLED = -signal.SIGKILL


@pytest.mark.parametrize("stage", ["sft", "dpr"])
def test_killed_anywhere(bench: Bench, stage: str) -> None:
    args = {"sft": bench.sft, "dpr": bench.dpr}[stage](f"killed_{stage}")
    for death in DEATHS[stage]:
        assert bench.run(args, death) == KILLED, death
    # And once at a moment that nobody chose.
    bench.run(args, seconds=random.Random(stage).uniform(0.5, 2.5))
    bench.finish(args)
    bench.assert_same(f"killed_{stage}", stage)
    # There is nothing left to do.
    bench.finish(args)
    assert "is finished (optimizer step" in (bench.root / "log.txt").read_text().splitlines()[-1]


@pytest.mark.multiprocess
def test_two_processes_of_which_one_or_both_are_killed(bench: Bench) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    assert bench.run_ranks(bench.dpr("two", *two)) == [0, 0], (bench.root / "log.0.txt").read_text()[-5000:]
    args = bench.dpr("killed_two", *two)
    both = Death("scoring", 2)
    assert bench.run_ranks(args, [both, both]) == [KILLED, KILLED]
    # The other one notices, and ends.
    first, second = bench.run_ranks(args, [None, Death("update", 5)])
    assert second == KILLED
    assert first not in (0, KILLED)
    first, second = bench.run_ranks(args, [Death("write", 1), None])
    assert first == KILLED
    assert second not in (0, KILLED)
    assert bench.run_ranks(args) == [0, 0], (bench.root / "log.0.txt").read_text()[-5000:]
    bench.assert_same("killed_two", "two")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(bench: Bench) -> None:
    args = bench.sft("damaged")
    assert bench.run(args, Death("update", 8)) == KILLED
    directory = bench.root / "damaged" / "checkpoints"
    newest = directory / "step=6.ckpt"
    assert {path.name for path in directory.iterdir()} == {"step=4.ckpt", "step=6.ckpt", "last.ckpt"}
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    bench.finish(args)
    assert "step=6.ckpt' is damaged (" in (bench.root / "log.txt").read_text()
    # It was set aside, and it is still there.
    newest.with_name("step=6.ckpt.damaged").unlink()
    bench.assert_same("damaged", "sft")


def test_what_is_another_run_is_refused(bench: Bench) -> None:
    args = bench.sft("refused")
    assert bench.run(args, Death("update", 4)) == KILLED
    directory = bench.root / "refused" / "checkpoints"

    def refusal(*more: str) -> str:
        assert bench.run([*args, *more]) == 2
        return (bench.root / "log.txt").read_text().splitlines()[-1]

    assert "other settings (model.optimizer.lr is 0.01 there and 0.02 here)" in refusal("--model.optimizer.lr=2e-2")
    assert "other settings (seed_everything is 0 there and 1 here)" in refusal("--seed_everything=1")
    rows = (bench.root / "train.jsonl").read_text()
    try:
        (bench.root / "train.jsonl").write_text(rows.replace("ok", "no"))
        assert "data.demonstrations: the train rows are not those that this run was begun with" in refusal()
    finally:
        (bench.root / "train.jsonl").write_text(rows)
    whole = directory / "step=2.ckpt"
    whole.write_bytes(whole.read_bytes()[:1000])
    assert "holds no whole checkpoint (1 damaged" in refusal()
    # Not even then does it begin anew by itself.
    assert "holds no whole checkpoint that the run could go on from, but last.ckpt, step=2.ckpt.damaged" in refusal()
