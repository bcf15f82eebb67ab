"""What the data doctor says, and the form every one of its checks has.

A check is a map and a reduce. ``map`` looks at one chunk of examples, by itself and without memory, and returns a
tally: small, picklable, the same whenever and wherever it is made. ``reduce`` reads the tallies of all chunks in order
and says what they come to. So chunks can be looked at by several processes or machines, a tally once made can be kept
on disk and never made again, and memory does not grow with the data. What a reducer must see again (a suspected pair of
duplicates, a row to show) it asks of the source by number.

Severity is policy, not opinion: **red** stops a run, **yellow** is for the user to judge, **info** is for the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from medcot.records import Example, Quarantined

MOST_ROWS = 20  # ids that a finding lists; its count is always of all


class Severity(StrEnum):
    """How bad a finding is."""

    RED = "red"
    YELLOW = "yellow"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen, for a person to judge: pieces of text side by side, each with what it is.

    Attributes:
        row: id of the example.
        parts: label → text, in the order to show; ``{"training question": …, "MedQA test 17": …}``.
    """

    row: str
    parts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the doctor found.

    Attributes:
        id: what it is, in words_with_underscores; a recipe's ``data.accept`` names it.
        severity: what it means for a run.
        count: rows concerned (or pairs, where ``says`` speaks of pairs).
        rows: ids of the first of them, ``MOST_ROWS`` at most.
        says: a sentence with the figures.
        fix: a sentence with the remedy; empty where there is nothing to do.
        evidence: what to show a person.
        figures: numbers for charts and tables, plain JSON.
    """

    id: str
    severity: Severity
    count: int
    rows: tuple[str, ...]
    says: str
    fix: str
    evidence: tuple[Evidence, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("says", "fix"):  # sentences: they are printed one after another
            text = getattr(self, name).rstrip()
            object.__setattr__(self, name, text if not text or text[-1] in ".!?…" else f"{text}.")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a source that follow one another.

    Attributes:
        first: number of its first row in the source, from 1.
        num_rows: raw rows that it spans; examples and rows set aside together.
        examples: what could be read.
        quarantined: what could not.
    """

    first: int
    num_rows: int
    examples: Sequence[Example]
    quarantined: Sequence[Quarantined] = ()


class Reader(Protocol):
    """Gives back examples that a tally remembers by number only."""

    def fetch(self, numbers: Sequence[int]) -> dict[int, Example]:
        """Return the examples of these rows, numbered from 1; all must be readable rows of the source."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """A reader of examples that are at hand, numbered from 1."""

    examples: Sequence[Example]

    def fetch(self, numbers: Sequence[int]) -> dict[int, Example]:
        """See ``Reader``."""
        return {number: self.examples[number - 1] for number in numbers}


class Check(Protocol):
    """One kind of look at the data; instances are picklable and frozen."""

    @property
    def name(self) -> str:
        """Its name, in words_with_underscores; a key of the cache."""

    @property
    def settings(self) -> str:
        """Whatever changes its tallies, as text: a cached tally serves only the same settings."""

    def map(self, chunk: Chunk) -> Any:
        """Look at a chunk; the tally is picklable, and its size bounded or a few bytes a row."""

    def reduce(self, tallies: Iterable[Any], reader: Reader) -> list[Finding]:
        """Say what all tallies come to, in the order of their chunks; holds none of them longer than it must."""
