"""The lines of a text file as they stream by: unpacked, decoded, numbered, and the file's bytes hashed on their way.

Python's own text files would decode in blocks and so could not say in which line a foreign byte stands, and would know
no places to come back to. Here lines are cut while they are still bytes (in UTF-8 the byte of a line feed is never part
of another character), and each is decoded by itself.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK_BYTES = 2**20


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


class _HashingFile(io.RawIOBase):
    """A file that hashes what is read from it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        """Say that it can be read, which ``io.BufferedReader`` asks."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer, as ``io.RawIOBase`` has it."""
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class Lines:
    """The lines of a text file, each with its number and its place.

    Attributes:
        number: of the line last given, from 1.
        start: where that line begins, in bytes of the unpacked text.
        end: where it ends.
        stream: the unpacked bytes; who reads there goes past what counts and decodes.
    """

    def __init__(self, path: Path, kind: str, *, hashed: bool) -> None:
        self.number = self.start = self.end = 0
        self._path, self._kind = path, kind
        try:
            self._raw: Any = _HashingFile(path) if hashed else path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(path, error) from error
        self._plain = io.BufferedReader(self._raw, _BLOCK_BYTES)
        self.stream: Any = gzip.GzipFile(fileobj=self._plain) if path.suffix.lower() == ".gz" else self._plain

    def __iter__(self) -> Iterator[str]:
        """Read on from where the last line ended.

        Raises:
            DataError: bytes that are no UTF-8 text, a broken gzip file, a disk that cannot be read.
        """
        try:
            for raw in self.stream:
                self.number += 1
                self.start = self.end
                self.end += len(raw)
                line = decode_line(raw, self._path, self._kind, self.number, first=self.start == 0)
                yield line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self._broken_gzip(error) from error
        except OSError as error:
            raise unreadable(self._path, error) from error

    def seek(self, offset: int) -> None:
        """Go to the start of a line; going forward is cheap in a packed file too."""
        self.stream.seek(offset)
        self.end = offset

    def finish(self) -> str:
        """Hash the unread rest of the file, close it, and return the sha256 of all its bytes."""
        while self._raw.read(_BLOCK_BYTES):
            pass
        self.close()
        digest: str = self._raw.digest.hexdigest()
        return digest

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        self._plain.close()

    def _broken_gzip(self, error: Exception) -> DataError:
        return DataError(
            f"'{self._path}' is not a whole gzip file ({error})",
            "A name ending in .gz promises gzip",
            "Download or compress it again, or drop .gz from the name of a plain file",
        )


def decode_line(raw: bytes, path: Path, kind: str, number: int, *, first: bool) -> str:
    """Return a line as text; from the ``first`` of a file UTF-8's byte order mark is taken off.

    Raises:
        DataError: UTF-16, a null byte, or a byte that is no UTF-8; the message names the line.
    """
    if first:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"'{path}' is UTF-16 text", "Data files must be UTF-8", "Save it again as UTF-8")
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in raw:
        raise DataError(
            f"'{path}' is a binary file, or UTF-16 text (line {number:,} holds null bytes)",
            f"Its name promises {kind}, which is UTF-8 text",
            "Save it again as UTF-8; a packed file must end in .gz, a Parquet file in .parquet",
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        near = raw[max(0, error.start - 20) : error.start + 20].decode("ascii", "backslashreplace")
        raise DataError(
            f"'{path}' is not UTF-8 in line {number:,}: byte 0x{raw[error.start]:02x} in {quote(near)}",
            "Data files must be UTF-8",
            "Save it again as UTF-8 (in Excel: 'CSV UTF-8'), or run: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error


def no_rows(path: Path, value: str) -> DataError:
    """Return the error for a file without rows."""
    return DataError(f"'{path}' {value}", "A data file needs at least one row", "Check how the file was written")


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the system does not let us read."""
    remedy = "Check its permissions"
    if isinstance(error, FileNotFoundError):
        remedy = "Check the path: nothing is there"
    elif isinstance(error, IsADirectoryError):
        remedy = "Name a file in this folder"
    return DataError(f"'{path}' cannot be read ({error.strerror})", "Data files must be readable", remedy)


def quote(text: str, limit: int = 60) -> str:
    """Return the text on one line in quotation marks, cut to ``limit`` characters."""
    line = " ".join(text[: 100 * limit].split())  # of ten megabytes in one line, the first words only
    return f"'{line[:limit]}…'" if len(line) > limit else f"'{line}'"
