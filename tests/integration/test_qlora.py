"""A frozen base in 4 bits: what is trained on it, what is written of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpr_lightning.application import CommandLine, command_line
from dpr_lightning.functional.collate import collate
from dpr_lightning.main import main
from dpr_lightning.manifest import verify
from dpr_lightning.models.adapters import is_in_4_bits
from dpr_lightning.models.backbone import BackboneConfig
from dpr_lightning.models.policies import CausalPolicy, load_policy

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'dpr-lightning[qlora]'")


def arguments(root: Path, recipe: str, run: str, *more: str) -> list[str]:
    names = ("base", f"recipe/{recipe}", "backbone/tiny", "qlora", "hardware/cpu")
    own = {
        "sft": [f"--data.demonstrations.source={root / 'train.jsonl'}", "--data.demonstrations.preset=prompt_response"],
        "dpr": [f"--model.teacher={root / 'sft'}", "--data.prompts_per_rollout=8", "--data.sampling.max_new_tokens=8"],
    }[recipe]
    sizes = ["--data.global_batch_size=8", "--data.micro_batch_size=4"]
    # float32, so that equalities are to float32's rounding.
    precision = ["--model.backbone.dtype=float32", "--model.optimizer.lr=1e-2", "--trainer.max_epochs=2"]
    files = [argument for name in names for argument in ("-c", f"configs/{name}.yaml")]
    return ["fit", *files, *own, *sizes, *precision, f"--run_dir={root / run}", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CommandLine, CommandLine]:
    """A short SFT run and a DPR run after it."""
    root = tmp_path_factory.mktemp("qlora")
    numbers = np.random.default_rng(0).integers(1000, size=16).tolist()
    rows = [{"prompt": f"draw {i}.\n", "response": f"{number} it is"} for i, number in enumerate(numbers)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = command_line(arguments(root, "sft", "sft", "--data.demonstrations.subsample=null"))
    return root, sft, command_line(arguments(root, "dpr", "dpr"))


def logp(policy: CausalPolicy) -> torch.Tensor:
    batch = collate([[1, 5, 6, 7]], [[9, 10, 11, 12, 13, 2]], pad_id=0)
    with torch.no_grad():
        return policy(batch).logp_N


def test_the_base_is_in_4_bits_and_shared(runs: tuple[Path, CommandLine, CommandLine]) -> None:
    _, sft, dpr = runs
    for cli in (sft, dpr):
        layers = [module for module in cli.model.actor.modules() if is_in_4_bits(module)]
        assert len(layers) == 7 * cli.model.actor.model.config.num_hidden_layers
        assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert {id(policy.model) for policy in dpr.model.frozen.values()} == {id(dpr.model.actor.model)}


def test_the_export_is_the_policy_that_was_trained(runs: tuple[Path, CommandLine, CommandLine]) -> None:
    root, sft, dpr = runs
    plain = BackboneConfig(name_or_path="unused")
    for name, cli in (("sft", sft), ("dpr", dpr)):
        verify(root / name / "final")
        exported = load_policy(str(root / name / "final"), plain, chunk_size=64)
        torch.testing.assert_close(logp(exported), logp(cli.model.actor), rtol=1e-3, atol=1e-3)
        config = AutoModelForCausalLM.from_pretrained(root / name / "final").config
        assert not hasattr(config, "quantization_config")
    # Rounding to 4 bits shows, and the adapter is more than it.
    base = load_policy("dpr_lightning/demo/backbone", plain, chunk_size=64)
    assert (logp(base) - logp(sft.model.actor)).abs().max() > 0.05


def test_the_teacher_is_the_sft_policy_exactly(runs: tuple[Path, CommandLine, CommandLine]) -> None:
    _, sft, dpr = runs
    assert torch.equal(logp(dpr.model.frozen["teacher"]), logp(sft.model.actor))
    assert not torch.equal(logp(dpr.model.frozen["reference"]), logp(sft.model.actor))


def test_a_checkpoint_holds_the_adapter_alone_and_resumes(runs: tuple[Path, CommandLine, CommandLine]) -> None:
    root, _, dpr = runs
    saved = torch.load(root / "dpr/checkpoints/last.ckpt", weights_only=True)
    assert {name.rsplit(".", 3)[1] for name in saved["state_dict"]} == {"lora_A", "lora_B"}
    every = [
        "--trainer.callbacks+=dpr_lightning.callbacks.checkpoint.RunCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1",
    ]
    main(arguments(root, "dpr", "killed", *every))
    resumed = command_line(arguments(root, "dpr", "again", f"--ckpt_path={root / 'killed/checkpoints/step=1.ckpt'}"))
    assert torch.equal(logp(resumed.model.actor), logp(dpr.model.actor))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.backbone.lora=null"], "model.backbone.quantization: weights in 4 bits cannot be trained"),
        (["--model.reference=dpr_lightning/demo/backbone"], None),
        (["--model.reference={root}/other"], "model.backbone.quantization: the reference '"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    more: list[str],
    message: str | None,
    runs: tuple[Path, CommandLine, CommandLine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, _, dpr = runs
    if not (root / "other").exists():
        model = AutoModelForCausalLM.from_pretrained("dpr_lightning/demo/backbone")
        model.save_pretrained(root / "other")
        dpr.model.tokenizer.save_pretrained(root / "other")
    settings = [argument.replace("{root}", str(root)) for argument in more]
    command = arguments(root, "dpr", str(tmp_path / "run"), "--trainer.max_epochs=1", *settings)
    if message is None:
        # The bare base is a policy of the same base.
        main(command)
        return
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert message in capsys.readouterr().err
