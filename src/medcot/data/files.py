"""Local data as a stream of rows: one file of a known format, or a folder of one kind, read in name order.

The rows go by one at a time, so memory does not grow with the data; ``read_files`` collects the same stream into a list
for those who need all of it. Nothing is skipped in silence: what was left out on purpose (blank lines, a README beside
the data) is said in ``notes``; anything else that cannot be read is an error that names its line (``formats.py`` says
how and why).

The checksum of a file is that of its bytes, so ``sha256sum FILE`` shows the same; that of a folder is the checksum of
the text ``sha256sum`` would print for its files in name order (``LC_ALL=C sha256sum *.jsonl | sha256sum``). It is known
once the stream has ended, since the bytes are hashed on their way.
"""

from __future__ import annotations

import bisect
import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medcot.data.formats import JsonRows, Kind, RawRow, RowFile
from medcot.data.tables import ParquetRows, TableRows
from medcot.errors import DataError

__all__ = [
    "FileRows",
    "Kind",
    "Part",
    "Places",
    "RawRow",
    "RowStream",
    "find_kind",
    "read_files",
    "stream_files",
    "suggest_path",
]

_KINDS = {
    ".json": Kind.JSON,
    ".jsonl": Kind.JSONL,
    ".ndjson": Kind.JSONL,
    ".csv": Kind.CSV,
    ".tsv": Kind.TSV,
    ".parquet": Kind.PARQUET,
}
_READABLE = ".json, .jsonl, .ndjson, .csv, .tsv (each also with .gz) and .parquet"


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a source, and how many rows it gave."""

    name: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Places:
    """Which file each row of a source lies in; small and picklable, so that it can travel with some rows.

    Attributes:
        names: the files up to now, in order; the last one is open-ended.
        before: rows of the source that come before each.
        several: whether the source has more than one file.
    """

    names: tuple[str, ...]
    before: tuple[int, ...] = (0,)
    several: bool = False

    def find(self, number: int) -> tuple[str, int]:
        """Return the file that a row, counted from 1, came from and its number there."""
        file = bisect.bisect_left(self.before, number) - 1
        return self.names[file], number - self.before[file]


@dataclass(frozen=True, slots=True)
class FileRows:
    """What a file or a folder holds."""

    rows: list[RawRow]
    sha256: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...]  # what was left out or read otherwise than its name says, in sentences


def find_kind(path: Path) -> Kind | None:
    """Return the format that a file name stands for, or ``None`` where it stands for none we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = suffixes[-2] if zipped and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    kind = _KINDS.get(suffix)
    return None if zipped and kind is Kind.PARQUET else kind


def suggest_path(path: Path) -> str:
    """Return "Did you mean …?" for the nearest name beside a missing path, else the data files there, else nothing."""
    folder = path.parent
    if not folder.is_dir():
        return ""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    known = {name.partition(".")[0]: name for name in names} | {name: name for name in names}  # with and without ending
    near = difflib.get_close_matches(path.name, known, n=1, cutoff=0.5)
    if near:
        return f"Did you mean '{folder / known[near[0]]}'?"
    readable = [name for name in names if find_kind(Path(name)) is not None]
    return f"Data files in {folder.resolve()}: {', '.join(readable[:8])}" if readable else ""


