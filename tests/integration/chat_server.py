"""A local server that speaks the chat-completions protocol and misbehaves on demand; it counts what it is asked."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dpr_lightning.judging.command import main


@dataclass
class Act:
    """What the server does with one request."""

    text: str | None = "Because.\nVerdict: 1"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    refusal: str | None = None
    finish_reason: str = "stop"
    logprobs: dict[str, float] | None = None
    is_reset: bool = False
    """Close the connection without an answer."""
    is_truncated: bool = False
    """Send half of a valid body, and say that this is all."""
    body: str | None = None
    """Instead of a chat completion."""


Behaviour = Callable[[dict[str, Any], int], Act]
"""From the request's body and which attempt at it this is (from 1) to what is done."""


class ChatServer:
    """Counts requests by what they ask, answers, and requests in flight."""

    def __init__(self) -> None:
        self.behave: Behaviour = lambda body, attempt: Act()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.authorization: set[str] = set()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    outer._handle(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            self.asked[key] += 1
            attempt = self.asked[key]
            self.times.setdefault(key, []).append(time.monotonic())
            self.bodies.append(body)
            self.authorization.add(handler.headers.get("Authorization", ""))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            act = self.behave(body, attempt)
            time.sleep(act.delay)
        finally:
            with self.lock:
                self.in_flight -= 1
        if act.is_reset:
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            handler.close_connection = True
            return
        payload = (act.body if act.body is not None else json.dumps(completion(act))).encode()
        if act.is_truncated:
            payload = payload[: len(payload) // 2]
        handler.send_response(act.status)
        for name, value in {"Content-Type": "application/json", **act.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)
        if act.status == 200:
            with self.lock:
                self.answered[key] += 1


def completion(act: Act) -> dict[str, Any]:
    tops = [{"token": token, "logprob": value, "bytes": None} for token, value in (act.logprobs or {}).items()]
    content = [{"token": act.text or "", "logprob": -0.1, "bytes": None, "top_logprobs": tops}]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": act.finish_reason,
                "logprobs": {"content": content} if act.logprobs is not None else None,
                "message": {"role": "assistant", "content": act.text, "refusal": act.refusal},
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def judge(server: ChatServer, tmp_path: Path, files: list[str], *more: str) -> dict[str, Any]:
    """Run the command with the key that JUDGE_KEY holds, and return its report."""
    out = tmp_path / "out"
    asked = ["--judge_model", "judge", "--base_url", server.url, "--api_key_env", "JUDGE_KEY"]
    main([*files, *asked, "--out", str(out), *more])
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def user_text(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])
