"""The HTTP side: OpenAI's chat and completions, models, health, metrics.

Starlette and not FastAPI: bodies are read by hand, since what goes wrong while they are read must come out as OpenAI's
error JSON whatever it is (a nesting too deep for the parser, half a surrogate pair, a body too long), and never as a
500. Nothing that a client sends is put into a message without being cut and escaped.

What is bounded: the body's bytes, tokens, answers to one request, time, and how many wait. A client that goes away is
noticed, and its slot is given to somebody else. Without an API key the server answers only requests that name it by a
loopback name and do not come from another site's page: a web page can have its own name resolve to 127.0.0.1, and the
browser's rules would then let it in.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from medcot.errors import DataError
from medcot.generate import Sampling
from medcot.prompt import Style, encode_prompt
from medcot.serve.jobs import Job
from medcot.serve.protocol import BadRequest, ChatRequest, CompletionRequest, Message, error_body, now
from medcot.serve.replies import Answers, ChatForm, CompletionForm, Form, cancel_when_gone, collect, stream
from medcot.serve.scheduler import Draining, Overloaded

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as Event
    from transformers import PreTrainedTokenizerBase

    from medcot.serve.metrics import Metrics
    from medcot.serve.scheduler import Scheduler

RETRY_S = 5  # what those who are turned away are told to wait
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN_PATHS = frozenset({"/health", "/ready"})  # for whoever watches over the process
_SHOWN = 60  # characters of what a client sent

_Body = TypeVar("_Body", ChatRequest, CompletionRequest)


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        models: names to be asked for, the first of them by default.
        style: how a question is put.
        context_tokens: prompt and answer together.
        max_tokens: of an answer, where the request does not say.
        think_tokens: budget for thinking, where the request does not say; ``None`` for none.
        sampling: where the request does not say.
        seconds: of a request, waiting included.
        body_bytes: of a request.
        api_key: what must be shown; ``None`` for loopback alone.
    """

    models: tuple[str, ...]
    style: Style
    context_tokens: int
    max_tokens: int
    think_tokens: int | None
    sampling: Sampling
    seconds: float = 600.0
    body_bytes: int = 2**20
    api_key: str | None = None


