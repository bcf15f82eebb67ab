"""From raw rows to examples: which layout they have, what each column becomes, said in words.

The names of medical-o1-reasoning-SFT (Question, Complex_CoT, Response; in any case) and the layouts of ``layouts.py``
are taken without being told; anything else is named by the user. The usual alternative, guessing by a list of likely
names, is how the commonest tools lose the reasoning of this very data set: they map Complex_CoT to a system prompt or
drop it, training goes on, and the loss still falls. So a guess is only ever offered, inside an error that shows the
columns found; that holds too where two layouts fit, or where one fits and a column is left that may be the reasoning.

The layout is recognised once, on the first rows, and becomes a ``Plan``: small, picklable, and able to build the
examples of any rows that follow, so that a data set larger than memory is built a chunk at a time, by several
processes. A row that cannot be used as it stands is set aside with its reason and counted; never repaired, never
dropped in silence. What is done to texts on purpose (``reading.Change``) is counted and said.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medcot.data.chats import find_system
from medcot.data.files import Places, RawRow
from medcot.data.layouts import COLUMNS, LAYOUTS, find_layouts, fits, list_named, why_unusable
from medcot.data.plans import (
    BuiltRows,
    Counts,
    Plan,
    Purpose,
    count_rows,
    find_row_number,
    make_id,
)
from medcot.data.reading import Given
from medcot.data.sources import Table
from medcot.errors import DataError, did_you_mean
from medcot.records import Example, Quarantined

__all__ = [
    "FIRST_ROWS",
    "NATIVE",
    "Built",
    "BuiltRows",
    "Counts",
    "Plan",
    "Purpose",
    "build_examples",
    "choose_layout",
    "find_row_number",
    "locate",
    "make_id",
    "refuse_all",
]

NATIVE = {"question": "Question", "reasoning": "Complex_CoT", "response": "Response"}
FIRST_ROWS = 1_000  # that the layout is recognised by

# Names seen for each field elsewhere. They only word the suggestion of an error; nothing is mapped by them.
_ELSEWHERE = {
    "question": ("question", "prompt", "instruction", "input", "query", "problem"),
    "reasoning": ("reasoning", "cot", "complexcot", "chainofthought", "thinking", "think", "thought", "rationale"),
    "response": ("response", "answer", "output", "completion", "solution", "final_answer"),
}


@dataclass(frozen=True, slots=True)
class Built:
    """The examples, the rows set aside, and what happened in sentences."""

    examples: list[Example]
    quarantined: list[Quarantined]
    sentences: list[str]


def choose_layout(
    columns: Sequence[str],
    first_rows: Sequence[RawRow],
    named: Mapping[str, str] | None = None,
    *,
    source: str,
    purpose: Purpose = Purpose.TRAIN,
    layout: str | None = None,
) -> Plan:
    """Recognise the layout of a source by its columns and its first rows.

    Args:
        columns: every name that these rows have.
        first_rows: ``FIRST_ROWS`` of them, or all.
        named: which column is the ``question``, the ``reasoning``, the ``response``, where the user says so; then
            layouts are out of question, and fields left out must have the native name.
        source: the path or Hub id.
        purpose: what a row must have.
        layout: a key of ``LAYOUTS`` that is known already, and is only checked.

    Raises:
        DataError: no layout fits, several do, or what is left over makes the one that fits doubtful.
    """
    named = named or {}
    unknown = [key for key in named if key not in NATIVE]
    if unknown:
        raise DataError(
            f"columns names '{unknown[0]}'", "The fields are " + ", ".join(NATIVE), did_you_mean(unknown[0], NATIVE)
        )
    looks = _Look(source, list(columns), first_rows[:FIRST_ROWS], purpose)
    if layout is None and not named and any(_find_native(looks, native) is None for native in NATIVE.values()):
        layout = _recognise(looks)
    if layout is None:
        chosen, sentences = _choose_columns(looks, named)
        return Plan(source, "columns", Given(chosen), purpose, tuple(sentences))
    _check_fits(layout, looks)
    given = Given(COLUMNS.get(layout, {}), find_system(looks.rows))
    return Plan(source, layout, given, purpose, tuple(_say_layout(layout, looks)))


def build_examples(table: Table, columns: Mapping[str, str] | None = None, purpose: Purpose = Purpose.TRAIN) -> Built:
    """Turn rows into examples.

    Args:
        table: the raw rows.
        columns: which column is the ``question``, the ``reasoning``, the ``response``; those left out must have the
            native name.
        purpose: what a row must have.

    Raises:
        DataError: the layout is not clear, a column cannot be found, or no row is usable.
    """
    plan = choose_layout(table.columns, table.rows, columns, source=table.source, purpose=purpose)
    built = plan.build(table.rows, 1, _find_places(table))
    if not built.examples:
        raise refuse_all(table.source, built.counts.num_rows, built.quarantined[0].reason)
    sentences = [f"{note}." for note in table.notes] + plan.say(built.counts)
    return Built(built.examples, built.quarantined, sentences)


def refuse_all(source: str, num_rows: int, first_reason: str) -> DataError:
    """Return the error for a source of which no row became an example."""
    return DataError(
        f"None of the {count_rows(num_rows)} of '{source}' is usable; row 1: {first_reason}",
        "Question, reasoning and response must each be text and not empty",
        "Check which columns hold them: data.columns.question=…, data.columns.reasoning=…, data.columns.response=…",
    )


def locate(table: Table, row_number: int) -> tuple[str, int]:
    """Return the file that a row came from and its number there; for a Hub data set its id and the same number."""
    return _find_places(table).find(row_number)


def _find_places(table: Table) -> Places:
    if not table.parts:
        return Places((table.source,))
    before = [0]
    for part in table.parts[:-1]:
        before.append(before[-1] + part.num_rows)
    return Places(tuple(part.name for part in table.parts), tuple(before), len(table.parts) > 1)


# Recognising ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Look:
    """What there is to recognise a layout by."""

    source: str
    columns: list[str]
    rows: Sequence[RawRow]
    purpose: Purpose


def _recognise(looks: _Look) -> str | None:
    """Return the one layout that fits beyond doubt, or ``None`` where no layout has these columns."""
    found = find_layouts(looks.columns, looks.rows, grading=looks.purpose is Purpose.EVALUATE)
    if len(found) > 1:
        titles = " and ".join(LAYOUTS[name].title for name in found)
        raise DataError(
            f"'{looks.source}' may be {titles}; its columns are {_list(looks.columns)}",
            "One layout must be meant, and the first rows do not tell which",
            "Remove the columns that are not meant; for an evaluation set write its name in front: medmcqa=FILE",
        )
    if not found:
        named = list_named(looks.columns)
        if named:
            _check_fits(named[0], looks)
        return None
    _check_doubts(found[0], looks)
    return found[0]


def _check_fits(name: str, looks: _Look) -> None:
    """Refuse a layout whose columns are missing, or whose values are not there in any of the first rows."""
    layout = LAYOUTS[name]
    missing = [column for column in layout.needs if column not in looks.columns]
    if missing:
        raise DataError(
            f"'{looks.source}' has no column '{missing[0]}'; its columns are {_list(looks.columns)}",
            f"The {layout.title} layout has {_list(list(layout.needs))}",
            "Name the file that has them, or write them as such",
        )
    if not fits(name, looks.rows):
        reasons = (why_unusable(name, row, Given(COLUMNS.get(name, {}))) for row in looks.rows)
        first = next((reason for reason in reasons if reason), "the values are another layout's")
        raise DataError(
            f"'{looks.source}' has the columns of {layout.title}, but its rows do not read so; the first: {first}",
            "Columns are known by their names and by their values",
            f"Correct the rows, or name the columns: {_remedy(NATIVE, looks.columns)}",
        )


def _check_doubts(name: str, looks: _Look) -> None:
    """Ask where a column that the layout does not know may be the reasoning."""
    layout = LAYOUTS[name]
    known = {*layout.needs, *layout.takes}
    doubtful = [column for column in looks.columns if column not in known and _plain(column) in _ELSEWHERE["reasoning"]]
    if doubtful and looks.purpose is not Purpose.EVALUATE and "the reasoning" not in layout.needs.values():
        raise DataError(
            f"'{looks.source}' has the {layout.title} layout, and a column '{doubtful[0]}' that may be the reasoning",
            "Which column is the reasoning is never guessed",
            f"Name the columns: {_remedy(NATIVE, looks.columns)}; or remove '{doubtful[0]}'",
        )


def _say_layout(name: str, looks: _Look) -> list[str]:
    layout = LAYOUTS[name]
    fates = {column: fate for column, fate in {**layout.needs, **layout.takes}.items() if column in looks.columns}
    sentences = [f"Column '{column}' is {fate} (the {layout.title} layout)." for column, fate in fates.items()]
    return sentences + _say_unused(looks, fates)


def _say_unused(looks: _Look, used: Mapping[str, str] | Sequence[str]) -> list[str]:
    unused = [column for column in looks.columns if column not in used]
    return [f"Not used: {_list(unused)}."] if unused else []


def _choose_columns(looks: _Look, named: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return field → column for the fields, by name, and the sentences that say so."""
    chosen: dict[str, str] = {}
    sentences: list[str] = []
    for name, native in NATIVE.items():
        column = named.get(name)
        if column is None:
            column = _find_native(looks, native)
            how = "a name medcot knows"
        elif column not in looks.columns:
            raise DataError(
                f"data.columns.{name}={column} names no column of '{looks.source}'",
                f"Its columns are {_list(looks.columns)}",
                did_you_mean(column, looks.columns),
            )
        else:
            how = f"as data.columns.{name} says"
        if column is not None:
            chosen[name] = column
            sentences.append(f"Column '{column}' is the {name} ({how}).")
    if "reasoning" not in chosen and "response" in chosen and _hold_thoughts(looks.rows, chosen["response"]):
        sentences.append(f"Column '{chosen['response']}' holds the reasoning too, up to </think>.")
    else:
        _check_chosen(looks, chosen)
    return chosen, sentences + _say_unused(looks, list(chosen.values()))


