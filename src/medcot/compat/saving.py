"""Saving as the tutorial does: adapter, tokenizer and merged weights, all into one folder.

transformers looks for ``adapter_config.json`` in whatever folder it loads a model from, and applies what it finds. In
the tutorial's folder it would find merged weights and the adapter that is already in them, and apply it twice. So
where the two meet, the adapter moves to ``adapter/`` in that folder, whichever came first; a plain
``AutoModelForCausalLM.from_pretrained(folder)`` then loads the merged model and nothing else, and
``PeftModel.from_pretrained(base, "folder/adapter")`` the adapter.

The user's folder may hold other files, which stay. Everything is written beside the folder first and moved in when it
is whole, the file by which loaders recognise it last.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medcot.compat.notes import ArgumentError, pass_over, say_once
from medcot.compat.session import Session, session_of
from medcot.errors import OutputError, did_you_mean
from medcot.export import llama_cpp
from medcot.export.adapter import ADAPTER_FILES, estimate_adapter_bytes
from medcot.export.adapter import save_adapter as save_adapter_files
from medcot.export.gguf import estimate_gguf_bytes, write_gguf
from medcot.export.kinds import MADE_BY_LLAMA_CPP, check_quant
from medcot.export.merged import Base, estimate_merged_bytes, merge, open_merged
from medcot.export.nf4 import save_nf4
from medcot.export.places import scratch_beside
from medcot.export.turns import build_jinja, build_turns
from medcot.prompt import Style

ADAPTER, MODEL = "adapter_config.json", "config.json"
NESTED = "adapter"  # where an adapter goes beside merged weights
CARD = "README.md"
METHODS = ("merged_16bit", "merged_4bit", "lora")
_SAFE = "is not needed: weights are saved as safetensors"
_WHOLE = "is not needed: the adapter that is being trained is saved"
IDLE_SAVING = {
    "safe_serialization": _SAFE,
    "is_main_process": "is not needed: one process saves",
    "selected_adapters": _WHOLE,
    "save_embedding_layers": _WHOLE,
    "max_shard_size": "is not needed: shards have 2 GB",
    "maximum_memory_usage": "is not needed: weights pass through memory a few megabytes at a time",
    "temporary_location": "is not needed: nothing is put aside",
    "tags": "is not needed: the card has medcot's",
    "first_conversion": "is not needed: medcot chooses it",
    "variant": _SAFE,
}


def is_tuned(model: Any) -> bool:
    """Whether a model has an adapter."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def save_adapter(model: Any, folder: Path, tokenizer: Any = None, **others: Any) -> None:
    """Save the adapter and its tokenizer to a folder, or to ``adapter/`` in it where it holds a model.

    Args:
        model: with an adapter.
        folder: other files in it stay.
        tokenizer: the model's own if ``None``.
        **others: accepted where they have no meaning here, and said once.

    Raises:
        OutputError: the folder cannot be written.
    """
    repo_id, is_pushed = others.pop("repo_id", None), others.pop("push_to_hub", False)
    push = {name: others.pop(name) for name in ("token", "private") if name in others}
    pass_over(others, IDLE_SAVING, "model.save_pretrained", ("tokenizer", "push_to_hub", "token", "private"))
    folder = folder.expanduser().resolve()
    place = folder
    if (folder / MODEL).is_file():
        place = folder / NESTED
        say_once(f"the adapter is saved to {place}: beside merged weights it would be applied a second time")
    with scratch_beside(folder, estimate_adapter_bytes(model)) as work:
        _move_in(write_adapter(model, tokenizer, work), place, last=ADAPTER)
    if is_pushed:
        model.push_to_hub(repo_id or folder.name, **push)


def save_merged(
    model: Any, folder: Path, tokenizer: Any = None, save_method: str = "merged_16bit", **others: Any
) -> None:
    """Save the base's weights with the adapter merged in.

    Args:
        model: with an adapter.
        folder: other files in it stay; an adapter in it moves to ``adapter/``.
        tokenizer: the model's own if ``None``.
        save_method: ``merged_16bit``, ``merged_4bit`` (NF4) or ``lora`` (the adapter alone).
        **others: accepted where they have no meaning here, and said once.

    Raises:
        MedcotError: no adapter, no room, or weights that cannot be merged.
    """
    repo_id, is_pushed = others.pop("repo_id", None), others.pop("push_to_hub", False)
    push = {name: others.pop(name) for name in ("token", "private") if name in others}
    known = ("tokenizer", "save_method", "push_to_hub", "token", "private")
    pass_over(others, IDLE_SAVING, "model.save_pretrained_merged", known)
    method = check_method(save_method)
    folder = folder.expanduser().resolve()
    if method == "lora":
        save_adapter(model, folder, tokenizer)
    else:
        num_bytes = estimate_merged_bytes(session_of(model, "save_pretrained_merged").loaded.num_params)
        with scratch_beside(folder, num_bytes) as work:
            merged = write_merged(model, tokenizer, method, work)
            _step_aside(folder)
            for stale in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
                stale.unlink()
            _move_in(merged, folder, last=MODEL)
    if is_pushed:
        model.push_to_hub_merged(repo_id or folder.name, tokenizer, save_method=method, **push)


def check_method(save_method: str) -> str:
    """Return the name of a way to save.

    Raises:
        ArgumentError: there is none of that name.
    """
    method = save_method.removesuffix("_forced")
    if method not in METHODS:
        raise ArgumentError(f"save_method={save_method!r}", "It is one of those known", did_you_mean(method, METHODS))
    return method


