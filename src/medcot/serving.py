"""The job of ``medcot serve``: open a run or a model with its adapters, and answer requests until told to stop.

Everything is loaded before the server listens, so whoever gets a connection gets an answer. SIGTERM and Ctrl-C drain:
no new connections, those being answered go on to their ends for so many seconds, and the process ends with exit code 0.

The base is served as ``base``, a run's adapter as ``tuned``, the default; further adapters go by the names they are
given.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot.answering import Choice, Engine, choose_run, find_adapter
from medcot.errors import MissingExtraError, ModelError, OutputError, RecipeError
from medcot.generate import Sampling, eos_token_ids, sampling_defaults
from medcot.prompt.frames import frame_of

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from medcot.model import LoadedModel
    from medcot.serve.app import Settings
    from medcot.serve.lanes import Lane
    from medcot.serve.scheduler import Scheduler

BASE, TUNED = "base", "tuned"
# Answers written together, by device type: a cache of 64 rows of 4,096 tokens takes 34 GB of an 8B.
SLOTS = {"cuda": 64, "cpu": 16}
WAITING_A_SLOT = 4  # how many may wait, for each that is answered
CLOSE_TOKENS = 8  # room for closing the thinking, in any style


@dataclass(frozen=True)
class Wish:
    """What is to be served, and how.

    Attributes:
        who: the model, with the adapter that is served as ``tuned``.
        adapters: more of them by name.
        host: address to listen on.
        port: 0 for any that is free.
        slots: answers written together; ``None`` for what the device is good for.
        waiting: requests that may wait for a slot; ``None`` for a few for each.
        context_tokens: prompt and answer together.
        max_tokens: of an answer, unless the request says otherwise.
        think_tokens: budget for thinking, unless the request says otherwise; ``None`` for none.
        temperature: unless the request says otherwise; ``None`` for the model's own.
        top_p: as ``temperature``.
        seconds: of a request, waiting included.
        drain_seconds: that those being answered have when the server is stopped.
        body_bytes: of a request.
        api_key: that must be shown; needed on any address but loopback.
    """

    who: Choice
    adapters: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int | None = None
    waiting: int | None = None
    context_tokens: int = 4096
    max_tokens: int = 2048
    think_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seconds: float = 600.0
    drain_seconds: float = 30.0
    body_bytes: int = 2**20
    api_key: str | None = field(default=None, repr=False)


def choose(target: str, adapter: str | None = None) -> Choice:
    """Return what a run folder, or a model by its name, stands for.

    Raises:
        ModelError: a folder that is a run without an adapter.
    """
    from medcot.records import Run

    if Run(Path(target)).recipe.is_file():
        return choose_run(Path(target))
    return Choice(target, adapter, name=TUNED)


def check_wish(wish: Wish) -> None:
    """Refuse what could not be meant, before anything is loaded.

    Raises:
        RecipeError: an address without a key, a name twice, or numbers that do not fit together.
        MissingExtraError: the server's libraries are not there.
    """
    from medcot.serve.app import LOOPBACK

    if wish.host not in LOOPBACK and not wish.api_key:
        raise RecipeError(
            f"--host {wish.host} without an API key",
            "Anybody in the network could ask; only 127.0.0.1 is served without a key",
            "Put a key into the environment variable MEDCOT_API_KEY (or name another with --api-key-env)",
        )
    taken = [name for name in wish.adapters if name in (BASE, TUNED)]
    if taken:
        raise RecipeError(f"an adapter named '{taken[0]}'", f"{BASE} and {TUNED} are taken", "Give it another name")
    if wish.max_tokens > wish.context_tokens:
        raise RecipeError(
            f"--max-tokens {wish.max_tokens} with --context {wish.context_tokens}",
            "An answer and its prompt share the context",
            "Raise --context, or lower --max-tokens",
        )


def serve(wish: Wish, *, console: Console | None = None) -> None:
    """Serve until told to stop.

    Args:
        wish: what and how.
        console: where to draw.

    Raises:
        MedcotError: a model that cannot be loaded, an address that cannot be listened on, libraries that are missing.
    """
    uvicorn = _import_server()
    check_wish(wish)
    from medcot.train.progress import RunConsole

    screen = RunConsole(console)
    with screen.stage("load model") as line:
        service = open_service(wish)
        line.detail = service.sentence
    config = uvicorn.Config(
        service.app, host=wish.host, port=wish.port, log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=int(wish.drain_seconds), limit_concurrency=None, server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listener = _listen(wish)
    address = f"http://{_bracketed(wish.host)}:{listener.getsockname()[1]}"
    service.scheduler.start()
    _announce(screen, address, service.settings)
    with _quiet_signals():
        server.run(sockets=[listener])
    service.scheduler.drain()
    service.scheduler.join(wish.drain_seconds)
    screen.note("stopped")


@dataclass(frozen=True)
class Service:
    """What answers, without the socket: an ASGI application over a scheduler, which its user starts."""

    app: Any
    scheduler: Scheduler
    settings: Settings
    sentence: str  # what is served


def open_service(wish: Wish) -> Service:
    """Load what is to be served; errors as for ``serve``."""
    from medcot.serve.app import build_app
    from medcot.serve.metrics import Metrics
    from medcot.serve.rows import Row
    from medcot.serve.scheduler import Scheduler

    opened = _open(wish)
    frame, eos_ids = frame_of(wish.who.style, opened.tokenizer), eos_token_ids(opened.model, opened.tokenizer)
    metrics = Metrics()
    scheduler = Scheduler(
        opened.lanes,
        lambda job: Row(job, opened.tokenizer, frame, eos_ids),
        most_waiting=opened.slots * WAITING_A_SLOT if wish.waiting is None else wish.waiting,
        on_end=metrics.note,
    )
    metrics.watch(scheduler)
    settings = _settings(wish, opened)
    app = build_app(settings, scheduler, opened.tokenizer, metrics)
    return Service(app, scheduler, settings, opened.describe())


@dataclass
class _Opened:
    """A loaded model, and how the lanes of its names are opened."""

    loaded: LoadedModel
    model: Any
    lanes: dict[str, Callable[[], Lane]]
    slots: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """The tuned model first: it is who is asked where a request names nobody."""
        return tuple(sorted(self.lanes, key=lambda name: (name != TUNED, name != BASE, name)))

    def describe(self) -> str:
        loaded = self.loaded
        return f"{loaded.source}, {loaded.num_params / 1e6:,.0f} M parameters, {loaded.precision}, {self.slots} slots"


def _open(wish: Wish) -> _Opened:
    """Load the base and every adapter; lanes take their memory when they are first asked for."""
    from medcot import engine
    from medcot.model import load, load_adapter

    who = wish.who
    if who.engine is not Engine.LOCAL:
        raise ModelError(
            f"--engine {who.engine}",
            "medcot's own engine serves in medcot's process",
            "Serve merged weights with vLLM itself: 'medcot export RUN --to merged-16bit' writes its command",
        )
    folders = {TUNED: who.adapter, **wish.adapters} if who.adapter is not None else dict(wish.adapters)
    adapters = {name: find_adapter(text) for name, text in folders.items() if text is not None}
    loaded = load(
        who.source,
        precision=who.precision,
        revision=who.revision,
        max_seq_length=wish.context_tokens,
        allow_pickle=who.allow_pickle,
        trust_remote_code=who.trust_remote_code,
    )
    frame_of(who.style, loaded.tokenizer)  # a style that the tokenizer has no frame for is missed now
    model: Any = loaded.model
    known: dict[str, str] = {}  # names to PEFT's
    for name, folder in adapters.items():
        if not known:
            model, known[name] = load_adapter(loaded, folder), "default"
        else:
            model.load_adapter(str(folder), adapter_name=name)
            known[name] = name
    if who.accelerate:
        engine.accelerate(model)
    slots = wish.slots or SLOTS.get(loaded.device.type, SLOTS["cpu"])
    lanes = {BASE: _opener(loaded, model, None, slots, wish.context_tokens)}
    lanes |= {name: _opener(loaded, model, peft, slots, wish.context_tokens) for name, peft in known.items()}
    return _Opened(loaded, model, lanes, slots)


def _opener(loaded: LoadedModel, model: Any, adapter: str | None, slots: int, context: int) -> Callable[[], Lane]:
    """Return what opens a lane with that adapter on; a model without adapters has none to switch."""

    def open_lane() -> Lane:
        from medcot.engine import engine_of
        from medcot.serve.lanes import EngineLane, PlainLane

        with _switched(model, adapter):
            if engine_of(model) is not None:
                return EngineLane(model, slots, context + CLOSE_TOKENS)
        return PlainLane(model, loaded.tokenizer, lambda: _switched(model, adapter))

    return open_lane


@contextlib.contextmanager
def _switched(model: Any, adapter: str | None) -> Iterator[None]:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield
    elif adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield


def _settings(wish: Wish, opened: _Opened) -> Settings:
    from medcot.serve.app import Settings

    own = sampling_defaults(opened.loaded.model)
    return Settings(
        models=opened.names,
        style=wish.who.style,
        context_tokens=wish.context_tokens,
        max_tokens=wish.max_tokens,
        think_tokens=wish.think_tokens,
        sampling=Sampling(
            own.temperature if wish.temperature is None else wish.temperature,
            own.top_p if wish.top_p is None else wish.top_p,
        ),
        seconds=wish.seconds,
        body_bytes=wish.body_bytes,
        api_key=wish.api_key,
    )


def _import_server() -> Any:
    try:
        import prometheus_client  # noqa: F401 - metrics.py needs it; missed here, with the others
        import starlette  # noqa: F401 - as above
        import uvicorn
    except ImportError as error:
        raise MissingExtraError(
            f"{error.name} is not installed",
            "Serving needs Starlette, uvicorn and prometheus-client",
            "Run: pip install -c constraints.txt '.[serve]'",
        ) from None
    return uvicorn


def _listen(wish: Wish) -> Any:
    import socket

    family = socket.AF_INET6 if ":" in wish.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((wish.host, wish.port))
    except OSError as error:
        listener.close()
        raise OutputError(
            f"{wish.host}:{wish.port} cannot be listened on: {error.strerror}",
            "An address of this machine, and a port that nobody has",
            "Name another with --port, or 0 for any",
        ) from None
    listener.listen(512)
    return listener


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _announce(screen: Any, address: str, settings: Settings) -> None:
    from medcot.report.page import INTENDED_USE

    screen.note(f"serving {', '.join(settings.models)} at {address}/v1, prompt style {settings.style}")
    key = ' -H "Authorization: Bearer $MEDCOT_API_KEY"' if settings.api_key else ""
    body = '{"messages": [{"role": "user", "content": "Why does furosemide lower potassium?"}], "stream": true}'
    screen.note(f"try: curl -N {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    screen.note(f"health {address}/health, metrics {address}/metrics; Ctrl-C stops")
    screen.note(INTENDED_USE)


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """Let a stop by signal be an end like any other: uvicorn, done draining, raises the signal again."""
    known = {}
    for name in (signal.SIGTERM, signal.SIGINT):
        known[name] = signal.signal(name, lambda *_: logging.getLogger("medcot.serve").debug("stopping"))
    try:
        yield
    finally:
        for name, handler in known.items():
            signal.signal(name, handler)