def _hold_thoughts(rows: Sequence[RawRow], column: str) -> bool:
    """Whether a column closes thinking somewhere; as a mere response it would be refused there."""
    return any("</think>" in value for row in rows if isinstance(value := row.get(column), str))


def _find_native(looks: _Look, native: str) -> str | None:
    """Return the column of the native name, else the only one that differs from it in case alone."""
    if native in looks.columns:
        return native
    variants = [column for column in looks.columns if column.strip().lower() == native.lower()]
    if len(variants) > 1:
        raise DataError(
            f"'{looks.source}' has {_list(variants)}, which differ in case only",
            "One column must be meant",
            "Name it under data.columns",
        )
    return variants[0] if variants else None


def _check_chosen(looks: _Look, chosen: Mapping[str, str]) -> None:
    """Raise where a field has no column, suggesting one, or where one column serves two fields."""
    missing = [name for name in NATIVE if name not in chosen]
    if missing:
        free = [column for column in looks.columns if column not in chosen.values()]
        lacks = " and ".join(f"the {name} ('{NATIVE[name]}')" for name in missing)
        raise DataError(
            f"'{looks.source}' has no column for {lacks}; its columns are {_list(looks.columns)}",
            "Each row needs a question, a reasoning and a response",
            f"Name the column: {_remedy(missing, free)}",
        )
    shared = [column for column, uses in Counter(chosen.values()).items() if uses > 1]
    if shared:
        fields = [name for name, column in chosen.items() if column == shared[0]]
        raise DataError(
            f"Column '{shared[0]}' is named as {' and '.join(fields)}",
            "Each field has a column of its own",
            f"Correct data.columns.{fields[-1]}",
        )


def _remedy(fields: Mapping[str, str] | Sequence[str], free: list[str]) -> str:
    return " ".join(f"data.columns.{name}={_suggest(name, free) or '…'}" for name in fields)


def _suggest(name: str, free: list[str]) -> str | None:
    """Return the free column whose name is nearest to what the field is called here or elsewhere."""
    plain = {_plain(column): column for column in free}
    for other in _ELSEWHERE[name]:
        near = difflib.get_close_matches(other.replace("_", ""), plain, n=1, cutoff=0.75)
        if near:
            return plain[near[0]]
    return None


def _plain(column: str) -> str:
    return re.sub(r"[\W_]+", "", column).lower()


def _list(names: list[str]) -> str:
    """Return up to twelve column names in quotation marks."""
    shown = ", ".join(f"'{name}'" for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