def build_app(
    settings: Settings, scheduler: Scheduler, tokenizer: PreTrainedTokenizerBase, metrics: Metrics
) -> ASGIApp:
    """Return the application; the scheduler is started and stopped by whoever runs it."""
    api = _Api(settings, scheduler, tokenizer, metrics)
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/v1/models", api.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.show_model, methods=["GET"]),
        Route("/health", api.health, methods=["GET"]),
        Route("/ready", api.ready, methods=["GET"]),
        Route("/metrics", api.show_metrics, methods=["GET"]),
    ]

    async def not_there(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return _reply(error_body(f"{request.method} {_shown(request.url.path)} is not served here"), status)

    app = Starlette(routes=routes, exception_handlers={404: not_there, 405: not_there, BadRequest: _explain})
    return _Gate(app, settings, metrics)


async def _explain(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    kind = {429: "rate_limit_error", 503: "overloaded_error", 500: "server_error", 504: "timeout_error"}
    body = error_body(str(error), kind.get(error.status, "invalid_request_error"), error.param)
    return _reply(body, error.status, {"Retry-After": str(RETRY_S)} if error.status in (429, 503) else None)


def _reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # Escapes keep it ASCII: a lone surrogate in what a client sent has no UTF-8.
    return Response(json.dumps(body), status, headers, media_type="application/json")


def _shown(text: str) -> str:
    return repr(text[:_SHOWN] + ("…" if len(text) > _SHOWN else ""))


class _Gate:
    """Who may come in, and how much they may bring; counts every request."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refuse(scope)
        known = scope["path"].startswith("/v1/") or scope["path"] in OPEN_PATHS | {"/metrics"}
        path = scope["path"] if known and len(scope["path"]) < 30 else "other"

        async def counted(event: Event) -> None:
            if event["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(event["status"])).inc()
            await send(event)

        if refused is not None:
            await (await _explain(None, refused))(scope, receive, counted)  # type: ignore[arg-type]
            return
        await self._app(scope, receive, counted)

    def _refuse(self, scope: Scope) -> BadRequest | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._settings.body_bytes:
            return BadRequest(f"A request has at most {self._settings.body_bytes:,} bytes", 413)
        key = self._settings.api_key
        if key is None:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
            origin = headers.get("origin")
            if host not in LOOPBACK or (origin is not None and urlsplit(origin).hostname not in LOOPBACK):
                return BadRequest("This server answers to 127.0.0.1 and localhost, and to no other site's pages", 403)
            return None
        shown = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if scope["path"] in OPEN_PATHS or hmac.compare_digest(shown.encode("latin-1"), key.encode()):
            return None
        return BadRequest("The API key is missing or wrong: send it as 'Authorization: Bearer KEY'", 401)


class _Api:
    """The routes."""

    def __init__(
        self, settings: Settings, scheduler: Scheduler, tokenizer: PreTrainedTokenizerBase, metrics: Metrics
    ) -> None:
        self._settings, self._scheduler, self._tokenizer, self._metrics = settings, scheduler, tokenizer, metrics
        self._started = now()

    async def health(self, _: Request) -> Response:
        """Whether answers are being written."""
        alive = self._scheduler.is_alive
        return _reply({"status": "ok" if alive else "down"}, 200 if alive else 503)

    async def ready(self, _: Request) -> Response:
        """As ``health``: models are loaded before the server listens."""
        return await self.health(_)

    async def show_metrics(self, _: Request) -> Response:
        """Everything, in Prometheus's text format."""
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self, _: Request) -> Response:
        """All names."""
        return _reply({"object": "list", "data": [self._describe(name) for name in self._settings.models]})

    async def show_model(self, request: Request) -> Response:
        """One name."""
        return _reply(self._describe(self._find_model(request.path_params["name"])))

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "medcot"}

    def _find_model(self, name: str | None) -> str:
        if name is None:
            return self._settings.models[0]
        if name not in self._settings.models:
            known = ", ".join(self._settings.models)
            raise BadRequest(f"There is no model {_shown(name)} here; there are {known}", 404, "model")
        return name

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        body = await self._read(request, ChatRequest)
        prompt_ids = self._encode_question(body.messages)
        think = self._settings.think_tokens if body.thinking_budget is None else body.thinking_budget
        answers = self._submit(body, prompt_ids, splits=True, think_tokens=think)
        return await self._respond(request, body, answers, ChatForm(self._model_of(body)))

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = await self._read(request, CompletionRequest)
        try:
            body.prompt.encode()
        except UnicodeEncodeError:
            raise BadRequest(
                "'prompt' holds half a surrogate pair; text must be valid Unicode", 400, "prompt"
            ) from None
        prompt_ids = self._tokenizer(body.prompt, verbose=False)["input_ids"]
        answers = self._submit(body, prompt_ids, splits=False, think_tokens=None)
        return await self._respond(request, body, answers, CompletionForm(self._model_of(body)))

    def _model_of(self, body: ChatRequest | CompletionRequest) -> str:
        return self._find_model(body.model)

    async def _read(self, request: Request, kind: type[_Body]) -> _Body:
        """Return the body as asked for.

        Raises:
            BadRequest: whatever is wrong with it.
        """
        raw = bytearray()
        async for piece in request.stream():
            raw += piece
            if len(raw) > self._settings.body_bytes:
                raise BadRequest(f"A request has at most {self._settings.body_bytes:,} bytes", 413)
        try:
            values = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"The body is not JSON: {str(error)[:_SHOWN]}") from None
        if not isinstance(values, dict):
            raise BadRequest("The body is not a JSON object")
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part)[:_SHOWN] for part in first["loc"][:6])
            message = first["msg"].removeprefix("Value error, ")
            raise BadRequest(f"{where}: {message}" if where else message, 400, where or None) from None

    def _encode_question(self, messages: list[Message]) -> list[int]:
        if [message.role for message in messages] != ["user"]:
            raise BadRequest(
                "This model was trained on single questions: send one message, of role 'user' "
                f"(these are: {', '.join(message.role for message in messages[:8])})",
                400,
                "messages",
            )
        try:
            return encode_prompt(messages[0].text, self._settings.style, self._tokenizer)
        except DataError as error:
            raise BadRequest(str(error), 400, "messages") from None

    def _submit(
        self, body: ChatRequest | CompletionRequest, prompt_ids: list[int], *, splits: bool, think_tokens: int | None
    ) -> Answers:
        """Hand the jobs of a request over, one for each answer; all of them or none."""
        settings, model = self._settings, self._model_of(body)
        room = settings.context_tokens - len(prompt_ids)
        if not prompt_ids or room < 1:
            most = settings.context_tokens
            raise BadRequest(f"The prompt has {len(prompt_ids):,} tokens; with its answer it may have {most:,}")
        default = settings.sampling
        sampling = Sampling(
            default.temperature if body.temperature is None else body.temperature,
            default.top_p if body.top_p is None else body.top_p,
        )
        seed = secrets.randbits(62) if body.seed is None else body.seed % 2**63
        answers = Answers(body.n or 1)
        for index in range(answers.num):
            job = Job(
                model=model,
                prompt_ids=prompt_ids,
                max_tokens=min(room, body.most_tokens or settings.max_tokens),
                sampling=sampling,
                seed=(seed + index) % 2**63,
                splits=splits,
                tell=answers.listener(index),
                think_tokens=think_tokens,
                stop=body.stops,
                seconds=settings.seconds,
            )
            answers.jobs.append(job)
            try:
                self._scheduler.submit(job)
            except (Overloaded, Draining) as error:
                answers.cancel()
                full = isinstance(error, Overloaded)
                words = "Too many requests wait; try again in a moment" if full else "The server is stopping"
                raise BadRequest(words, 429 if full else 503) from None
        return answers

    async def _respond(
        self, request: Request, body: ChatRequest | CompletionRequest, answers: Answers, form: Form
    ) -> Response:
        if body.stream:
            return StreamingResponse(stream(answers, form, usage=body.wants_usage), media_type="text/event-stream")
        watcher = asyncio.create_task(cancel_when_gone(request.receive, answers))
        try:
            texts, ends = await collect(answers)
        finally:
            watcher.cancel()
            answers.cancel()  # what is not done by now is nobody's
        return _reply(form.whole(texts, ends))
