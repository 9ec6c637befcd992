"""SFT on demonstrations of mixed lengths: our ``fit`` and TRL's SFTTrainer.

The same rows in the same order, rows of a step, length limit, AdamW settings and float32 weights; the loss is
taken on the completion, and nobody recomputes activations. One piece of work is one optimizer step. Tokens are prompt
and completion without padding.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gate import Gate
from benchmarks.inputs import load_model, read_shuffled

_MANY = 10_000


def ours(gate: Gate, settings: dict[str, Any]) -> None:
    """``dpr-lightning fit`` with ``configs/recipe/sft.yaml``."""
    from benchmarks.fit_gate import fit

    fit(
        "sft",
        settings,
        f"--model.backbone.name_or_path={settings['model']}",
        f"--data.demonstrations.source={settings['rows']}",
        "--data.demonstrations.preset=prompt_response",
        "--data.demonstrations.subsample=null",
        f"--data.global_batch_size={settings['global_batch_size']}",
        f"--data.micro_batch_size={settings['micro_batch_size']}",
        f"--data.seed={settings['seed']}",
        f"--trainer.max_epochs={_MANY}",
        "--data.drop_last=true",
    )


def trl(gate: Gate, settings: dict[str, Any]) -> None:
    """TRL's SFTTrainer; ``settings["more"]`` are further arguments of its configuration."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from benchmarks.trl_gate import StepGate, common

    class CountingTrainer(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
            gate.add(
                tokens=ids.numel() if mask is None else int(mask.sum()),
                trained_tokens=ids.numel(),
                response_tokens=int((inputs["labels"] != -100).sum()),
            )
            return super().training_step(model, inputs, *args, **kwargs)

    rows = read_shuffled(settings["rows"], settings["seed"], 0)
    # Our default template ends a prompt by a line break; TRL adds EOS to the completion as we do.
    pairs = [{"prompt": f"{row['prompt']}\n", "completion": row["response"]} for row in rows]
    arguments = {
        **common(settings),
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": settings["global_batch_size"] // settings["micro_batch_size"],
        "learning_rate": 5e-6,
        "max_length": settings["max_length"],
        "train_sampling_strategy": "sequential",
    } | settings.get("more", {})
    trainer = CountingTrainer(
        model=load_model(settings, settings["model"]),
        args=SFTConfig(**arguments),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        train_dataset=Dataset.from_list(pairs),
        callbacks=[StepGate(gate)],
    )
    trainer.train()


CONTENDERS = {"ours": ours, "trl": trl}
