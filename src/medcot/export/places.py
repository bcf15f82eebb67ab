"""Where artefacts are written: the disk looked at first, a scratch folder beside the place, one rename at the end.

A folder that a loader could take for an artefact is always a whole one. It is filled under a hidden name on the same
disk and moved to its place when nothing is left to write; what stood there before goes only then. An interrupt or an
error takes the scratch folder away with it. (A process that is killed outright leaves a hidden folder, which nobody
loads and the next export of that kind removes.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from medcot.errors import OutputError

TOKENIZER_BYTES = 40_000_000  # generous: a vocabulary of 150,000 tokens takes 10 to 20 MB
SLACK = 1.02  # file headers and JSON


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise ``OutputError`` where the disk that would hold ``folder`` has less than ``num_bytes`` free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OutputError(
            f"the disk of '{folder}' has {free / 1e9:.2f} GB free",
            f"{num_bytes / 1e9:.2f} GB are needed there",
            "Free some space, or choose a folder on another disk with --out",
        )


@contextlib.contextmanager
def scratch_beside(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield an empty folder on the disk of ``folder`` that vanishes with the block, whatever ends it.

    Raises:
        OutputError: the disk has less than ``num_bytes`` free, or cannot be written.
    """
    check_free_space(folder, num_bytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-????????"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        work = scratch / "new"
        work.mkdir()
        yield work
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(work: Path, folder: Path) -> None:
    """Let ``work``, a folder from ``scratch_beside``, take the place of ``folder``, and be it."""
    if folder.exists():
        os.replace(folder, work.with_name("old"))
    os.replace(work, folder)


@contextlib.contextmanager
def replacing(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a working folder that takes the place of ``folder`` when the block ends well, and vanishes when not."""
    with scratch_beside(folder, num_bytes) as work:
        yield work
        put_in_place(work, folder)


def cannot_write(folder: Path, error: OSError) -> OutputError:
    """Return the error for a disk that took less than was to be written."""
    return OutputError(
        f"'{folder}' cannot be written: {error.strerror or error}",
        "Saving needs a folder this user may write, on a disk with room",
        "Choose another folder with --out",
    )
