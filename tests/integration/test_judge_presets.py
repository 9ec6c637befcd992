"""The official presets of ``dpr-lightning judge`` against a local server: what is asked, and how it counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Act, ChatServer, judge, user_text, write

from dpr_lightning.errors import UserError
from dpr_lightning.judging.command import main

pytest.importorskip("openai")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_alpaca_eval_2_asks_and_reads_as_published(server: ChatServer, tmp_path: Path) -> None:
    template = tmp_path / "template.txt"
    template.write_text(
        "<|im_start|>system\nRank.\n<|im_end|>\n<|im_start|>user\n{instruction}|{output_1}|{output_2}\n<|im_end|>"
    )
    # P(m) = 0.8, P(M) = 0.2, whoever is shown first.
    logprobs = {"m": -0.2231435513, "M": -1.6094379124, "The": -9.0}
    server.behave = lambda body, attempt: Act(text="m", logprobs=logprobs)
    rows = [{"instruction": f"do {n}", "output": f"ours {n}", "generator": "us"} for n in range(20)]
    base = [{"instruction": f"do {n}", "output": f"base {n}", "generator": "them"} for n in range(20)]
    files = ["--responses", write(tmp_path / "o.jsonl", rows), "--baseline", write(tmp_path / "b.jsonl", base)]
    preset = ["--preset", "alpaca_eval_2", "--templates", str(template)]
    model = judge(server, tmp_path, files, *preset)["models"][0]
    body = server.bodies[0]
    assert {key: value for key, value in body.items() if key != "messages"} == {
        "model": "judge",
        "temperature": 1,
        "max_tokens": 1,
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    ours_first = sum(user_text(body).index("ours") < user_text(body).index("base") for body in server.bodies)
    assert 0 < ours_first < 20
    official = {figure["name"]: figure["value"] for figure in model["official"]}
    assert official["win_rate"] == pytest.approx((80 * ours_first + 20 * (20 - ours_first)) / 20)
    assert official["n_wins"] == ours_first
    assert model["order"]["first_shown"]["value"] == pytest.approx(0.8)
    stored = [json.loads(line) for line in (tmp_path / "out" / "judgments.jsonl").read_text().splitlines()]
    assert {row["generator_1"] for row in stored} == {"them"}
    # The file that was written counts to the same figures.
    stored_at = ["--from_judgments", str(tmp_path / "out" / "judgments.jsonl")]
    main([*stored_at, "--preset", "alpaca_eval_2", "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "report.json").read_text())["models"][0]
    assert again["official"] == model["official"]


def test_mt_bench_takes_the_templates_of_category_and_turn(server: ChatServer, tmp_path: Path) -> None:
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    marks = {
        "single-v1": "{question}|{answer}",
        "single-math-v1": "{question}|{ref_answer_1}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "single-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{question_2}|{answer_2}",
    }
    templates = [{"name": name, "system_prompt": name, "prompt_template": marks[name]} for name in names]
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["w1", "w2"]},
        {"question_id": 111, "category": "math", "turns": ["m1", "m2"]},
    ]
    answers = [{"question_id": n, "model_id": "us", "choices": [{"turns": [f"a{n}-1", f"a{n}-2"]}]} for n in (81, 111)]
    references = [{"question_id": 111, "choices": [{"turns": ["r1", "r2"]}]}]
    ratings = {"single-v1": "9", "single-v1-multi-turn": "7.5", "single-math-v1": "4"}

    def rate(body: dict[str, Any], attempt: int) -> Act:
        name = body["messages"][0]["content"]
        return Act(text=f"Fine. Rating: [[{ratings[name]}]]" if name in ratings else "Rating: [2]")

    server.behave = rate
    files = ["--responses", write(tmp_path / "answers.jsonl", answers)]
    files += ["--prompts", write(tmp_path / "question.jsonl", questions)]
    files += ["--templates", write(tmp_path / "judge_prompts.jsonl", templates), "--preset", "mt_bench"]
    with pytest.raises(UserError, match=r"--references: question 111 \(math\) has no reference answer for turn 1"):
        judge(server, tmp_path, files)
    assert server.asked.total() == 0
    model = judge(server, tmp_path, [*files, "--references", write(tmp_path / "ref.jsonl", references)])["models"][0]
    assert {body["messages"][0]["content"]: user_text(body) for body in server.bodies} == {
        "single-v1": "w1|a81-1",
        "single-v1-multi-turn": "w1|a81-1|w2|a81-2",
        "single-math-v1": "m1|r1|a111-1",
        "single-math-v1-multi-turn": "r1|r2|m2|a111-2",
    }
    official = {figure["name"]: figure["value"] for figure in model["official"]}
    # (9 + 7.5 + 4 + 2) / 4; turns (9 + 4) / 2 and (7.5 + 2) / 2.
    assert official == {
        "score": 5.625,
        "first_turn": 6.5,
        "second_turn": 4.75,
        "category writing": 8.25,
        "category math": 3.0,
    }


def test_mt_bench_by_pairs_counts_the_same_from_its_file(server: ChatServer, tmp_path: Path) -> None:
    names = ("pair-v2", "pair-math-v1", "pair-v2-multi-turn", "pair-math-v1-multi-turn")
    body = {name: "{answer_a_2} or {answer_b_2}" if "turn" in name else "{answer_a} or {answer_b}" for name in names}
    templates = [{"name": name, "system_prompt": "s", "prompt_template": body[name]} for name in names]
    questions = [{"question_id": 81 + n, "category": "writing", "turns": ["1", "2"]} for n in range(4)]

    def answers(name: str) -> list[dict[str, Any]]:
        return [
            {"question_id": 81 + n, "model_id": name, "choices": [{"turns": [f"{name} 1", f"{name} 2"]}]}
            for n in range(4)
        ]

    def choose(body: dict[str, Any], attempt: int) -> Act:
        # Ours in the first turn; in the second whichever comes first.
        text = user_text(body)
        return Act(text="[[A]]" if text.startswith("us 1") or " 2" in text else "[[B]]")

    server.behave = choose
    files = ["--responses", write(tmp_path / "us.jsonl", answers("us"))]
    files += ["--baseline", write(tmp_path / "them.jsonl", answers("them"))]
    files += ["--prompts", write(tmp_path / "question.jsonl", questions), "--preset", "mt_bench_pair"]
    model = judge(server, tmp_path, [*files, "--templates", write(tmp_path / "prompts.jsonl", templates)])["models"][0]
    official = {figure["name"]: figure["value"] for figure in model["official"]}
    assert official == {
        "win_rate_adjusted": 0.75,
        "win_rate": 0.5,
        "loss_rate": 0.0,
        "win": 4,
        "loss": 0,
        "tie": 4,
    }
    assert (model["win_rate"]["value"], model["win_rate"]["n"]) == (0.75, 4)
    # Four questions are two requests a turn: equal ones are asked once.
    assert server.asked.total() == 4
    stored = ["--from_judgments", str(tmp_path / "out" / "judgments.jsonl"), "--preset", "mt_bench_pair"]
    main([*stored, "--baseline_name", "them", "--out", str(tmp_path / "again")])
    (again,) = json.loads((tmp_path / "again" / "report.json").read_text())["models"]
    assert again == model
    with pytest.raises(UserError, match="no judgments of a pair with 'nobody'"):
        main([*stored, "--baseline_name", "nobody", "--out", str(tmp_path / "again")])
