"""``dpr-lightning plan``: real-size backbones without weights, the command as it is used, and fit's own memory."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

import dpr_lightning.application
from dpr_lightning.main import main
from dpr_lightning.planning import architecture
from dpr_lightning.planning.advice import with_lora
from dpr_lightning.planning.devices import GPUS
from dpr_lightning.planning.phases import BUCKETS, Planner
from dpr_lightning.planning.settings import Parallel, read_run
from dpr_lightning.planning.sizes import Given, find_sizes
from dpr_lightning.planning.tracker import ACTIVATIONS, FROZEN, GRADIENTS, MOMENTS, WEIGHTS

CONFIGS = Path(dpr_lightning.application.__file__).parent / "configs"
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "plan_memory.py"
GIB = 2**30
# Parameters of the published weights (of Gemma 3's 4,300,079,472 without the vision tower's 416,866,032 and the
# projector's 2,950,272), and those of rank 16 on every linear layer
# but the last: 16 x (inputs + outputs) of q, k, v, o, gate, up and down, in every layer.
BACKBONES = {
    "llama3.1_8b": (8_030_261_248, 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)),
    "qwen2.5_7b": (7_615_616_512, 28 * 16 * (2 * 7168 + 2 * 4096 + 3 * 22528)),
    "mistral_7b_v0.1": (7_241_732_096, 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)),
    "gemma3_4b": (3_880_263_168, 34 * 16 * (2 * 4608 + 2 * 3584 + 3 * 12800)),
}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "_hub_answers", lambda: False)


def files(*names: str) -> list[str]:
    return [part for name in ("base", *names) for part in ("-c", str(CONFIGS / f"{name}.yaml"))]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_real_sizes_are_planned_without_weights(backbone: str) -> None:
    num_parameters, num_adapted = BACKBONES[backbone]
    run = read_run(files("recipe/dpr", f"backbone/{backbone}", "hardware/gpu1"))
    sizes = find_sizes(run, Given(num_rows=100, longest_prompt=24, longest_response=40))
    planner = Planner(run, sizes, GPUS["H100-80"])
    assert (planner.model.num_parameters, planner.model.num_trained) == (num_parameters, num_parameters)
    parts = planner.plan("training").parts
    # float32: 4 bytes a weight and a gradient, 8 of moments, and two frozen copies.
    assert parts[WEIGHTS] == pytest.approx(4 * num_parameters, rel=1e-5)
    assert parts[GRADIENTS] == pytest.approx(4 * num_parameters, rel=1e-5)
    assert parts[MOMENTS] == pytest.approx(8 * num_parameters, rel=1e-5)
    assert parts[FROZEN] == pytest.approx(8 * num_parameters, rel=1e-5)
    # At lengths as short as these an optimizer that is not fused would hold most, with a tensor for every weight.
    unfused = read_run([*files("recipe/dpr", f"backbone/{backbone}", "hardware/gpu1"), "--model.optimizer.fused=false"])
    most = Planner(unfused, sizes, GPUS["H100-80"]).plan("training").parts[ACTIVATIONS]
    assert most == pytest.approx(4 * num_parameters, rel=1e-5)
    assert parts[ACTIVATIONS] < 0.6 * most

    eight = dataclasses.replace(run, parallel=Parallel(strategy="ddp", num_devices=8, devices_per_node=8))
    replicated = Planner(eight, sizes, GPUS["H100-80"], planner.memo).plan("training")
    assert replicated.peak == pytest.approx(planner.plan("training").peak + 4 * num_parameters, rel=1e-5)
    assert replicated.parts[BUCKETS] == pytest.approx(4 * num_parameters, rel=1e-5)
    shards = dataclasses.replace(run, parallel=Parallel(strategy="sharded", num_devices=8, devices_per_node=8))
    sharded = Planner(shards, sizes, GPUS["H100-80"], planner.memo).plan("training").parts
    assert sharded[WEIGHTS] == pytest.approx(parts[WEIGHTS] / 8)
    assert sum(sharded.values()) < sum(parts.values()) / 4

    assert Planner(with_lora(run), sizes, GPUS["H100-80"]).model.num_trained == num_adapted


def test_adapters_of_a_real_size_share_one_base() -> None:
    num_parameters, num_adapted = BACKBONES["mistral_7b_v0.1"]
    run = read_run(
        [
            *files("recipe/dpr", "backbone/mistral_7b_v0.1", "hardware/gpu8"),
            *("-c", str(CONFIGS / "lora.yaml"), "--trainer.strategy=ddp"),
        ]
    )
    sizes = find_sizes(run, Given(num_rows=100, longest_prompt=24, longest_response=40))
    phase = Planner(run, sizes, GPUS["H100-80"]).plan("training")
    # Actor, teacher and reference are an adapter each; gradients of the actor's are in DDP's buckets once more.
    assert phase.parts[WEIGHTS] == pytest.approx(4 * (num_parameters + 3 * num_adapted), rel=1e-3)
    assert phase.parts[MOMENTS] == pytest.approx(8 * num_adapted, rel=1e-3)
    assert phase.parts[BUCKETS] == pytest.approx(4 * num_adapted, rel=1e-3)
    assert FROZEN not in phase.parts


def test_a_teachers_sft_is_planned_with_dpr() -> None:
    run = read_run(files("recipe/sft", "backbone/tiny", "hardware/cpu"))
    sizes = find_sizes(run, Given(num_rows=100, longest_prompt=24, longest_response=40))
    own = Planner(run, sizes, GPUS["H100-80"]).plan("training")
    later = read_run(files("recipe/dpr", "backbone/tiny", "hardware/cpu"))
    planner = Planner(later, sizes, GPUS["H100-80"])
    assert planner.phases == ("sft", "rollout", "scoring", "training")
    assert planner.plan("sft").parts == own.parts
    # Two frozen copies more, at the least.
    assert planner.plan("training").peak >= own.peak + 2 * own.parts[WEIGHTS]


def test_the_command_says_whether_it_fits(tmp_path: Path, demonstrations_file: str, capsys: Any) -> None:
    args = ["plan", *files("recipe/sft", "backbone/tiny", "hardware/gpu1"), "--data.global_batch_size=12"]
    args += ["--data.micro_batch_size=4", f"--data.demonstrations.source={demonstrations_file}"]
    args += ["--data.demonstrations.preset=prompt_response", "--device=A100-40"]
    main([*args, f"--out={tmp_path / 'plan.json'}"])
    printed = capsys.readouterr().out
    assert "fits: " in printed
    assert "24 training rows" in printed
    report = json.loads((tmp_path / "plan.json").read_text())
    # 24 rows in steps of 12.
    assert (report["fits"], report["cost"]["steps_per_epoch"], report["cost"]["num_steps"]) == (True, 2, 2)
    phase = report["phases"]["training"]
    assert phase["peak_bytes"] == pytest.approx(sum(phase["parts_bytes"].values()), abs=9)
    assert report["largest_micro_batch_size"] == 12
    # The model has 0.6 million weights: 1.01 GiB, of which 1 is not for tensors, hold them and no batch.
    with pytest.raises(SystemExit) as left:
        main([*args, "--gpu_memory=1.01"])
    assert left.value.code == 1
    printed = capsys.readouterr().out
    assert "does not fit: SFT training needs" in printed
    assert "gradient_checkpointing true" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu_memory=-1"], "--gpu_memory: found -1.0; give more than 0"),
        (["--data.micro_batchsize=3"], "data.micro_batchsize: there is no such key"),
        (["--data.global_batch_size=100"], "data.global_batch_size: 100 is no multiple of data.micro_batch_size 32"),
        (["--trainer.strategy=deepspeed"], "trainer.strategy: plan knows"),
        (["--model.backbone.name_or_path=some/model"], "the package knows the architecture of"),
    ],
)
def test_bad_input_is_refused(more: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", *files("recipe/sft", "backbone/tiny", "hardware/gpu1"), *more])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's accounts of memory")
@pytest.mark.multiprocess
def test_fit_takes_what_was_planned(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("plan_memory", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    small = {"num_hidden_layers": 4, "vocab_size": 24000, "hidden_size": 512, "num_attention_heads": 8}
    benchmark.MODELS["small"] = benchmark.MODELS["Llama, 8 layers"] | small | {"num_key_value_heads": 4}
    tokens = (40, 60)
    for name in ("teacher", "reference"):
        benchmark.build(tmp_path / name, "small", tokens)
    args = benchmark.arguments(tmp_path / "teacher", "dpr", "full", tokens)
    args = [arg for arg in args if not arg.startswith("--model.teacher")]
    args += [f"--model.{name}={tmp_path / name / 'model'}" for name in ("teacher", "reference")]
    peaks = _in_child(lambda: benchmark.measure(args, tmp_path / "peaks.json"), tmp_path / "peaks.json")
    lengths = [f"--prompt_tokens={tokens[0]}", f"--response_tokens={tokens[1]}"]
    main(["plan", *args, *lengths, f"--out={tmp_path / 'plan.json'}"])
    phases = json.loads((tmp_path / "plan.json").read_text())["phases"]
    assert peaks.keys() == {"rollout", "scoring", "training"}
    for name, measured in peaks.items():
        assert phases[name]["peak_bytes"] == pytest.approx(measured, rel=0.15), name


def _in_child(run: Any, out: Path) -> dict[str, int]:
    """Run in a copy of this process, which gives freed memory back at once; return what it wrote."""
    child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None)
            m_trim_threshold, m_mmap_threshold = -1, -3
            for option in (m_trim_threshold, m_mmap_threshold):
                libc.mallopt(option, 65536)
            libc.malloc_trim(0)
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    found: dict[str, int] = json.loads(out.read_text())
    return found
