"""A source cut into pieces: small descriptions of some rows that follow one another, which anybody can read by himself.

A piece says where its rows lie (a file and a range of bytes) instead of holding them. So what travels to a worker is a
few kilobytes, JSON is parsed there and not in the parent, any row can be fetched again by its number, and memory does
not grow with the data. JSON Lines are cut where they lie; rows of any other kind (CSV, Parquet, packed files, the Hub)
are written to a scratch file as they stream by, one pickle a row, and cut there.

A piece is cut after so many lines, not bytes: then a row mended in the middle of a file leaves all other pieces what
they were. Its digest is that of its bytes; who reads it checks that, so a file that changes meanwhile is an error and
not a mixture of two.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medcot.data.files import Kind, Places, RowStream, find_kind, stream_files
from medcot.data.formats import JsonRows, parse_lines
from medcot.data.lines import no_rows
from medcot.data.sources import SourceStream
from medcot.errors import DataError

ROWS_PER_PIECE = 2000
MOST_BYTES_PER_PIECE = 8 * 2**20  # a piece ends early at the row that reaches this

_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark


class Piece(Protocol):
    """Some rows of a source that follow one another; picklable."""

    @property
    def first(self) -> int:
        """Number of its first row in the source, from 1."""

    @property
    def num_rows(self) -> int:
        """Rows that it spans."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it spans."""

    @property
    def digest(self) -> str:
        """Hash of its content."""

    @property
    def places(self) -> Places:
        """Which file its rows come from, and how many rows of the source lie before that."""

    def read(self) -> list[Any]:
        """Return its raw rows.

        Raises:
            DataError: a row is broken, or the file is no longer what it was.
        """

    def pick(self, positions: Sequence[int]) -> list[Any]:
        """Return some of its raw rows, by position from 0."""


