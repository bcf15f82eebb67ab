"""The kinds of artefacts: how they are named, where they stand, what a folder is one of, and what room one takes."""

from __future__ import annotations

import json
from pathlib import Path

from medcot.errors import ModelError, UnequalError, one_of

KINDS = ("adapter", "merged-16bit", "merged-32bit", "merged-4bit", "gguf", "ollama")
# Kinds of GGUF that its own package writes, and those that llama.cpp makes of a file in F16 or F32, with bits a weight.
WRITTEN_HERE = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0")
MADE_BY_LLAMA_CPP = {
    "q6_k": 6.6,
    "q5_k_m": 5.7,
    "q5_k_s": 5.6,
    "q4_k_m": 4.9,
    "q4_k_s": 4.6,
    "q3_k_m": 4.0,
    "q2_k": 3.4,
}
QUANTS = (*WRITTEN_HERE, *MADE_BY_LLAMA_CPP)
DEFAULT = "q8_0"  # half of 16 bit, nearly its equal, and written with no llama.cpp at hand
_WITH_QUANT = ("gguf", "ollama")
_FOLDERS = {"adapter": "adapter", "merged-16bit": "merged"}  # where `medcot run` itself puts them


def parse_kinds(text: str) -> list[str]:
    """Return kinds from ``adapter,merged-16bit,gguf:q8_0,q4_k_m``, each once; a bare GGUF kind is q8_0.

    Raises:
        ModelError: an unknown kind.
    """
    kinds: list[str] = []
    family = ""
    for part in (part.strip().lower() for part in text.split(",") if part.strip()):
        head, colon, quant = part.partition(":")
        if not colon and part in QUANTS and family in _WITH_QUANT:
            head, quant = family, part
        family = head
        if head not in KINDS or (colon and head not in _WITH_QUANT):
            raise ModelError(f"export kind '{part}'", *one_of(head, KINDS))
        quant = check_quant(quant or DEFAULT) if head in _WITH_QUANT else ""
        # Ollama's folder holds one model; only one with another quantisation than the usual needs it in its name.
        kinds.append(f"{head}:{quant}" if head == "gguf" or quant not in ("", DEFAULT) else head)
    if not kinds:
        raise ModelError("no kind to export", f"Kinds are {', '.join(KINDS)}", "Add --to merged-16bit,gguf")
    return list(dict.fromkeys(kinds))


def check_quant(quant: str) -> str:
    """Return the quantisation.

    Raises:
        ModelError: an unknown one.
    """
    if quant not in QUANTS:
        raise ModelError(f"gguf:{quant}", *one_of(quant, QUANTS))
    return quant


def quant_of(kind: str) -> str:
    """Return the quantisation of a GGUF or Ollama kind."""
    return kind.partition(":")[2] or DEFAULT


def folder_of(kind: str, place: Path) -> Path:
    """Return where an artefact stands below the folder of all."""
    return place / _FOLDERS.get(kind, kind.replace(":", "-"))


def estimate_bytes(kind: str, num_params: int, adapter_bytes: int) -> int:
    """Return the room that making an artefact takes on the disk."""
    import torch

    from medcot.export.gguf import estimate_gguf_bytes
    from medcot.export.merged import estimate_merged_bytes

    if kind == "adapter":
        return adapter_bytes
    if kind.startswith("merged"):  # for 4 bit this is generous
        return estimate_merged_bytes(num_params, torch.float32 if kind == "merged-32bit" else torch.bfloat16)
    return estimate_gguf_bytes(num_params, quant_of(kind))


def detect_kind(path: Path) -> str:
    """Return what kind of artefact a folder or a GGUF file is.

    Raises:
        ModelError: none.
        UnequalError: an adapter beside merged weights.
    """
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    ggufs = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if {"adapter_config.json", "config.json"} <= names:
        raise UnequalError(
            f"'{path}' is not the tuned model: it holds an adapter beside merged weights",
            "transformers applies an adapter that it finds beside weights, here a second time",
            "Move adapter_config.json and adapter_model.safetensors to a folder of their own",
        )
    if "adapter_config.json" in names:
        return "adapter"
    if "config.json" in names:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            return "merged-4bit"
        return "merged-32bit" if (config.get("dtype") or config.get("torch_dtype")) == "float32" else "merged-16bit"
    if len(ggufs) == 1:
        quant = read_quant(ggufs[0])
        if "Modelfile" in names:
            return "ollama" if quant == DEFAULT else f"ollama:{quant}"
        return f"gguf:{quant}"
    raise ModelError(
        f"'{path}' is no artefact{' of one kind' if ggufs else ''}",
        "An artefact is the folder of an adapter, of a merged model, of one GGUF file, or the file",
        "Name what 'medcot export' wrote, or a copy of it",
    )


def read_quant(path: Path) -> str:
    """Return how a GGUF file says that it is quantised.

    Raises:
        UnequalError: it cannot be read, or is in a kind that is not exported here.
    """
    from gguf import GGUFReader, LlamaFileType

    try:
        marked = GGUFReader(path).fields["general.file_type"].contents()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UnequalError(
            f"'{path}' does not open: {type(error).__name__}: {error}",
            "It should be a GGUF file that says how it is quantised",
            "Export it again, or copy it whole",
        ) from None
    quant = LlamaFileType(marked).name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    if quant not in QUANTS:
        raise UnequalError(
            f"'{path}' is in {quant}", f"GGUF kinds are {', '.join(QUANTS)}", "Name an export of the run"
        )
    return quant
