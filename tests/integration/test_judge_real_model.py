"""``dpr-lightning judge`` with SmolLM2-135M behind a local server: a judge too small to follow its instructions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Act, ChatServer
from smollm2 import load, needs_smollm2

from dpr_lightning.errors import UserError
from dpr_lightning.judging.command import main

pytest.importorskip("openai")
pytestmark = [
    pytest.mark.real_model,
    needs_smollm2,
]
_MAX_TOKENS = 12


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    model, tokenizer = load()
    one_at_a_time = threading.Lock()

    def answer(body: dict[str, Any], attempt: int) -> Act:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in body["messages"]) + "assistant: "
        inputs = tokenizer(text, return_tensors="pt")
        with one_at_a_time, torch.inference_mode():
            found = model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
        new = found[0, inputs["input_ids"].shape[1] :]
        is_cut = len(new) == body["max_tokens"]
        return Act(text=tokenizer.decode(new, skip_special_tokens=True), finish_reason="length" if is_cut else "stop")

    server = ChatServer()
    server.behave = answer
    yield server
    server.close()


def test_what_it_writes_is_no_verdict_and_is_counted_and_refused(server: ChatServer, tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {n} colours.", "response": "red " * n} for n in (1, 2)]
    (tmp_path / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps({**row, "response": "no"}) + "\n" for row in rows))
    arguments = ["--responses", str(tmp_path / "ours.jsonl"), "--baseline", str(tmp_path / "theirs.jsonl")]
    arguments += ["--judge_model", "SmolLM2-135M", "--base_url", server.url, "--api_key_env", "none"]
    arguments += ["--max_tokens", str(_MAX_TOKENS), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"no score, 2 of 2 prompts \(100.0%\)"):
        main(arguments)
    model = json.loads((tmp_path / "out" / "report.json").read_text())["models"][0]
    failed = model["counts"]["failed_games"]
    assert sum(failed.values()) == 4
    assert set(failed) <= {"no verdict", "cut before a verdict", "empty reply"}
    assert "win_rate" not in model
    # Failures are not kept: all are asked again.
    with pytest.raises(UserError):
        main(arguments)
    assert server.asked.total() == 8
