"""``evaluate`` from a run: metrics, a judge on a local server, MT-Bench, temperatures, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chat_server import Act, ChatServer, user_text

from dpr_lightning.main import main
from dpr_lightning.manifest import read_json, write_directory

CANARY = "sk-canary-77aa"
TEMPLATE = {"type": "text", "prompt": "Q: {prompt} A: ", "system": "{system}\n\n", "turn_end": "\n\n"}


@pytest.fixture
def run(frozen_dirs: tuple[str, str], tmp_path: Path) -> Path:
    """A finished run, as HFExport leaves it: two different random models, and a template of its own."""
    teacher, policy = frozen_dirs
    directory = tmp_path / "run"
    manifest = {"kind": "final", "initial_weights": teacher, "data": {"template": TEMPLATE}}
    write_directory(directory / "final", lambda partial: shutil.copytree(policy, partial, dirs_exist_ok=True), manifest)
    (directory / "config.yaml").write_text("{}")
    return directory


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    pytest.importorskip("openai")
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    server = ChatServer()
    yield server
    server.close()


def benchmark(tmp_path: Path, name: str = "small", **settings: Any) -> str:
    rows = [{"prompt": f"question {n}", "answer": str(n), "category": "math"} for n in range(6)]
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"title": "Small", "prompts": "prompts.jsonl", "max_new_tokens": 8, **settings}))
    return str(path)


def accuracy(path: Path) -> list[bool]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [not row["is_truncated"] and "a" in row["response"] for row in rows]


def evaluate(run: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    main(["evaluate", str(run), "--data_dir", str(tmp_path / "data"), "--batch_size", "4", *more])
    return read_json(run / "evaluation" / "report.json")


def metric() -> dict[str, Any]:
    verifier = {"class_path": "dpr_lightning.evaluation.verifiers.ExactMatch", "init_args": {"column": "answer"}}
    return {
        "class_path": "dpr_lightning.evaluation.metrics.VerifierAccuracy",
        "init_args": {"verifier": verifier},
    }


def test_both_models_are_asked_alike_and_graded(run: Path, tmp_path: Path, frozen_dirs: tuple[str, str]) -> None:
    path = benchmark(tmp_path, metric=metric(), temperatures=[0.0, 1.0], num_samples=2)
    report = evaluate(run, tmp_path, "--benchmarks", path)
    assert report["teacher"] == frozen_dirs[0]
    rows = report["benchmarks"]["small"]["rows"]
    assert [row["temperature"] for row in rows] == [0.0, 1.0]
    assert [row["answers"]["policy"]["num_responses"] for row in rows] == [6, 12]
    place = run / "evaluation" / "small"
    settings = [read_json(place / "T1" / f"{side}.jsonl.manifest.json")["settings"] for side in ("policy", "teacher")]
    # The run's template, although the teacher's directory names none.
    assert settings[0]["template"] == settings[1]["template"] == TEMPLATE
    assert settings[0]["model"] != settings[1]["model"]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"model", "name"}
    assert (place / "temperature.png").stat().st_size > 5_000
    text = (run / "evaluation" / "report.md").read_text()
    assert text.count("| Small |") == 2


def test_figures_are_those_of_the_answers(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dpr_lightning.evaluation.verifiers.ExactMatch.__call__", lambda self, row, response: "a" in response
    )
    path = benchmark(tmp_path, metric=metric(), temperatures=[1.0], num_samples=3, max_new_tokens=60)
    report = evaluate(run, tmp_path, "--benchmarks", path)
    (row,) = report["benchmarks"]["small"]["rows"]
    found = row["figures"]["accuracy"]
    place = run / "evaluation" / "small" / "T1"
    policy, teacher = (np.array(accuracy(place / f"{side}.jsonl")).reshape(6, 3) for side in ("policy", "teacher"))
    assert found["policy"]["value"] == pytest.approx(policy.mean())
    assert found["teacher"]["value"] == pytest.approx(teacher.mean())
    assert found["difference"]["value"] == pytest.approx(policy.mean() - teacher.mean())
    assert found["difference"]["n"] == 6
    outcome = (np.sign(policy.astype(int) - teacher.astype(int)) + 1) / 2
    assert found["win_rate"]["value"] == pytest.approx(outcome.mean())
    assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]


def test_a_judge_compares_the_answers_and_nothing_is_asked_twice(
    run: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    policy: set[str] = set()

    def prefer_policy(body: dict[str, Any], attempt: int) -> Act:
        if not policy:
            lines = (run / "evaluation/small/T0.7/policy.jsonl").read_text().splitlines()
            policy.update(json.loads(line)["response"] for line in lines)
        text = user_text(body)
        first = min((text.find(answer) for answer in policy if answer and answer in text), default=-1)
        return Act(text=f"Reasons.\nVerdict: {1 if 0 <= first < len(text) / 2 else 2}")

    server.behave = prefer_policy
    judge = ["--judge_model", "judge", "--base_url", server.url, "--api_key_env", "JUDGE_KEY"]
    path = benchmark(tmp_path, judge="paper")
    arguments = ["--benchmarks", path, *judge]
    main(["evaluate", str(run), "--data_dir", str(tmp_path / "data"), "--dry_run", *arguments])
    assert "12 to send" in capsys.readouterr().out
    assert not server.asked
    report = evaluate(run, tmp_path, *arguments, "--batch_size", "64")
    (row,) = report["benchmarks"]["small"]["rows"]
    assert row["judge"]["win_rate"]["n"] == 6
    num_asked = server.asked.total()
    assert 0 < num_asked <= 12
    again = evaluate(run, tmp_path, *arguments, "--batch_size", "64")
    assert server.asked.total() == num_asked
    assert again["benchmarks"]["small"]["rows"][0]["judge"]["win_rate"] == row["judge"]["win_rate"]
    # The key is nowhere in what the run's directory holds.
    assert server.authorization == {f"Bearer {CANARY}"}
    files = [path for path in (run / "evaluation").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_a_refused_score_does_not_stop_the_other_benchmarks(
    run: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave = lambda body, attempt: Act(text="I cannot say.")
    paths = [benchmark(tmp_path, "judged", judge="paper"), benchmark(tmp_path, "graded", metric=metric())]
    judge = ["--judge_model", "judge", "--base_url", server.url, "--api_key_env", "JUDGE_KEY"]
    with pytest.raises(SystemExit, match="2"):
        evaluate(run, tmp_path, "--benchmarks", *paths, *judge)
    assert "judged at temperature 0.7: --max_failed: no score" in capsys.readouterr().err
    report = read_json(run / "evaluation" / "report.json")["benchmarks"]
    assert "no score" in report["judged"]["rows"][0]["refused"]
    assert "accuracy" in report["graded"]["rows"][0]["figures"]
    assert "score refused" in (run / "evaluation" / "report.md").read_text()


def test_mt_bench_grades_both_turns_of_both_models(run: Path, tmp_path: Path, server: ChatServer) -> None:
    path = benchmark(
        tmp_path,
        "mt",
        prompts="questions.jsonl",
        judge="mt_bench",
        templates="templates.jsonl",
        category_temperatures="mt_bench",
    )
    questions = [{"question_id": 81 + n, "category": "writing", "turns": [f"first {n}", "second"]} for n in range(4)]
    (tmp_path / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    names = {
        "single-v1": "{question} {answer}",
        "single-math-v1": "{question} {ref_answer_1} {answer}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {answer_1} {question_2} {ref_answer_2} {answer_2}",
    }
    templates = [{"name": name, "system_prompt": "Rate.", "prompt_template": text} for name, text in names.items()]
    (tmp_path / "data" / "templates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in templates))
    server.behave = lambda body, attempt: Act(text=f"Rating: [[{1 + len(user_text(body)) % 10}]]")
    judge = ["--judge_model", "judge", "--base_url", server.url, "--api_key_env", "JUDGE_KEY"]
    report = evaluate(run, tmp_path, "--benchmarks", path, *judge, "--max_failed", "1")
    (row,) = report["benchmarks"]["mt"]["rows"]
    assert row["ratings"]["num_questions"] == 4
    place = run / "evaluation" / "mt" / "T0.7"
    means = []
    for side in ("policy", "teacher"):
        answers = [json.loads(line) for line in (place / f"{side}.jsonl").read_text().splitlines()]
        assert all(len(answer["response"]) == 2 for answer in answers)
        judgments = [json.loads(line) for line in (place / side / "judgments.jsonl").read_text().splitlines()]
        assert [(found["question_id"], found["turn"]) for found in judgments] == [
            (81 + n, turn) for n in range(4) for turn in (1, 2)
        ]
        means.append(np.mean([found["score"] for found in judgments]))
        assert row["ratings"][side]["value"] == pytest.approx(means[-1])
    assert row["ratings"]["difference"]["value"] == pytest.approx(means[0] - means[1])


def test_the_embedded_tasks_need_no_file(run: Path, tmp_path: Path) -> None:
    main(
        [
            "evaluate",
            str(run),
            "--benchmarks",
            "configs/evaluation/embedded.yaml",
            "--limit",
            "5",
            "--temperatures",
            "0",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    (row,) = read_json(tmp_path / "out" / "report.json")["benchmarks"]["embedded"]["rows"]
    assert row["answers"]["policy"]["num_responses"] == 5


def broken(run: Path, tmp_path: Path, what: str) -> list[str]:
    """Return arguments with one mistake in them."""
    path = benchmark(tmp_path, metric=metric())
    data = ["--data_dir", str(tmp_path / "data")]
    if what == "unfinished":
        (run / "final" / "manifest.json").unlink()
    elif what == "moved":
        manifest = read_json(run / "final" / "manifest.json")
        (run / "final" / "manifest.json").write_text(json.dumps(manifest | {"initial_weights": "a/b/c/gone"}))
    elif what == "both":
        path = benchmark(tmp_path, metric=metric(), judge="paper")
    elif what == "unknown":
        path = benchmark(tmp_path, metric=metric(), colour="red")
    elif what == "no data":
        data = []
    elif what == "absent":
        path = "configs/evaluation/nothing.yaml"
    elif what == "samples":
        path = benchmark(tmp_path, judge="paper", num_samples=4)
    elif what == "categories":
        path = benchmark(tmp_path, metric=metric(), category_temperatures="mt_bench")
        data += ["--temperatures", "0", "1"]
    return [str(run), "--benchmarks", path, *data]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unfinished", "has no finished 'final/' directory"),
        ("moved", "started from 'a/b/c/gone'"),
        ("both", "found both of judge and metric"),
        ("unknown", "colour"),
        ("no data", "prompts: no file 'prompts.jsonl'; set --data_dir"),
        ("absent", "no file 'configs/evaluation/nothing.yaml'"),
        ("samples", "num_samples: found 4; a judge compares one answer each"),
        ("categories", "--temperatures: small has a temperature for each category"),
    ],
)
def test_mistakes_are_told_before_weights_load(
    what: str,
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail: Callable[..., Any] = lambda *_: pytest.fail("weights loaded")  # noqa: E731
    monkeypatch.setattr("dpr_lightning.generation.command.load_model", fail)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *broken(run, tmp_path, what)])
    assert message in capsys.readouterr().err