def write_adapter(model: Any, tokenizer: Any, work: Path) -> Path:
    """Write the adapter into a new folder of ``work``, and return it."""
    session = tuned_session(model)
    return save_adapter_files(
        model, tokenizer or session.loaded.tokenizer, work / NESTED, init=session.recipe.lora.init
    )


def write_merged(model: Any, tokenizer: Any, method: str, work: Path) -> Path:
    """Write adapter and merged weights into new folders of ``work``; return that of the merged weights."""
    session = tuned_session(model)
    adapter = write_adapter(model, tokenizer, work)
    loaded = dataclasses.replace(session.loaded, tokenizer=tokenizer or session.loaded.tokenizer)
    base = Base.of(loaded, trust_remote_code=session.recipe.model.trust_remote_code)
    device = str(loaded.device)
    if method == "merged_4bit":
        merged = save_nf4(base, adapter, work / "merged", device=device)
    else:
        merged = merge(base, adapter, work / "merged", dtype=base.dtype, device=device)
    say_once(merged.base)
    (merged.folder / CARD).write_text(_card(loaded.name, merged.base), encoding="utf-8")
    return merged.folder


def tuned_session(model: Any) -> Session:
    """Return the session of a model with an adapter.

    Raises:
        ArgumentError: it has none.
    """
    session = session_of(model, "saving")
    if not is_tuned(model):
        raise ArgumentError(
            "the model has no adapter",
            "What is saved and merged is what get_peft_model added and training changed",
            "Call FastLanguageModel.get_peft_model first, or copy the base model as it is",
        )
    return session


def _step_aside(folder: Path) -> None:
    """Move an adapter that stands where merged weights will stand."""
    if not (folder / ADAPTER).is_file():
        return
    nested = folder / NESTED
    nested.mkdir(exist_ok=True)
    for name in (*ADAPTER_FILES, CARD):
        if (folder / name).is_file():
            os.replace(folder / name, nested / name)
    say_once(f"the adapter moved to {nested}: beside merged weights it would be applied a second time")


def _move_in(source: Path, folder: Path, *, last: str) -> None:
    """Move the files of a folder into another one, ``last`` when the others are there."""
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name == last, name))
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"'{folder}' is a file", "Weights are saved to a folder", "Choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / last).unlink(missing_ok=True)  # a loader shall not take a mixture of old and new for a whole
    for name in names:
        os.replace(source / name, folder / name)


def _card(base: str, described: str) -> str:
    is_local = Path(base).is_absolute()  # the Hub rejects a card whose base_model is a path
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [medcot]"]
    front += [] if is_local else [f"base_model: {base}"]
    return (
        "---\n" + "\n".join(front) + "\n---\n# Merged model\n\n"
        f"Made with medcot: {described}. For research and education; not for diagnosis or treatment.\n"
    )


# GGUF -----------------------------------------------------------------------------------------------------------------

# Unsloth's words for kinds of files.
GGUF_WORDS = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m", None: "q8_0"}


def save_gguf(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] | None = "q8_0",
    **others: Any,
) -> None:
    """Save merged weights as GGUF files, one for each kind, with the prompt style as their chat template.

    Args:
        model: with an adapter.
        folder: other files in it stay.
        tokenizer: the model's own if ``None``.
        quantization_method: a kind that ``medcot export`` knows, or several.
        **others: accepted where they have no meaning here, and said once.

    Raises:
        MedcotError: an unknown kind, one that needs llama.cpp where it is absent, or weights that cannot be merged.
    """
    pass_over(others, IDLE_SAVING, "model.save_pretrained_gguf", ("tokenizer", "quantization_method"))
    words = (
        [quantization_method]
        if quantization_method is None or isinstance(quantization_method, str)
        else quantization_method
    )
    quants = [check_quant(GGUF_WORDS.get(word, str(word).lower())) for word in words]
    session = tuned_session(model)
    folder = folder.expanduser().resolve()
    for quant in quants:
        with scratch_beside(folder, estimate_gguf_bytes(session.loaded.num_params, quant)) as work:
            made = _write_gguf(session, write_adapter(model, tokenizer, work), tokenizer, quant, work)
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(made, folder / f"{folder.name}-{quant}.gguf".replace(" ", "-"))


def _write_gguf(session: Session, adapter: Path, tokenizer: Any, quant: str, work: Path) -> Path:
    loaded = dataclasses.replace(session.loaded, tokenizer=tokenizer or session.loaded.tokenizer)
    base = Base.of(loaded, trust_remote_code=session.recipe.model.trust_remote_code)
    turns = build_turns(Style(session.recipe.prompt.style), loaded.tokenizer)
    tensors = open_merged(base, adapter, device=str(loaded.device))
    first, made = work / "first.gguf", work / "made.gguf"
    if quant in MADE_BY_LLAMA_CPP:
        llama_cpp.check_can_quantise(quant)
    write_gguf(
        tensors,
        loaded.tokenizer,
        first,
        quant="f16" if quant in MADE_BY_LLAMA_CPP else quant,
        name=f"{loaded.source}, tuned with medcot",
        add_bos=turns.added,
        chat_template=build_jinja(turns),
    )
    say_once(tensors.base)
    if quant not in MADE_BY_LLAMA_CPP:
        return first
    llama_cpp.quantise(first, made, quant)
    return made
