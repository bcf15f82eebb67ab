"""The door: hosts, origins, keys and lengths, as no client would write them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client import generate_latest

from medcot.serve.gate import Gate
from medcot.serve.metrics import Metrics

HERE = [(b"host", b"127.0.0.1:8000")]


def knock(headers: list[tuple[bytes, bytes]], *, path: str = "/v1/models", key: str | None = None) -> Any:
    """The answer to a request: status, body, metrics."""
    sent: list[dict[str, Any]] = []
    metrics = Metrics()

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"in": true}'})

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    gate = Gate(inside, metrics, api_key=key, body_bytes=1000)
    scope = {"type": "http", "path": path, "headers": headers, "method": "GET"}
    asyncio.run(gate(scope, receive, send))
    body = json.loads(b"".join(event.get("body", b"") for event in sent))
    return sent[0]["status"], body, generate_latest(metrics.registry).decode()


@pytest.mark.parametrize("host", [b"127.0.0.1", b"localhost:1", b"LOCALHOST", b"[::1]:8000"])
def test_names_of_this_machine(host: bytes) -> None:
    assert knock([(b"host", host)])[0] == 200


@pytest.mark.parametrize(
    "host",
    [b"evil.example", b"127.0.0.1.evil.example", b"127.0.0.1@evil.example", b"", b"[::1", b"\xff\xfe", b"localhost."],
)
def test_names_of_others(host: bytes) -> None:
    status, body, _ = knock([(b"host", host)])
    assert status == 403 and body["error"]["type"] == "permission_error"


@pytest.mark.parametrize("origin", [b"null", b"https://evil.example", b"http://[", b"http://127.0.0.1.evil.example"])
def test_pages_of_others(origin: bytes) -> None:
    assert knock([*HERE, (b"origin", origin)])[0] == 403
    assert knock([*HERE, (b"origin", b"http://localhost:3000")])[0] == 200


@pytest.mark.parametrize("length", [b"1001", b"\xb2", b"-1", b"+5", b"1e3", b"", b"9" * 5000, b"12, 12"])
def test_lengths_that_are_none_or_too_long(length: bytes) -> None:
    assert knock([*HERE, (b"content-length", length)])[0] == 413
    assert knock([*HERE, (b"content-length", b"1000")])[0] == 200


@pytest.mark.parametrize("shown", [b"", b"Bearer", b"Bearer wrong", b"Bearer \xff\xfe", b"Bearer  right2", b"right "])
def test_keys(shown: bytes) -> None:
    wrong = shown != b"right "
    assert knock([(b"authorization", shown)], key="right")[0] == (401 if wrong else 200)
    assert knock([(b"authorization", b"Bearer right"), (b"host", b"evil.example")], key="right")[0] == 200
    assert knock([], key="right", path="/health")[0] == 200
    assert knock([], key="right", path="/metrics")[0] == 401


def test_what_is_counted_has_few_names() -> None:
    *_, text = knock(HERE, path="/v1/models/" + "x" * 500)
    assert 'medcot_requests_total{path="other",status="200"} 1.0' in text and "xxx" not in text
