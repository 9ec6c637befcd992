"""Whatever a user gets wrong is refused before a model loads: one line, exit status 2, no traceback."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dpr_lightning.models.policies
from dpr_lightning.main import main
from dpr_lightning.manifest import write_directory

CALLBACKS = "dpr_lightning.callbacks."
Refuse = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must be refused; return its message, checked for form."""

    def no_model(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded before the refusal")

    monkeypatch.setattr(dpr_lightning.models.policies, "load_model", no_model)

    def run(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as status:
            main(list(args))
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpr-lightning: error: ")]
        assert status.value.code == 2
        assert len(errors) == 1
        message = errors[0].removeprefix("dpr-lightning: error: ")
        assert message.isprintable()
        return message

    return run


@pytest.fixture
def sft(refused: Refuse, tmp_path: Path, tiny_model_dir: Path, demonstrations_file: str) -> Refuse:
    """Refusal of a good SFT command with something added; later arguments win."""

    def run(*more: str, subcommand: str = "fit") -> str:
        return refused(subcommand, *_overlays("sft", tmp_path, tiny_model_dir), *_data(demonstrations_file), *more)

    return run


@pytest.fixture
def dpr(
    refused: Refuse, tmp_path: Path, tiny_model_dir: Path, demonstrations_file: str, frozen_dirs: tuple[str, str]
) -> Refuse:
    """The same of DPR, between two directories that no run of ours wrote."""
    pair = [f"--model.teacher={frozen_dirs[0]}", f"--model.reference={frozen_dirs[1]}"]
    sizes = ["--data.prompts_per_rollout=16", "--data.global_batch_size=8", "--data.micro_batch_size=4"]

    def run(*more: str, subcommand: str = "fit") -> str:
        overlays = _overlays("dpr", tmp_path, tiny_model_dir)
        return refused(subcommand, *overlays, *_data(demonstrations_file), *pair, *sizes, *more)

    return run


def _overlays(recipe: str, tmp_path: Path, model_dir: Path) -> list[str]:
    files = ("base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu")
    overlays = [argument for file in files for argument in ("-c", f"configs/{file}.yaml")]
    return [*overlays, f"--model.backbone.name_or_path={model_dir}", f"--run_dir={tmp_path / 'run'}"]


def _data(source: str) -> list[str]:
    key = "--data.demonstrations"
    return [f"{key}.source={source}", f"{key}.preset=prompt_response", f"{key}.subsample=null"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


KEYS = [
    (["--trainer.max_epoch", "1"], "trainer.max_epoch: there is no such key; did you mean 'trainer.max_epochs'?"),
    (["--modle.warmup_ratio", "0"], "modle.warmup_ratio: there is no such key; did you mean 'model.warmup_ratio'?"),
    (["--model.warmup_rato", "0"], "model.warmup_rato: there is no such key; did you mean 'model.warmup_ratio'?"),
    (["--model.decoding.temprature=1"], "did you mean 'model.decoding.temperature'?"),
    (["--model.backbone.dtyp=float32"], "did you mean 'model.backbone.dtype'?"),
    (["--model.optimizer.lrr", "1"], "model.optimizer.lrr: there is no such key; did you mean 'model.optimizer.lr'?"),
    (["--data.demonstrations.sorce", "x"], "did you mean 'data.demonstrations.source'?"),
    (["--data.global_batchsize", "4"], "did you mean 'data.global_batch_size'?"),
    (["--trainer.callbacks.direktory", "x"], "trainer.callbacks.direktory: there is no such key"),
    (["--rundir", "x"], "rundir: there is no such key; did you mean 'run_dir'?"),
    (["stray"], "found 'stray', which belongs to no key"),
    (["--model.warmup_ratio"], "model.warmup_ratio: found no value"),
    (["--run_dir"], "run_dir: found no value"),
    (["--model.teacher=x"], "model.teacher: there is no such key; here are backbone"),
    (["--model..x=1"], "model..x: there is no such key"),
    (["--model.=1"], "model: found '1'"),
    (["--=x"], "there is no such key"),
    ([""], "found '', which belongs to no key"),
]

TYPES = [
    (["--model.warmup_ratio", "abc"], "model.warmup_ratio: found 'abc'; give a number"),
    (["--trainer.max_epochs", "1.5"], "trainer.max_epochs: found '1.5'; give a whole number or null"),
    (["--seed_everything", "abc"], "seed_everything: found 'abc'"),
    (["--seed_everything", "-3"], "seed_everything: found -3; give a whole number from 0"),
    (["--data.demonstrations.preset", "orca"], "did you mean 'open_orca'?"),
    (["--data.demonstrations.subsample", "many"], "data.demonstrations.subsample: found 'many'; give a whole number"),
    (["--data.demonstrations.columns", "abc"], "data.demonstrations.columns: found 'abc'; give a mapping or null"),
    (["--data.drop_last", "maybe"], "data.drop_last: found 'maybe'; give true or false"),
    (["--model.backbone.dtype", "float"], "model.backbone.dtype: found 'float'; give one of 'float32'"),
    (["--model.backbone.model_class", "transformers.Nothing"], "model.backbone.model_class: found 'transformers.Noth"),
    (["--model.optimizer", "SGDD"], "model.optimizer: found 'SGDD'; give the whole path of a class"),
    (["--model", "5"], "model: found '5'"),
    (["--model", "dpr_lightning.data.SFTDataModule"], "give the class_path of a CausalLMModule"),
    (["--model.class_path", "dpr_lightning.modules.sft.SFTModul"], "did you mean 'dpr_lightning.modules.sft.SFTModule"),
    (["--data.template", "dpr_lightning.data.templates.TxtTemplate"], "did you mean 'dpr_lightning.data.templates.Tex"),
    ([f"--trainer.callbacks+={CALLBACKS}hf_export.HFExprt"], f"did you mean '{CALLBACKS}hf_export.HFExport'?"),
    (["--model=null"], "model: it is required"),
    (["--model.optimizer=null"], "model.optimizer: found 'None'"),
    (["--model.backbone=null"], "model.backbone: found 'null'; set the keys below it"),
    (["--model.init_args=null"], "model: found 'null'; give the class_path of a CausalLMModule"),
    (["--data.template.prompt={prompt}"], "data.template: found '{prompt}'; give the class_path of a PromptTemplate"),
    (["--trainer.callbacks.directory"], "trainer.callbacks.directory: found no value"),
]

VALUES = [
    (["--model.warmup_ratio=2"], "model.warmup_ratio: found 2"),
    (["--model.optimizer.lr=-1"], "model.optimizer: Invalid learning rate: -1.0"),
    (["--model.optimizer=torch.optim.SGD", "--model.optimizer.momentum=-1"], "model.optimizer: Invalid momentum value"),
    (["--model.decoding.max_new_tokens=0"], "model.decoding: max_new_tokens must be at least 1, got 0"),
    (["--model.decoding.temperature=-1"], "model.decoding: temperature must be 0"),
    (["--model.decoding.top_p=0"], "model.decoding: top_p must be in (0, 1], got 0"),
    (["--model.logprob_chunk_size=0"], "model.logprob_chunk_size: found 0"),
    (["--model.backbone.name_or_path=/no/such/directory"], "there is no such directory"),
    (["--data.global_batch_size=0"], "data.global_batch_size: found 0"),
    (["--data.micro_batch_size=0"], "data.micro_batch_size: found 0"),
    (["--data.global_batch_size=7", "--data.micro_batch_size=2"], "set data.global_batch_size to 6 or 8"),
    (["--data.demonstrations.max_prompt_tokens=0"], "data.demonstrations.max_prompt_tokens: found 0"),
    (["--data.demonstrations.max_prompt_tokens=2"], "data.demonstrations"),
    (["--data.demonstrations.validation_fraction=1.5"], "data.demonstrations.validation_fraction: found 1.5"),
    (["--data.template=dpr_lightning.data.templates.ChatTemplate"], "has no chat template"),
    (["--data.template=dpr_lightning.data.templates.TextTemplate", "--data.template.prompt=nothing"], "{prompt}"),
    (["--trainer.accelerator=tpuu"], "trainer: You selected an invalid accelerator name"),
    (["--trainer.devices=abc"], "trainer: `devices`"),
    (["--trainer.strategy=foo"], "trainer: You selected an invalid strategy name"),
    (
        ["--trainer.strategy=fsdp_cpu_offload"],
        "trainer.strategy: found fsdp_cpu_offload; weights are sharded by 'fsdp'",
    ),
    (
        ['--trainer.strategy={"class_path": "lightning.pytorch.strategies.FSDPStrategy"}'],
        "trainer.strategy: found FSDPStrategy",
    ),
    (["--trainer.strategy=fsdp", "--trainer.precision=16-mixed"], "trainer: "),
    (
        ["--trainer.strategy=fsdp", "-c", "configs/qlora.yaml"],
        "model.backbone.quantization: a base in 4 bits cannot be sharded",
    ),
    (["--model.backbone.quantization=nf4"], "model.backbone.quantization: weights in 4 bits cannot be trained"),
    (["--trainer.max_epochs=-2"], "trainer: `max_epochs` must be"),
    (["--trainer.max_epochs=-1"], "trainer.max_epochs and trainer.max_steps: both are unbounded"),
    (["--trainer.accumulate_grad_batches=5"], "trainer.accumulate_grad_batches: found 5"),
    (["--ckpt_path=last"], "ckpt_path: found 'last', but"),
    (["--ckpt_path=none.ckpt"], "ckpt_path: no file 'none.ckpt'"),
    (["--ckpt_path="], "ckpt_path: no file ''"),
    (["--ckpt_path=configs"], "ckpt_path: no file 'configs'"),
    (["--run_dir="], "run_dir: found the working directory itself"),
    (["--data.seed=-1"], "data.seed: found -1"),
    (["--data.demonstrations.seed=-1"], "data.demonstrations.seed: found -1"),
    (["--model.prediction_seed=-1"], "model.prediction_seed: found -1"),
    (["--trainer.max_time=00:00"], "trainer: `Timer(duration='00:00')` is not a valid duration"),
    (["--trainer.enable_checkpointing=false"], "trainer: Trainer was configured with `enable_checkpointing=False`"),
    (["--trainer.accelerator=cuda", "--trainer.devices=99"], "trainer: "),
    (["--data.demonstrations.columns.promt=q"], "data.demonstrations.columns: unknown key 'promt'"),
    (["--data.demonstrations.columns.prompt=q"], "data.demonstrations.columns: no column 'q' for prompt"),
]


@pytest.mark.parametrize(("args", "message"), KEYS + TYPES + VALUES, ids=lambda value: str(value)[:60])
def test_sft_refuses(sft: Refuse, args: list[str], message: str) -> None:
    assert message in sft(*args)


DPR = [
    (["--model.reference=null"], "so there is no snapshot to find: set model.reference"),
    (["--model.teacher=/no/run", "--model.reference=null"], "model.teacher '/no/run' is no directory here"),
    (["--model.reference=/no/such/directory"], "'/no/such/directory' cannot be loaded (there is no such directory)"),
    (["--model.alpha=0"], "model.alpha: found 0"),
    (["--model.alpha=1"], "model.alpha: found 1"),
    (["--model.alpha=nan"], "model.alpha: found 'nan'"),
    (["--model.returns.gamma=3"], "model.returns: gamma must be in [0, 1], got 3"),
    (["--model.returns.gama=1"], "model.returns.gama: there is no such key; did you mean 'model.returns.gamma'?"),
    (["--model.loss.clip_low=2"], "model.loss: need 0 < clip_low < 1"),
    (["--model.loss.clip_lw=0.1"], "did you mean 'model.loss.clip_low'?"),
    (["--model.loss=dpr_lightning.functional.losses.ClipedPolicyLoss"], "losses.ClippedPolicyLoss'?"),
    (["--model.importance_cap=0.5"], "model.importance_cap: found 0.5; give 1 or more"),
    (["--model.kl_in_reward=-1"], "model.kl_in_reward: found -1"),
    (["--model.advantage.leave_one_out=true"], "data.samples_per_prompt: found 1"),
    (["--model.score_micro_batch_size=0"], "model.score_micro_batch_size: found 0"),
    (["--data.sampling.top_k=-1"], "data.sampling: top_k must be 0 (off) or more, got -1"),
    (["--data.sampling.batch_size=0"], "data.sampling: batch_size must be at least 1, got 0"),
    (["--data.prompts_per_rollout=32"], "data.prompts_per_rollout: found 32, but there are 24 training prompts"),
    (["--data.prompts_per_rollout=12"], "no multiple of data.global_batch_size 8"),
    (["--data.prompts_per_rollout=0"], "data.prompts_per_rollout: found 0"),
    (["--data.samples_per_prompt=0"], "data.samples_per_prompt: found 0"),
    (["--data.micro_batch_size=3"], "data.global_batch_size: 8 is no multiple of data.micro_batch_size 3"),
    (["--data.num_validation_prompts=0"], "data.num_validation_prompts: found 0"),
]


@pytest.mark.parametrize(("args", "message"), DPR, ids=lambda value: str(value)[:60])
def test_dpr_refuses(dpr: Refuse, args: list[str], message: str) -> None:
    assert message in dpr(*args)


def test_rollouts_by_vllm(dpr: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = "--model.sampler=dpr_lightning.rollout.vllm_sampler.VLLMSampler"
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "model.sampler: VLLMSampler needs vllm, which is not installed here; install dpr-l" in dpr(sampler)
    # A module that only says that it is there: none of these refusals needs it.
    found = ModuleType("vllm")
    found.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", found)
    message = dpr(sampler, "--model.sampler.max_model_len=1030")
    assert "model.sampler.max_model_len: found 1030, but the longest prompt has " in message
    assert "max_model_len: found 0; give" in dpr(sampler, "--model.sampler.max_model_len=0")
    assert "'seed' is set by VLLMSampler itself" in dpr(sampler, "--model.sampler.engine={seed: 3}")
    assert "model.sampler.max_modl_len: there is no such key" in dpr(sampler, "--model.sampler.max_modl_len=9")


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_no_held_out_rows(sft: Refuse, dpr: Refuse, subcommand: str) -> None:
    assert "data.demonstrations: no " in sft("--ckpt_path=initial", subcommand=subcommand)
    assert "data.demonstrations: no held-out prompts" in dpr("--ckpt_path=initial", subcommand=subcommand)


@pytest.mark.parametrize("alpha", ["0", "1", "1.5", "-0.1", "[0.5, 2]"])
def test_snapshot_alpha_outside_the_run(sft: Refuse, tmp_path: Path, alpha: str) -> None:
    callback = f"{{class_path: {CALLBACKS}reference_snapshot.ReferenceSnapshot, init_args: {{alphas: {alpha}}}}}"
    overlay = write(tmp_path / "overlay.yaml", f"trainer: {{callbacks+: [{callback}]}}")
    assert "trainer.callbacks.ReferenceSnapshot.alphas: found" in sft("-c", overlay)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainr: {max_epochs: 1}", "trainr.max_epochs: there is no such key; did you mean 'trainer.max_epochs'?"),
        ("trainer: {max_epoch: 1}", "trainer.max_epoch: there is no such key; did you mean 'trainer.max_epochs'?"),
        ("model: {init_args: {warmup_rato: 1}}", "did you mean 'model.warmup_ratio'?"),
        ("model: {init_args: {decoding: {temprature: 1}}}", "did you mean 'model.decoding.temperature'?"),
        ("data: {init_args: {demonstrations: {subsampl: 1}}}", "did you mean 'data.demonstrations.subsample'?"),
        (
            f"trainer: {{callbacks+: [{{class_path: {CALLBACKS}progress.Progress, init_args: {{num_line: 1}}}}]}}",
            "trainer.callbacks.num_line: there is no such key; did you mean 'trainer.callbacks.num_lines'?",
        ),
    ],
)
def test_unknown_key_in_a_file(sft: Refuse, tmp_path: Path, text: str, message: str) -> None:
    overlay = write(tmp_path / "overlay.yaml", f"# a comment\n{text}\n")
    found = sft("-c", overlay)
    assert message in found
    assert f"({overlay} line 2)" in found


@pytest.mark.parametrize("text", ["trainer: {max_epochs: [1, 2}", "trainer:\n\tmax_epochs: 1", "just text", "[1, 2]"])
def test_file_that_is_no_configuration(sft: Refuse, tmp_path: Path, text: str) -> None:
    overlay = write(tmp_path / "overlay.yaml", text)
    assert overlay in sft("-c", overlay)


def test_file_that_is_no_text(sft: Refuse, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_bytes(b"\xff\xfe\x00")
    assert f"'{overlay}' is no valid YAML" in sft("-c", str(overlay))
    assert "config" in sft("-c", str(tmp_path))


def test_configuration_file_missing(sft: Refuse, tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in sft("-c", str(tmp_path / "none.yaml"))


GOOD_ROW = json.dumps({"prompt": "1 and 1", "response": "ok"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n\n", "holds no rows"),
        ("broken.jsonl", f'{GOOD_ROW}\n{GOOD_ROW}\n{{"prompt": \n', "line 3: broken JSON"),
        ("column.jsonl", '{"promt": "a", "response": "b"}\n', "no column 'prompt' for prompt (nearest: 'promt')"),
        ("answer.csv", "prompt\na\n", "no column 'response' for response"),
        ("number.jsonl", f'{GOOD_ROW}\n{{"prompt": 3, "response": "b"}}\n', "line 2: column 'prompt' holds int 3"),
        ("object.jsonl", f"{GOOD_ROW}\n[1]\n", "line 2 holds list, not an object"),
        ("cells.csv", "prompt,response\na,b\na,b,c\n", "line 3 has 3 cells, the header 2"),
        ("kind.txt", "prompt\n", "is not one of .jsonl"),
        ("rejected.jsonl", f'{GOOD_ROW}\n{{"prompt": "a", "response": ""}}\n', "max_rejected_share"),
        ("parquet.parquet", "no parquet", "cannot be read as Parquet"),
    ],
)
def test_broken_data(sft: Refuse, tmp_path: Path, name: str, text: str, message: str) -> None:
    source = write(tmp_path / name, text)
    found = sft(f"--data.demonstrations.source={source}")
    assert message in found
    assert source in found or "data.demonstrations" in found


def test_data_missing(sft: Refuse, tmp_path: Path) -> None:
    for source in (tmp_path / "none.jsonl", tmp_path):
        assert str(source) in sft(f"--data.demonstrations.source={source}")


def test_run_dir_that_cannot_be_written(sft: Refuse, tmp_path: Path) -> None:
    # Permissions do not stop root, which tests may run as; a path below a regular file stops everyone.
    file = write(tmp_path / "file", "")
    for subcommand in ("fit", "validate", "predict"):
        found = sft(f"--run_dir={file}/run", subcommand=subcommand)
        assert found.startswith(f"run_dir: '{file}/run' cannot be written to")
    assert "run_dir" in sft(f"--run_dir={tmp_path / ('long' * 100)}")


def test_run_dir_that_holds_a_run(sft: Refuse, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write(run_dir / "config.yaml", "seed_everything: 7\n")
    found = sft()
    assert found.startswith(f"run_dir: '{run_dir}' already holds a run with other settings (seed_everything is 7 there")
    assert "--ckpt_path last continues it" in found
    # A run that ended before its first step left nothing that is worth keeping: the next refusal is about the data.
    write(run_dir / "run.json", json.dumps({"status": "failed", "optimizer_steps": 0}))
    assert sft("--data.global_batch_size=0").startswith("data.global_batch_size")


def test_mismatched_tokenizers(dpr: Refuse, tmp_path: Path, frozen_dirs: tuple[str, str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(frozen_dirs[1], other)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(other)
    found = dpr(f"--model.reference={other}")
    assert "have different tokenizers" in found
    assert frozen_dirs[0] in found
    assert str(other) in found


def test_teachers_run_that_is_unfinished_or_lacks_the_snapshot(
    dpr: Refuse, tmp_path: Path, frozen_dirs: tuple[str, str]
) -> None:
    run = tmp_path / "sft"
    run.mkdir()
    write(run / "config.yaml", "")
    args = [f"--model.teacher={run}", "--model.reference=null"]
    assert "without a finished 'final/' directory" in dpr(*args)
    write_directory(run / "final", lambda path: shutil.copytree(frozen_dirs[0], path, dirs_exist_ok=True), {})
    assert "model.alpha is 0.5, but" in dpr(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bogus"], "COMMAND: found 'bogus'; give one of fit, validate"),
        ([], "COMMAND: found none; give one of fit, validate"),
        (["fit"], "data: it is required, and so is model, and not given"),
        (["validate", "-c", "configs/base.yaml"], "data: it is required, and so is model, and not given"),
        (["fit", "-c", "configs/base.yaml", "-c", "configs/recipe/dpr.yaml"], "it is required"),
        (["--bogus"], "bogus"),
    ],
)
def test_incomplete_commands(refused: Refuse, args: list[str], message: str) -> None:
    assert message in refused(*args)
