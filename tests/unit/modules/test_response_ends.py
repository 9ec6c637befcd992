"""One run whose chat template, tokenizer and generation config each end a response in another way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.data.templates import ChatTemplate
from dpr_lightning.generation.command import main as generate
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.modules.sft import SFTModule
from dpr_lightning.types import SamplingConfig

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<turn>\n{% else %}"
    "[{{ m['content'] }}]{% endif %}{% endfor %}"
)


@pytest.fixture
def chat_dir(
    tmp_path: Path, tiny_model_dir: Path, tiny_model: Callable[..., PreTrainedModel]
) -> tuple[Path, int, int, int]:
    """A directory, and the ids of the template's end, the tokenizer's EOS, and the generation config's."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens([AddedToken("<turn>", special=False)])
    tokenizer.chat_template = TEMPLATE
    model = tiny_model("llama", vocab_size=len(tokenizer), initializer_range=0.02)
    declared = 40
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, declared])
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat", tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id, declared


def test_training_sampling_export_and_generate_agree_on_the_ends(
    chat_dir: tuple[Path, int, int, int],
    demonstrations_file: str,
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    directory, turn, eos, declared = chat_dir
    module = SFTModule(
        backbone=BackboneConfig(name_or_path=str(directory)),
        decoding=SamplingConfig(max_new_tokens=48, temperature=1.0),
    )
    data = SFTDataModule(
        DemonstrationConfig(source=demonstrations_file, validation_source=demonstrations_file),
        template=ChatTemplate(),
        global_batch_size=8,
        micro_batch_size=8,
    )
    trainer = make_trainer()
    trainer.fit(module, data)
    encoded = data.encoded["train"]
    assert {encoded.response_ids(row)[-1] for row in range(len(encoded))} == {turn}
    assert module.response_ends == [turn, eos, declared]

    samples = module.sample([[5, 6, 7]] * 200, module.decoding, seed=0)
    lasts = {ids[-1] for ids, cut in zip(samples.response_ids, samples.is_truncated, strict=True) if not cut}
    assert lasts == {turn, eos, declared}
    assert not any({turn, eos, declared} & {*ids[:-1]} for ids in samples.response_ids)
    texts = [module.decode(ids) for ids in samples.response_ids]
    assert not any("<turn>" in text for text in texts)

    module.save_pretrained(tmp_path / "final")
    saved = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [turn, eos, declared]

    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(60)))
    flags: dict[str, Any] = {
        **{"model": tmp_path / "final", "prompts": tmp_path / "prompts.jsonl", "out": tmp_path / "out.jsonl"},
        **{"max_new_tokens": 48, "temperature": 1.0},
    }
    generate([*(f"--{name}={value}" for name, value in flags.items()), "--chat"])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert not any("<turn>" in row["response"] for row in rows)
    # 3 of about 260 tokens end: a response of 48 tokens without any of them is no rule.
    assert sum(not row["is_truncated"] for row in rows) > 10
