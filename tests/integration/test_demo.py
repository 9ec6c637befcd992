"""The demo's own pipeline at a size that takes seconds: what it counts and prints, not whether DPR wins."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from dpr_lightning.demo import run
from dpr_lightning.main import main


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shrink the data and DPR's rollouts; SFT keeps ten steps, as alpha 0.1 needs one of its own."""
    configs = tmp_path / "configs"
    shutil.copytree(run.CONFIGS, configs)
    sft, dpr = (yaml.safe_load((configs / "demo" / f"{name}.yaml").read_text()) for name in ("sft", "dpr"))
    sft["trainer"]["max_epochs"] = 1
    sft["data"]["init_args"] |= {"global_batch_size": 16, "micro_batch_size": 16}
    dpr["trainer"] |= {"max_epochs": 2, "check_val_every_n_epoch": 1}
    dpr["data"]["init_args"] |= {"prompts_per_rollout": 8, "global_batch_size": 16, "micro_batch_size": 16}
    for name, config in (("sft", sft), ("dpr", dpr)):
        (configs / "demo" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(run, "CONFIGS", configs)
    for name, value in (("DEMONSTRATIONS", 160), ("VALIDATION", 6), ("TEST", 5), ("SAMPLES", 2), ("RANKED", 3)):
        monkeypatch.setattr(run, f"NUM_{name}", value)
    return tmp_path / "demo"


def test_demo_counts_compute_and_compares(small_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", f"--run_dir={small_demo}", "--seeds", "0", "1"])
    printed = capsys.readouterr().out
    for seed in (0, 1):
        seed_dir = small_demo / f"seed_{seed}"
        report = json.loads((seed_dir / "report.json").read_text())
        stages = {name: json.loads((seed_dir / name / "run.json").read_text()) for name in ("sft", "dpr", "continued")}
        assert stages["sft"]["optimizer_steps"] == 10
        assert stages["dpr"]["optimizer_steps"] == 2 * 8 * 4 // 16
        # Sampling costs one forward of each token, scoring three, training three; a step of SFT three.
        dpr_tokens, sft_tokens = stages["dpr"]["tokens"], stages["sft"]["tokens"]["trained"]
        forwards = 4 * dpr_tokens["rolled_out"] + 3 * dpr_tokens["trained"]
        assert report["compute"]["token_forwards"] == forwards
        assert stages["continued"]["optimizer_steps"] == math.ceil(forwards / (3 * sft_tokens / 10))
        # Every response is trained on once.
        assert dpr_tokens["trained"] == dpr_tokens["rolled_out"]
        assert report["ranking"]["num_prompts"] == 6
        assert set(report["ranking"]["dense"]) == {"0.1", "0.25", "0.5"}
        for by_temperature in report["policies"].values():
            assert {key: row["num_responses"] for key, row in by_temperature.items()} == {"0": 5, "0.7": 10, "1": 10}
        assert str(seed_dir / "dpr" / "final") in printed
    summary = json.loads((small_demo / "summary.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert "accuracy, DPR - SFT continued" in printed
    # Finished seeds are read back, so the tables are the same and nothing is trained again.
    main(["demo", f"--run_dir={small_demo}", "--seeds", "0", "1"])
    again = capsys.readouterr().out
    assert again[again.index("2 seeds") :] == printed[printed.index("2 seeds") :]


def test_demo_refuses_an_unfinished_directory(small_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_demo / "seed_0").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"--run_dir={small_demo}"])
    assert "holds an unfinished demo; delete it" in capsys.readouterr().err
