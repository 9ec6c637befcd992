"""``dpr-lightning judge`` against a real server: nothing is lost, nothing is paid twice, no secret comes out."""

from __future__ import annotations

import json
import logging
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Act, ChatServer, judge, user_text, write

from dpr_lightning.errors import UserError
from dpr_lightning.judging.command import main

pytest.importorskip("openai")

ROOT = Path(__file__).resolve().parents[2]
CANARY = "sk-canary-4b1d7e/+Zq9"
"""With characters that are escaped in URLs."""


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def pair_files(tmp_path: Path, num: int) -> list[str]:
    """Prompts 0 to num - 1; the model writes 'long answer i', the baseline 'short i'."""
    ours = [{"prompt": f"prompt {n}", "response": f"long answer {n}"} for n in range(num)]
    theirs = [{"prompt": f"prompt {n}", "response": f"short {n}"} for n in range(num)]
    return [
        "--responses",
        write(tmp_path / "ours.jsonl", ours),
        "--baseline",
        write(tmp_path / "theirs.jsonl", theirs),
    ]


def number_of(body: dict[str, Any]) -> int:
    found = re.search(r"prompt (\d+)\n", user_text(body))
    assert found is not None
    return int(found[1])


def is_model_first(body: dict[str, Any]) -> bool:
    text = user_text(body)
    return text.index("long answer") < text.index("short")


def better(body: dict[str, Any]) -> Act:
    """Prefer the model on even prompts, the baseline on odd ones, in either order."""
    model_wins = number_of(body) % 2 == 0
    return Act(text=f"Reasons.\nVerdict: {1 if is_model_first(body) == model_wins else 2}")


def test_results_do_not_depend_on_the_order_of_arrival(server: ChatServer, tmp_path: Path) -> None:
    def late_first(body: dict[str, Any], attempt: int) -> Act:
        act = better(body)
        act.delay = 0.02 * (10 - number_of(body))
        return act

    files = pair_files(tmp_path, 10)
    server.behave = late_first
    report = judge(server, tmp_path, files, "--concurrency", "8")
    slow = (tmp_path / "out" / "judgments.jsonl").read_text()
    server.behave = lambda body, attempt: better(body)
    judge(server, tmp_path, files, "--concurrency", "1", "--cache", str(tmp_path / "other.sqlite"))
    assert (tmp_path / "out" / "judgments.jsonl").read_text() == slow
    # Five wins and five losses, every pair alike in both orders; each answer is shown first once.
    model = report["models"][0]
    assert (model["win_rate"]["value"], model["win_rate"]["wins"], model["win_rate"]["losses"]) == (0.5, 5, 5)
    assert model["order"]["consistency"]["value"] == 1.0
    assert model["order"]["first_shown"]["value"] == 0.5
    assert model["counts"]["faulty_share"] == 0
    assert report["source"]["judge_model"]["prompt_tokens"] == 20 * 7
    assert [json.loads(line)["id"] for line in slow.splitlines()] == [f"prompt {n}" for n in range(10)]


def test_the_limit_on_requests_in_flight_is_kept(server: ChatServer, tmp_path: Path) -> None:
    # Three at a time get through; with fewer in flight this would not end, with more the server would notice.
    barrier = threading.Barrier(3)

    def in_threes(body: dict[str, Any], attempt: int) -> Act:
        barrier.wait(timeout=60)
        return Act()

    server.behave = in_threes
    judge(server, tmp_path, pair_files(tmp_path, 12), "--concurrency", "3")
    assert server.most_in_flight == 3
    assert server.asked.total() == 24


def test_a_judge_that_always_takes_the_first_answer_shows_as_such(server: ChatServer, tmp_path: Path) -> None:
    model = judge(server, tmp_path, pair_files(tmp_path, 6))["models"][0]
    assert (model["win_rate"]["value"], model["win_rate"]["ties"]) == (0.5, 6)
    assert model["order"]["consistency"]["value"] == 0.0
    assert model["order"]["first_shown"]["value"] == 1.0


def test_transient_failures_are_retried_and_nothing_is_lost_or_paid_twice(server: ChatServer, tmp_path: Path) -> None:
    first = {
        0: Act(status=429, headers={"Retry-After": "1"}, body='{"error": {"message": "slow down"}}'),
        1: Act(status=429, body='{"error": {"message": "slow down"}}'),
        2: Act(status=500, body="oops"),
        3: Act(is_reset=True),
        4: Act(delay=6.0),
        5: Act(status=503, body="{"),
    }
    server.behave = lambda body, attempt: first.get(number_of(body), better(body)) if attempt == 1 else better(body)
    files = pair_files(tmp_path, 8)
    model = judge(server, tmp_path, files, "--timeout", "3", "--concurrency", "16")["models"][0]
    assert model["counts"] == {
        "prompts": 8,
        "with_all_verdicts": 8,
        "lost": {},
        "repeated": {},
        "failed_games": {},
        "faulty_share": 0.0,
    }
    assert model["win_rate"]["value"] == 0.5
    by_number = {number_of(body): 0 for body in server.bodies}
    for body in server.bodies:
        by_number[number_of(body)] += 1
    # Two games each; those of prompts 0 to 5 had to be asked twice.
    assert by_number == {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 2, 7: 2}
    waits = [times[1] - times[0] for times in server.times.values() if len(times) > 1]
    assert sum(wait >= 1.0 for wait in waits) >= 2, "Retry-After was not honoured"
    # A second run takes all from disk.
    before = server.asked.total()
    again = judge(server, tmp_path, files)["models"][0]
    assert server.asked.total() == before
    assert again["win_rate"] == model["win_rate"]