class RowStream:
    """The rows of a file or folder, each with the name of its file; made by ``stream_files``.

    An iteration is one pass. ``num_rows``, ``places`` and ``fetch`` follow it as it goes; ``sha256``, ``parts`` and
    ``notes`` are known when it has ended, of its own or at the limit.

    Attributes:
        files: what it reads, in order.
        own_notes: those of ``notes`` that are no file's.
        folder: whether they are a folder's, be it of one file.
        limit: the most rows it gives; ``None`` for all.
        ended: whether the last pass came to its end.
        num_rows: rows given so far.
        places: where they lie.
    """

    def __init__(self, files: Sequence[RowFile], notes: Sequence[str], *, folder: bool, limit: int | None) -> None:
        self.files, self.own_notes, self.folder, self.limit = files, tuple(notes), folder, limit
        self.ended = self._under_way = False
        self.num_rows = 0
        self.places = Places(())

    def __iter__(self) -> Iterator[tuple[RawRow, str]]:
        """Yield each row with its file's name.

        Raises:
            DataError: where anything in the way cannot be read exactly; the message names the file and the line.
        """
        self.ended, self._under_way = False, True
        self.num_rows, self.places = 0, Places((), (), len(self.files) > 1)
        for file in self.files:
            if self.num_rows == self.limit:
                file.finish()
                continue
            name = file.path.name
            self.places = Places((*self.places.names, name), (*self.places.before, self.num_rows), self.places.several)
            for row in file:
                self.num_rows += 1
                yield row, name
                if self.num_rows == self.limit:
                    file.finish()
                    break
        self.ended, self._under_way = True, False

    def fetch(self, numbers: Sequence[int]) -> dict[int, RawRow]:
        """Return rows by number, counted from 1 over all files.

        Before the first pass this makes one of its own, up to the last row asked for; amid one, only rows that have
        passed can be had.

        Raises:
            DataError: there is no such row, or its file was changed since.
        """
        if numbers and max(numbers) > self.num_rows:
            assert not self._under_way, f"row {max(numbers)} is yet to come"
            for _ in self:
                if self.num_rows == max(numbers):
                    self._under_way = False
                    break
            else:
                raise DataError(
                    f"Row {max(numbers):,} was asked for, and there are {self.num_rows:,}",
                    "Rows are numbered from 1",
                    "Start again if the data was changed meanwhile",
                )
        found: dict[int, RawRow] = {}
        for file, before in zip(self.files, self.places.before, strict=False):
            here = [number - before for number in numbers if before < number <= before + file.num_rows]
            found |= {before + number: row for number, row in file.fetch(here).items()}
        return found

    @property
    def sha256(self) -> str:
        """The checksum of all bytes, whatever the limit."""
        assert self.ended, "known when the stream has ended"
        return _join_digests(self.files) if self.folder else self.files[0].sha256

    @property
    def parts(self) -> tuple[Part, ...]:
        """The files read and how many rows each gave."""
        assert self.ended, "known when the stream has ended"
        read = self.files[: len(self.places.names)]
        return tuple(Part(file.path.name, file.num_rows) for file in read)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out or read otherwise than the names say, in sentences."""
        assert self.ended, "known when the stream has ended"
        return tuple(note for file in self.files for note in file.notes) + self.own_notes


def stream_files(path: Path, limit: int | None = None) -> RowStream:
    """Open one file, or all files of a folder in name order, as a stream of at most ``limit`` rows.

    Raises:
        DataError: there is nothing that can be read; later, what cannot be read exactly.
    """
    if path.is_dir():
        files, notes = _list_folder(path)
        return RowStream([_open(file) for file in files], notes, folder=True, limit=limit)
    if not path.is_file():
        raise DataError(f"'{path}' is neither a file nor a folder", "Rows are read from files", "Name a data file")
    return RowStream([_open(path)], (), folder=False, limit=limit)


def read_files(path: Path) -> FileRows:
    """Read one file, or all files of a folder in name order.

    Raises:
        DataError: where anything in the way cannot be read exactly; the message names the file and the line.
    """
    stream = stream_files(path)
    rows = [row for row, _ in stream]
    return FileRows(rows, stream.sha256, stream.parts, stream.notes)


def _open(path: Path) -> RowFile:
    kind = find_kind(path)
    if kind is None:
        ending = f"ends in '{path.suffix}'" if path.suffix else "has no ending"
        raise DataError(
            f"'{path}' {ending}", f"Readable are {_READABLE}", "Convert the file, or rename it to its format"
        )
    if kind is Kind.PARQUET:
        return ParquetRows(path)
    return JsonRows(path, kind) if kind in (Kind.JSON, Kind.JSONL) else TableRows(path, kind)


def _join_digests(files: Sequence[RowFile]) -> str:
    listing = "".join(f"{file.sha256}  {file.path.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _list_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """Return a folder's data files, and a note on the rest."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and find_kind(entry) is not None]
    _check_folder(folder, files)
    others = [entry.name + ("/" if entry.is_dir() else "") for entry in entries if entry not in files]
    notes = [f"Left out of {folder}, being no data files: {', '.join(others)}"] if others else []
    return files, notes


def _check_folder(folder: Path, files: list[Path]) -> None:
    """Refuse a folder without data, with several formats, or with the same file twice."""
    names = {file.name for file in files}
    if {"dataset_info.json", "state.json"} <= names:
        raise DataError(
            f"'{folder}' was written by datasets' save_to_disk",
            "That is a private cache layout, not an exchange format",
            "Write the rows out with dataset.to_json('rows.jsonl') and name that file",
        )
    if not files:
        raise DataError(f"Folder '{folder}' holds no data file", f"Readable are {_READABLE}", "Name a folder that does")
    by_kind: dict[Kind, str] = {}
    for file in files:
        kind = find_kind(file)
        assert kind is not None, "only files of a known kind get here"
        by_kind.setdefault(kind, file.name)
    if len(by_kind) > 1:
        found = ", ".join(f"{kind} ({name})" for kind, name in by_kind.items())
        raise DataError(
            f"Folder '{folder}' mixes formats: {found}",
            "All files of a folder must be of one kind, or the same rows may be read twice",
            "Move the others elsewhere, or name one file",
        )
    doubled = sorted(name for name in names if name + ".gz" in names)
    if doubled:
        raise DataError(
            f"Folder '{folder}' holds both {doubled[0]} and {doubled[0]}.gz",
            "The same rows would be read twice",
            "Remove one of the two",
        )
