"""Known servers get what they need, a key goes only where it is for, and what a user mistypes is said back."""

from __future__ import annotations

from typing import Any

import pytest

from medcot import secrets
from medcot.errors import ModelError
from medcot.evaluate.endpoint import Dialect, Endpoint
from medcot.evaluate.replies import Price, Thinks
from medcot.evaluate.servers import build_endpoint, choose_dialect, find_server

OPENAI, DEEPSEEK, OPENROUTER = "https://api.openai.com/v1", "https://api.deepseek.com", "https://openrouter.ai/api/v1"
LOCAL = "http://127.0.0.1:8000/v1"
KEYS = {
    name: f"sk-{name.lower().replace('_', '-')}-secret" for name in secrets.ENVIRONMENT[secrets.SecretName.ENDPOINT]
}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key there is lies in the environment."""
    monkeypatch.setattr(secrets, "_found", set())
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_found", set())
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def sent_key(endpoint: Endpoint) -> str | None:
    return endpoint.api_key and endpoint.api_key.value


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (OPENAI, "OPENAI_API_KEY"),
        ("https://API.OpenAI.com./v1/", "OPENAI_API_KEY"),
        (DEEPSEEK, "DEEPSEEK_API_KEY"),
        (OPENROUTER, "OPENROUTER_API_KEY"),
        (LOCAL, "MEDCOT_API_KEY"),
        ("https://api.openai.com.evil.com/v1", "MEDCOT_API_KEY"),
        ("https://evil.com/api.openai.com/v1", "MEDCOT_API_KEY"),
        ("https://eu.api.openai.com/v1", "MEDCOT_API_KEY"),
    ],
)
def test_a_key_goes_to_its_own_host_only(keys: None, url: str, name: str) -> None:
    assert sent_key(build_endpoint("m", url)) == KEYS[name]


def test_a_key_goes_elsewhere_where_the_user_names_it(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent_key(build_endpoint("m", "https://a.host/v1", api_key_env="OPENAI_API_KEY")) == KEYS["OPENAI_API_KEY"]
    monkeypatch.setenv("MINE", "my-own")
    endpoint = build_endpoint("m", OPENAI, api_key_env="MINE")
    assert sent_key(endpoint) == "my-own" and "my-own" not in repr(endpoint)
    assert secrets.redact("no my-own-key") == "no my-own-key"  # six signs are too few to look for
    with pytest.raises(ModelError, match="found under 'OTHER'"):
        build_endpoint("m", LOCAL, api_key_env="OTHER")


def test_without_keys(no_keys: None) -> None:
    assert sent_key(build_endpoint("m", LOCAL)) is sent_key(build_endpoint("m", "http://gpu-box:8000/v1")) is None
    for url, name in ((OPENAI, "OPENAI"), (DEEPSEEK, "DEEPSEEK"), (OPENROUTER, "OPENROUTER")):
        with pytest.raises(ModelError, match=f"No key.*'{name}_API_KEY'"):
            build_endpoint("m", url)


def test_a_key_never_travels_in_the_clear(keys: None) -> None:
    for url in ("http://gpu-box:8000/v1", "http://api.openai.com/v1", "http://127.0.0.1.evil.com/v1"):
        with pytest.raises(ModelError, match="not encrypted"):
            build_endpoint("m", url)
    for url in (LOCAL, "http://localhost:1/v1", "http://[::1]:1/v1", "https://gpu-box:8000/v1"):
        assert build_endpoint("m", url).api_key is not None


def test_no_error_quotes_a_key(monkeypatch: pytest.MonkeyPatch, no_keys: None) -> None:
    def message(url: str, **settings: Any) -> str:
        with pytest.raises(ModelError) as caught:
            build_endpoint("m", url, **settings)
        return str(caught.value)

    for pasted in ("sk-proj-0123abcd", "gsk_0123abcd"):
        assert pasted not in message(LOCAL, api_key_env=pasted)
    for address in (f"https://user:{KEYS['OPENAI_API_KEY']}@host/v1", f"https://host/v1?key={KEYS['OPENAI_API_KEY']}"):
        assert KEYS["OPENAI_API_KEY"] not in message(address)
    for broken in ("sk-two words", "sk-ké0123456", "sk-line\nbreak"):
        monkeypatch.setenv("OPENAI_API_KEY", broken)
        told = message(OPENAI)
        assert broken not in told and "OPENAI_API_KEY" in told


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        ("o1", True), ("o3-mini", True), ("o4-mini-2025-04-16", True), ("gpt-5", True), ("gpt-5.1", True),
        ("gpt-5-mini", True), ("ft:o4-mini:org::id", True), ("gpt-4o", False), ("gpt-4.1", False),
        ("gpt-5-chat-latest", False), ("chatgpt-4o-latest", False), ("ft:gpt-4o-mini:org", False), ("omni", False),
    ],
)  # fmt: skip
def test_openai_has_two_dialects_and_others_one(model: str, reasons: bool) -> None:
    assert choose_dialect(model, OPENAI) is (Dialect.REASONING if reasons else Dialect.CHAT)
    assert choose_dialect(model, LOCAL) is choose_dialect(f"openai/{model}", OPENROUTER) is Dialect.CHAT


def test_what_is_told_stands_before_what_is_known(keys: None) -> None:
    told = build_endpoint("o3", OPENAI, dialect=Dialect.CHAT, no_thinking='{"reasoning_effort": "none"}')
    assert (told.dialect, told.no_thinking) == (Dialect.CHAT, {"reasoning_effort": "none"})
    assert build_endpoint("o3", OPENAI).no_thinking is None
    assert build_endpoint("deepseek-reasoner", DEEPSEEK).no_thinking == {"thinking": {"type": "disabled"}}
    full = build_endpoint(
        "m", LOCAL + "/", concurrency=2, requests_a_minute=30, tokens_a_minute=9000, timeout_s=5, price=(0.5, 2),
        stream=True, thinks=Thinks.TAGS, extra='{"top_k": 20, "seed": null}',
    )  # fmt: skip
    assert (full.base_url, full.concurrency, full.requests_a_minute, full.tokens_a_minute) == (LOCAL, 2, 30, 9000)
    assert (full.timeout_s, full.stream, full.thinks) == (5, True, Thinks.TAGS)
    assert (full.prices, full.extra) == ({"m": Price(0.5, 2)}, {"top_k": 20, "seed": None})
    assert build_endpoint("m", LOCAL).prices == {}, "prices change, so none is built in"


def test_servers_have_names_and_notes() -> None:
    assert [find_server(url).name for url in (OPENAI, DEEPSEEK, OPENROUTER)] == ["OpenAI", "DeepSeek", "OpenRouter"]
    assert "generation_config" in " ".join(find_server(LOCAL).notes)
    assert find_server("https://a.host/v1").notes == ()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_url": "api.openai.com/v1"}, "begins with http"),
        ({"base_url": "ftp://host/v1"}, "begins with http"),
        ({"base_url": "http://"}, "begins with http"),
        ({"base_url": "http://host:port/v1"}, "begins with http"),
        ({"base_url": "http://[::1/v1"}, "begins with http"),
        ({"base_url": LOCAL + "/chat/completions"}, "Take http://127.0.0.1:8000/v1."),
        ({"base_url": "https://host/v1?api-version=1"}, "query"),
        ({"model": " "}, "no name"),
        ({"concurrency": 0}, "concurrency=0.*whole number above 0"),
        ({"concurrency": 1.5}, "whole number"),
        ({"requests_a_minute": -1}, "requests_a_minute=-1"),
        ({"tokens_a_minute": float("nan")}, "tokens_a_minute=nan"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"price": (1.0, -1.0)}, "price=.*two numbers"),
        ({"price": (1.0,)}, "two numbers"),
        ({"extra": "{'top_k': 20}"}, "no JSON.*double quotes"),
        ({"extra": "[1]"}, "an object"),
        ({"extra": '{"temperature": 0}'}, "sets temperature.*Use the option"),
        ({"extra": '{"n": 2}'}, "sets n"),
        ({"extra": '{"top_k": null}'}, "null is no value"),
        ({"no_thinking": '{"messages": []}'}, "no_thinking sets messages"),
        ({"no_thinking": '{"seed": null}'}, "null is no value"),
        ({"no_thinking": "off"}, "no_thinking='off' is no JSON"),
    ],
)
def test_what_cannot_be_is_said(no_keys: None, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build_endpoint(**{"model": "m", "base_url": LOCAL, **settings})