def test_failures_are_counted_by_kind_refuse_the_score_and_are_asked_again(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts = {
        0: Act(text=None, refusal="I will not judge this."),
        1: Act(text=""),
        2: Act(text="Both are fine."),
        3: Act(text="Verdict: 1\nVerdict: 2"),
        4: Act(text="Well, the first", finish_reason="length"),
        5: Act(is_truncated=True),
        6: Act(status=400, body='{"error": {"message": "too long"}}'),
        7: Act(status=500, body="{}"),
        8: Act(body='{"choices": []}'),
        9: Act(text="x", finish_reason="content_filter"),
    }
    server.behave = lambda body, attempt: acts.get(number_of(body), better(body))
    files = pair_files(tmp_path, 30)
    with pytest.raises(UserError, match=r"10 of 30 prompts \(33.3%\) are lost or repeated, and 2.0% may be"):
        judge(server, tmp_path, files, "--max_retries", "0")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    model = report["models"][0]
    assert model["counts"]["failed_games"] == {
        "refusal": 4,
        "empty reply": 2,
        "no verdict": 4,
        "cut before a verdict": 2,
        "broken reply": 4,
        "request refused": 2,
        "server error": 2,
    }
    assert "win_rate" not in model
    assert "no score: 10 of 30" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgments.jsonl").read_text().splitlines()]
    assert rows[0]["games"][0]["detail"] == "I will not judge this."
    # A larger share may be lost if the user says so; then 20 whole prompts count, 10 of them even.
    server.behave = lambda body, attempt: acts.get(number_of(body), better(body))
    asked = server.asked.total()
    model = judge(server, tmp_path, files, "--max_retries", "0", "--max_failed", "0.4")["models"][0]
    assert (model["win_rate"]["n"], model["win_rate"]["value"]) == (20, 0.5)
    assert server.asked.total() - asked == 20, "what had a verdict was paid for twice, or a failure was kept"
    # The server recovers: only what failed is asked.
    server.behave = lambda body, attempt: better(body)
    asked = server.asked.total()
    model = judge(server, tmp_path, files)["models"][0]
    assert (model["win_rate"]["n"], model["counts"]["failed_games"]) == (30, {})
    assert server.asked.total() - asked == 20


def test_a_killed_run_resumes_with_the_missing_requests_only(server: ChatServer, tmp_path: Path) -> None:
    def first_twenty(body: dict[str, Any], attempt: int) -> Act:
        act = better(body)
        act.delay = 0.0 if number_of(body) < 10 else 60.0
        return act

    server.behave = first_twenty
    files = pair_files(tmp_path, 16)
    command = [*files, "--judge_model", "judge", "--base_url", server.url, "--api_key_env", "JUDGE_KEY"]
    command += ["--out", str(tmp_path / "out"), "--concurrency", "4"]
    process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), "judge", *command])
    try:
        deadline = time.monotonic() + 200
        while _num_cached(tmp_path / "out" / "cache.sqlite") < 20 or server.in_flight < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert server.answered.total() == 20
    server.behave = lambda body, attempt: better(body)
    model = judge(server, tmp_path, files)["models"][0]
    assert (model["win_rate"]["n"], model["win_rate"]["value"]) == (16, 0.5)
    # 32 requests, each answered once; the four in flight when the run died were asked once more.
    finished = [key for key, count in server.asked.items() if count == 1]
    assert len(server.asked) == 32
    assert len(finished) == 28
    assert all(server.answered[key] == 1 for key in finished)


