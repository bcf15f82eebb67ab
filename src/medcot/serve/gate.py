"""Who may come in, and how much they may bring; stands before the application, and counts every request.

Without an API key the server answers only requests that name it by a loopback name and do not come from another site's
page: a web page can have its own name resolve to 127.0.0.1 ("DNS rebinding"), and the browser's rules would then let it
in. With a key no page can speak for its reader, who alone knows it. No CORS headers are sent in either case: a page
from elsewhere reads nothing.
"""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.responses import Response

from medcot.serve.protocol import BadRequest, error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from medcot.serve.metrics import Metrics

RETRY_S = 5  # what those who are turned away are told to wait
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN_PATHS = frozenset({"/health", "/ready"})  # for whoever watches over the process
COUNTED_PATHS = OPEN_PATHS | {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"}
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
          500: "server_error", 503: "overloaded_error", 504: "timeout_error"}  # fmt: skip
_MOST_DIGITS = 12  # of a length


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON in ASCII: half a surrogate pair in what a client sent has no UTF-8."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


def explain(error: BadRequest) -> Response:
    """Return an error as OpenAI's clients read it."""
    headers = {"Retry-After": str(RETRY_S)} if error.status in (429, 503) else None
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    kind = _KINDS.get(error.status, "invalid_request_error")
    return reply(error_body(str(error), kind, error.param), error.status, headers)


class Gate:
    """An application's door.

    Args:
        app: what is behind it.
        metrics: count the requests.
        api_key: what must be shown; ``None`` for loopback alone.
        body_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, api_key: str | None, body_bytes: int) -> None:
        self._app, self._metrics, self._api_key, self._body_bytes = app, metrics, api_key, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in COUNTED_PATHS else "other"

        async def counted(event: Message) -> None:
            if event["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(event["status"])).inc()
            await send(event)

        refused = self._refuse(scope)
        await (self._app if refused is None else explain(refused))(scope, receive, counted)

    def _refuse(self, scope: Scope) -> BadRequest | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if _too_long(headers.get("content-length", "0"), self._body_bytes):
            return BadRequest(f"A request has at most {self._body_bytes:,} bytes", 413)
        if self._api_key is None:
            origin = headers.get("origin")
            if _host(f"//{headers.get('host', '')}") in LOOPBACK and (origin is None or _host(origin) in LOOPBACK):
                return None
            return BadRequest("This server answers to 127.0.0.1 and localhost, and to no other site's pages", 403)
        shown = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if scope["path"] in OPEN_PATHS or hmac.compare_digest(shown.encode("latin-1"), self._api_key.encode()):
            return None
        return BadRequest("The API key is missing or wrong: send it as 'Authorization: Bearer KEY'", 401)


def _too_long(length: str, most: int) -> bool:
    is_number = length.isascii() and length.isdigit() and len(length) <= _MOST_DIGITS
    return not is_number or int(length) > most


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # an address that is none: "//[::1"
        return None
