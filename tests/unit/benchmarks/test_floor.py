"""What benchmarks say of their rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import floor
from benchmarks.driver import Bench, Result
from benchmarks.report import SPEEDS, Target, ratios


def test_weights_are_those_of_the_model(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir))
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    found = floor.Weights.of(tiny_model_dir)
    assert found.blocks == sum(layer.weight.numel() for layer in linear)
    assert found.head == model.lm_head.weight.numel()
    assert found.total == model.num_parameters()


def test_the_floor_of_a_part() -> None:
    weights = floor.Weights(blocks=1000, head=100, total=1200)
    facts = {
        **{"sampled_tokens": 30.0, "sampled_forwards": 5.0, "scored_tokens": 60.0},
        **{"trained_tokens": 30.0, "response_tokens": 20.0},
    }
    sampled = floor.sampling(facts, weights, 2.0, num_drawn=20)
    # Two operations a weight and token; five reads of 1100 float32 weights.
    assert (sampled.operations, sampled.bytes) == (2 * (1000 * 30 + 100 * 20), 5 * 4 * 1100)
    assert floor.scoring(facts, weights, 2.0, num_scored=40).operations == 2 * (1000 * 60 + 100 * 40)
    trained = floor.training(facts, weights, 2.0, num_steps=3)
    assert (trained.operations, trained.bytes) == (6 * (1000 * 30 + 100 * 20), 3 * 28 * 1200)


def test_a_section_divides_by_the_machines_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Result(rounds=[{"flops": 4e9, "bandwidth": 1e9}, {"flops": 5e9, "bandwidth": 2e9}])
    monkeypatch.setattr(floor, "play", lambda *_, **__: {"machine": machine})
    bench = Bench(pythons={}, work_dir=Path(), rounds=2, threads=1, seed=0, small=True)

    def parts(facts: dict[str, float]) -> list[floor.Part]:
        return [floor.Part(name, 10e9, 6e9, facts["wall"]) for name in ("sampling", "training")]

    lines = floor.section(bench, Result(rounds=[{"wall": 4.0}, {"wall": 8.0}]), parts)
    # 2 s of operations and 3 s of bytes: one behind the other in sampling, one after the other in training.
    assert lines[-2:] == [
        "| sampling | 10 | 6.0 | 3.00 | 6.00 | 2.00 |",
        "| training | 10 | 6.0 | 5.00 | 6.00 | 1.20 |",
    ]
    assert floor.section(bench, Result(failure="broke"), parts) == []


def test_ratios_are_formed_within_a_round_and_held_against_targets() -> None:
    ours = [{"tokens": 100.0, "wall": 1.0, "cpu": 1.0}, {"tokens": 100.0, "wall": 2.0, "cpu": 1.0}]
    peer = [{"tokens": 100.0, "wall": 2.0, "cpu": 4.0}, {"tokens": 100.0, "wall": 8.0, "cpu": 1.0}]
    lines = ratios({"ours": Result(rounds=ours), "peer": Result(rounds=peer)}, SPEEDS, [Target("peer", 2.9)])
    assert lines[-1] == (
        "| peer | 3.00 (2.00 to 4.00); at least 2.9: reached | 2.50 (1.00 to 4.00); at least 2.9: **missed** |"
    )
