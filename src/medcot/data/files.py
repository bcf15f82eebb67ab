r"""Local files as lists of rows: JSON, JSON Lines, CSV, TSV and Parquet, one file or a folder of one kind.

Why not ``datasets.load_dataset`` for these too: it guesses types (a CSV answer of ``3`` becomes a number, ``NA``
becomes null), rewrites the file into an Arrow cache, and reports a broken line as a chain of three tracebacks without
the line's number. Our users' files are megabytes, not terabytes. Reading the bytes once gives the checksum, the exact
line of any damage, and every cell as it was written.

Nothing is skipped in silence. What was left out on purpose (blank lines, a README beside the data) is said in
``notes``; anything else that cannot be read is an error that names its line. Three traps are closed here:

- lines end at ``\n`` only; ``str.splitlines`` would also cut at U+2028, U+0085 and form feeds inside a JSON string;
- CSV is read strictly; otherwise one unclosed quote swallows the rest of the file as a single cell;
- a file called ``.json`` often holds JSON Lines and the reverse; both are read by content, and it is said.

The checksum of a file is that of its bytes, so ``sha256sum FILE`` shows the same; that of a folder is the checksum of
the text ``sha256sum`` would print for its files in name order (``LC_ALL=C sha256sum *.jsonl | sha256sum``).
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from medcot.errors import DataError

RawRow = dict[str, object]

_LONGEST_HEADER_CELL = 100  # characters; a longer "column name" is a row of a file without a header
_BINARY_PROBE_BYTES = 8192


class Kind(StrEnum):
    """The file formats that are read."""

    JSON = "JSON"
    JSONL = "JSON Lines"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "Parquet"


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


def read_files(path: Path) -> FileRows:
    """Read one file, or all files of a folder in name order.

    Raises:
        DataError: where anything in the way cannot be read exactly; the message names the file and the line.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise DataError(f"'{path}' is neither a file nor a folder", "Rows are read from files", "Name a data file")
    rows, digest, notes = _read_file(path)
    return FileRows(rows, digest, (Part(path.name, len(rows)),), tuple(notes))


def _read_folder(folder: Path) -> FileRows:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and find_kind(entry) is not None]
    _check_folder(folder, files)
    rows: list[RawRow] = []
    parts: list[Part] = []
    notes: list[str] = []
    listing = hashlib.sha256()
    for file in files:
        file_rows, digest, file_notes = _read_file(file)
        rows += file_rows
        parts.append(Part(file.name, len(file_rows)))
        notes += file_notes
        listing.update(f"{digest}  {file.name}\n".encode())
    others = [entry.name + ("/" if entry.is_dir() else "") for entry in entries if entry not in files]
    if others:
        notes.append(f"Left out of {folder}, being no data files: {', '.join(others)}")
    return FileRows(rows, listing.hexdigest(), tuple(parts), tuple(notes))


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


