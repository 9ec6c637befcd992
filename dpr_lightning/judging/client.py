"""The API of a judge model: the official ``openai`` client, a limit on requests in flight, retries, no secrets out."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from dpr_lightning.errors import UserError
from dpr_lightning.judging.chat import Redactor, Reply, Request, shorten
from dpr_lightning.judging.games import Failure

NO_KEY = "none"
"""Name of the key's variable where the server wants none."""
TRANSPORT_FAILURES = frozenset({"rate limit", "server error", "timeout", "no connection"})
"""Failures of the way to the model, each after all its retries."""
REFUSED = "request refused"
"""What the server answers to a request that it will not take, whoever asks."""
_WIRE_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
_MAX_FAILURES_IN_A_ROW = 10

OnReply: TypeAlias = Callable[[int, Reply | Failure], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Which model to ask, and how patiently."""

    model: str
    base_url: str | None = None
    """The API's root; None takes the client's own, or OPENAI_BASE_URL."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; ``none`` where the server wants none."""
    concurrency: int = 8
    """Most requests in flight."""
    timeout: float = 120.0
    """Seconds for one attempt."""
    max_retries: int = 6
    """Further attempts after rate limits, server errors, timeouts and lost connections."""


class ChatClient:
    """Sends requests and hands back every reply or failure as it comes.

    The client's own retries are used: exponential back-off from half a second to eight, and the server's Retry-After
    up to a minute. Whatever leaves this class has gone through the redactor.

    Raises:
        UserError: The ``openai`` package, the key, or a usable URL is missing.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "--judge_model: asking a model needs the 'openai' package; pip install 'dpr-lightning[judge]'"
            ) from error
        self._openai = openai
        self.endpoint = endpoint
        key = _api_key(endpoint.api_key_env)
        self.redact = Redactor([] if endpoint.api_key_env == NO_KEY else [key])
        _check_url(endpoint.base_url or os.environ.get("OPENAI_BASE_URL"))
        self._key = key
        self.base_url = str(self._connect().base_url).rstrip("/")
        for name in _WIRE_LOGGERS:
            # Their debug lines repeat headers and bodies.
            logging.getLogger(name).setLevel(logging.WARNING)

    def _connect(self) -> Any:
        return self._openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.endpoint.base_url,
            timeout=self.endpoint.timeout,
            max_retries=self.endpoint.max_retries,
        )

    def ask(self, requests: Sequence[Request], on_reply: OnReply, *, ends_on_refusals: bool = False) -> None:
        """Send all requests; ``on_reply`` gets the number of each and what came, in the order of arrival.

        After ten requests in a row that no retry got through, the rest is not sent, and fails as ``not asked``.

        Args:
            requests: What to send.
            on_reply: Called in this thread.
            ends_on_refusals: Whether ten refused requests before the first reply end the run: then a setting is wrong,
                and not a question.

        Raises:
            UserError: The server refuses the key, does not know the model, or refuses the first requests: nothing
                further is sent.
        """
        asyncio.run(self._ask_all(requests, on_reply, ends_on_refusals))

    async def _ask_all(self, requests: Sequence[Request], on_reply: OnReply, ends_on_refusals: bool) -> None:
        queue = iter(enumerate(requests))
        failures_in_a_row = 0
        refusals_left = min(_MAX_FAILURES_IN_A_ROW, len(requests)) if ends_on_refusals else math.inf

        async def work() -> None:
            nonlocal failures_in_a_row, refusals_left
            for number, request in queue:
                if refusals_left <= 0:
                    # Another worker has given up; the run ends before this one is cancelled.
                    return
                if failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
                    found: Reply | Failure = Failure(kind="not asked", detail="the server had stopped answering")
                else:
                    found = await self._ask(client, request)
                    is_lost = isinstance(found, Failure) and found.kind in TRANSPORT_FAILURES
                    failures_in_a_row = failures_in_a_row + 1 if is_lost else 0
                    if isinstance(found, Failure) and found.kind == REFUSED:
                        refusals_left -= 1
                        if refusals_left <= 0:
                            raise UserError(
                                f"the judge's server refuses the requests ({found.detail}); change what it names, "
                                "--token_limit_key and --temperature default say which fields are sent"
                            )
                    elif isinstance(found, Reply):
                        refusals_left = math.inf
                on_reply(number, found)

        async with self._connect() as client:
            workers = [asyncio.create_task(work()) for _ in range(min(self.endpoint.concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, client: Any, request: Request) -> Reply | Failure:
        openai = self._openai
        try:
            completion = await client.chat.completions.create(
                model=self.endpoint.model, messages=[dict(message) for message in request.messages], **request.decoding
            )
            return self._reply(completion)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            problem = self._describe(error)
        except openai.RateLimitError as error:
            return Failure(kind="rate limit", detail=self._describe(error))
        except openai.APITimeoutError:
            return Failure(kind="timeout", detail=f"no answer in {self.endpoint.timeout:g} s")
        except openai.InternalServerError as error:
            return Failure(kind="server error", detail=self._describe(error))
        except openai.APIConnectionError as error:
            return Failure(kind="no connection", detail=self._describe(error))
        except openai.APIStatusError as error:
            return Failure(kind=REFUSED, detail=self._describe(error))
        except UnicodeEncodeError:
            return Failure(kind="unsendable text", detail="it holds one half of a surrogate pair")
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            # Whatever the client makes of a body that is no chat completion.
            return Failure(kind="broken reply", detail=self._describe(error))
        # Outside the handler, so that the client's own error, which may repeat the key, is not chained.
        raise UserError(
            f"the judge's server refuses every request ({problem}); check --judge_model, --base_url and the key in the "
            "variable that --api_key_env names"
        )

    def _describe(self, error: BaseException) -> str:
        status = getattr(error, "status_code", None)
        told = f"{type(error).__name__}{'' if status is None else f' {status}'}: {error}"
        return shorten(self.redact(told))

    def _reply(self, completion: Any) -> Reply:
        choice, usage = completion.choices[0], completion.usage
        content = choice.logprobs.content if choice.logprobs is not None else None
        return Reply(
            text=self.redact(choice.message.content or ""),
            finish_reason=choice.finish_reason,
            refusal=None if choice.message.refusal is None else self.redact(choice.message.refusal),
            first_token_logprobs=(
                {self.redact(top.token): top.logprob for top in content[0].top_logprobs} if content else None
            ),
            prompt_tokens=(usage.prompt_tokens or 0) if usage is not None else 0,
            completion_tokens=(usage.completion_tokens or 0) if usage is not None else 0,
        )


def _api_key(variable: str) -> str:
    """Return the key. No message repeats the name: someone may have written the key itself there."""
    if variable == NO_KEY:
        return NO_KEY
    if not variable.isidentifier():
        raise UserError(
            "--api_key_env: found something that is no name of an environment variable; give the name of the variable "
            "that holds the key, never the key itself"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            "--api_key_env: the environment variable that it names is not set or empty; set it to the judge's key, or "
            f"give '{NO_KEY}' for a server without keys"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError("--api_key_env: the key in it has characters that no HTTP header can carry; set it anew")
    return key


def _check_url(base_url: str | None) -> None:
    if base_url is None:
        return
    try:
        parts = urlsplit(base_url)
        is_plain = parts.username is None and parts.password is None and not parts.query and not parts.fragment
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_plain = is_url = False
    if not is_url:
        raise UserError("--base_url: found no http or https URL; give one such as http://localhost:8000/v1")
    if not is_plain:
        raise UserError("--base_url: found a user, a query or a fragment in it; give the bare URL, keys go elsewhere")
