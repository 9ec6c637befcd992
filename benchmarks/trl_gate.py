"""Stops TRL's trainers between optimizer steps, and what all of them are told."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.gate import Gate


class StepGate(TrainerCallback):
    """One piece of work is one optimizer step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the next round."""
        self.gate.piece_done()


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """Return TrainingArguments that match our recipes and turn off what the others do not do either."""
    is_cuda = settings.get("device") == "cuda"
    return {
        "output_dir": settings["folder"],
        "max_steps": 10_000,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 300,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": settings.get("is_bf16", False),
        "use_cpu": not is_cuda,
        "seed": settings["seed"],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