def _read_file(path: Path) -> tuple[list[RawRow], str, list[str]]:
    """Return a file's rows, the sha256 of its bytes, and notes."""
    kind = find_kind(path)
    if kind is None:
        ending = f"ends in '{path.suffix}'" if path.suffix else "has no ending"
        raise DataError(
            f"'{path}' {ending}", f"Readable are {_READABLE}", "Convert the file, or rename it to its format"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be read ({error.strerror})", "Data files must be readable", "Check its permissions"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if not data:
        raise _no_rows(path, "is empty (0 bytes)")
    notes: list[str] = []
    if kind is Kind.PARQUET:
        rows = _parse_parquet(data, path)
    else:
        text = _decode(_unzip(data, path) if path.suffix.lower() == ".gz" else data, path)
        if not text.strip():
            raise _no_rows(path, "holds only white space")
        if kind in (Kind.CSV, Kind.TSV):
            rows = _parse_csv(text, path, "," if kind is Kind.CSV else "\t", notes)
        else:
            rows = _parse_json(text, path, kind, notes)
    if not rows:
        raise _no_rows(path, "holds no rows")
    return rows, digest, notes


def _no_rows(path: Path, value: str) -> DataError:
    return DataError(f"'{path}' {value}", "A data file needs at least one row", "Check how the file was written")


def _unzip(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"'{path}' is not a whole gzip file ({error})",
            "A name ending in .gz promises gzip",
            "Download or compress it again, or drop .gz from the name of a plain file",
        ) from error


def _decode(data: bytes, path: Path) -> str:
    """Return UTF-8 text without its byte order mark; the error names the line of the first foreign byte."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"'{path}' is UTF-16 text", "Data files must be UTF-8", "Save it again as UTF-8")
    if b"\0" in data[:_BINARY_PROBE_BYTES]:
        raise DataError(
            f"'{path}' is a binary file (it holds null bytes)",
            f"Its name promises {find_kind(path)}, which is text",
            "Name the data file itself; a packed file must end in .gz, a Parquet file in .parquet",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        near = data[max(0, error.start - 20) : error.start + 20].decode("ascii", "backslashreplace")
        raise DataError(
            f"'{path}' is not UTF-8 in line {line:,}: byte 0x{data[error.start]:02x} in {_quote(near)}",
            "Data files must be UTF-8",
            "Save it again as UTF-8 (in Excel: 'CSV UTF-8'), or run: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error


def _parse_json(text: str, path: Path, kind: Kind, notes: list[str]) -> list[RawRow]:
    """Read a list, an object or JSON Lines, by content: the ending decides only which error is shown."""
    if text.lstrip().startswith("["):
        if kind is Kind.JSONL:
            notes.append(f"{path.name} holds one JSON list, not JSON Lines; its items are the rows")
        return _check_rows(_load_json(text, path), path)
    if kind is Kind.JSONL or _is_json_lines(text):
        if kind is Kind.JSON:
            notes.append(f"{path.name} holds JSON Lines, not one JSON value; its lines are the rows")
        return _parse_lines(text, path, notes)
    return _rows_of_object(_load_json(text, path), path)


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a whole JSON object and more follows, as in a ``.json`` that holds JSON Lines."""
    first, _, rest = text.strip().partition("\n")
    if not rest.strip() or not first.startswith("{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
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


def _parse_lines(text: str, path: Path, notes: list[str]) -> list[RawRow]:
    rows: list[RawRow] = []
    num_blank = 0
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line.strip():
            num_blank += 1
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise _broken_json(path, number, reason, line) from error
        if not isinstance(row, dict):
            raise DataError(
                f"Line {number:,} of '{path}' is {_name_type(row)}: {_quote(line)}",
                "Each line of a JSON Lines file is one object",
                "Write rows as {'Question': ..., 'Complex_CoT': ..., 'Response': ...}",
            )
        rows.append(row)
    _note_blank(path, num_blank, notes)
    return rows


def _broken_json(path: Path, line: int, reason: str, text: str) -> DataError:
    return DataError(
        f"Line {line:,} of '{path}' is not JSON ({reason}): {_quote(text)}",
        "No line is skipped, because a skipped line is lost data",
        "Mend or remove that line; a file cut off at its end was not fully downloaded",
    )


def _rows_of_object(value: object, path: Path) -> list[RawRow]:
    """Find the rows in a JSON object: the one list it holds, or the object itself where it is one flat row."""
    if not isinstance(value, dict):
        raise _not_rows(path, f"holds {_name_type(value)}")
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
            raise _not_rows(path, f"has {_name_type(row)} as row {number:,}: {_quote(str(row))}")
    return value


def _not_rows(path: Path, value: str) -> DataError:
    return DataError(
        f"'{path}' {value}",
        "A JSON file is a list of row objects, or an object with one such list inside",
        "Write it as rows; with pandas: frame.to_json(path, orient='records', lines=True) into a .jsonl file",
    )


def _parse_csv(text: str, path: Path, delimiter: str, notes: list[str]) -> list[RawRow]:
    """Read delimited text whose first line names the columns; every cell stays the text it was."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = _csv_lines(reader, path)
    header = _check_header(next(lines, []), path, delimiter)
    rows: list[RawRow] = []
    num_blank = 0
    for cells in lines:
        if not cells:
            num_blank += 1
            continue
        if len(cells) != len(header):
            raise DataError(
                f"Line {reader.line_num:,} of '{path}' has {len(cells)} cells, the header has {len(header)}:"
                f" {_quote(delimiter.join(cells))}",
                "Every row needs a cell for every column",
                "Put text that holds a separator or a line break into double quotes",
            )
        rows.append(dict(zip(header, cells, strict=True)))
    _note_blank(path, num_blank, notes)
    return rows


def _csv_lines(reader: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    """Yield the rows of a ``csv.reader``, its complaints turned into ours."""
    number = 0
    try:
        for number, cells in enumerate(reader, start=1):  # noqa: B007 - the handler names the last good row
            yield cells
    except csv.Error as error:
        raise DataError(
            f"'{path}' breaks after its row {number:,} ({error})",
            "CSV is read strictly, because one unclosed quote would swallow the rest of the file",
            "Close or double the quotes there, or save the table as JSON Lines",
        ) from error


def _check_header(cells: list[str], path: Path, delimiter: str) -> list[str]:
    """Return the column names, a blank one named by its position (pandas writes its index so)."""
    if len(cells) == 1:
        other = next((mark for mark in ";\t|," if mark != delimiter and mark in cells[0]), None)
        if other is not None:
            raise DataError(
                f"The header of '{path}' is one cell: {_quote(cells[0])}",
                f"Columns of this file must be separated by {delimiter!r}, and it seems to use {other!r}",
                "Save it with commas as .csv, or with tabs as .tsv",
            )
    names = [name.strip() or f"column {position}" for position, name in enumerate(cells, start=1)]
    odd = [name for name in cells if len(name) > _LONGEST_HEADER_CELL or "\n" in name or _is_number(name)]
    if odd or not any(name.strip() for name in cells):
        raise DataError(
            f"The first line of '{path}' is no header: {_quote(odd[0] if odd else delimiter.join(cells))}",
            "The first line of a CSV or TSV file names the columns",
            "Put a line such as Question,Complex_CoT,Response on top",
        )
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(
            f"The header of '{path}' names '{doubled[0]}' twice",
            "Column names must differ",
            "Rename one of the columns",
        )
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_parquet(data: bytes, path: Path) -> list[RawRow]:
    import pyarrow as pa  # tenths of a second to import, so only where a Parquet file is read
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"'{path}' is not a whole Parquet file ({_quote(str(error).splitlines()[0])})",
            "A name ending in .parquet promises Parquet",
            "Download it again; a file of a few hundred bytes may be a Git LFS pointer",
        ) from error
    doubled = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if doubled:
        raise DataError(f"'{path}' has two columns '{doubled[0]}'", "Column names must differ", "Rename one of them")
    rows: list[RawRow] = table.to_pylist()
    return rows


def _note_blank(path: Path, num_blank: int, notes: list[str]) -> None:
    if num_blank:
        notes.append(f"{num_blank:,} blank line{'s' if num_blank > 1 else ''} in {path.name} hold no row")


def _name_type(value: object) -> str:
    """Return a JSON value's type in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _quote(text: str, limit: int = 60) -> str:
    """Return the text on one line in quotation marks, cut to ``limit`` characters."""
    line = " ".join(text.split())
    return f"'{line[:limit]}…'" if len(line) > limit else f"'{line}'"
