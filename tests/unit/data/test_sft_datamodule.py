from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.prompts import PromptBatch
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.data.templates import ChatTemplate, TextTemplate
from dpr_lightning.errors import UserError
from dpr_lightning.types import SFTBatch

# Resumed runs write to a directory of their own here, which Lightning remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

Write = Callable[..., str]
ROWS = [{"prompt": "abcdefgh"[i % 7 :], "response": "he" * (1 + i % 5), "id": i} for i in range(21)]


class Toy(LightningModule):
    """Bigram-like scores from an embedding; loads its weights late, as the real modules do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.table: torch.nn.Embedding | None = None
        self.seen: list[SFTBatch] = []
        self.predicted: list[PromptBatch] = []

    def configure_model(self) -> None:
        if self.table is None:
            self.table = torch.nn.Embedding(len(self.tokenizer), 1)
            torch.nn.init.constant_(self.table.weight, 0.1)

    def loss(self, batch: SFTBatch) -> Tensor:
        assert self.table is not None
        score_BT = self.table(batch.input_ids_BT)[..., 0].cos()
        return torch.where(batch.response_mask_BT, score_BT, 0.0).sum() / batch.num_tokens

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.loss(batch)

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        self.seen.append(batch)
        self.log("val/loss", self.loss(batch), batch_size=1)

    def test_step(self, batch: SFTBatch, batch_idx: int) -> None:
        self.seen.append(batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.predicted.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def trainer(root: Path, **kwargs: Any) -> Trainer:
    torch.set_num_threads(1)
    settings = {"max_epochs": 1, "callbacks": [], "enable_checkpointing": bool(kwargs.get("callbacks")), **kwargs}
    return Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


def data(source: str, **kwargs: Any) -> SFTDataModule:
    settings = {name: kwargs.pop(name) for name in list(kwargs) if name in DemonstrationConfig.__dataclass_fields__}
    return SFTDataModule(
        DemonstrationConfig(source=source, **settings),
        **{"global_batch_size": 8, "micro_batch_size": 2, **kwargs},
    )


def test_an_epoch_serves_every_row_once_in_whole_steps(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module, datamodule = Toy(byte_bpe), data(write_jsonl(ROWS))
    runner = trainer(tmp_path)
    runner.fit(module, datamodule)
    # 21 rows: two steps of four micro-batches of two, then five rows in three micro-batches.
    assert runner.accumulate_grad_batches == 4
    assert runner.global_step == 3
    assert len(module.seen) == 11
    tokens_per_micro_batch = [int(batch.response_mask_BT.sum()) for batch in module.seen]
    for start, stop in ((0, 4), (4, 8), (8, 11)):
        step_tokens = sum(tokens_per_micro_batch[start:stop])
        assert {batch.num_tokens for batch in module.seen[start:stop]} == {step_tokens}
    # "he" is one token: row i has 1 + i % 5 of them, then EOS.
    assert sum(tokens_per_micro_batch) == sum(1 + i % 5 + 1 for i in range(21))
    labels = [batch.input_ids_BT[batch.response_mask_BT] for batch in module.seen]
    assert sum(int((ids == byte_bpe.eos_token_id).sum()) for ids in labels) == 21
    assert all(not batch.response_mask_BT[:, 0].any() for batch in module.seen)
    assert "21 rows, 21 kept" in datamodule.drop_reports["train"].table()


def test_epochs_differ_and_are_a_function_of_seed_and_epoch(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(ROWS)
    modules = [SFTDataModule(DemonstrationConfig(source=path), None, 8, 2, seed=seed) for seed in (0, 0, 1)]
    for datamodule in modules:
        datamodule.trainer = trainer(tmp_path)
        datamodule.trainer.strategy._lightning_module = Toy(byte_bpe)
        datamodule.setup("fit")
    plans = [[datamodule.plan_epoch(epoch) for epoch in (0, 1)] for datamodule in modules]
    assert plans[0] == plans[1]
    assert plans[0][0] != plans[0][1]
    assert plans[0][0] != plans[2][0]


def test_killed_run_resumes_bit_for_bit(write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_jsonl(ROWS)

    def run(name: str, resume: str | None = None, **kwargs: Any) -> Toy:
        saver = ModelCheckpoint(dirpath=tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        module = Toy(byte_bpe)
        runner = trainer(tmp_path, callbacks=[saver], **{"max_epochs": 3, **kwargs})
        runner.fit(module, data(path, validation_fraction=0.2), ckpt_path=resume)
        return module

    whole = run("whole")
    for step in (1, 4):
        run(f"killed{step}", max_steps=step)
        resumed = run(f"resumed{step}", str(tmp_path / f"killed{step}" / f"step={step}.ckpt"))
        assert whole.table is not None
        assert resumed.table is not None
        assert torch.equal(whole.table.weight, resumed.table.weight)


def test_validation_micro_batches_carry_their_own_tokens(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(ROWS)
    for run_on in ("validate", "test"):
        module = Toy(byte_bpe)
        datamodule = data(path, validation_source=path, test_source=path)
        getattr(trainer(tmp_path), run_on)(module, datamodule, verbose=False)
        assert [batch.num_tokens for batch in module.seen] == [int(b.response_mask_BT.sum()) for b in module.seen]
        assert len(module.seen) == 11


def test_predict_serves_held_out_prompts_with_their_rows(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module = Toy(byte_bpe)
    path = write_jsonl([{"prompt": "hell", "id": i} for i in range(5)])
    trainer(tmp_path).predict(module, data(path, test_source=path))
    assert [len(batch) for batch in module.predicted] == [2, 2, 1]
    assert [row["id"] for batch in module.predicted for row in batch.rows] == [0, 1, 2, 3, 4]
    assert module.predicted[0].prompt_ids[0] == byte_bpe("hell\n")["input_ids"]


def test_refusals_come_before_weights_are_loaded(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(ROWS)
    cases: list[tuple[SFTDataModule, PreTrainedTokenizerFast, dict[str, Any], str]] = [
        (data(path, global_batch_size=7), byte_bpe, {}, r"data\.global_batch_size: 7 .* 6 or 8"),
        (data(path), byte_bpe, {"accumulate_grad_batches": 3}, "accumulate_grad_batches: found 3.* 4; leave it out"),
        (data(path, template=ChatTemplate()), words, {}, "has no chat template"),
        (data(path, max_prompt_tokens=3), byte_bpe, {}, "rows cannot be used: .* prompt too long"),
        (data(path, global_batch_size=32, drop_last=True), byte_bpe, {}, "drop_last leaves no step"),
        (data(path, columns={"prompt": "ids"}), byte_bpe, {}, "no column 'ids' for prompt"),
    ]
    for datamodule, tokenizer, settings, match in cases:
        module = Toy(tokenizer)
        with pytest.raises(UserError, match=match):
            trainer(tmp_path, **settings).fit(module, datamodule)
        assert module.table is None
    with pytest.raises(UserError, match="no test rows; set test_fraction or test_source"):
        trainer(tmp_path).test(Toy(byte_bpe), data(path))


def test_accumulation_that_agrees_is_accepted(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    runner = trainer(tmp_path, accumulate_grad_batches=4)
    runner.fit(Toy(byte_bpe), data(write_jsonl(ROWS)))
    assert runner.global_step == 3


def test_manifest_is_plain_json(write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_jsonl(ROWS)
    datamodule = data(path, validation_fraction=0.2, template=TextTemplate("{prompt}:"))
    trainer(tmp_path).fit(Toy(byte_bpe), datamodule)
    manifest = json.loads(json.dumps(datamodule.data_manifest()))
    assert manifest["demonstrations"]["source"] == path
    assert manifest["template"] == datamodule.template.to_manifest()
    assert manifest["template_fingerprint"] == datamodule.template.fingerprint()
    assert manifest["splits"]["train"]["kept"] + manifest["splits"]["validation"]["kept"] == 21
    assert manifest["splits"]["train"]["fingerprint"] == datamodule.encoded["train"].fingerprint()


def test_validation_prompts_seen_in_training_are_counted(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    held_out = write_jsonl([{"prompt": text, "response": "x"} for text in ("abcdefgh", "new")], "held_out.jsonl")
    datamodule = data(write_jsonl(ROWS), validation_source=held_out)
    with pytest.warns(UserWarning, match="1 of 2 distinct validation prompts are training prompts too"):
        trainer(tmp_path).fit(Toy(byte_bpe), datamodule)
    assert datamodule.data_manifest()["validation_prompts_seen_in_training"] == 1


def test_datamodule_parses_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parsed = parser.parse_string("""
data:
  class_path: dpr_lightning.data.SFTDataModule
  init_args:
    demonstrations: {source: rows.jsonl, preset: gsm8k, validation_fraction: 0.01}
    template:
      class_path: dpr_lightning.data.TextTemplate
      init_args: {prompt: "Q: {prompt}\\nA:"}
    global_batch_size: 64
