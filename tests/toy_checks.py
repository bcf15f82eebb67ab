"""A builder and checks so small that what they must find can be said beforehand; importable by workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from medcot.data.files import Places
from medcot.data.findings import Chunk, Finding, Reader, Severity
from medcot.data.plans import BuiltRows, Counts
from medcot.errors import DataError
from medcot.records import Example, Quarantined


@dataclass(frozen=True)
class ToyBuilder:
    """Rows need a text ``q``; all others are set aside."""

    settings: str = "toy"

    def build(self, rows: Sequence[Any], first_number: int, places: Places) -> BuiltRows:
        built = BuiltRows([], [], Counts(len(rows)))
        for number, row in enumerate(rows, start=first_number):
            if isinstance(row.get("q"), str):
                built.examples.append(Example(f"toy:{number}", row["q"], places.find(number)[0]))
            else:
                built.quarantined.append(Quarantined(number, "q is no text", row))
                built.counts.reasons["q is no text"] += 1
        return built


@dataclass(frozen=True)
class Numbered:
    """Finds the rows whose question holds a word, reads them again, and leaves a trace of every map."""

    word: str = "needle"
    trace: Path | None = None  # a file that gets a line for each chunk mapped
    nap_s: float = 0.0
    fail: str = ""  # what happens at a question that says "trouble"
    name: str = "numbered"

    @property
    def settings(self) -> str:
        return self.word

    def map(self, chunk: Chunk) -> list[int]:
        time.sleep(self.nap_s)
        if self.trace is not None:
            with self.trace.open("a") as file:
                file.write(f"{self.name} {chunk.first} {os.getpid()}\n")
        if any("trouble" in example.question for example in chunk.examples):
            self._make_trouble()
        return [int(e.id.rpartition(":")[2]) for e in chunk.examples if self.word in e.question]

    def reduce(self, tallies: Iterable[list[int]], reader: Reader) -> list[Finding]:
        numbers = [number for tally in tallies for number in tally]
        fetched = reader.fetch(numbers[::-1])
        assert [fetched[number].id for number in numbers] == [f"toy:{number}" for number in numbers]
        rows = tuple(f"{number} {fetched[number].source} {fetched[number].question}" for number in numbers)
        return [Finding(self.name, Severity.INFO, len(numbers), rows, f"{len(numbers)} rows", "")]

    def _make_trouble(self) -> None:
        if self.fail == "data":
            raise DataError("The row says trouble", "It must not", "Mend it")
        if self.fail == "bug":
            raise KeyError("a bug in the check")
        if self.fail == "die":
            os._exit(7)


@dataclass(frozen=True)
class Memory:
    """How much each worker's memory grew from its first chunk to its last; ``says`` tells in MB."""

    name: str = "memory"
    settings: str = ""

    def map(self, chunk: Chunk) -> tuple[int, float]:
        return os.getpid(), peak_mb()

    def reduce(self, tallies: Iterable[tuple[int, float]], reader: Reader) -> list[Finding]:
        by_worker: dict[int, list[float]] = {}
        for pid, megabytes in tallies:
            by_worker.setdefault(pid, []).append(megabytes)
        grown = max(max(peaks) - min(peaks) for peaks in by_worker.values())
        return [Finding(self.name, Severity.INFO, len(by_worker), (), f"{grown:.1f}", "")]


def peak_mb() -> float:
    """The most memory that this process has had; ``ru_maxrss`` would count the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def traced(path: Path) -> list[tuple[str, int]]:
    """Which chunks were mapped: check and first row."""
    if not path.exists():
        return []
    return [(name, int(first)) for name, first, _ in (line.split() for line in path.read_text().splitlines())]


def my_children() -> list[psutil.Process]:
    """Workers of this process; other tests may have started other children."""
    return [child for child in psutil.Process().children() if "medcot.data.children" in " ".join(child.cmdline())]
