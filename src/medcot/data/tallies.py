"""What checks have tallied, kept on disk: so that a scan's memory does not grow, and no chunk is looked at twice.

Every tally is a file of its own, named by a hash of all that it depends on: the content of the chunk and its place in
the source, how rows become examples, the check with its settings, and the code of ``medcot.data`` itself. So a byte
changed in the data makes the chunks anew that it touches, a changed setting that check alone, an upgrade everything;
nothing has to be declared stale. A file is written under another name and moved into place, so that a killed scan
leaves whole tallies or none.

A cache is only ever a guess at what would be computed, so what is read is not trusted: a file whose name, checksum or
content is not what it should be is left out, counted and said, and the tally is made anew. The content is a pickle,
since tallies hold arrays and records; but one that may name nothing except plain containers, numpy's arrays and records
of medcot (and of the package that brought the check), so that a file put there by somebody else cannot run a program.

The folder does not grow without end: after each scan, what has not been used for ``MOST_AGE_S`` goes, then the longest
unused until ``MOST_BYTES`` hold the rest; what was used in the last hour stays, since another scan may need it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import io
import json
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from medcot.errors import OutputError

MOST_BYTES = 4 * 2**30
MOST_AGE_S = 30 * 86_400
_SAFE_AGE_S = 3_600

_MAGIC = b"medcot tally 1\n"
_DIGEST_BYTES = 32
_SUFFIX = ".tally"
_PLAIN = {
    "builtins": {"set", "frozenset", "bytearray", "complex", "range", "slice"},
    "collections": {"Counter", "OrderedDict", "deque"},
    "array": {"array", "_array_reconstructor"},
    "numpy": {"ndarray", "dtype"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},  # how a pickle writes bytes for an old protocol; numpy's arrays use it
}


class UntrustedTallyError(Exception):
    """A file of the cache that is not what it should be; never leaves the scan, which counts it."""


@dataclass(frozen=True, slots=True)
class TallyStore:
    """A folder of tallies."""

    folder: Path

    def make_key(self, *parts: object) -> str:
        """Return the name of the tally that depends on these parts (plain JSON) and on the code."""
        text = json.dumps([_hash_code(), *parts], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def holds(self, key: str) -> bool:
        """Whether a whole tally of this name is there; it counts as used now.

        Raises:
            UntrustedTallyError: a file is there, but is not what it should be.
        """
        try:
            self._read(key)
            os.utime(self._path(key))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UntrustedTallyError(str(error)) from error
        return True

    def save(self, key: str, content: bytes) -> None:
        """Write a pickled tally; it appears whole or not at all.

        Raises:
            OutputError: the folder cannot be written or the disk is full.
        """
        path = self._path(key)
        draft = path.with_name(f".{key}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a tally may quote what it saw
            path.parent.mkdir(exist_ok=True)
            try:
                draft.write_bytes(_MAGIC + _checksum(key, content) + content)
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"'{path.parent}' cannot be written ({error.strerror})",
                "What the checks find in each part of the data is kept there until all is read",
                "Free disk space, or set XDG_CACHE_HOME to a folder on another disk",
            ) from error

    def load(self, key: str, package: str) -> Any:
        """Return a tally; ``package`` is where its check comes from, whose classes it may hold besides medcot's.

        Raises:
            UntrustedTallyError: there is none, or it is not what it should be.
        """
        try:
            return _Unpickler(io.BytesIO(self._read(key)), package).load()
        except UntrustedTallyError:
            raise
        except Exception as error:  # a pickle that is not one raises anything; all of it means the same
            raise UntrustedTallyError(f"{type(error).__name__}: {error}") from error

    def prune(self, *, most_bytes: int = MOST_BYTES, most_age_s: float = MOST_AGE_S) -> int:
        """Remove what the essay says, and return how many files that was."""
        now = time.time()
        found = sorted(self._list_files(), key=lambda entry: entry[0])
        excess = sum(size for _, size, _ in found) - most_bytes
        num_removed = 0
        for used, size, path in found:
            if now - used < _SAFE_AGE_S or (excess <= 0 and now - used < most_age_s):
                break  # the rest was used later still
            path.unlink(missing_ok=True)
            excess -= size
            num_removed += 1
        return num_removed

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _read(self, key: str) -> bytes:
        """Return the pickle in a file whose header and checksum are right."""
        data = self._path(key).read_bytes()
        start = len(_MAGIC) + _DIGEST_BYTES
        if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : start] != _checksum(key, data[start:]):
            raise UntrustedTallyError("its checksum is wrong")
        return data[start:]

    def _list_files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield time of last use, size and path of every file of ours, drafts of killed processes among them."""
        for path in self.folder.glob("??/*"):
            if path.suffix not in (_SUFFIX, ".tmp"):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process prunes at the same time
                continue
            yield stat.st_mtime, stat.st_size, path


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, package: str) -> None:
        super().__init__(file)
        self._packages = {"medcot", package.partition(".")[0]}

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name:  # a dotted name would reach through a module: medcot.x's os.system
            if name in _PLAIN.get(module.replace("numpy.core.", "numpy._core."), ()):  # as numpy 1 called it
                return super().find_class(module, name)
            if module.partition(".")[0] in self._packages:
                found = super().find_class(module, name)
                if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, tuple | Enum)):
                    return found
        raise UntrustedTallyError(f"it names {module}.{name}, which no tally holds")


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


@functools.cache
def _hash_code() -> str:
    """Return a hash of the code that tallies depend on, so that a development version needs no number of its own."""
    digest = hashlib.sha256(_MAGIC)
    package = importlib.resources.files("medcot")
    for file in (*_list_code(package / "data"), *_list_code(package / "prompt"), package / "records.py"):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _list_code(folder: Traversable) -> Iterator[Traversable]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _list_code(entry)
        elif entry.name.endswith(".py"):
            yield entry
