"""The HTTP side: OpenAI's chat and completions, models, health, metrics.

Starlette and not FastAPI: bodies are read by hand, since what goes wrong while they are read must come out as OpenAI's
error JSON whatever it is (a nesting too deep for the parser, half a surrogate pair, a body too long), and never as a
500. Nothing that a client sends is put into a message without being cut and escaped.

A conversation is one question. The runs behind this server were trained on single questions, and their prompts begin
no other turn: a history or a system message would be something the model never saw, so it is refused in words instead
of dropped.

What is bounded: the body's bytes (``gate.py``), tokens, answers to one request, time, and how many wait. A client that
goes away is noticed, and its slot is given to somebody else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from medcot.errors import DataError
from medcot.generate import Sampling
from medcot.prompt import Style, count_most_bytes, encode_prompt
from medcot.serve.gate import Gate, explain, reply
from medcot.serve.jobs import Job
from medcot.serve.protocol import BadRequest, ChatRequest, CompletionRequest, Message, error_body, now
from medcot.serve.replies import Answers, ChatForm, CompletionForm, Form, cancel_when_gone, collect, stream
from medcot.serve.scheduler import Draining, Overloaded

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp
    from transformers import PreTrainedTokenizerBase

    from medcot.serve.metrics import Metrics

# Colder draws are the likeliest token in all but name, and a float32 overflows on the way; the same of a nucleus.
COLDEST, NARROWEST = 1e-4, 1e-6
_SHOWN = 60  # characters of what a client sent
_ROUTES = "POST /v1/chat/completions and /v1/completions, GET /v1/models, /health, /ready and /metrics"
_MOST_NAMES = 32  # fields without a meaning that are told once each
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_log = logging.getLogger("medcot.serve")

_Body = TypeVar("_Body", ChatRequest, CompletionRequest)


class Writes(Protocol):
    """What writes the answers: a ``Scheduler``, or vLLM behind the same words."""

    @property
    def num_waiting(self) -> int:
        """Jobs without a slot."""

    @property
    def num_running(self) -> int:
        """Jobs with one."""

    @property
    def num_slots(self) -> int:
        """Jobs that may have one."""

    @property
    def is_alive(self) -> bool:
        """Whether jobs that were taken are being written."""

    @property
    def is_draining(self) -> bool:
        """Whether no more jobs are taken."""

    def submit(self, job: Job) -> None:
        """Take a job; raises ``Overloaded`` or ``Draining``."""


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


def build_app(settings: Settings, writer: Writes, tokenizer: PreTrainedTokenizerBase, metrics: Metrics) -> ASGIApp:
    """Return the application; what writes is started and stopped by whoever runs it."""
    api = _Api(settings, writer, tokenizer, metrics)
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
        message = f"{_shown(request.method)} {_shown(request.url.path)} is not served here; {_ROUTES} are"
        return reply(error_body(message), status, getattr(error, "headers", None))

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, BadRequest)
        return explain(error)

    async def failed(_: Request, __: Exception) -> Response:
        return explain(BadRequest("The server failed; its log says why", 500))

    handlers: Any = {404: not_there, 405: not_there, BadRequest: refused, Exception: failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Gate(app, metrics, api_key=settings.api_key, body_bytes=settings.body_bytes)


def _shown(text: str) -> str:
    return ascii(text[:_SHOWN] + ("..." if len(text) > _SHOWN else ""))


class _Api:
    """The routes."""

    def __init__(
        self, settings: Settings, writer: Writes, tokenizer: PreTrainedTokenizerBase, metrics: Metrics
    ) -> None:
        self._settings, self._writer, self._tokenizer, self._metrics = settings, writer, tokenizer, metrics
        self._started = now()
        self._most_bytes = count_most_bytes(tokenizer)
        self._told = set[str]()

    async def health(self, _: Request) -> Response:
        """Whether answers are being written."""
        alive = self._writer.is_alive
        return reply({"status": "ok" if alive else "down"}, 200 if alive else 503)

    async def ready(self, _: Request) -> Response:
        """Whether more is taken; models are loaded before the server listens."""
        ready = self._writer.is_alive and not self._writer.is_draining
        return reply({"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    async def show_metrics(self, _: Request) -> Response:
        """Everything, in Prometheus's text format."""
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self, _: Request) -> Response:
        """All names."""
        return reply({"object": "list", "data": [self._describe(name) for name in self._settings.models]})

    async def show_model(self, request: Request) -> Response:
        """One name."""
        return reply(self._describe(self._find_model(request.path_params["name"])))

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
        question = _only_question(body.messages)
        self._check_length(question, "messages")
        try:
            # In a thread: a megabyte takes seconds, and others are to be answered meanwhile.
            prompt_ids = await asyncio.to_thread(encode_prompt, question, self._settings.style, self._tokenizer)
        except DataError as error:
            raise BadRequest(ascii_only(str(error)), 400, "messages") from None
        think = self._settings.think_tokens if body.budget is None else body.budget
        answers = self._submit(body, prompt_ids, splits=True, think_tokens=think)
        return await self._respond(request, body, answers, ChatForm(self._find_model(body.model)))

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = await self._read(request, CompletionRequest)
        self._check_length(body.prompt, "prompt")
        prompt_ids = await asyncio.to_thread(self._encode_plain, body.prompt)
        answers = self._submit(body, prompt_ids, splits=False, think_tokens=None)
        return await self._respond(request, body, answers, CompletionForm(self._find_model(body.model)))

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _check_length(self, text: str, param: str) -> None:
        """Refuse what is no Unicode, and what is too long however it is cut into tokens."""
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError:
            raise BadRequest("The text holds half a surrogate pair; it must be valid Unicode", 400, param) from None
        most = self._settings.context_tokens
        if self._most_bytes is not None and num_bytes > self._most_bytes * most:
            raise BadRequest(
                f"The prompt is longer than the {most:,} tokens that it may have with its answer", 400, param
            )

    async def _read(self, request: Request, kind: type[_Body]) -> _Body:
        """Return the body as asked for.

        Raises:
            BadRequest: whatever is wrong with it.
        """
        raw = bytearray()
        try:
            async for piece in request.stream():
                raw += piece
                if len(raw) > self._settings.body_bytes:
                    raise BadRequest(f"A request has at most {self._settings.body_bytes:,} bytes", 413)
            values = json.loads(raw)
        except ClientDisconnect:
            raise BadRequest("The body did not come whole") from None
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"The body is not JSON: {ascii_only(str(error)[:_SHOWN])}") from None
        if not isinstance(values, dict):
            raise BadRequest("The body is not a JSON object")
        try:
            body = kind.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(ascii_only(str(part)[:_SHOWN]) for part in first["loc"][:6])
            message = ascii_only(first["msg"].removeprefix("Value error, "))
            raise BadRequest(f"{where}: {message}" if where else message, 400, where or None) from None
        self._tell_unknown(set(values) - set(kind.model_fields))
        return body

    def _tell_unknown(self, names: set[str]) -> None:
        """Say once of each field that nobody knows that it was passed over."""
        for name in sorted(names - self._told)[: _MOST_NAMES - len(self._told)]:
            self._told.add(name)
            _log.warning("A request holds %s, which means nothing here; it is passed over", _shown(name))

    def _submit(
        self, body: ChatRequest | CompletionRequest, prompt_ids: list[int], *, splits: bool, think_tokens: int | None
    ) -> Answers:
        """Hand the jobs of a request over, one for each answer; all of them or none."""
        settings, model = self._settings, self._find_model(body.model)
        room = settings.context_tokens - len(prompt_ids)
        if not prompt_ids or room < 1:
            most = settings.context_tokens
            raise BadRequest(f"The prompt has {len(prompt_ids):,} tokens; with its answer it may have {most:,}")
        seed = secrets.randbits(62) if body.seed is None else body.seed % 2**63
        answers = Answers(body.n or 1)
        for index in range(answers.num):
            job = Job(
                model=model,
                prompt_ids=prompt_ids,
                max_tokens=min(room, body.most_tokens or settings.max_tokens),
                sampling=_choose_sampling(body, settings.sampling),
                seed=(seed + index) % 2**63,
                splits=splits,
                tell=answers.listener(index),
                think_tokens=think_tokens,
                stop=body.stops,
                seconds=settings.seconds,
            )
            answers.jobs.append(job)
            try:
                self._writer.submit(job)
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
            events = stream(answers, form, usage=body.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        watcher = asyncio.create_task(cancel_when_gone(request.receive, answers))
        try:
            texts, ends = await collect(answers)
        finally:
            watcher.cancel()
            answers.cancel()  # what is not done by now is nobody's
        return reply(form.whole(texts, ends))


def ascii_only(text: str) -> str:
    """Return a text with all else escaped, so that it can be shown anywhere."""
    return text.encode("ascii", "backslashreplace").decode()


def _only_question(messages: list[Message]) -> str:
    roles = [message.role for message in messages]
    if roles != ["user"]:
        raise BadRequest(
            "This model answers single questions, as it was trained: send one message, of role 'user' "
            f"(these are: {', '.join(roles[:8])})",
            400,
            "messages",
        )
    return messages[0].text


def _choose_sampling(body: ChatRequest | CompletionRequest, default: Sampling) -> Sampling:
    temperature = default.temperature if body.temperature is None else body.temperature
    if temperature < COLDEST:
        return Sampling(0.0, 1.0)
    return Sampling(temperature, max(NARROWEST, default.top_p if body.top_p is None else body.top_p))
