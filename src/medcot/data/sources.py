"""Where training rows come from: a local file, a folder, or a data set on the Hugging Face Hub.

A source is one string: a path, or a Hub id ``owner/name``; ``[:500]`` behind either takes the first 500 rows. A path
that exists always wins; something that looks like a path but does not exist is never looked up on the Hub, because a
misspelt file name should end in "did you mean", not in a network error.

Local files are read by ``files.py``, Hub data sets by ``hub_rows.py``. Either is a stream, so that data larger than
memory can be looked at row by row; ``load_rows`` collects it into a ``Table``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medcot.data.files import Part, Places, RawRow, RowStream, find_kind, stream_files, suggest_path
from medcot.data.hub_rows import HubRows
from medcot.errors import DataError, did_you_mean

DEFAULT_CONFIGS = {"FreedomIntelligence/medical-o1-reasoning-SFT": "en"}  # of en, zh, en_mix, zh_mix

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_HUB_URL = re.compile(r"(?:hf://datasets/|https?://(?:huggingface\.co|hf\.co)/datasets/)([\w.-]+/[\w.-]+)")
_SLICE = re.compile(r"(.*)\[([^\[\]]*:[^\[\]]*)\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Table:
    """Raw rows and where they came from; a row's number is its position in ``rows``, counted from 1."""

    rows: list[RawRow]
    columns: list[str]  # every key that any row has, in order of first appearance
    source: str  # the path or Hub id, without a slice
    sha256: str  # a file's bytes, or a Hub data set's rows as taken, in canonical JSON
    revision: str | None = None  # the Hub commit, where known
    parts: tuple[Part, ...] = ()  # the files behind a folder, in order; one for a file, none for a Hub data set
    notes: tuple[str, ...] = ()  # what the reader should know of how it was read


def parse_slice(source: str) -> tuple[str, int | None]:
    """Split ``"data.jsonl[:500]"`` into ``("data.jsonl", 500)``; without a slice the number is ``None``.

    Raises:
        DataError: for any slice but ``[:N]`` with N of at least 1.
    """
    match = _SLICE.fullmatch(source.strip())
    if match is None:
        return source.strip(), None
    name, inside = match[1].strip(), match[2].strip()
    count = inside.removeprefix(":").strip()
    if not name or not inside.startswith(":") or not count.isascii() or not count.isdigit() or int(count) == 0:
        raise DataError(
            f"'{source}' ends in the slice [{inside}]",
            "Only the first N rows can be taken, N at least 1",
            f"Write {name or 'SOURCE'}[:500] for the first 500",
        )
    return name, int(count)