@dataclass(frozen=True, slots=True)
class _Range:
    """A range of bytes in a file, and where in it each row begins."""

    path: Path
    start: int
    num_bytes: int
    first: int
    starts: array[int]  # of each row, from ``start``
    digest: str
    places: Places

    @property
    def num_rows(self) -> int:
        """Rows that it spans."""
        return len(self.starts)

    def load(self) -> bytes:
        """Return all its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.num_bytes)
        if _hash(data) != self.digest:
            raise self.changed()
        return data

    def cut(self, positions: Sequence[int]) -> Iterator[bytes]:
        """Yield the bytes from each of these rows to the row behind."""
        with self.path.open("rb") as file:
            for position in positions:
                stop = self.starts[position + 1] if position + 1 < len(self.starts) else self.num_bytes
                file.seek(self.start + self.starts[position])
                yield file.read(stop - self.starts[position])

    def changed(self) -> DataError:
        """Return the error for a file that is not what it was when it was cut."""
        return DataError(
            f"'{self.path}' changed while it was being read",
            "A file is looked at as a whole, in one state",
            "Wait until nothing writes to it, and start again; what has not changed is not done twice",
        )


@dataclass(frozen=True, slots=True)
class LinesPiece(_Range):
    """Lines of a JSON Lines file; blank ones hold no row."""

    def read(self) -> list[Any]:
        """Return the rows.

        Raises:
            DataError: a line is not UTF-8, not JSON or not an object (with its number), or the file has changed.
        """
        data = self.load()
        try:
            return self._parse(data, self.start)
        except DataError:
            for _ in stream_files(self.path):  # whose errors know the number of the line
                pass
            raise self.changed() from None

    def pick(self, positions: Sequence[int]) -> list[Any]:
        """Return some of the rows."""
        rows: list[Any] = []
        try:
            for position, data in zip(positions, self.cut(positions), strict=True):
                rows += self._parse(data, self.start + self.starts[position])
        except DataError:  # all of it could be read before
            raise self.changed() from None
        if len(rows) != len(positions):
            raise self.changed()
        return rows

    def _parse(self, data: bytes, start: int) -> list[Any]:
        """Return the rows on some of its lines; a byte order mark belongs to the first line of a file only."""
        return parse_lines(data, self.path, first_line=1 if start == 0 else 2)


@dataclass(frozen=True, slots=True)
class SpilledPiece(_Range):
    """Rows of a scratch file, one pickle each; only files that this process wrote."""

    def read(self) -> list[Any]:
        """Return the rows."""
        file = io.BytesIO(self.load())
        return [pickle.load(file) for _ in range(self.num_rows)]

    def pick(self, positions: Sequence[int]) -> list[Any]:
        """Return some of the rows."""
        return [pickle.loads(data) for data in self.cut(positions)]


class SourcePieces:
    """A source, cut; taken once, in order.

    Attributes:
        figures: the stream whose ``num_rows``, ``sha256``, ``parts`` and ``notes`` are known when all have been taken.
        total_bytes: size of the files that are cut where they lie; ``None`` for any other source.
    """

    def __init__(self, stream: SourceStream, scratch: Path, *, rows_per_piece: int = ROWS_PER_PIECE) -> None:
        """Cut a source.

        Args:
            stream: the source.
            scratch: a folder for rows that cannot be cut where they lie; it must stay as long as the pieces are used,
                and is the caller's to remove.
            rows_per_piece: lines or rows in each but the last of a file.
        """
        self._scratch, self._rows_per_piece = scratch, rows_per_piece
        self.figures, self.total_bytes = stream, None
        self._lines: CutStream | None = None
        rows = stream.rows
        self._several = isinstance(rows, RowStream) and len(rows.files) > 1
        if isinstance(rows, RowStream) and all(_is_plain(file.path) for file in rows.files):
            self._lines = CutStream(rows, rows_per_piece)
            self.figures = SourceStream(self._lines, stream.source, stream.limit, stream.own_notes)
            self.total_bytes = sum(file.path.stat().st_size for file in rows.files)

    def __iter__(self) -> Iterator[Piece]:
        """Cut.

        Raises:
            DataError: the source cannot be read.
        """
        if self._lines is not None:
            return self._lines.cut()
        path = self._scratch / "rows"
        return spill_rows(self.figures, path, several=self._several, rows_per_piece=self._rows_per_piece)


def _is_plain(path: Path) -> bool:
    """Whether a file holds JSON Lines that need no unpacking."""
    if find_kind(path) is not Kind.JSONL or path.suffix.lower() == ".gz":
        return False
    with path.open("rb") as file:
        first = next((line for line in file if not _is_blank(line)), b"")
    return not first.removeprefix(_MARK).lstrip().startswith(b"[")


# JSON Lines ----------------------------------------------------------------------------------------------------------


class _CutFile(JsonRows):
    """A file of JSON Lines that is cut and not parsed: all that is looked for are line ends."""

    def cut(self, places: Places, first: int, limit: int | None, rows_per_piece: int) -> Iterator[LinesPiece]:
        """Yield pieces of at most ``limit`` rows in all, the first of which has the number ``first`` in the source."""
        self.notes, self.num_rows = [], 0
        if self.state[0] == 0:
            raise no_rows(self.path, "is empty (0 bytes)")
        offset = 0
        for lines in _batch(self.open_lines().stream, rows_per_piece):
            most = len(lines) if limit is None else limit - self.num_rows
            starts, num_bytes = self._find_starts(lines, most)
            if starts:
                content = _hash(b"".join(lines)[:num_bytes])
                yield LinesPiece(self.path, offset, num_bytes, first + self.num_rows, starts, content, places)
            self.num_rows += len(starts)
            offset += num_bytes
            if self.num_rows == limit:
                break
        if self.num_rows == 0:
            raise no_rows(self.path, "holds only white space")
        self.finish()

    def _find_starts(self, lines: Sequence[bytes], most: int) -> tuple[array[int], int]:
        """Return where each of the first ``most`` rows begins, and where they end."""
        starts, position = array("Q"), 0
        for line in lines:
            if _is_blank(line):
                self._num_blank += 1
            elif len(starts) == most:
                break
            else:
                starts.append(position)
            position += len(line)
        return starts, position


class CutStream(RowStream):
    """The files of a stream, all of plain JSON Lines, as pieces."""

    def __init__(self, rows: RowStream, rows_per_piece: int) -> None:
        self._cut_files = [_CutFile(file.path, Kind.JSONL) for file in rows.files]
        super().__init__(self._cut_files, rows.own_notes, folder=rows.folder, limit=rows.limit)
        self._rows_per_piece = rows_per_piece

    def cut(self) -> Iterator[LinesPiece]:
        """Yield the pieces of all files."""
        self.ended, self.num_rows, self.places = False, 0, Places((), (), len(self._cut_files) > 1)
        for file in self._cut_files:
            if self.num_rows == self.limit:
                file.finish()
                continue
            name, before, several = file.path.name, self.num_rows, self.places.several
            self.places = Places((*self.places.names, name), (*self.places.before, before), several)
            left = None if self.limit is None else self.limit - before
            for piece in file.cut(Places((name,), (before,), several), before + 1, left, self._rows_per_piece):
                self.num_rows += piece.num_rows
                yield piece
        self.ended = True


def _is_blank(line: bytes) -> bool:
    r"""Whether a line holds no row: white space as Python's text has it, a byte order mark aside."""
    if line[:1] == b"{":
        return False
    return line.isspace() or line.removeprefix(_MARK).decode("utf-8", "replace").isspace()


# Everything else -----------------------------------------------------------------------------------------------------


def spill_rows(
    rows: Iterable[tuple[object, str]], path: Path, *, several: bool = False, rows_per_piece: int = ROWS_PER_PIECE
) -> Iterator[SpilledPiece]:
    """Write rows, each with the name of its file, to a scratch file as they come, and yield its pieces.

    Args:
        rows: the rows.
        path: the scratch file.
        several: whether the source has more than one file, which its places say.
        rows_per_piece: rows in each piece but the last of a file.
    """
    before = offset = 0
    with path.open("wb") as file:
        for name, group in itertools.groupby(rows, key=lambda pair: pair[1]):
            places, first = Places((name,), (before,), several), before + 1
            for batch in _batch((pickle.dumps(row, protocol=5) for row, _ in group), rows_per_piece):
                data = b"".join(batch)
                file.write(data)
                file.flush()
                starts = array("Q", itertools.accumulate(map(len, batch[:-1]), initial=0))
                yield SpilledPiece(path, offset, len(data), first, starts, _hash(data), places)
                first += len(batch)
                offset += len(data)
            before = first - 1


def _batch(records: Iterable[bytes], most: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for record in records:
        batch.append(record)
        num_bytes += len(record)
        if len(batch) >= most or num_bytes >= MOST_BYTES_PER_PIECE:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