""")
    datamodule = parser.instantiate(parsed).data
    assert isinstance(datamodule, SFTDataModule)
    assert datamodule.demonstrations == DemonstrationConfig(
        source="rows.jsonl", preset="gsm8k", validation_fraction=0.01
    )
    assert datamodule.template == TextTemplate("Q: {prompt}\nA:")
    assert (datamodule.global_batch_size, datamodule.micro_batch_size) == (64, 8)


@pytest.mark.shared_data
def test_gsm8k_and_alpaca_as_they_are(byte_bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    shared = Path(os.environ.get("DPR_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not (shared / "gsm8k" / "train.jsonl").is_file():
        pytest.skip(f"no shared data at {shared}")
    limits = {"max_prompt_tokens": 4096, "max_response_tokens": 512, "subsample": 200, "validation_fraction": 0.1}
    for name, preset in (("gsm8k/train.jsonl", "gsm8k"), ("demos/alpaca_gpt4_en_999.json", "alpaca")):
        datamodule = data(str(shared / name), preset=preset, **limits)
        datamodule.trainer = trainer(tmp_path)
        datamodule.trainer.strategy._lightning_module = Toy(byte_bpe)
        datamodule.setup("fit")
        reports = datamodule.drop_reports
        assert reports["train"].num_rows + reports["validation"].num_rows == 200
        assert reports["train"].num_dropped == 0
        encoded = datamodule.encoded["train"]
        row = encoded.metadata(0)
        assert byte_bpe.decode(encoded.prompt_ids(0)) == row["prompt"] + "\n"
        assert row["response"].startswith(byte_bpe.decode(encoded.response_ids(0), skip_special_tokens=True))
