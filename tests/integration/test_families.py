"""SFT and then DPR from the command line for each family: its real class, and a tokenizer with its quirks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dpr_lightning.demo.tokenizer import build_tokenizer
from dpr_lightning.main import main
from dpr_lightning.manifest import read_manifest, verify

CONFIGS = Path(__file__).parents[2] / "configs"
NUM_ROWS = 32
"""In steps of 8: four optimizer steps, the snapshot after the second."""


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """BOS by the post-processor and no padding token, as in Llama 3."""
    tokenizer = build_tokenizer(seed=0, num_documents=50)
    tokenizer.pad_token = None
    return tokenizer


def qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """No BOS at all, as in Qwen 2.5."""
    tokenizer = build_tokenizer(seed=0, num_documents=50)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.bos_token = None
    return tokenizer


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """A dummy space before a text, byte fallback, BOS by the post-processor and no padding token, as in Mistral 0.1."""
    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz0123456789", "▁a"]:
        vocab[piece] = len(vocab)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma3_tokenizer() -> PreTrainedTokenizerFast:
    """Padding, BOS and EOS apart, BOS by the post-processor, padding on the left, as in Gemma 3."""
    tokenizer = build_tokenizer(seed=0, num_documents=50)
    tokenizer.padding_side = "left"
    return tokenizer


TOKENIZERS = {
    "llama": llama_tokenizer,
    "qwen2": qwen2_tokenizer,
    "mistral": mistral_tokenizer,
    "gemma3": gemma3_tokenizer,
}


def run(recipe: str, *args: str) -> None:
    overlays = [CONFIGS / "base.yaml", CONFIGS / "recipe" / f"{recipe}.yaml", CONFIGS / "hardware" / "cpu.yaml"]
    main(["fit", *(part for path in overlays for part in ("-c", str(path))), *args])


def scalars(run_dir: Path) -> dict[str, list[float]]:
    """Return the logged curves by key."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_sft_then_dpr(family: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[family]()
    # More rows than tokens, as in real checkpoints: an id without a token may be drawn.
    model = tiny_model(family, vocab_size=len(tokenizer) + 5, initializer_range=0.02)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    # Some families' own class gives a saved tokenizer its own rules; those are the ones to keep.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {n}", "response": " ".join(["a"] * (1 + n % 4)) + f" {n}"} for n in range(NUM_ROWS + 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:NUM_ROWS]))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[NUM_ROWS:]))

    run(
        "sft",
        f"--model.backbone.name_or_path={tmp_path / 'start'}",
        f"--data.demonstrations.source={data}",
        "--data.demonstrations.preset=prompt_response",
        f"--data.demonstrations.validation_source={held_out}",
        "--data.global_batch_size=8",
        "--data.micro_batch_size=4",
        "--model.optimizer.lr=0.003",
        f"--run_dir={tmp_path / 'sft'}",
    )
    snapshot, final = tmp_path / "sft" / "reference" / "alpha_0.5", tmp_path / "sft" / "final"
    assert read_manifest(snapshot)["step"] == 2
    assert read_manifest(final)["step"] == 4
    verify(snapshot)
    verify(final)
    assert not same_weights(snapshot, final)

    run(
        "dpr",
        f"--model.teacher={tmp_path / 'sft'}",
        "--model.backbone.name_or_path=unused",
        "--data.prompts_per_rollout=8",
        "--data.global_batch_size=4",
        "--data.micro_batch_size=2",
        "--data.sampling.max_new_tokens=8",
        "--model.decoding.max_new_tokens=8",
        "--model.optimizer.lr=0.001",
        "--trainer.max_epochs=2",
        f"--run_dir={tmp_path / 'dpr'}",
    )
    curves = scalars(tmp_path / "dpr")
    for key in ("reward/mean", "reward/sum_mean", "rollout/sampler_gap", "policy/loss", "val/reward_sum"):
        assert curves[key], key
        assert all(math.isfinite(value) for value in curves[key]), key
    assert max(curves["rollout/sampler_gap"]) < 1e-3
    assert len(curves["policy/loss"]) == 4
    trained = tmp_path / "dpr" / "final"
    assert read_manifest(trained)["step"] == 4
    verify(trained)
    assert not same_weights(trained, final)

    # What is left is plain transformers: the family's own class, and a tokenizer that encodes as before.
    for directory in (snapshot, final, trained):
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        assert type(loaded) is type(model)
        again = AutoTokenizer.from_pretrained(directory)
        text = "say 7 a b\n"
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (again.eos_token_id, again.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
        prompt = torch.tensor([again(text)["input_ids"]])
        loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, pad_token_id=0)


def same_weights(first: Path, second: Path) -> bool:
    models = [AutoModelForCausalLM.from_pretrained(directory).state_dict() for directory in (first, second)]
    assert models[0].keys() == models[1].keys()
    return all(torch.equal(models[0][name], models[1][name]) for name in models[0])
