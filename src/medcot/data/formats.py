r"""One data file as a stream of rows, read once, and by row number again; JSON and JSON Lines here, tables next door.

Why not ``datasets.load_dataset``: it guesses types (a CSV answer of ``3`` becomes a number, ``NA`` becomes null),
rewrites the file into an Arrow cache, and reports a broken line as a chain of three tracebacks without the line's
number. Here the bytes are hashed on their way from the disk, the text is decoded and parsed line by line, and only the
current line is held; every cell stays as it was written, and damage is an error that names its line. Three traps are
closed:

- lines end at ``\n`` only; ``str.splitlines`` would also cut at U+2028, U+0085 and form feeds inside a JSON string;
- CSV is read strictly; otherwise one unclosed quote swallows the rest of the file as a single cell;
- a file called ``.json`` often holds JSON Lines and the reverse; both are read by content, and it is said.

The place of every ``STRIDE``-th row is kept during the pass, so that single rows can be fetched again without reading
the file from its start. What cannot be streamed is held whole: one JSON list, because the standard parser (kept, since
faster ones read large integers and lone surrogates otherwise) takes only whole values.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from medcot.data.lines import Lines, decode_line, hash_file, no_rows, quote, unreadable
from medcot.errors import DataError

RawRow = dict[str, object]

STRIDE = 1_000  # rows from one remembered place to the next
WHOLE_BYTES = 64 * 2**20  # a JSON value of this size is held whole with a note


class Kind(StrEnum):
    """The file formats that are read."""

    JSON = "JSON"
    JSONL = "JSON Lines"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "Parquet"


class RowFile(abc.ABC):
    """One file's rows: an iteration is one pass over it; ``fetch`` gives single rows that a pass has seen.

    Attributes:
        path: the file.
        state: its size in bytes and time of change when it was opened.
        notes: after a pass, what was left out or read otherwise than the name says, in sentences.
        num_rows: rows that the pass has given so far.
        sha256: after a pass, or ``finish``, that of the file's bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.num_rows = 0
        self.sha256 = ""
        self.state = self._look()

    def __iter__(self) -> Iterator[RawRow]:
        """Read the rows in order.

        Raises:
            DataError: anything in the way cannot be read exactly; the message names the file and the line.
        """
        self.notes, self.num_rows = [], 0
        if self.state[0] == 0:
            raise no_rows(self.path, "is empty (0 bytes)")
        for row in self._read():
            self.num_rows += 1
            yield row
        if self.num_rows == 0:
            raise no_rows(self.path, "holds no rows")
        self.finish()

    def fetch(self, numbers: Sequence[int]) -> dict[int, RawRow]:
        """Return rows by their number in this file, from 1; the pass must have come so far.

        Raises:
            DataError: the file was changed since.
        """
        wanted = sorted(set(numbers))
        if not wanted:
            return {}
        assert wanted[0] >= 1 and wanted[-1] <= self.num_rows, f"row {wanted[-1]} of {self.num_rows} seen"
        if self._look() != self.state:
            raise DataError(
                f"'{self.path}' was changed while it was read", "Data must stay as it is meanwhile", "Start again"
            )
        return dict(self._fetch(wanted))

    @abc.abstractmethod
    def finish(self) -> None:
        """Hash what the pass has left unread, and close the file."""

    @abc.abstractmethod
    def _read(self) -> Iterator[RawRow]: ...

    @abc.abstractmethod
    def _fetch(self, wanted: list[int]) -> Iterator[tuple[int, RawRow]]: ...

    def _look(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise unreadable(self.path, error) from error
        return found.st_size, found.st_mtime_ns


class TextRows(RowFile):
    """What JSON Lines and CSV have in common: lines, remembered places, and records among the lines."""

    def __init__(self, path: Path, kind: Kind) -> None:
        super().__init__(path)
        self._kind = kind
        self._lines: Lines | None = None
        self._marks: list[int] = []  # where rows 1, 1 + STRIDE, 1 + 2 * STRIDE … begin
        self._num_blank = 0

    def finish(self) -> None:
        """Hash what the pass has left unread, close the file, and count its blank lines."""
        if self._lines is not None:
            self.sha256 = self._lines.finish()
            self._lines = None
        self.sha256 = self.sha256 or hash_file(self.path)  # a file that no pass began
        if self._num_blank:
            plural = "s" if self._num_blank > 1 else ""
            self.notes.append(f"{self._num_blank:,} blank line{plural} in {self.path.name} hold no row")
            self._num_blank = 0

    def open_lines(self) -> Lines:
        """Begin a pass: open the file at its start, for ``finish`` to close."""
        if self._lines is not None:
            self._lines.close()
        self._marks, self._num_blank = [], 0
        self._lines = Lines(self.path, self._kind, hashed=True)
        return self._lines

    def _mark(self, offset: int) -> None:
        if self.num_rows % STRIDE == 0:
            self._marks.append(offset)

    def _fetch(self, wanted: list[int]) -> Iterator[tuple[int, RawRow]]:
        lines = Lines(self.path, self._kind, hashed=False)
        position = 0  # the row last passed
        records: Iterator[Any] = iter(())
        try:
            for number in wanted:
                mark = (number - 1) // STRIDE
                if position == 0 or mark * STRIDE > position:
                    lines.seek(self._marks[mark])
                    position, records = mark * STRIDE, self._records(lines)
                while position < number:
                    record = next(records)
                    position += 1
                yield number, self._parse(record, number)
        finally:
            lines.close()

    @abc.abstractmethod
    def _records(self, lines: Lines) -> Iterator[Any]:
        """Cut the lines that follow into records, without those that hold none."""

    @abc.abstractmethod
    def _parse(self, record: Any, number: int) -> RawRow:
        """Make a record, read before, a row."""


class JsonRows(TextRows):
    """A list, an object or JSON Lines, by content: the ending decides only which error is shown."""

    def __init__(self, path: Path, kind: Kind) -> None:
        super().__init__(path, kind)
        self._whole: list[RawRow] | None = None

    def _read(self) -> Iterator[RawRow]:
        lines = self.open_lines()
        rest = iter(lines)
        first = self._skip_blank(rest)
        if first is None:
            raise no_rows(self.path, "holds only white space")
        mark, number, second = lines.start, lines.number, None
        listed = first.lstrip().startswith("[")
        if self._kind is Kind.JSON and not listed and _is_object(first):
            second = self._skip_blank(rest)
        if listed or (self._kind is Kind.JSON and second is None):
            text = "\n" * (self._num_blank) + first + "".join(rest)
            self._num_blank = 0
            yield from self._read_whole(text, listed)
            return
        if self._kind is Kind.JSON:
            self.notes.append(f"{self.path.name} holds JSON Lines, not one JSON value; its lines are the rows")
        self._mark(mark)
        yield _load_object(first, self.path, number)
        yield from self._read_lines(lines, rest, second)

    def _read_lines(self, lines: Lines, rest: Iterator[str], line: str | None) -> Iterator[RawRow]:
        if line is None:
            line = self._skip_blank(rest)
        while line is not None:
            self._mark(lines.start)
            yield _load_object(line, self.path, lines.number)
            line = self._skip_blank(rest)

    def _skip_blank(self, lines: Iterator[str]) -> str | None:
        for line in lines:
            if not line.isspace():
                return line
            self._num_blank += 1
        return None

    def _read_whole(self, text: str, listed: bool) -> Iterator[RawRow]:
        if listed and self._kind is Kind.JSONL:
            self.notes.append(f"{self.path.name} holds one JSON list, not JSON Lines; its items are the rows")
        if len(text) > WHOLE_BYTES:
            self.notes.append(
                f"{self.path.name} is one JSON value, so all of it is held in memory; JSON Lines would be streamed"
            )
        value = _load_json(text, self.path)
        self._whole = _check_rows(value, self.path) if listed else _rows_of_object(value, self.path)
        yield from self._whole

    def _fetch(self, wanted: list[int]) -> Iterator[tuple[int, RawRow]]:
        if self._whole is None:
            return super()._fetch(wanted)
        return ((number, self._whole[number - 1]) for number in wanted)

    def _records(self, lines: Lines) -> Iterator[str]:
        return (line for line in lines if not line.isspace())

    def _parse(self, record: str, number: int) -> RawRow:
        return _load_object(record, self.path, number)


def parse_lines(data: bytes, path: Path, first_line: int) -> list[RawRow]:
    """Return the rows of some whole lines of a JSON Lines file, as a pass over the file gives them.

    Args:
        data: the lines' bytes.
        path: of the file, for messages.
        first_line: number of the first of them, from 1; it tells whether a byte order mark may be there.

    Raises:
        DataError: a line is not UTF-8, not JSON or not an object; the message names it.
    """
    rows = []
    for number, raw in enumerate(data.split(b"\n"), first_line):
        line = decode_line(raw, path, Kind.JSONL, number, first=number == 1)
        if line and not line.isspace():
            rows.append(_load_object(line, path, number))
    return rows


def _load_object(line: str, path: Path, number: int) -> RawRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise _broken_json(path, number, reason, line) from error
    if not isinstance(row, dict):
        raise DataError(
            f"Line {number:,} of '{path}' is {name_type(row)}: {quote(line)}",
            "Each line of a JSON Lines file is one object",
            "Write rows as {'Question': ..., 'Complex_CoT': ..., 'Response': ...}",
        )
    return row


def _is_object(line: str) -> bool:
    """Whether a line is a whole JSON object, as in a ``.json`` that holds JSON Lines."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _load_json(text: str, path: Path) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1] if error.lineno <= text.count("\n") + 1 else ""
        raise _broken_json(path, error.lineno, error.msg, line[max(0, error.colno - 30) :]) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise _broken_json(path, 1, str(error), text) from error


def _broken_json(path: Path, line: int, reason: str, text: str) -> DataError:
    returns = ", and a carriage return ends no line" if "\r" in text.strip() else ""
    return DataError(
        f"Line {line:,} of '{path}' is not JSON ({reason}{returns}): {quote(text)}",
        "No line is skipped, because a skipped line is lost data",
        "Mend or remove that line; a file cut off at its end was not fully downloaded",
    )


def _rows_of_object(value: object, path: Path) -> list[RawRow]:
    """Find the rows in a JSON object: the one list it holds, or the object itself where it is one flat row."""
    if not isinstance(value, dict):
        raise _not_rows(path, f"holds {name_type(value)}")
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    if len(lists) == 1:
        return _check_rows(next(iter(lists.values())), path)
    if not lists and value and not any(isinstance(item, dict) for item in value.values()):
        return [value]
    found = ", ".join(lists) if lists else "none"
    raise _not_rows(path, f"is an object with {len(lists)} lists inside ({found})")


def _check_rows(value: object, path: Path) -> list[RawRow]:
    assert isinstance(value, list), "callers hand over lists"
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise _not_rows(path, f"has {name_type(row)} as row {number:,}: {quote(str(row))}")
    return value


def _not_rows(path: Path, value: str) -> DataError:
    return DataError(
        f"'{path}' {value}",
        "A JSON file is a list of row objects, or an object with one such list inside",
        "Write it as rows; with pandas: frame.to_json(path, orient='records', lines=True) into a .jsonl file",
    )


def name_type(value: object) -> str:
    """Return a JSON value's type in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
