"""Who can be asked: the model of a run, a base with or without an adapter, through us or vLLM, or a server.

Each becomes an ``Answerer``: a back end with a name, and what the store of answers knows it by. A model with an adapter
is always two of them, the plain base first, because a score without the base's beside it says nothing about training.
They are opened one after the other, so that the base answers before it has an adapter at all, and share its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot.asking import ADAPTER_FILES, count_prompt_tokens, hash_adapter, name_base, stamp_weights
from medcot.errors import ModelError
from medcot.evaluate.backends import Backend, Ending, Limits
from medcot.evaluate.endpoint import Endpoint, EndpointBackend, check_there, is_this_machine
from medcot.evaluate.results import read_json, slug
from medcot.evaluate.servers import find_server
from medcot.evaluate.tasks import Task
from medcot.prompt import Style
from medcot.quiet import quiet_libraries
from medcot.recipe import load_recipe
from medcot.records import Run

if TYPE_CHECKING:
    from medcot.model import LoadedModel

MOST_TOGETHER = {"cuda": 256, "cpu": 64}  # answers written side by side, where memory has room for them


class Engine(StrEnum):
    """What writes the answers of a model whose weights we have."""

    LOCAL = "local"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True)
class Choice:
    """A model whose weights we have.

    Attributes:
        source: Hub id, folder, GGUF file or "embedded".
        adapter: folder or Hub id of a PEFT adapter; ``None`` for the base alone.
        name: what the model with the adapter goes by.
        style: how a question becomes a prompt.
        revision: Hub branch, tag or commit of the base.
        precision: how its weights are held.
        engine: what writes.
        accelerate: whether our engine does, where it can.
        batch_size: answers written together at most; ``None`` for what suits the machine.
        allow_pickle: accept pickled weights.
        trust_remote_code: accept a repository's own Python files.
    """

    source: str
    adapter: str | None = None
    name: str = "adapter"
    style: Style = Style.CHAT
    revision: str | None = None
    precision: str = "auto"
    engine: Engine = Engine.LOCAL
    accelerate: bool = True
    batch_size: int | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Answerer:
    """Somebody who can be asked.

    Attributes:
        name: what it goes by in a table.
        facts: what it is, for results.json.
        backend: answers.
        model: what the store knows it by, without its adapter.
        adapter_sha256: of the adapter.
        base: the name of its plain base, asked before it; ``None`` of a base.
        keeps: whether its answers may be found by a later evaluation: whoever goes by this name is the same.
    """

    name: str
    facts: dict[str, Any]
    backend: Backend
    model: str
    adapter_sha256: str | None
    base: str | None = None
    keeps: bool = True


def choose_run(folder: Path) -> Choice:
    """Return the model of a run, in the run's own prompt style.

    Raises:
        ModelError: the folder holds no adapter.
    """
    run = Run(folder)
    needed = (run.recipe, run.facts, *(run.adapter / name for name in ADAPTER_FILES))
    if not all(path.is_file() for path in needed):
        raise ModelError(
            f"'{folder}' holds no trained adapter",
            "A run keeps its recipe and its adapter",
            "Name the folder of a finished run, such as runs/latest",
        )
    recipe, base = load_recipe(run.recipe), read_json(run.facts)["model"]  # the very base that it was trained on
    return Choice(
        recipe.model.source,
        adapter=str(run.adapter),
        name=run.folder.resolve().name,
        style=Style(recipe.prompt.style),
        revision=base.get("revision") or recipe.model.revision,
        precision=base.get("precision") or recipe.model.precision.value,
        accelerate=recipe.train.accelerate,
        allow_pickle=recipe.model.allow_pickle,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def open_answerers(who: Choice | Endpoint, tasks: Sequence[Task], limits: Limits) -> Iterator[Answerer]:
    """Yield who is to be asked, one after the other; each is done with before the next is asked for.

    Args:
        who: a model or a server.
        tasks: what will be asked, for the room that prompts need.
        limits: the longest answers that will be asked for.

    Raises:
        MedcotError: the model or the adapter cannot be loaded.
    """
    if isinstance(who, Endpoint):
        yield _of_endpoint(who)
    elif who.engine is Engine.VLLM:
        yield from _open_vllm(who, limits)
    else:
        yield from _open_local(who, tasks, limits)


def _of_endpoint(endpoint: Endpoint) -> Answerer:
    check_there(endpoint)
    server = find_server(endpoint.base_url)
    facts = {
        "source": endpoint.model,
        "backend": "endpoint",
        "server": server.name,
        "base_url": endpoint.base_url,
        "notes": list(server.notes),
    }
    # The next model behind an address of this machine may go by the same name.
    keeps = not is_this_machine(endpoint.base_url)
    known_as = f"{endpoint.base_url} {endpoint.model}"
    return Answerer(endpoint.model, facts, EndpointBackend(endpoint), known_as, None, keeps=keeps)


def _open_local(choice: Choice, tasks: Sequence[Task], limits: Limits) -> Iterator[Answerer]:
    from medcot import engine
    from medcot.evaluate.local import ModelWriter, TokenBackend
    from medcot.model import load, load_adapter
    from medcot.planning import fit_answers
    from medcot.shapes import compute_shape

    room = limits.think_tokens + limits.answer_tokens
    adapter = (
        None if choice.adapter is None else find_adapter(choice.adapter)
    )  # missed now, not after the base's answers
    loaded = load(
        choice.source,
        precision=choice.precision,
        revision=choice.revision,
        max_seq_length=room,
        allow_pickle=choice.allow_pickle,
        trust_remote_code=choice.trust_remote_code,
    )
    row_tokens = count_prompt_tokens(tasks, choice.style, loaded.tokenizer) + room
    wanted = choice.batch_size or MOST_TOGETHER.get(loaded.device.type, MOST_TOGETHER["cpu"])
    shape = compute_shape(loaded.model.config, trust_remote_code=choice.trust_remote_code)
    together = fit_answers(wanted, shape, loaded.precision, row_tokens, loaded.device)
    name = name_base(loaded, accelerated=choice.accelerate)

    def build(model: Any) -> TokenBackend:
        if choice.accelerate:
            engine.accelerate(model)
        return TokenBackend(ModelWriter(model, loaded.tokenizer), loaded.tokenizer, choice.style, batch_size=together)

    facts = {**_describe(loaded), "backend": choice.engine.value, "style": choice.style.value, "together": together}
    base, tuned = _name_both(choice)
    yield Answerer(base, {**facts, "adapter": None}, build(loaded.model), name, None)
    if adapter is not None:
        engine.release(loaded.model)
        digest = hash_adapter(adapter)
        facts = {**facts, "adapter": choice.adapter, "adapter_sha256": digest}
        yield Answerer(tuned, facts, build(load_adapter(loaded, adapter)), name, digest, base)


def _open_vllm(choice: Choice, limits: Limits) -> Iterator[Answerer]:
    from medcot.evaluate.local import TokenBackend
    from medcot.evaluate.vllm_writer import VllmWriter, load_vllm
    from medcot.model import load_tokenizer, read_adapter_config
    from medcot.weights import find_weights

    _check_vllm(choice, limits)
    module = load_vllm()
    adapter = None if choice.adapter is None else find_adapter(choice.adapter)
    rank = 16 if adapter is None else int(read_adapter_config(adapter)["r"])
    allowed: dict[str, Any] = {"allow_pickle": choice.allow_pickle, "trust_remote_code": choice.trust_remote_code}
    weights = find_weights(choice.source, revision=choice.revision, config_only=True, **allowed)
    tokenizer = load_tokenizer(choice.source, revision=choice.revision, **allowed)
    writer = VllmWriter(module, choice.source, adapter=adapter, adapter_rank=rank, revision=weights.commit)
    stamp = f"{choice.source}@{weights.commit}" if weights.commit else stamp_weights(weights.folder)
    facts = {"source": choice.source, "revision": weights.commit, "backend": "vllm", "style": choice.style.value}
    known_as = f"vllm {module.__version__} {stamp}"
    together = choice.batch_size or MOST_TOGETHER["cuda"]
    base, tuned = _name_both(choice)
    plain = TokenBackend(writer.without_adapter(), tokenizer, choice.style, batch_size=together)
    yield Answerer(base, {**facts, "adapter": None}, plain, known_as, None)
    if adapter is not None:
        digest = hash_adapter(adapter)
        facts = {**facts, "adapter": choice.adapter, "adapter_sha256": digest}
        backend = TokenBackend(writer, tokenizer, choice.style, batch_size=together)
        yield Answerer(tuned, facts, backend, known_as, digest, base)


def _check_vllm(choice: Choice, limits: Limits) -> None:
    """Refuse what vLLM would do otherwise than asked.

    Raises:
        ModelError: a precision of ours, or likelihoods.
    """
    if choice.precision not in ("auto", "bf16", "fp16"):
        raise ModelError(
            f"vLLM was asked to hold weights in {choice.precision}",
            "It holds them as their checkpoint says",
            "Add --precision auto, or take the local engine",
        )
    if limits.ending is Ending.LIKELIHOOD:
        raise ModelError(
            "vLLM was asked for likelihoods",
            "It tells those of the likeliest tokens only, and a choice may not be among them",
            "Take the local engine, or --ending forced",
        )


def find_adapter(text: str) -> Path:
    """Return the folder of an adapter: as named, or fetched from the Hub.

    Raises:
        ModelError: there is none by this name.
        NetworkError: the Hub does not answer.
    """
    folder = Path(text)
    if all((folder / name).is_file() for name in ADAPTER_FILES):
        return folder
    if folder.exists() or text.count("/") != 1:
        raise ModelError(
            f"'{text}' is no adapter",
            f"An adapter is a folder or a Hub repository with {' and '.join(ADAPTER_FILES)}",
            "Name the adapter/ folder of a run, or a repository such as me/my-adapter",
        )
    from huggingface_hub import snapshot_download

    from medcot.weights import hub_errors, hub_token

    with hub_errors(text), quiet_libraries():
        found = Path(snapshot_download(text, allow_patterns=list(ADAPTER_FILES), token=hub_token()))
    if not all((found / name).is_file() for name in ADAPTER_FILES):
        raise ModelError(f"'{text}' holds no adapter", f"It holds {' and '.join(ADAPTER_FILES)}", "Name another")
    return found


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "source": loaded.source,
        "resolved": loaded.resolved,
        "revision": loaded.revision,
        "precision": loaded.precision,
        "params": loaded.num_params,
        "device": str(loaded.device),
    }


def _name_both(choice: Choice) -> tuple[str, str]:
    """Return what the base and the tuned model go by: names, and names of files, that differ."""
    path = Path(choice.source)
    base = path.resolve().name if path.exists() else choice.source
    return base, choice.name if slug(choice.name) != slug(base) else f"{choice.name}, tuned"
