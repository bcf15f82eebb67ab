"""The run folder: who may write to it, and how its facts reach the disk.

A folder belongs to one job at a time. The job that has it holds a lock on ``.lock``, which the system lets go of when
the process ends, however it ends, so a kill leaves nothing to clear up. ``run.json`` is replaced whole at every change,
so that whatever reads it, even after a kill, reads a complete file. Paths inside it are relative to the folder, so a
run can be moved.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medcot.errors import OutputError
from medcot.records import Run

RUNS = Path("runs")
LATEST = RUNS / "latest"
LOCK = ".lock"
# Logs, samples and the report of a run; adapters, checkpoints and merged weights are estimated on top.
MIN_FREE_BYTES = 200 * 2**20


def create_run(recipe_name: str, out: Path | None) -> Run:
    """Make the folder of a new run: ``out``, or ``runs/<recipe>-<time>`` with ``runs/latest`` pointing at it.

    Raises:
        OutputError: the folder holds another run or other files, or cannot be made.
    """
    folder = out if out is not None else free_name(RUNS / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        holds = "a run" if (folder / "run.json").exists() else "files" if folder.is_dir() else "no folder but a file"
        raise OutputError(
            f"'{folder}' already holds {holds}",
            "A run writes to a new or empty folder, so that it overwrites nothing",
            f"Add --resume to go on with it, or name another folder with --out (try '{free_name(folder)}')",
        )
    run = Run(folder)
    try:
        for part in (run.folder, run.data, run.samples, run.checkpoints):
            part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be made: {error.strerror}",
            "A run needs a folder to write to",
            "Name another with --out",
        ) from None
    if out is None:
        _point_latest(folder)
    return run


def find_latest() -> Path | None:
    """Return the run folder that runs/latest points at; ``None`` for nothing."""
    return LATEST.resolve() if LATEST.is_symlink() else None


def point_back(folder: Path, previous: Path | None) -> None:
    """Let runs/latest point at the run before this one again, which came to nothing; only where it points at this."""
    if find_latest() == folder.resolve() and previous is not None and previous.is_dir():
        _point_latest(previous)


def find_resumable(out: Path | None) -> Run:
    """Return the run to go on with: ``out``, else ``runs/latest``.

    Raises:
        OutputError: there is no run there.
    """
    folder = out if out is not None else LATEST
    run = Run(folder.resolve() if folder.is_symlink() else folder)
    if not run.recipe.is_file():
        raise OutputError(
            f"'{folder}' holds no recipe.yaml",
            "--resume goes on with a run that was started",
            "Name its folder with --out, or start one without --resume",
        )
    return run


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Hold the folder for this process while the block runs.

    Raises:
        OutputError: another process, or another job of this one, holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(run.folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"'{run.folder}' is in use by another job",
            "One job writes to a run folder at a time",
            "Wait for it, stop it, or name another folder with --out",
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_disk(folder: Path, num_bytes: int) -> None:
    """Refuse to start a run that the disk cannot hold.

    Raises:
        OutputError: less is free than ``num_bytes`` and a margin.
    """
    needed = num_bytes + MIN_FREE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"'{folder}' has {free / 2**30:.1f} GiB free, and this run may need {needed / 2**30:.1f} GiB",
            "Checkpoints, adapter and merged weights must fit before training starts",
            "Free some space, name a folder on another disk with --out, or keep fewer checkpoints",
        )


def write_text(path: Path, text: str) -> None:
    """Replace a file whole."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose what is in it
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror}",
            "What a run finds out is kept in its folder",
            "Free some space or mend the permissions; --resume then goes on from here",
        ) from None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text; numbers that JSON has no word for (a first fp16 step's infinite gradient norm) become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file whole."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON Lines file whole."""
    write_text(path, "".join(to_json(value) + "\n" for value in values))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; a last line cut short by a kill is left out."""
    # Not splitlines(), which also breaks at U+2028 and its like: model text may hold them.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def free_name(folder: Path) -> Path:
    """Return a folder's name, with a number behind it where it is taken."""
    candidate, number = folder, 2
    while candidate.exists():
        candidate = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return candidate


def _point_latest(folder: Path) -> None:
    """Point runs/latest at the folder; where links are not allowed (Windows without the right), do without."""
    temporary = LATEST.with_name(".latest")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, LATEST)
    except OSError as error:
        raise OutputError(
            f"'{LATEST}' cannot be made a link to '{folder.name}': {error.strerror}",
            "runs/latest points at the newest run",
            "Move what is in its place, or name the run folder with --out",
        ) from None
