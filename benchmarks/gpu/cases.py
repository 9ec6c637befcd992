"""Runs of ``fit`` on random Llamas whose sizes are known: for speed and memory, and for ``plan`` to predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import write_model
from benchmarks.gpu.worker import Context
from benchmarks.inputs import exact_rows

SFT_ALPHAS = (0.3, 0.45)
"""Snapshots of SFT with LoRA, which DPR takes as its reference and its teacher; both are taken while it warms up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of ``fit``. All prompts and responses are of one length, so that memory is that of the longest batch."""

    shape: str
    """Key of ``models.SHAPES``."""
    stage: str
    """``sft`` or ``dpr``."""
    is_lora: bool
    prompt_tokens: int
    response_tokens: int
    micro_batch_size: int
    global_batch_size: int
    num_responses: int = 0
    """Of one rollout, sampled all at once; DPR only."""
    is_checkpointed: bool = False
    """Recomputes activations, as ``configs/backbone/llama3.1_8b.yaml`` does."""
    dtype: str = "float32"
    """Of stored weights, those of the adapter excepted."""
    is_profiled: bool = False
    """A profile of a few steps takes many seconds to sum up."""

    @property
    def name(self) -> str:
        """Name in result tables."""
        weights = "LoRA" if self.is_lora else "all weights"
        stored = "" if self.dtype == "float32" else f", base in {self.dtype}"
        return f"{self.stage.upper()}, {self.shape}, {weights}{stored}"

    @property
    def stem(self) -> str:
        """Of file names."""
        return f"{self.stage}-{self.shape}-{'lora' if self.is_lora else 'full'}-{self.dtype}".lower()


def cases(context: Context) -> list[Case]:
    """Return the runs, in order: DPR with LoRA needs the snapshots of the SFT before it."""
    if context.rehearse:
        small: dict[str, Any] = {
            "prompt_tokens": 8,
            "response_tokens": 16,
            "micro_batch_size": 2,
            "global_batch_size": 4,
        }
        return [
            Case(shape="1B", stage="sft", is_lora=False, is_profiled=True, **small),
            Case(shape="1B", stage="dpr", is_lora=False, num_responses=8, **small),
            Case(shape="8B", stage="sft", is_lora=True, is_checkpointed=True, **small),
            Case(
                shape="8B", stage="dpr", is_lora=True, is_checkpointed=True, num_responses=8, is_profiled=True, **small
            ),
        ]
    llama_1b: dict[str, Any] = {
        "shape": "1B",
        "prompt_tokens": 128,
        "response_tokens": 256,
        "micro_batch_size": 8,
        "global_batch_size": 32,
    }
    llama_8b: dict[str, Any] = {
        "shape": "8B",
        "prompt_tokens": 384,
        "response_tokens": 128,
        "micro_batch_size": 2,
        "is_checkpointed": True,
    }
    return [
        Case(stage="sft", is_lora=False, is_profiled=True, **llama_1b),
        Case(stage="dpr", is_lora=False, num_responses=64, is_profiled=True, **llama_1b),
        Case(stage="sft", is_lora=True, **llama_1b),
        Case(stage="dpr", is_lora=True, num_responses=64, **llama_1b),
        Case(stage="sft", is_lora=True, global_batch_size=8, **llama_8b),
        Case(stage="dpr", is_lora=True, global_batch_size=16, num_responses=32, is_profiled=True, **llama_8b),
        Case(stage="sft", is_lora=True, global_batch_size=8, dtype="bfloat16", **llama_8b),
        Case(stage="dpr", is_lora=True, global_batch_size=16, num_responses=32, dtype="bfloat16", **llama_8b),
    ]


def write_inputs(context: Context, case: Case, folder: Path) -> None:
    """Write models and rows of a run below ``folder``, where they are not there yet."""
    for seed, name in ((1, "teacher"), (2, "reference")):
        directory = folder / case.shape / name
        if not directory.exists():
            write_model(directory, case.shape, is_toy=context.rehearse, seed=seed)
    if not _rows(case, folder).exists():
        num_rows = max(case.num_responses, case.global_batch_size)
        tokens = (case.prompt_tokens, case.response_tokens)
        exact_rows(folder / case.shape / "teacher", _rows(case, folder), num_rows, tokens)


def _rows(case: Case, folder: Path) -> Path:
    return folder / case.shape / f"{case.stem}.jsonl"


def arguments(context: Context, case: Case, folder: Path) -> list[str]:
    """Return the arguments that ``fit`` and ``plan`` share; ``plan`` needs no teacher."""
    files = ["base", f"recipe/{case.stage}", f"hardware/{'gpu1' if context.is_cuda else 'cpu'}"]
    files += ["lora"] if case.is_lora else []
    args = [argument for name in files for argument in ("-c", f"configs/{name}.yaml")]
    args += [
        f"--trainer.precision={context.precision}",
        "--trainer.limit_val_batches=0",
        f"--model.backbone.name_or_path={folder / case.shape / 'teacher'}",
        "--model.backbone.model_class=benchmarks.gpu.models.RandomLlama",
        f"--model.backbone.dtype={case.dtype}",
        f"--model.backbone.gradient_checkpointing={str(case.is_checkpointed).lower()}",
        f"--data.demonstrations.source={_rows(case, folder)}",
        "--data.demonstrations.preset=prompt_response",
        "--data.demonstrations.subsample=null",
        f"--data.demonstrations.max_prompt_tokens={case.prompt_tokens}",
        f"--data.demonstrations.max_response_tokens={case.response_tokens}",
        f"--data.micro_batch_size={case.micro_batch_size}",
        f"--data.global_batch_size={case.global_batch_size}",
    ]
    if case.stage == "sft":
        return args
    return [
        *args,
        f"--data.prompts_per_rollout={case.num_responses}",
        f"--data.sampling.max_new_tokens={case.response_tokens}",
        f"--data.sampling.batch_size={case.num_responses}",
    ]


def fit_arguments(case: Case, folder: Path) -> list[str]:
    """Return what only ``fit`` takes: the teacher and reference of DPR, and where the run is written."""
    run_dir = f"--run_dir={folder / case.stem}"
    if case.stage == "sft":
        return [run_dir]
    if case.is_lora:
        snapshots = folder / case.stem.replace("dpr", "sft", 1) / "reference"
        reference, teacher = (snapshots / f"alpha_{alpha:g}" for alpha in SFT_ALPHAS)
    else:
        teacher, reference = (folder / case.shape / name for name in ("teacher", "reference"))
    return [run_dir, f"--model.teacher={teacher}", f"--model.reference={reference}"]
