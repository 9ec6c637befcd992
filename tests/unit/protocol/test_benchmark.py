from __future__ import annotations

from pathlib import Path

import pytest

import dpr_lightning.main
from dpr_lightning.errors import UserError
from dpr_lightning.judging.presets import PRESETS
from dpr_lightning.protocol.benchmark import read_benchmark
from dpr_lightning.protocol.compare import compare_ratings

FILES = sorted((Path(dpr_lightning.main.__file__).parent / "configs" / "evaluation").glob("*.yaml"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Empty files under the names that the benchmarks use."""
    for name in (
        "alpaca_eval/instructions.json",
        "arena_hard_v0.1/question.jsonl",
        "gsm8k/test.jsonl",
        "ifeval/input_data.jsonl",
        "lima/test_300.jsonl",
        "mt_bench/question.jsonl",
        "mt_bench/judge_prompts.jsonl",
        "mt_bench/reference_answer_gpt-4.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_benchmark_that_ships_is_read(path: Path, data_dir: Path) -> None:
    found = read_benchmark(path, data_dir)
    assert (found.judge is None) != (found.metric is None)
    assert found.judge in (None, *PRESETS)
    assert found.prepare is not None or Path(found.prompts).is_absolute()
    if path.stem == "mt_bench":
        assert found.templates == str(data_dir / "mt_bench" / "judge_prompts.jsonl")
        assert found.references == str(data_dir / "mt_bench" / "reference_answer_gpt-4.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: [", "is no YAML"),
        ("- 1", "holds no mapping"),
        ("{title: a, prompts: b}", "found neither of judge and metric"),
        ("{title: a, prompts: b, judge: paper, temperatures: []}", "temperatures: found []"),
        ("{title: a, prompts: b, judge: paper, temperatures: [1, 1]}", "give one or more different numbers"),
        (
            "{title: a, prompts: b, judge: paper, temperatures: [0, 1], category_temperatures: mt_bench}",
            "stand in place of several temperatures",
        ),
        ("{title: a, prompts: b, judge: paper, max_new_tokens: many}", "max_new_tokens"),
        ("{title: a, judge: paper}", "prompts"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "benchmark.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_benchmark(path, None)
    assert message in str(caught.value)


def test_ratings_are_compared_over_questions_that_both_have() -> None:
    def judgments(scores: dict[int, list[float]]) -> list[dict[str, float]]:
        return [
            {"question_id": key, "turn": turn, "score": score}
            for key, found in scores.items()
            for turn, score in enumerate(found, start=1)
        ]

    # Question 82 lacks a rating of the one model, 84 of both, 85 is not there at all.
    policy = judgments({81: [8, 6], 82: [9, -1], 83: [5, 5], 84: [-1, -1], 85: [9, 9]})
    teacher = judgments({81: [5, 5], 82: [1, 1], 83: [4, 8], 84: [-1, 2]})
    found = compare_ratings(policy, teacher, seed=0)
    assert found["num_questions"] == 2
    assert found["policy"]["value"] == 6.0
    assert found["teacher"]["value"] == 5.5
    assert found["difference"]["value"] == 0.5
    assert compare_ratings(policy, [], seed=0) == {"num_questions": 0}