def _num_cached(path: Path) -> int:
    if not path.exists():
        return 0
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("SELECT count(*) FROM replies").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def test_a_server_that_went_away_is_not_asked_for_ever(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda body, attempt: Act(status=500, body="{}")
    with pytest.raises(UserError, match="no score"):
        judge(server, tmp_path, pair_files(tmp_path, 40), "--max_retries", "0", "--concurrency", "2")
    model = json.loads((tmp_path / "out" / "report.json").read_text())["models"][0]
    failed = model["counts"]["failed_games"]
    assert failed["server error"] + failed["not asked"] == 80
    assert 10 <= server.asked.total() <= 12


def test_equal_questions_are_asked_once_and_equal_answers_not_at_all(server: ChatServer, tmp_path: Path) -> None:
    ours = [{"id": 1, "prompt": "a", "response": "x"}, {"id": 2, "prompt": "a", "response": "x"}]
    ours.append({"id": 3, "prompt": "b", "response": "same"})
    theirs = [{**row, "response": "same"} for row in ours]
    files = ["--responses", write(tmp_path / "o.jsonl", ours), "--baseline", write(tmp_path / "t.jsonl", theirs)]
    model = judge(server, tmp_path, files, "--match", "id")["models"][0]
    assert server.asked.total() == 2
    assert model["win_rate"] | {"low": 0, "high": 0} == {
        "value": 0.5,
        "low": 0,
        "high": 0,
        "n": 3,
        "wins": 0,
        "ties": 3,
        "losses": 0,
    }


def test_what_shapes_an_answer_is_asked_anew(server: ChatServer, tmp_path: Path) -> None:
    files = pair_files(tmp_path, 2)
    judge(server, tmp_path, files)
    for change in (["--max_tokens", "99"], ["--token_limit_key", "max_completion_tokens"], ["--judge_model", "other"]):
        before = server.asked.total()
        judge(server, tmp_path, files, *change)
        assert server.asked.total() - before == 4
    before = server.asked.total()
    judge(server, tmp_path, files, "--concurrency", "2", "--timeout", "9")
    assert server.asked.total() == before


def test_dry_run_and_cost(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    prices = ["--price_in", "1000000", "--price_out", "1000000"]
    files = pair_files(tmp_path, 3)
    asked = ["--judge_model", "judge", "--base_url", server.url, "--out", str(tmp_path / "out")]
    main([*files, *asked, "--dry_run", "--max_tokens", "10", *prices])
    told = capsys.readouterr().out
    found = re.search(r"6 to send: about (\d+) tokens in, at most 60 out; at most about ([\d.]+) at your prices", told)
    assert found is not None
    # Price 1 a token.
    assert float(found[2]) == int(found[1]) + 60
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--max_cost: 6 games"):
        main([*files, *asked, "--max_cost", "1", *prices, "--api_key_env", "none"])
    assert server.asked.total() == 0


def test_no_secret_leaves_by_any_path(
    server: ChatServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f"the key was {CANARY}, in a header Bearer {CANARY}"
    wrong = json.dumps({"error": {"message": echo, "code": echo}})
    headers = {"X-Echo": CANARY, "Retry-After": "0.05"}
    acts = [
        Act(status=429, headers=headers, body=wrong),
        Act(status=500, headers=headers, body=wrong),
        Act(status=400, headers=headers, body=wrong),
        Act(headers=headers, body=echo),
        Act(headers=headers, body=json.dumps({"choices": echo})),
        Act(text=None, refusal=echo, headers=headers),
        Act(text=echo, headers=headers),
        Act(text=f"{echo}\nVerdict: 1", headers=headers),
        Act(text="Verdict: 1", headers=headers, logprobs={CANARY: -1.0}),
        Act(is_reset=True),
        Act(delay=1.0),
        Act(is_truncated=True, text=echo),
    ]
    server.behave = lambda body, attempt: acts[number_of(body)]
    problems = []

    def attempt(*arguments: str, files: list[str]) -> None:
        try:
            judge(server, tmp_path, files, *arguments)
        except (UserError, SystemExit) as error:
            problems.append("".join(traceback.format_exception(error)))

    attempt("--max_retries", "1", "--timeout", "0.5", files=pair_files(tmp_path, len(acts)))
    for status in (401, 403, 404):
        server.behave = lambda body, attempt, status=status: Act(status=status, headers=headers, body=wrong)  # type: ignore[misc]
        attempt(files=pair_files(tmp_path, 14))
    server.behave = lambda body, attempt: Act()
    attempt("--api_key", CANARY, files=pair_files(tmp_path, 14))
    attempt("--api_key_env", CANARY, files=pair_files(tmp_path, 14))
    attempt("--api_key_env", "CANARYWITHOUTDASHES", files=pair_files(tmp_path, 14))
    attempt("--base_url", f"http://user:{CANARY}@127.0.0.1:9/v1", files=pair_files(tmp_path, 14))
    attempt("--base_url", f"http://127.0.0.1:9/v1?key={CANARY}", files=pair_files(tmp_path, 14))
    monkeypatch.setenv("JUDGE_KEY", f"{CANARY}\x07")
    attempt(files=pair_files(tmp_path, 14))
    assert len(problems) == 10
    assert server.authorization == {f"Bearer {CANARY}"}
    told = capsys.readouterr()
    written = [path.read_bytes().decode(errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert any("[secret]" in text for text in written)
    for text in [*problems, told.out, told.err, caplog.text, *written]:
        assert CANARY not in text
        assert CANARY.split("/")[0] not in text
        assert "CANARYWITHOUTDASHES" not in text
