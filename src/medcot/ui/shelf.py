"""The runs that the pages may show: those in one folder, and the one that was named; nothing else of the disk.

A browser names a run by a word out of this list, never by a path. What a run's files are is fixed (``records.Run``),
and one that is a link to somewhere else is refused, so that a folder copied from elsewhere cannot have the pages read
what its sender would like to see.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medcot.errors import DataError, did_you_mean
from medcot.records import Run

MOST_RUNS = 200  # the newest of them


class Shelf:
    """The runs of a folder.

    Args:
        root: holds run folders; may not be there yet.
        named: one more run, wherever it is.
    """

    def __init__(self, root: Path, named: Path | None = None) -> None:
        self._root, self._named = root, named

    def runs(self) -> dict[str, Run]:
        """Return the runs by name, the newest first."""
        folders = [] if self._named is None else [self._named.resolve()]
        if (self._root / "run.json").is_file():
            folders.append(self._root.resolve())
        with contextlib.suppress(FileNotFoundError):  # no run was made yet
            # Links are left out: runs/latest is one of the folders beside it.
            folders += [path.resolve() for path in self._root.iterdir() if path.is_dir() and not path.is_symlink()]
        dated = [(_changed(Run(folder)), folder) for folder in dict.fromkeys(folders)]
        newest = sorted((pair for pair in dated if pair[0]), reverse=True)[:MOST_RUNS]
        found: dict[str, Run] = {}
        for _, folder in newest:
            name = folder.name if folder.name not in found else f"{folder.parent.name}/{folder.name}"
            found[name] = Run(folder)
        return found

    def find(self, name: str) -> Run:
        """Return a run by its name.

        Raises:
            DataError: there is none of this name, or its files lie elsewhere.
        """
        runs = self.runs()
        if name not in runs:
            raise DataError(f"No run is called '{name}'", "A run is chosen from the list", did_you_mean(name, runs))
        run = runs[name]
        for path in _files_of(run):
            if not path.resolve().is_relative_to(run.folder):
                raise DataError(
                    f"'{path.relative_to(run.folder)}' of '{name}' is a link to a file outside the run",
                    "The pages show what lies in a run's folder",
                    "Copy the file into it",
                )
        return run


def _files_of(run: Run) -> Iterator[Path]:
    yield from (run.facts, run.recipe, run.metrics, run.report)
    yield from (run.data / name for name in ("report.json", "report.html", "quarantine.jsonl"))
    yield from (run.samples / name for name in ("before.jsonl", "after.jsonl"))


def _changed(run: Run) -> float:
    """Return when a run's facts were last written; 0 where there are none."""
    try:
        return run.facts.stat().st_mtime
    except OSError:
        return 0.0


def stamp(run: Run) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether a run has gone on: names, sizes and times of the files that grow."""
    stamps = []
    for path in (run.facts, run.metrics, run.report):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            stamps.append((path.name, found.st_size, found.st_mtime_ns))
    return tuple(stamps)


def read_facts(run: Run) -> dict[str, Any]:
    """Return run.json; empty where it cannot be read, which a list of runs shows as not known."""
    try:
        facts = json.loads(run.facts.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
