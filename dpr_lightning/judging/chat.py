"""One request to a chat model and its reply, and what may be said of them in public."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from dpr_lightning.judging.games import Failure

_TOKENS_A_MESSAGE = 4
_BYTES_A_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What shapes an answer, besides the model and the server."""

    messages: tuple[Mapping[str, str], ...]
    """``role`` and ``content`` of each."""
    decoding: Mapping[str, Any]
    """Further fields of the request body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The part of a chat completion that judges read."""

    text: str
    finish_reason: str | None = None
    refusal: str | None = None
    first_token_logprobs: Mapping[str, float] | None = None
    """Log-probability of the likeliest first tokens; None where they were not asked for or not given."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoVerdictError(ValueError):
    """A reply holds no verdict in the form that was asked for; the message says what it holds."""


def adapted(request: Request, *, token_limit_key: str, with_temperature: bool) -> Request:
    """Return a request for a model that wants other fields than a preset's.

    Args:
        request: The preset's.
        token_limit_key: Field that limits the reply, in place of ``max_tokens``.
        with_temperature: Whether the temperature is sent.
    """
    decoding = {token_limit_key if name == "max_tokens" else name: value for name, value in request.decoding.items()}
    if not with_temperature:
        decoding.pop("temperature", None)
    return Request(messages=request.messages, decoding=decoding)


def cache_key(request: Request, *, model: str, base_url: str) -> str:
    """Return the SHA-256 of everything that shapes the answer."""
    shape = [base_url.rstrip("/"), model, [dict(message) for message in request.messages], dict(request.decoding)]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def estimated_tokens(request: Request) -> int:
    """Return roughly how many tokens a request's messages are: UTF-8 bytes over 4, and 4 a message."""
    num_bytes = sum(len(message["content"].encode(errors="replace")) for message in request.messages)
    return math.ceil(num_bytes / _BYTES_A_TOKEN) + _TOKENS_A_MESSAGE * len(request.messages)


def unusable(reply: Reply) -> Failure | None:
    """Return why a reply cannot hold a verdict, whatever form is asked for; None where it may."""
    if reply.refusal is not None or reply.finish_reason == "content_filter":
        return Failure(kind="refusal", detail=shorten(reply.refusal or "stopped by the server's content filter"))
    if not reply.text.strip():
        return Failure(kind="empty reply", detail=f"finish_reason {reply.finish_reason}")
    return None


def shorten(text: str, limit: int = 300) -> str:
    """Return ``text`` on one line without control characters, cut where it is long."""
    # A terminal obeys control characters, and a lone surrogate cannot be printed at all.
    line = " ".join("".join(mark if mark.isprintable() else " " for mark in text[: 20 * limit]).split())
    return line if len(line) <= limit else f"{line[:limit]}..."


class Redactor:
    """Removes secrets from text.

    Args:
        secrets: What must not be seen.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        forms = {form for secret in secrets if secret for form in (secret, quote(secret, safe=""), repr(secret)[1:-1])}
        parts = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
        self._pattern = re.compile(parts) if parts else None

    def __call__(self, text: str) -> str:
        """Return ``text`` with every secret replaced."""
        return text if self._pattern is None else self._pattern.sub("[secret]", text)
