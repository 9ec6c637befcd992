"""``dpr-lightning judge`` on files alone: stored judgments, verifiers, refusals, and the developers' shared data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.judging.command import main as judge
from dpr_lightning.main import main


def write(path: Path, rows: list[dict[str, Any]], *, as_list: bool = False) -> str:
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_a_verifier_judges_and_its_file_counts_the_same(tmp_path: Path) -> None:
    prompts = [{"question": f"{n} + {n}?", "answer": f"so #### {2 * n}"} for n in range(40)]
    # Ours is right on all but the first 10, theirs on the even ones: 30 right and 20 right.
    ours = [{"prompt": f"{n} + {n}?", "response": f"it is {2 * n if n >= 10 else 'no idea'}"} for n in range(40)]
    theirs = [{"prompt": f"{n} + {n}?", "response": f"it is {2 * n + n % 2}"} for n in range(40)]
    files = ["--responses", write(tmp_path / "o.jsonl", ours), "--baseline", write(tmp_path / "t.json", theirs)]
    files += ["--prompts", write(tmp_path / "p.json", prompts, as_list=True)]
    verifier = ["--verifier", "dpr_lightning.evaluation.FinalNumber", "--verifier_args", '{"column": "answer"}']
    main(["judge", *files, *verifier, "--out", str(tmp_path / "out")])
    win = result(tmp_path / "out")["models"][0]["win_rate"]
    # Odd ones from 10: 15 wins; even ones below 10: 5 losses; the rest ties.
    assert (win["wins"], win["losses"], win["ties"], win["value"]) == (15, 5, 20, 0.625)
    main(["judge", "--from_judgments", str(tmp_path / "out" / "judgments.jsonl"), "--out", str(tmp_path / "again")])
    again, first = result(tmp_path / "again")["models"][0], result(tmp_path / "out")["models"][0]
    assert again == first
    page = (tmp_path / "out" / "report.html").read_text()
    assert "0.625" in page


def test_several_models_of_stored_judgments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question_id": 81 + n, "model": model, "turn": turn, "score": score, "judgment": ""}
        for model, score in (("x", 8), ("y", 6.5))
        for n in range(5)
        for turn in (1, 2)
    ]
    rows[-1]["score"] = -1
    source = write(tmp_path / "gpt-4_single.jsonl", rows)
    stored = ["--from_judgments", source, "--preset", "mt_bench", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"no score, 1 of 2 models: 1 of 5 prompts \(20.0%\)"):
        judge(stored)
    assert [model["refused"] is None for model in result(tmp_path / "out")["models"]] == [True, False]
    judge([*stored, "--max_failed", "0.2"])
    told = capsys.readouterr().out
    assert "y: 1 games without verdict: no verdict" in told
    official = [
        {figure["name"]: figure["value"] for figure in model["official"]}
        for model in result(tmp_path / "out")["models"]
    ]
    assert official[0] == {"score": 8.0, "first_turn": 8.0, "second_turn": 8.0, "category writing": 8.0}
    assert official[1]["score"] == 6.5
    judge([*stored, "--model", "x"])
    assert [model["model"] for model in result(tmp_path / "out")["models"]] == ["x"]
    with pytest.raises(UserError, match="no judgments of 'z'; the file has x, y"):
        judge([*stored, "--model", "z"])


def test_repeated_and_missing_judgments_are_counted(tmp_path: Path) -> None:
    games = [{"score": "A=B", "judgment": ""}] * 2
    rows = [{"question_id": f"q{n}", "model": "m", "games": games} for n in range(8)]
    prompts = [{"question_id": f"q{n}", "turns": [{"content": "p"}], "category": "c"} for n in range(10)]
    arguments = ["--from_judgments", write(tmp_path / "j.jsonl", [*rows, rows[0]]), "--preset", "arena_hard"]
    arguments += ["--prompts", write(tmp_path / "q.jsonl", prompts), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"3 of 10 prompts \(30.0%\)"):
        judge(arguments)
    counts = result(tmp_path / "out")["models"][0]["counts"]
    assert (counts["lost"], counts["repeated"]) == ({"missing in the judgments": 2}, {"repeated judgment": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--responses: it is required"),
        (["--responses", "a.jsonl"], "--baseline: --preset paper compares two files"),
        (["--responses", "a.jsonl", "--baseline", "b.jsonl"], "--responses: no file a.jsonl"),
        (["--responses", "a", "--preset", "mt_bench"], "--prompts: --preset mt_bench needs the questions"),
        (["--responses", "a", "--baseline", "b", "--preset", "arena_hard"], "--templates: give Arena-Hard's judge"),
        (["--responses", "a", "--baseline", "b", "--verifier", "x.Y"], "--prompts: a verifier compares"),
        (["--responses", "a", "--baseline", "b", "--concurrency", "0"], "--concurrency: found 0"),
        (["--responses", "a", "--baseline", "b", "--timeout", "nan"], "--timeout: found nan"),
        (["--responses", "a", "--baseline", "b", "--max_failed", "2"], "--max_failed: found 2.0"),
        (["--responses", "a", "--baseline", "b", "--price_in", "1"], "--price_in: give both"),
        (["--responses", "a", "--baseline", "b", "--max_cost", "1"], "--max_cost: it needs --price_in"),
        (["--from_judgments", "a.jsonl", "--responses", "b"], "--responses: --from_judgments asks no judge"),
        (["--from_judgments", "a.jsonl"], "--from_judgments: no file a.jsonl"),
        (["--from_judgments", "a.jsonl", "--out", "/dev/null/x"], "--out: '/dev/null/x' cannot be written to"),
        (["--from_judgments", "a", "--templates", "b"], "--templates: no template is asked for here"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        judge(arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_preset_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "annotations.json", [{"instruction": "i", "preference": 1.0}], as_list=True)
    for preset in ("paper", "arena_hard", "mt_bench"):
        with pytest.raises(UserError, match=r"annotations.json line 1: "):
            judge(["--from_judgments", source, "--preset", preset])


@pytest.mark.shared_data
def test_published_files_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = Path(os.environ.get("DPR_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (shared / "arena_hard_v0.1" / "question.jsonl").is_file():
        pytest.skip(f"no shared data at {shared}")
    pytest.importorskip("openai")
    arena, alpaca, mt_bench = shared / "arena_hard_v0.1", shared / "alpaca_eval", shared / "mt_bench"
    answers = arena / "model_answer"
    lima = [json.loads(line)["conversations"] for line in (shared / "lima" / "test_300.jsonl").read_text().splitlines()]
    ours = write(tmp_path / "lima.jsonl", [{"prompt": prompt, "response": "a"} for prompt in lima])
    theirs = write(tmp_path / "base.jsonl", [{"prompt": prompt, "response": "b"} for prompt in lima])
    questions = [json.loads(line) for line in (mt_bench / "question.jsonl").read_text().splitlines()]
    turns = [
        {"question_id": row["question_id"], "model_id": "us", "choices": [{"turns": ["one", "two"]}]}
        for row in questions
    ]
    write(tmp_path / "others.jsonl", [{**row, "choices": [{"turns": ["three", "four"]}]} for row in turns])
    runs = {
        # 500 prompts in both orders, and of the other shape of the same questions.
        "1000 games: 0 need no question": [
            *("--preset", "arena_hard", "--templates", str(arena / "judge_config.yaml")),
            *(
                "--responses",
                str(answers / "gpt-3.5-turbo-0125.jsonl"),
                "--baseline",
                str(answers / "gpt-4-0314.jsonl"),
            ),
            *("--prompts", str(arena / "question.jsonl")),
        ],
        "805 games": [
            *("--preset", "alpaca_eval_2", "--templates", str(alpaca / "prompts" / "alpaca_eval_clf.txt")),
            *("--responses", str(alpaca / "reference_text_davinci_003.json")),
            *("--baseline", str(alpaca / "reference_gpt4_1106_preview.json")),
            *("--prompts", str(alpaca / "instructions.json")),
        ],
        "600 games": [
            *("--responses", ours, "--baseline", theirs, "--prompts", str(shared / "lima" / "test_300.jsonl")),
        ],
        "160 games": [
            *("--preset", "mt_bench", "--templates", str(mt_bench / "judge_prompts.jsonl")),
            *("--responses", write(tmp_path / "turns.jsonl", turns), "--prompts", str(mt_bench / "question.jsonl")),
            *("--references", str(mt_bench / "reference_answer_gpt-4.jsonl")),
        ],
        "320 games": [
            *("--preset", "mt_bench_pair", "--templates", str(mt_bench / "judge_prompts.jsonl")),
            *("--responses", str(tmp_path / "turns.jsonl"), "--baseline", str(tmp_path / "others.jsonl")),
            *("--prompts", str(mt_bench / "question.jsonl")),
            *("--references", str(mt_bench / "reference_answer_gpt-4.jsonl")),
        ],
    }
    for told, arguments in runs.items():
        judge([*arguments, "--dry_run", "--out", str(tmp_path / "out")])
        assert told in capsys.readouterr().out
