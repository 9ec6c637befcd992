"""A model as the judge: every distinct question is asked once, whatever is known is taken from disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpr_lightning.judging.cache import ReplyCache
from dpr_lightning.judging.chat import (
    NoVerdictError,
    Reply,
    Request,
    adapted,
    cache_key,
    estimated_tokens,
    shorten,
    unusable,
)
from dpr_lightning.judging.client import ChatClient
from dpr_lightning.judging.games import Failure, Game, Outcome
from dpr_lightning.judging.preset import Preset


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will ask for before it begins."""

    num_games: int
    num_settled: int
    """Games that need no question, such as equal answers."""
    num_cached: int
    """Distinct requests with a reply on disk."""
    num_requests: int
    """Distinct requests to send."""
    prompt_tokens: int
    """Of the requests to send; an estimate from their length."""
    max_completion_tokens: int
    """As many as they may answer with at most."""

    def cost(self, price_in: float, price_out: float) -> float:
        """Return the most that it may cost, given prices for a million tokens."""
        return (self.prompt_tokens * price_in + self.max_completion_tokens * price_out) / 1e6


class ModelJudge:
    """Asks a chat model by the rules of a preset.

    Args:
        preset: Makes the questions and reads the answers.
        client: Sends them.
        cache: Keeps replies that held a verdict, and no others.
        token_limit_key: Field of the request that limits the reply.
        with_temperature: Whether the preset's temperature is sent.
    """

    def __init__(
        self,
        preset: Preset,
        client: ChatClient,
        cache: ReplyCache,
        *,
        token_limit_key: str = "max_tokens",
        with_temperature: bool = True,
    ) -> None:
        self.preset = preset
        self.client = client
        self.cache = cache
        self.token_limit_key = token_limit_key
        self.with_temperature = with_temperature
        self.prompt_tokens = 0
        self.completion_tokens = 0

    @property
    def name(self) -> str:
        """The model's name."""
        return self.client.endpoint.model

    def estimate(self, games: Sequence[Game]) -> Estimate:
        """Say what :meth:`judge` would send."""
        _, requests, members = self._plan(games)
        missing = [request for key, request in requests.items() if self._known(key) is None]
        return Estimate(
            num_games=len(games),
            num_settled=len(games) - sum(map(len, members.values())),
            num_cached=len(requests) - len(missing),
            num_requests=len(missing),
            prompt_tokens=sum(map(estimated_tokens, missing)),
            max_completion_tokens=sum(map(self.preset.max_completion_tokens, missing)),
        )

    def judge(self, games: Sequence[Game], *, on_progress: Callable[[int], object] | None = None) -> list[Outcome]:
        """Return the outcome of every game, in their order; see ``Judge``.

        Raises:
            UserError: The server refuses the key, does not know the model, or refuses the first requests of all.
        """
        outcomes, requests, members = self._plan(games)
        missing: list[str] = []

        def decide(key: str, outcome: Outcome) -> None:
            for number in members[key]:
                outcomes[number] = outcome
            if on_progress is not None:
                on_progress(len(members[key]))

        def receive(number: int, found: Reply | Failure) -> None:
            key = missing[number]
            if isinstance(found, Reply):
                self.prompt_tokens += found.prompt_tokens
                self.completion_tokens += found.completion_tokens
            outcome = found if isinstance(found, Failure) else self._read(found)
            if isinstance(found, Reply) and not isinstance(outcome, Failure):
                self.cache.put(key, found)
            decide(key, outcome)

        for key in requests:
            known = self._known(key)
            if known is None:
                missing.append(key)
            else:
                decide(key, known)
        if missing:
            is_first = len(missing) == len(requests)
            self.client.ask([requests[key] for key in missing], receive, ends_on_refusals=is_first)
        decided = [outcome for outcome in outcomes if outcome is not None]
        assert len(decided) == len(games)
        return decided

    def _plan(self, games: Sequence[Game]) -> tuple[list[Outcome | None], dict[str, Request], dict[str, list[int]]]:
        """Return what needs no question, the distinct requests by key, and which games each decides."""
        outcomes: list[Outcome | None] = [self.preset.settled(game) for game in games]
        requests: dict[str, Request] = {}
        members: dict[str, list[int]] = {}
        for number, game in enumerate(games):
            if outcomes[number] is None:
                request = adapted(
                    self.preset.request(game),
                    token_limit_key=self.token_limit_key,
                    with_temperature=self.with_temperature,
                )
                key = cache_key(request, model=self.client.endpoint.model, base_url=self.client.base_url)
                requests.setdefault(key, request)
                members.setdefault(key, []).append(number)
        return outcomes, requests, members

    def _known(self, key: str) -> Outcome | None:
        reply = self.cache.get(key)
        if reply is None:
            return None
        outcome = self._read(reply)
        return None if isinstance(outcome, Failure) else outcome

    def _read(self, reply: Reply) -> Outcome:
        failure = unusable(reply)
        if failure is not None:
            return failure
        try:
            return self.preset.parse(reply)
        except NoVerdictError as error:
            kind = "cut before a verdict" if reply.finish_reason == "length" else "no verdict"
            return Failure(kind=kind, detail=shorten(f"{error}: {reply.text[-200:]}"))
