"""Tests of a CUDA device. ``DPR_LIGHTNING_TEST_DEVICE=cpu`` runs them on the CPU: a rehearsal of the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_checks import CONFIGS, ROLLOUTS, SFT

from dpr_lightning.main import main

# Read when cuBLAS is first used: a test asks for deterministic sums.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

Fit = Callable[..., Path]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test; without it every test of this folder is skipped."""
    name = os.environ.get("DPR_LIGHTNING_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> None:
    """Skip where there is no device."""


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 demonstrations of unequal length."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"draw {n}.", "response": f"{n * n} it is" + " so" * (n % 6)} for n in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def fit(rows_file: Path, device: torch.device) -> Fit:
    """Run ``fit`` on the embedded backbone: ``fit(recipe, run_dir, *flags, on="device" or "cpu", overlays=())``."""

    def run(recipe: str, run_dir: Path, *more: str, on: str = "device", overlays: tuple[str, ...] = ()) -> Path:
        is_cuda = on == "device" and device.type == "cuda"
        names = ["base", f"recipe/{recipe}", "backbone/tiny", *overlays, f"hardware/{'gpu1' if is_cuda else 'cpu'}"]
        files = [argument for name in names for argument in ("-c", str(CONFIGS / f"{name}.yaml"))]
        main(
            [
                "fit",
                *files,
                f"--run_dir={run_dir}",
                f"--data.demonstrations.source={rows_file}",
                "--data.demonstrations.preset=prompt_response",
                "--data.demonstrations.subsample=null",
                *(SFT if recipe == "sft" else ROLLOUTS),
                *more,
            ]
        )
        return run_dir

    return run
