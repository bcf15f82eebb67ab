"""The job of ``medcot serve``: open a run or a model, give each adapter its lane, and let a server stand before them.

The base is loaded once and served as ``base``; a run's adapter is ``tuned``, the one asked where a request names none,
and further ones go by the names they are given. The adapters are PEFT's, side by side; each lane is opened with its own
switched on and keeps it (``serve/opening.py``), so all are written at the same time over one set of weights. Lanes are
opened before the server listens: what does not fit into memory is said at the start, and not to the first who asks.

Safety comes before loading: any address but loopback needs an API key, and the address is taken first, so that a port
in use costs no minute of loading.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot.answering import Choice, Engine, choose_run, find_adapter
from medcot.errors import MissingExtraError, RecipeError
from medcot.prompt import Style
from medcot.prompt.frames import frame_of
from medcot.secrets import OTHER_ENDPOINT_KEY

if TYPE_CHECKING:
    import socket

    from rich.console import Console
    from starlette.types import ASGIApp
    from transformers import PreTrainedTokenizerBase

    from medcot.generate import Sampling
    from medcot.model import LoadedModel
    from medcot.serve.app import Settings
    from medcot.serve.lanes import Lane
    from medcot.serve.metrics import Metrics
    from medcot.serve.opening import Opener
    from medcot.serve.scheduler import MakeRow, Scheduler
    from medcot.serve.vllm_scheduler import VllmScheduler

BASE, TUNED = "base", "tuned"
INTENDED_USE = "For research and education; not for diagnosis or treatment."
SLOTS = {"cuda": 64, "cpu": 16}  # answers written together for each model, where memory has room
WAITING_A_SLOT = 4  # how many may wait, for each that is answered
CONTEXT_TOKENS = 4096
LIBRARIES = ("starlette", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Wish:
    """What is to be served, and how.

    Attributes:
        who: the model, with the adapter that is served as ``tuned``.
        adapters: further ones by name: folder or Hub id.
        host: address to listen at.
        port: 0 for any that is free.
        slots: answers written together for each model; ``None`` for what suits the machine.
        waiting: requests that may wait for a slot; ``None`` for a few for each.
        context_tokens: prompt and answer together; ``None`` for 4,096, or the model's own length if that is less.
        max_tokens: of an answer, unless the request says otherwise.
        think_tokens: budget for thinking, unless the request says otherwise; ``None`` for none.
        temperature: unless the request says otherwise; ``None`` for the model's own.
        top_p: as ``temperature``.
        seconds: of a request, waiting included.
        drain_seconds: that those being answered have when the server is stopped.
        body_bytes: of a request.
        api_key: that must be shown; needed on any address but loopback.
        api_key_name: the environment variable that has it, for the line that says how to ask.
    """

    who: Choice
    adapters: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int | None = None
    waiting: int | None = None
    context_tokens: int | None = None
    max_tokens: int = 2048
    think_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seconds: float = 600.0
    drain_seconds: float = 30.0
    body_bytes: int = 2**20
    api_key: str | None = field(default=None, repr=False)
    api_key_name: str = OTHER_ENDPOINT_KEY


@dataclass(frozen=True)
class Service:
    """All that stands behind an address; whoever has it starts and stops the scheduler.

    Attributes:
        app: speaks HTTP.
        scheduler: writes the answers.
        settings: what is allowed.
        sentence: what is served.
        notes: what the user should know, one sentence each.
    """

    app: ASGIApp
    scheduler: Scheduler | VllmScheduler
    settings: Settings
    sentence: str
    notes: tuple[str, ...] = ()


def choose(target: str, adapter: str | None = None, *, engine: Engine = Engine.LOCAL) -> Choice:
    """Return what a run folder, or a model by its name, stands for.

    Raises:
        ModelError: a folder that is a run without an adapter.
    """
    from dataclasses import replace

    from medcot.records import Run

    if Run(Path(target)).recipe.is_file():
        return replace(choose_run(Path(target)), engine=engine)
    return Choice(target, adapter, name=TUNED, engine=engine)


def find_engine() -> Engine:
    """Return vLLM where it is installed and there is a GPU, else our own engine."""
    import torch

    return Engine.VLLM if importlib.util.find_spec("vllm") is not None and torch.cuda.is_available() else Engine.LOCAL


def check_wish(wish: Wish) -> None:
    """Refuse what could not be meant, before anything is loaded.

    Raises:
        RecipeError: an address without a key, a name that is taken, or numbers that do not fit together.
        MissingExtraError: the server's libraries are not there.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)} not installed",
            "Serving needs starlette, uvicorn and prometheus-client",
            "Run pip install -c constraints.txt '.[serve]'",
        )
    from medcot.serve.server import is_loopback

    if not is_loopback(wish.host) and not wish.api_key:
        raise RecipeError(
            f"--host {wish.host} without an API key",
            "Anybody in the network could ask; only this machine is served without a key",
            "Make one: export MEDCOT_API_KEY=$(openssl rand -hex 24), or name another with --api-key-env",
        )
    for name in wish.adapters:
        if name in (BASE, TUNED):
            raise RecipeError(f"an adapter named '{name}'", f"{BASE} and {TUNED} are taken", "Give it another name")
        if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise RecipeError(f"an adapter named {name!r}", "A name is of letters, digits, - and _", "Give it another")
    context = wish.context_tokens or CONTEXT_TOKENS
    if wish.max_tokens > context:
        raise RecipeError(
            f"--max-tokens {wish.max_tokens} with --context {context}",
            "An answer and its prompt share the context",
            "Raise --context, or lower --max-tokens",
        )


