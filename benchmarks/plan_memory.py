"""Checks what ``dpr-lightning plan`` says against what ``dpr-lightning fit`` takes, phase by phase, on a CPU.

    python -m benchmarks.plan_memory --out benchmarks/results/plan_cpu.md

Each run is a process of its own. Measured is the most memory that was resident (VmHWM, set back at the beginning of
each phase), less what was resident before the first model was loaded; glibc is told to give freed memory back at once.
Weights are random: no tensor's size depends on their values. SFT runs before DPR, which starts from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.inputs import exact_rows

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_SMALL = {"max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {},
    "Llama, 8 layers": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 8,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        **_SMALL,
    },
    "Qwen2, 6 layers": {
        "model_type": "qwen2",
        "vocab_size": 50000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        **_SMALL,
    },
    "Gemma 3, 8 layers": {
        "model_type": "gemma3_text",
        "vocab_size": 65536,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        "pad_token_id": 0,
        **_SMALL,
    },
}
"""Configurations by name; the first is the package's own."""
VARIANTS = {
    "full": [],
    "LoRA": ["-c", "configs/lora.yaml"],
    "full, checkpointed": ["--model.backbone.gradient_checkpointing=true"],
    "full, bf16-mixed": ["--trainer.precision=bf16-mixed"],
}


def build(directory: Path, name: str, tokens: tuple[int, int]) -> None:
    """Write a random model with the packaged tokenizer, and rows of as many tokens as ``tokens`` says."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dpr_lightning.models.backbone import locate
    from dpr_lightning.planning.architecture import published_architectures

    settings = MODELS[name] or published_architectures()["HuggingFaceTB/SmolLM2-135M"]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(directory / "model")
    AutoTokenizer.from_pretrained(locate("dpr_lightning/demo/backbone")).save_pretrained(directory / "model")
    exact_rows(directory / "model", directory / "rows.jsonl", 8, tokens)


def arguments(directory: Path, stage: str, variant: str, tokens: tuple[int, int]) -> list[str]:
    """Return the arguments of ``fit``, which are ``plan``'s too."""
    files = ["-c", "configs/base.yaml", "-c", f"configs/recipe/{stage}.yaml", "-c", "configs/hardware/cpu.yaml"]
    args = [
        *files,
        *VARIANTS[variant],
        f"--model.backbone.name_or_path={directory / 'model'}",
        f"--data.demonstrations.source={directory / 'rows.jsonl'}",
        "--data.demonstrations.preset=prompt_response",
        "--data.demonstrations.subsample=null",
        f"--data.demonstrations.max_prompt_tokens={tokens[0]}",
        f"--data.demonstrations.max_response_tokens={tokens[1]}",
        "--data.global_batch_size=4",
        "--data.micro_batch_size=2",
        "--trainer.max_epochs=2",
        "--trainer.enable_checkpointing=false",
        "--trainer.logger=false",
        "--trainer.callbacks=[{class_path: dpr_lightning.callbacks.hf_export.HFExport}]",
        f"--run_dir={directory / stage}",
    ]
    if stage == "sft":
        snapshot = "dpr_lightning.callbacks.reference_snapshot.ReferenceSnapshot"
        return [*args, f"--trainer.callbacks+={{class_path: {snapshot}, init_args: {{alphas: 0.5}}}}"]
    return [
        *args,
        f"--model.teacher={directory / 'sft'}",
        f"--data.sampling.max_new_tokens={tokens[1]}",
        "--data.sampling.batch_size=8",
        "--data.prompts_per_rollout=8",
    ]


def measure(args: list[str], out: Path) -> None:
    """Run ``fit`` here and write the peak of each phase."""
    import torch

    from benchmarks.meter import HostMemory, PhaseMeter
    from dpr_lightning.main import main

    torch.set_num_threads(1)
    # What a first call of each kind of operation leaves behind is the program's, not the run's.
    torch.nn.Linear(8, 8)(torch.ones(2, 8)).sum().backward()
    meter = PhaseMeter(HostMemory())
    meter.watch_fit()
    main(["fit", *args])
    out.write_text(json.dumps(meter.peaks), encoding="utf-8")


def compare(name: str, stages: list[str], variant: str, tokens: tuple[int, int]) -> list[dict[str, Any]]:
    """Return planned and measured bytes of each phase of one model."""
    rows = []
    with tempfile.TemporaryDirectory() as found:
        directory = Path(found)
        build(directory, name, tokens)
        for stage in stages:
            args = arguments(directory, stage, variant, tokens)
            program = [sys.executable, "-m", "benchmarks.plan_memory", "--measure", str(directory / "peaks.json")]
            subprocess.run([*program, *args], check=True, env={**os.environ, **MALLOC}, stdout=subprocess.DEVNULL)
            peaks = json.loads((directory / "peaks.json").read_text())
            report = directory / "plan.json"
            lengths = [f"--prompt_tokens={tokens[0]}", f"--response_tokens={tokens[1]}"]
            command = [sys.executable, "-c", "from dpr_lightning.main import main; main()", "plan", *args, *lengths]
            subprocess.run([*command, f"--out={report}"], check=True, stdout=subprocess.DEVNULL)
            phases = json.loads(report.read_text())["phases"]
            for phase, measured in peaks.items():
                planned = phases[phase]["peak_bytes"]
                rows.append({"model": name, "variant": variant, "stage": stage, "phase": phase})
                rows[-1] |= {"planned": planned, "measured": measured, "ratio": planned / measured}
                print(*rows[-1].values(), flush=True)
    return rows


def page(rows: list[dict[str, Any]], tokens: tuple[int, int], versions: dict[str, str]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# plan against fit, on a CPU",
        "",
        f"`{' '.join(['python', *sys.argv])}`; prompts of up to {tokens[0]} tokens, responses of {tokens[1]}, "
        "micro-batches of 2, scoring of 4, sampling of 8; float32 where not said otherwise; one thread. MiB beyond the "
        "process without a model. " + ", ".join(f"{key} {value}" for key, value in versions.items()),
        "",
        "| model | weights | run | phase | planned | measured | planned / measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [f"{row[key] / 2**20:.0f}" for key in ("planned", "measured")]
        cells = [row["model"], row["variant"], row["stage"].upper(), row["phase"], *sizes, f"{row['ratio']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1.0))
    outside = sum(abs(row["ratio"] - 1.0) > 0.15 for row in rows)
    lines += ["", f"{outside} of {len(rows)} are further off than 15%; the furthest is {worst['ratio']:.3f}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Compare every model under every variant, or those named."""
    if "--measure" in sys.argv:
        measure(sys.argv[3:], Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["full", "LoRA"])
    parser.add_argument("--tokens", nargs=2, type=int, default=[96, 160], help="of the longest prompt and response")
    parsed = parser.parse_args()
    from dpr_lightning.manifest import environment

    tokens = (parsed.tokens[0], parsed.tokens[1])
    rows = [
        row
        for name in parsed.models
        for variant in parsed.variants
        for row in compare(name, ["sft", "dpr"], variant, tokens)
    ]
    keys = ("platform", "python", "torch", "lightning", "transformers", "peft")
    versions = {key: value for key, value in environment().items() if key in keys}
    parsed.out.write_text(page(rows, tokens, versions), encoding="utf-8")


if __name__ == "__main__":
    main()
