"""A plan: how the rows of one source become examples, settled once and then carried out on any of its rows.

It is small and picklable, so that a data set larger than memory is built a chunk at a time, by several processes; what
became of the rows of each chunk adds up in ``Counts``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath

from medcot.data.files import Places
from medcot.data.layouts import LAYOUTS
from medcot.data.reading import Change, Fields, Given, UnusableRow, read_columns
from medcot.records import Example, Problem, Quarantined


class Purpose(StrEnum):
    """What the examples are for, and so what a row must have."""

    TRAIN = "train"  # question, reasoning and response
    INSPECT = "inspect"  # a row without reasoning is an example too, so that it can be reported
    EVALUATE = "evaluate"  # a question; columns that are not wanted raise no doubts


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of some rows; those of several chunks add up."""

    num_rows: int = 0
    changes: Counter[Change] = field(default_factory=Counter)  # rows kept, by what was done to them
    reasons: Counter[str] = field(default_factory=Counter)  # rows set aside, by why

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.num_rows + other.num_rows, self.changes + other.changes, self.reasons + other.reasons)


@dataclass(frozen=True, slots=True)
class BuiltRows:
    """Examples and rows set aside, ``counts.num_rows`` together."""

    examples: list[Example]
    quarantined: list[Quarantined]
    counts: Counts


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of one source become examples.

    Attributes:
        source: the path or Hub id; ids of examples are made of it.
        layout: a key of ``LAYOUTS``, or ``"columns"``.
        given: what the layout leaves open.
        purpose: what a row must have.
        sentences: what each column became.
    """

    source: str
    layout: str
    given: Given
    purpose: Purpose
    sentences: tuple[str, ...]

    @property
    def settings(self) -> str:
        """Whatever changes the examples, as text."""
        columns = sorted(self.given.columns.items())
        return repr((self.source, self.layout, columns, self.given.system, self.purpose.value))

    def build(self, rows: Sequence[object], first_number: int = 1, places: Places | None = None) -> BuiltRows:
        """Turn rows that follow one another into examples and rows set aside; none is lost.

        Args:
            rows: raw rows.
            first_number: number of the first of them in the source, from 1.
            places: which files they lie in; ``None`` where the source is one.
        """
        examples: list[Example] = []
        quarantined: list[Quarantined] = []
        counts = Counts(len(rows))
        where = places or Places((PurePath(self.source).name,))
        for number, row in enumerate(rows, start=first_number):
            file_name, row_in_file = where.find(number)
            try:
                fields = self._read(row)
            except UnusableRow as unusable:
                suffix = f" ({file_name}, row {row_in_file:,})" if where.several else ""
                kept = row if isinstance(row, dict) else {"row": row}
                reason = f"{unusable}{suffix}"
                quarantined.append(Quarantined(number, reason, kept, unusable.field, unusable.problem))
                counts.reasons[str(unusable)] += 1
                continue
            counts.changes.update(fields.changes)
            if fields.reasoning is None and self.purpose is Purpose.INSPECT:
                counts.changes[Change.NO_REASONING] += 1
            examples.append(_make_example(make_id(self.source, number), file_name, fields))
        return BuiltRows(examples, quarantined, counts)

    def say(self, counts: Counts) -> list[str]:
        """Return what happened to all rows, in sentences: columns, changes, rows set aside."""
        sentences = list(self.sentences)
        sentences += [f"{count_rows(counts.changes[change])} {change}" for change in Change if counts.changes[change]]
        if counts.reasons:
            sentences.append(_list_reasons(counts))
        return sentences

    def _read(self, row: object) -> Fields:
        if not isinstance(row, dict):
            raise UnusableRow(f"it is no object but {type(row).__name__}", problem=Problem.TYPE)
        read = read_columns if self.layout == "columns" else LAYOUTS[self.layout].read
        fields = read(row, self.given)
        if self.purpose is Purpose.TRAIN:
            if fields.reasoning is None:
                raise fields.lacks or UnusableRow("it has no reasoning", "reasoning", Problem.MISSING)
            if fields.response is None:
                raise UnusableRow("it has no answer to train on", "response", Problem.MISSING)
        return fields


def make_id(source: str, row_number: int) -> str:
    """Return the id of a row: the source's name without folder and ending, a colon, the row's number from 1."""
    name = PurePath(source).name
    for ending in (".gz", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return f"{name}:{row_number}"


def find_row_number(example_id: str) -> int | None:
    """Return the row number that ``make_id`` put into an id, or ``None`` for an id made otherwise."""
    _, colon, number = example_id.rpartition(":")
    return int(number) if colon and number.isascii() and number.isdigit() else None


def _make_example(row_id: str, file_name: str, fields: Fields) -> Example:
    return Example(
        row_id,
        fields.question,
        file_name,
        fields.reasoning,
        fields.response,
        fields.options,
        fields.gold,
        fields.answer_kind,
        fields.topic,
    )


def _list_reasons(counts: Counts) -> str:
    """Return one sentence with how many rows were set aside, and why, the commonest reason first."""
    listed = "; ".join(f"{count:,} because {reason}" for reason, count in counts.reasons.most_common(6))
    more = f"; {len(counts.reasons) - 6} more reasons" if len(counts.reasons) > 6 else ""
    return f"{count_rows(counts.reasons.total())} of {counts.num_rows:,} set aside: {listed}{more}."


def count_rows(count: int) -> str:
    """Return a number of rows in words."""
    return f"{count:,} row{'' if count == 1 else 's'}"
