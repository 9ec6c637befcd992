from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.judging.cache import ReplyCache
from dpr_lightning.judging.chat import Redactor, Reply, Request, adapted, cache_key, estimated_tokens, shorten, unusable
from dpr_lightning.judging.client import _api_key, _check_url

REQUEST = Request(messages=({"role": "user", "content": "hi"},), decoding={"temperature": 0, "max_tokens": 5})


def test_the_key_holds_everything_that_shapes_an_answer() -> None:
    keys = {
        cache_key(REQUEST, model="m", base_url="http://a/v1"),
        cache_key(REQUEST, model="n", base_url="http://a/v1"),
        cache_key(REQUEST, model="m", base_url="http://b/v1"),
        cache_key(dataclasses.replace(REQUEST, decoding={"temperature": 1, "max_tokens": 5}), model="m", base_url="x"),
        cache_key(
            dataclasses.replace(REQUEST, messages=({"role": "system", "content": "hi"},)), model="m", base_url="x"
        ),
    }
    assert len(keys) == 5
    swapped = dataclasses.replace(REQUEST, decoding={"max_tokens": 5, "temperature": 0})
    assert cache_key(swapped, model="m", base_url="http://a/v1/") in keys


def test_details_hold_nothing_that_a_terminal_obeys() -> None:
    assert shorten("a\x1b[31m b\r\n\ud800c\u202e") == "a [31m b c"
    assert shorten("x" * 400) == "x" * 300 + "..."


def test_a_request_is_adapted_to_models_that_want_other_fields() -> None:
    assert adapted(REQUEST, token_limit_key="max_tokens", with_temperature=True) == REQUEST
    reasoning = adapted(REQUEST, token_limit_key="max_completion_tokens", with_temperature=False)
    assert (reasoning.messages, dict(reasoning.decoding)) == (REQUEST.messages, {"max_completion_tokens": 5})


def test_the_cache_keeps_replies_between_processes(tmp_path: Path) -> None:
    reply = Reply(text="\u2028 x", finish_reason="stop", first_token_logprobs={"m": -0.5}, prompt_tokens=3)
    with ReplyCache(tmp_path / "deep" / "c.sqlite") as cache, ReplyCache(tmp_path / "deep" / "c.sqlite") as other:
        cache.put("k", reply)
        assert other.get("k") == reply
        assert other.get("l") is None
        assert len(other) == 1


def test_another_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, and long enough to be looked at as one" * 50)
    with pytest.raises(UserError, match=r"--cache: '.*notes.txt' cannot be used as a cache"):
        ReplyCache(tmp_path / "notes.txt")


def test_secrets_are_removed_in_every_form() -> None:
    redact = Redactor(["a/b+'c", ""])
    assert redact("x a/b+'c y a%2Fb%2B%27c") == "x [secret] y [secret]"
    assert Redactor([])("text") == "text"


def test_tokens_are_bytes_over_four() -> None:
    # 8 bytes and 5 bytes of content: ceil(13 / 4) + 2 * 4.
    messages = ({"role": "a", "content": "abcdefgh"}, {"role": "b", "content": "éa\u00e9"})
    assert estimated_tokens(Request(messages=messages, decoding={})) == 12


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(text="", refusal="no"), "refusal"),
        (Reply(text="Verdict: 1", finish_reason="content_filter"), "refusal"),
        (Reply(text=" \n"), "empty reply"),
    ],
)
def test_replies_without_content_are_failures(reply: Reply, kind: str) -> None:
    failure = unusable(reply)
    assert failure is not None
    assert failure.kind == kind
    assert unusable(Reply(text="x")) is None


def test_urls_and_key_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for good in (None, "http://localhost:8000/v1", "https://host/v1"):
        _check_url(good)
    for bad in ("localhost:8000", "ftp://host/v1", "http://", "http://[", "http://host:x/v1"):
        with pytest.raises(UserError, match="--base_url: found no http or https URL"):
            _check_url(bad)
    with pytest.raises(UserError, match="a user, a query or a fragment"):
        _check_url("http://me:word@host/v1")
    monkeypatch.setenv("JUDGE_KEY", " word\n")
    assert _api_key("JUDGE_KEY") == "word"
    monkeypatch.setenv("JUDGE_KEY", "wörd")
    with pytest.raises(UserError, match="no HTTP header can carry"):
        _api_key("JUDGE_KEY")
    with pytest.raises(UserError, match="is not set or empty"):
        _api_key("NO_SUCH_KEY_ANYWHERE")
