"""Tables as streams of rows: CSV and TSV as the text they are, and Parquet by its row groups."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medcot.data.formats import STRIDE, Kind, RawRow, RowFile, TextRows
from medcot.data.lines import Lines, hash_file, no_rows, quote
from medcot.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_LONGEST_HEADER_CELL = 100  # characters; a longer "column name" is a row of a file without a header


class TableRows(TextRows):
    """Delimited text whose first line names the columns; every cell stays the text it was."""

    def __init__(self, path: Path, kind: Kind) -> None:
        super().__init__(path, kind)
        self._delimiter = "," if kind is Kind.CSV else "\t"
        self._header: list[str] = []

    def _read(self) -> Iterator[RawRow]:
        lines = self.open_lines()
        reader = csv.reader(_skip_blank_file(_cut_at_returns(lines), self.path), delimiter=self._delimiter, strict=True)
        records = self._checked(reader)
        self._header = _check_header(next(records, []), self.path, self._delimiter)
        start = lines.end
        for cells in records:
            if not cells:
                self._num_blank += 1
            elif len(cells) != len(self._header):
                raise self._ragged(cells, reader.line_num)
            else:
                self._mark(start)
                yield self._parse(cells, 0)
            start = lines.end

    def _checked(self, reader: Iterator[list[str]]) -> Iterator[list[str]]:
        """Yield the records of a ``csv.reader``, its complaints turned into ours."""
        number = 0
        try:
            for number, cells in enumerate(reader, start=1):  # noqa: B007 - the handler names the last good row
                yield cells
        except csv.Error as error:
            raise DataError(
                f"'{self.path}' breaks after its row {number:,} ({error})",
                "CSV is read strictly, because one unclosed quote would swallow the rest of the file, and a cell has at"
                f" most {csv.field_size_limit():,} characters",
                "Close or double the quotes there, or save the table as JSON Lines",
            ) from error

    def _ragged(self, cells: list[str], line: int) -> DataError:
        return DataError(
            f"Line {line:,} of '{self.path}' has {len(cells)} cells, the header has {len(self._header)}:"
            f" {quote(self._delimiter.join(cells))}",
            "Every row needs a cell for every column",
            "Put text that holds a separator or a line break into double quotes",
        )

    def _records(self, lines: Lines) -> Iterator[list[str]]:
        return (cells for cells in csv.reader(_cut_at_returns(lines), delimiter=self._delimiter, strict=True) if cells)

    def _parse(self, record: list[str], number: int) -> RawRow:
        return dict(zip(self._header, record, strict=True))


def _cut_at_returns(lines: Lines) -> Iterator[str]:
    r"""Yield the lines as ``csv`` wants them, which ends lines at a lone ``\r`` too; ``lines.end`` keeps step."""
    for line in lines:
        if "\r" not in line.removesuffix("\n").removesuffix("\r"):
            yield line
            continue
        end = lines.end
        pieces = io.StringIO(line, newline="").readlines()
        lengths = [len(piece.encode()) for piece in pieces]
        lines.end = end - sum(lengths)
        for piece, length in zip(pieces, lengths, strict=True):
            lines.end += length
            yield piece


def _skip_blank_file(lines: Iterator[str], path: Path) -> Iterator[str]:
    """Yield the lines, once one was found that is not blank."""
    held: list[str] = []
    for line in lines:
        held.append(line)
        if not line.isspace():
            yield from held
            yield from lines
            return
    raise no_rows(path, "holds only white space")


def _check_header(cells: list[str], path: Path, delimiter: str) -> list[str]:
    """Return the column names, a blank one named by its position (pandas writes its index so)."""
    if len(cells) == 1:
        other = next((mark for mark in ";\t|," if mark != delimiter and mark in cells[0]), None)
        if other is not None:
            raise DataError(
                f"The header of '{path}' is one cell: {quote(cells[0])}",
                f"Columns of this file must be separated by {delimiter!r}, and it seems to use {other!r}",
                "Save it with commas as .csv, or with tabs as .tsv",
            )
    names = [name.strip() or f"column {position}" for position, name in enumerate(cells, start=1)]
    odd = [name for name in cells if len(name) > _LONGEST_HEADER_CELL or "\n" in name or _is_number(name)]
    if odd or not any(name.strip() for name in cells):
        raise DataError(
            f"The first line of '{path}' is no header: {quote(odd[0] if odd else delimiter.join(cells))}",
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


class ParquetRows(RowFile):
    """A Parquet file, some rows of a row group at a time."""

    def finish(self) -> None:
        """Hash the file; its parts are not read in their order, so this is a pass of its own."""
        self.sha256 = hash_file(self.path)

    def _read(self) -> Iterator[RawRow]:
        with _explained(self.path), self._open() as file:
            names = file.schema_arrow.names
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise DataError(
                    f"'{self.path}' has two columns '{doubled[0]}'", "Column names must differ", "Rename one of them"
                )
            for batch in file.iter_batches(STRIDE):
                yield from batch.to_pylist()

    def _fetch(self, wanted: list[int]) -> Iterator[tuple[int, RawRow]]:
        with _explained(self.path), self._open() as file:
            before = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                here = [number for number in wanted if before < number <= before + num_rows]
                yield from _pick(file, group, before, here)
                before += num_rows

    def _open(self) -> ParquetFile:
        import pyarrow.parquet as pq  # tenths of a second to import, so only where a Parquet file is read

        return pq.ParquetFile(self.path)


def _pick(file: ParquetFile, group: int, before: int, wanted: list[int]) -> Iterator[tuple[int, RawRow]]:
    """Yield the wanted rows of a row group, of which ``before`` rows stand before."""
    left = iter(wanted)
    number = next(left, None)
    if number is None:
        return
    for batch in file.iter_batches(STRIDE, row_groups=[group]):
        while number is not None and number <= before + batch.num_rows:
            yield number, batch.slice(number - before - 1, 1).to_pylist()[0]
            number = next(left, None)
        before += batch.num_rows


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"'{path}' is not a whole Parquet file ({quote(str(error).splitlines()[0])})",
            "A name ending in .parquet promises Parquet",
            "Download it again; a file of a few hundred bytes may be a Git LFS pointer",
        ) from error