def serve(wish: Wish, *, console: Console | None = None) -> None:
    """Serve until told to stop.

    Raises:
        MedcotError: a model that cannot be loaded, an address that cannot be had, libraries that are missing.
    """
    check_wish(wish)
    from medcot.serve.server import CUT_S, Server, listen
    from medcot.train.progress import RunConsole

    screen = RunConsole(console)
    with listen(wish.host, wish.port) as listener:
        with screen.stage("load model") as line:
            service = open_service(wish)
            service.scheduler.start()
            line.detail = service.sentence
        for note in service.notes:
            screen.warn(note)
        _announce(screen, service.settings, listener, wish.api_key_name)
        Server(service.app, service.scheduler, wish.drain_seconds).run(sockets=[listener])
        screen.note("stopped" if service.scheduler.join(CUT_S) else "stopped; answers were cut")


def open_service(wish: Wish) -> Service:
    """Load what is to be served; errors as for ``serve``."""
    who = wish.who
    folders = {TUNED: who.adapter, **wish.adapters} if who.adapter is not None else dict(wish.adapters)
    adapters = {name: find_adapter(text) for name, text in folders.items()}
    return (_open_vllm if who.engine is Engine.VLLM else _open_local)(wish, adapters)


def _open_local(wish: Wish, adapters: Mapping[str, Path]) -> Service:
    from medcot.generate import eos_token_ids, sampling_defaults
    from medcot.model import load
    from medcot.serve.metrics import Metrics
    from medcot.serve.opening import Opener
    from medcot.serve.scheduler import Scheduler

    who = wish.who
    loaded = load(
        who.source,
        precision=who.precision,
        revision=who.revision,
        max_seq_length=wish.context_tokens or 1,
        allow_pickle=who.allow_pickle,
        trust_remote_code=who.trust_remote_code,
    )
    make_row = _row_maker(loaded.tokenizer, who.style, eos_token_ids(loaded.model, loaded.tokenizer))
    longest = loaded.model.config.get_text_config().to_dict().get("max_position_embeddings")
    context = wish.context_tokens or min(CONTEXT_TOKENS, longest or CONTEXT_TOKENS)
    metrics = Metrics()
    opener = Opener(loaded, adapters, BASE, accelerate=who.accelerate)
    slots, notes = _count_slots(opener, loaded, wish, context)
    ready = {name: opener.open(name, slots, context) for name in opener.names}

    def open_lane(name: str) -> Lane:
        """The lane that is open already; after a failure another."""
        return ready.pop(name, None) or opener.open(name, slots, context)

    scheduler = Scheduler(
        {name: partial(open_lane, name) for name in opener.names},
        make_row,
        most_waiting=slots * WAITING_A_SLOT if wish.waiting is None else wish.waiting,
        on_end=metrics.note,
    )
    settings = _settings(wish, opener.names, context, sampling_defaults(loaded.model))
    size = f"{loaded.num_params / 1e6:,.0f} M parameters, {loaded.precision} on {loaded.device}"
    sentence = f"{loaded.source}, {size}, {slots} answers together for each model"
    return _join(settings, scheduler, loaded.tokenizer, metrics, sentence, (*loaded.notes, *notes))


