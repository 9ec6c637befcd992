"""``dpr-lightning judge`` with odd answers, odd disks and odd judges."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Act, ChatServer, write

from dpr_lightning.errors import UserError
from dpr_lightning.judging.cache import ReplyCache
from dpr_lightning.judging.command import main

pytest.importorskip("openai")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.close()


def files(tmp_path: Path, answers: list[str]) -> list[str]:
    """One prompt for each answer of the model; the baseline says 'short'."""
    ours = [{"prompt": f"prompt {n}", "response": answer} for n, answer in enumerate(answers)]
    theirs = [{"prompt": f"prompt {n}", "response": "short"} for n in range(len(answers))]
    responses, baseline = write(tmp_path / "ours.jsonl", ours), write(tmp_path / "theirs.jsonl", theirs)
    return ["--responses", responses, "--baseline", baseline]


def options(server: ChatServer, out: Path) -> list[str]:
    return ["--judge_model", "judge", "--base_url", server.url, "--api_key_env", "none", "--out", str(out)]


def report(out: Path) -> dict[str, Any]:
    model: dict[str, Any] = json.loads((out / "report.json").read_text())["models"][0]
    return model


def test_odd_text_is_sent_and_shown_as_it_is(server: ChatServer, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} [bold]\x1b[31m"
    answers = ["\u4f60\u597d \U0001f600 e\u0301 \u202e", hostile, "a\x00b", "{answer_2} {request}", "x" * 3_000_000]
    server.behave = lambda body, attempt: Act(text=f"{hostile}\nVerdict: 1")
    main([*files(tmp_path, answers), *options(server, tmp_path / "out")])
    sent = [str(body["messages"][-1]["content"]) for body in server.bodies]
    for answer in answers:
        assert sum(f"\n{answer}\n" in text for text in sent) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;/script&gt;" in page
    assert "49" not in page.split("Judgments")[1]
    assert len(page) < 1_000_000
    assert report(tmp_path / "out")["length"]["bins"][0]["to"] == 3_000_000 - len("short")


def test_a_lone_surrogate_fails_alone(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 3 prompts \(33.3%\)"):
        main([*files(tmp_path, ["fine", "broken \ud800", "fine too"]), *options(server, tmp_path / "out")])
    counts = report(tmp_path / "out")["counts"]
    assert counts["with_all_verdicts"] == 2
    assert counts["failed_games"] == {"unsendable text": 2}


def test_an_unsupported_setting_is_told_in_the_servers_words(server: ChatServer, tmp_path: Path) -> None:
    def reasoning(body: dict[str, Any], attempt: int) -> Act:
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return Act(status=400, body=json.dumps({"error": {"message": message}}))
        if body.get("temperature") == 0:
            message = "Unsupported value: 'temperature' does not support 0 with this model."
            return Act(status=400, body=json.dumps({"error": {"message": message}}))
        return Act()

    server.behave = reasoning
    arguments = [*files(tmp_path, [f"answer {n}" for n in range(30)]), *options(server, tmp_path / "out")]
    with pytest.raises(UserError, match=r"Use 'max_completion_tokens' instead.*--token_limit_key"):
        main(arguments)
    # The first ten tell enough, with those in flight beside the tenth: 60 refusals say no more.
    assert server.asked.total() <= 10 + 7
    arguments += ["--token_limit_key", "max_completion_tokens"]
    with pytest.raises(UserError, match=r"'temperature' does not support 0 .*--temperature default"):
        main(arguments)
    main([*arguments, "--temperature", "default"])
    assert report(tmp_path / "out")["counts"]["with_all_verdicts"] == 30
    assert "temperature" not in server.bodies[-1]


def test_sixty_four_at_once_lose_nothing(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda body, attempt: Act(status=429, body="{}") if attempt == 1 else Act(delay=0.01)
    arguments = files(tmp_path, [f"answer {n}" for n in range(100)])
    main([*arguments, *options(server, tmp_path / "out"), "--concurrency", "64"])
    assert report(tmp_path / "out")["counts"]["with_all_verdicts"] == 100
    assert set(server.answered.values()) == {1}
    assert server.most_in_flight <= 64


def test_a_cache_that_cannot_be_written_ends_the_run_before_a_question(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*files(tmp_path, ["a"]), *options(server, tmp_path / "out")]
    with pytest.raises(UserError, match=r"--cache: '/proc/judge.sqlite' cannot be used"):
        main([*arguments, "--cache", "/proc/judge.sqlite"])
    (tmp_path / "text").write_text("not a data base, but long enough to be looked at")
    with pytest.raises(UserError, match=r"--cache: .* cannot be used as a cache"):
        main([*arguments, "--cache", str(tmp_path / "text")])
    # Read only, whoever asks: root may write where permissions forbid it.
    kept = tmp_path / "kept.sqlite"
    with ReplyCache(kept):
        pass
    link = f"file:{kept}?mode=ro"
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **more: connect(link, uri=True, **more))
    with pytest.raises(UserError, match=r"--cache: .*readonly"):
        main([*arguments, "--cache", str(kept)])
    assert server.asked.total() == 0


def test_an_interrupted_run_goes_on_where_it_was(server: ChatServer, tmp_path: Path) -> None:
    server.behave = lambda body, attempt: Act(delay=0.0 if server.asked.total() <= 10 else 60.0)
    arguments = [*files(tmp_path, [f"answer {n}" for n in range(10)]), *options(server, tmp_path / "out")]
    command = [sys.executable, str(ROOT / "cli.py"), "judge", *arguments, "--concurrency", "2"]
    # A shell's background job, and all below it, would ignore Ctrl-C.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 200
        while server.asked.total() < 12:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in told
    assert "the same command goes on" in told
    server.behave = lambda body, attempt: Act()
    main(arguments)
    assert report(tmp_path / "out")["counts"]["with_all_verdicts"] == 10
    assert sum(count == 1 for count in server.asked.values()) == 18
    assert set(server.answered.values()) == {1}


def test_rows_in_any_order_with_repeats_and_gaps_are_counted(server: ChatServer, tmp_path: Path) -> None:
    ours = [{"prompt": f"prompt {n}", "response": f"answer {n}"} for n in (3, 1, 2, 0, 1)]
    ours.append({"prompt": "prompt 2", "response": "another answer"})
    theirs = [{"prompt": f"prompt {n}", "response": "short"} for n in range(5)]
    rows = ["--responses", write(tmp_path / "o.jsonl", ours), "--baseline", write(tmp_path / "t.jsonl", theirs)]
    main([*rows, *options(server, tmp_path / "out"), "--max_failed", "1"])
    counts = report(tmp_path / "out")["counts"]
    assert counts["lost"] == {
        "different rows in responses": 1,
        "missing in responses": 1,
    } | {key: value for key, value in counts["lost"].items() if value == 0}
    assert counts["repeated"] == {"repeated row in responses": 1}
    assert (counts["prompts"], counts["with_all_verdicts"]) == (5, 3)