class SourceStream:
    """The rows of a source, each with the name of the file (or the Hub id) that it came from.

    An iteration is one pass; ``num_rows``, ``places`` and ``fetch`` follow it, ``sha256``, ``parts`` and ``notes`` are
    known when it has ended.

    Attributes:
        rows: the stream behind it.
        source: the path or Hub id, without a slice.
        limit: the most rows it gives; ``None`` for all.
        own_notes: those of ``notes`` that are not of ``rows``.
        revision: the Hub commit, where known.
    """

    def __init__(self, rows: RowStream | HubRows, source: str, limit: int | None, notes: tuple[str, ...]) -> None:
        self.rows, self.limit, self.own_notes = rows, limit, notes
        self.source = source
        self.revision = rows.revision if isinstance(rows, HubRows) else None

    def __iter__(self) -> Iterator[tuple[RawRow, str]]:
        """Yield each row with where it came from.

        Raises:
            DataError: where anything in the way cannot be read exactly.
        """
        return iter(self.rows)

    def fetch(self, numbers: Sequence[int]) -> dict[int, RawRow]:
        """Return rows by number, counted from 1."""
        return self.rows.fetch(numbers)

    @property
    def num_rows(self) -> int:
        """Rows given so far."""
        return self.rows.num_rows

    @property
    def places(self) -> Places:
        """Which file each of them lies in."""
        return self.rows.places

    @property
    def sha256(self) -> str:
        """That of a file's bytes, or of a Hub data set's rows as taken, in canonical JSON."""
        return self.rows.sha256

    @property
    def parts(self) -> tuple[Part, ...]:
        """The files behind a folder, in order; one for a file, none for a Hub data set."""
        return self.rows.parts

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know of how it was read."""
        short = self.limit is not None and self.num_rows < self.limit
        asked = (f"{self.limit:,} rows were asked for, {self.source} has {self.num_rows:,}",) if short else ()
        return self.rows.notes + self.own_notes + asked


def stream_rows(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    token: str | None = None,
) -> SourceStream:
    """Open a file, a folder or a Hub data set as a stream of rows.

    Args:
        source: a path or a Hub id, with or without ``[:N]``; what lies behind the first N rows is hashed, not parsed.
        config: the Hub configuration; ``None`` takes the data set's default (``en`` for medical-o1-reasoning-SFT).
        split: the Hub split, in ``datasets``' syntax.
        revision: the Hub branch, tag or commit.
        token: a Hub token; ``None`` leaves it to the library's own log-in.

    Raises:
        DataError: the source does not exist or cannot be read exactly.
        NetworkError: the Hub does not answer.
        OutputError: the disk of the Hub's cache is full.
    """
    name, limit = parse_slice(source)
    path = Path(name).expanduser()
    if name and os.path.exists(path):  # Path.exists raises on a name too long for the file system; this one says no
        return SourceStream(stream_files(path, limit), name, limit, _unused_on_disk(name, config, split, revision))
    _check_hub_id(name, path)
    rows = HubRows(name, config or DEFAULT_CONFIGS.get(name), split, revision, limit, token)
    return SourceStream(rows, name, limit, ())


def load_rows(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    token: str | None = None,
) -> Table:
    """Read all rows of a file, a folder or a Hub data set; arguments and errors are those of ``stream_rows``."""
    stream = stream_rows(source, config=config, split=split, revision=revision, token=token)
    rows = [row for row, _ in stream]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(rows, columns, stream.source, stream.sha256, stream.revision, stream.parts, stream.notes)


def _unused_on_disk(name: str, config: str | None, split: str, revision: str | None) -> tuple[str, ...]:
    """Say which Hub settings a local file leaves unused; a recipe's outlive ``data=my.jsonl`` on the command line."""
    given = {"config": config, "split": None if split == "train" else split, "revision": revision}
    unused = [f"{key}={value}" for key, value in given.items() if value is not None]
    return (f"{name} is local, so {', '.join(unused)} was not used",) if unused else ()


def _check_hub_id(name: str, path: Path) -> None:
    """Refuse what cannot be a Hub id, as the missing file, URL or word that it is."""
    if not name:
        raise DataError("The data source is empty", "It is a path or a Hub id", "Set data.source=my.jsonl")
    if name.startswith("builtin:"):
        raise DataError(f"'{name}' is not built in", "Only builtin:clinic is", did_you_mean(name, ["builtin:clinic"]))
    if "://" in name:
        url = _HUB_URL.match(name)
        remedy = f"Write {url[1]}" if url else "Download the file and pass its path"
        raise DataError(f"'{name}' is a URL", "A source is a path or a Hub id of the form owner/name", remedy)
    if find_kind(path) is not None or path.is_absolute() or name[0] in ".~" or name.count("/") > 1 or "\\" in name:
        raise DataError(
            f"'{name}' does not exist",
            f"A source is a path, here seen from {Path.cwd()}, or a Hub id",
            suggest_path(path) or "Check the path",
        )
    if not _HUB_ID.fullmatch(name):
        raise DataError(
            f"'{name}' is neither a file or folder here nor a Hub id",
            "A Hub id has the form owner/name, such as FreedomIntelligence/medical-o1-reasoning-SFT",
            suggest_path(path) or "Write the owner in front, or the path of a file",
        )
