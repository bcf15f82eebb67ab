"""What a push sends: named files of one kind of artefact, weighed and hashed, and nothing else.

The usual push sends a folder. A folder holds more than its owner remembers: an optimizer's state, a ``.env``, notes.
Here a file goes because its name is one that a loader of that kind of artefact reads; all others stay at home and are
listed. Pickled weights are among those: who loads them runs them. What goes as text is also searched for tokens and
private keys, since a configuration or a template can hold a line that was never meant to be there.

A file has two names on the Hub: git's blob id, which the Hub reports of small files, and the sha256 of its bytes, which
it reports of large ones (Git LFS). Which it will be is the Hub's decision, so both are computed, in one reading.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from medcot.errors import OutputError
from medcot.secrets import redact

CARD = "README.md"
_CHUNK_BYTES = 2**20
_MOST_SEARCHED = 50 * 2**20  # bytes; a tokenizer.json of 150,000 tokens has 11 MB


class Kind(StrEnum):
    """What a repository holds; one of them."""

    ADAPTER = "adapter"
    MODEL = "merged model"
    GGUF = "GGUF files"


# What a loader of each kind reads. The first name of each says that the kind is there.
_FILES = {
    Kind.ADAPTER: ("adapter_config.json", "adapter_model.safetensors"),
    Kind.MODEL: ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    Kind.GGUF: ("*.gguf", "Modelfile*"),
}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
_PAPERS = (CARD, "LICENSE*", "NOTICE*", "USE_POLICY.md")
# An adapter may lie in a folder of this name beside merged weights, where no loader finds it unasked.
_NESTED = "adapter/"
_TOKENS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "an API key": r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{32,}",
}


@dataclass(frozen=True, slots=True)
class Parcel:
    """One file of a push.

    Attributes:
        name: its path in the repository.
        source: where its bytes are; bytes themselves where they were made for this push.
        num_bytes: how many.
        sha256: of the bytes, in hex.
        blob_id: git's name for the bytes, in hex.
    """

    name: str
    source: Path | bytes
    num_bytes: int
    sha256: str
    blob_id: str


def pack(name: str, source: Path | bytes) -> Parcel:
    """Weigh and hash a file, or bytes, that shall become ``name`` in a repository.

    Raises:
        OutputError: it cannot be read.
    """
    if isinstance(source, bytes):
        return _hash(name, source, io.BytesIO(source), len(source))
    try:
        with source.open("rb") as file:
            return _hash(name, source, file, source.stat().st_size)
    except OSError as error:
        raise OutputError(
            f"'{source}' cannot be read: {error.strerror}",
            "Every file of an artefact goes to the Hub, or none",
            "Mend its permissions, or export the run again",
        ) from None


def _hash(name: str, source: Path | bytes, file: BinaryIO, num_bytes: int) -> Parcel:
    sha256 = hashlib.sha256()
    # Git's own name for content; no security rests on it.
    blob = hashlib.sha1(f"blob {num_bytes}\0".encode(), usedforsecurity=False)
    while chunk := file.read(_CHUNK_BYTES):
        sha256.update(chunk)
        blob.update(chunk)
    return Parcel(name, source, num_bytes, sha256.hexdigest(), blob.hexdigest())


def find_kinds(names: Iterable[str]) -> set[Kind]:
    """Return what file names make of a folder or repository; more than one where kinds are mixed in it."""
    outer = [name for name in names if "/" not in name]
    return {kind for kind, patterns in _FILES.items() if any(fnmatchcase(name, patterns[0]) for name in outer)}


def is_weights(name: str, kind: Kind) -> bool:
    """Whether a file of a repository belongs to an artefact of that kind rather than to its papers or tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in _FILES[kind])


def is_wanted(name: str, kind: Kind) -> bool:
    """Whether a file of that name goes along with an artefact of that kind."""
    if kind is Kind.MODEL and name.startswith(_NESTED):
        return is_wanted(name.removeprefix(_NESTED), Kind.ADAPTER)
    patterns = (*_FILES[kind], *TOKENIZER_FILES, *_PAPERS)
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def pack_folder(folder: Path) -> tuple[Kind, list[Parcel], list[str]]:
    """Return what a folder holds, the files of it that go, and the names of those that stay.

    Raises:
        OutputError: the folder holds no artefact, or two, or a file that cannot be read.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kinds = find_kinds(paths)
    if len(kinds) != 1:
        raise OutputError(
            f"'{folder}' holds neither an adapter nor a model alone",
            "A push takes one folder with an adapter (adapter_config.json), a merged model (config.json) or GGUF files",
            "Push the run's adapter/ or merged/ folder",
        )
    kind = kinds.pop()
    parcels = [pack(name, path) for name, path in paths.items() if is_wanted(name, kind)]
    return kind, parcels, [name for name in paths if not is_wanted(name, kind)]


def check_no_secrets(parcels: Sequence[Parcel]) -> None:
    """Refuse a push that would publish a token or a key.

    Raises:
        OutputError: a text file holds one; the message says which file and what kind, never the value.
    """
    for parcel in parcels:
        if parcel.num_bytes > _MOST_SEARCHED or parcel.name.endswith((".safetensors", ".gguf")):
            continue
        content = parcel.source if isinstance(parcel.source, bytes) else parcel.source.read_bytes()
        text = content.decode("utf-8", errors="replace")
        # Every known value of this machine counts, and whatever looks like a token of somebody's.
        found = ["a secret of this machine"] if redact(text) != text else []
        found += [what for what, pattern in _TOKENS.items() if re.search(pattern, text)]
        if found:
            raise OutputError(
                f"'{parcel.name}' holds {found[0]}",
                "A push publishes what it sends, and a repository keeps its history",
                "Take it out of the file, and revoke it if the file was ever shared",
            )