def _count_slots(opener: Opener, loaded: LoadedModel, wish: Wish, context: int) -> tuple[int, list[str]]:
    """How many slots each model has, and what is to be said of it."""
    from medcot.planning import fit_answers
    from medcot.shapes import compute_shape

    if opener.reason is not None:
        return 1, [f"transformers writes the answers, one after the other: the engine cannot, {opener.reason}"]
    wanted, num_lanes = wish.slots or SLOTS.get(loaded.device.type, SLOTS["cpu"]), len(opener.names)
    if loaded.device.type == "cuda":
        slots = opener.fit(wanted, context)
    else:
        shape = compute_shape(loaded.model.config, trust_remote_code=wish.who.trust_remote_code)
        slots = max(1, fit_answers(wanted * num_lanes, shape, loaded.precision, context, loaded.device) // num_lanes)
    if slots < wanted:
        return slots, [f"memory has room for {slots} answers of {context:,} tokens together, not {wanted}"]
    return slots, []


def _open_vllm(wish: Wish, adapters: Mapping[str, Path]) -> Service:
    from medcot.evaluate.vllm_writer import load_vllm
    from medcot.generate import DEFAULT_TEMPERATURE, DEFAULT_TOP_P, Sampling
    from medcot.model import load_tokenizer, read_adapter_config
    from medcot.serve.metrics import Metrics
    from medcot.serve.vllm_scheduler import VllmScheduler
    from medcot.weights import find_weights

    who, module = wish.who, load_vllm()
    importlib.import_module("vllm.v1.engine.async_llm")
    allowed: Any = {"allow_pickle": who.allow_pickle, "trust_remote_code": who.trust_remote_code}
    weights = find_weights(who.source, revision=who.revision, config_only=True, **allowed)
    tokenizer = load_tokenizer(who.source, revision=who.revision, **allowed)
    longest = weights.config.get("max_position_embeddings") or CONTEXT_TOKENS
    context = wish.context_tokens or min(CONTEXT_TOKENS, longest)
    lora: dict[str, Any] = {}
    if adapters:
        ranks = [int(read_adapter_config(folder)["r"]) for folder in adapters.values()]
        lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": max(ranks)}
    metrics, slots = Metrics(), wish.slots or SLOTS["cuda"]
    scheduler = VllmScheduler(
        module,
        who.source,
        {**adapters, BASE: None},
        _row_maker(tokenizer, who.style, {int(tokenizer.eos_token_id)}),
        most_running=slots,
        most_waiting=slots * WAITING_A_SLOT if wish.waiting is None else wish.waiting,
        on_end=metrics.note,
        revision=weights.commit,
        max_model_len=context,
        trust_remote_code=who.trust_remote_code,
        **lora,
    )
    settings = _settings(wish, (*adapters, BASE), context, Sampling(DEFAULT_TEMPERATURE, DEFAULT_TOP_P))
    sentence = f"{who.source}, by vLLM {module.__version__}, {slots} answers together"
    return _join(settings, scheduler, tokenizer, metrics, sentence, ())


def _settings(wish: Wish, models: tuple[str, ...], context: int, own: Sampling) -> Settings:
    from medcot.generate import Sampling
    from medcot.serve.app import Settings

    return Settings(
        models=models,
        style=wish.who.style,
        context_tokens=context,
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


def _row_maker(tokenizer: PreTrainedTokenizerBase, style: Style, eos_ids: set[int]) -> MakeRow:
    from medcot.serve.rows import Row

    frame = frame_of(style, tokenizer)  # a style that the tokenizer has no frame for is missed now
    return lambda job: Row(job, tokenizer, frame, eos_ids)


def _join(
    settings: Settings,
    scheduler: Scheduler | VllmScheduler,
    tokenizer: PreTrainedTokenizerBase,
    metrics: Metrics,
    sentence: str,
    notes: tuple[str, ...],
) -> Service:
    from medcot.serve.app import build_app

    metrics.watch(scheduler)
    return Service(build_app(settings, scheduler, tokenizer, metrics), scheduler, settings, sentence, notes)


def _announce(screen: Any, settings: Settings, listener: socket.socket, key_name: str) -> None:
    """Say where it is, who can be asked, and how."""
    from medcot.serve.server import address_of

    address, first = address_of(listener), settings.models[0]
    names = ", ".join(settings.models)
    budget = "no limit" if settings.think_tokens is None else f"at most {settings.think_tokens:,} tokens"
    screen.note(f"{address}/v1 serves {names}" + (f"; {first} where none is named" if "," in names else ""))
    room = f"up to {settings.context_tokens:,} tokens with the answer"
    screen.note(f"prompts in style {settings.style}, {room}; thinking: {budget}")
    key = f' -H "Authorization: Bearer ${key_name}"' if settings.api_key else ""
    question = "Why does furosemide lower potassium?"
    body = f'{{"model": "{first}", "stream": true, "messages": [{{"role": "user", "content": "{question}"}}]}}'
    screen.note(f"try: curl -N {address}/v1/chat/completions{key} -d '{body}'")
    screen.note(f"{address}/health, /ready, /metrics; Ctrl-C stops")
    screen.note(INTENDED_USE)
