"""Runs that are killed at many moments end, by the same command again, bit for bit where one that was not ends."""

from __future__ import annotations

import json
import math
import signal
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
    "dpr": [
        Death("rollout", 3),
        Death("scoring", 2),
        Death("micro-batch", 2),
        Death("update", 3),
        Death("rollout", 2),
        Death("write", 2),
        Death("scoring", 4),
        Death("removal", 2, after=True),
        Death("checksum"),
        Death("update", 1),
    ],
}


@pytest.mark.parametrize("stage", ["sft", "dpr"])
def test_killed_anywhere(bench: Bench, stage: str) -> None:
    args = {"sft": bench.sft, "dpr": bench.dpr}[stage](f"killed_{stage}")
    kills = 0
    for death in DEATHS[stage]:
        status = bench.run(args, death)
        print(death, status)
        kills += status == -signal.SIGKILL
    bench.finish(args)
    print("kills", kills)
    bench.assert_same(f"killed_{stage}", stage)
