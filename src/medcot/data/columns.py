"""From raw rows to examples: which column is the question, the reasoning and the response, said in words.

Only the names of medical-o1-reasoning-SFT (Question, Complex_CoT, Response; in any case) are taken without being told.
Everything else is named by the user. The usual alternative, guessing by a list of likely names, is how the commonest
tools lose the reasoning of this very data set: they map Complex_CoT to a system prompt or drop it, training goes on,
and the loss still falls. So a guess is only ever offered, inside an error that shows the columns found.

A row that cannot be trained on as it stands (a field missing, null, empty, not text; stray think tags) is set aside
with its reason and counted; never repaired, never dropped in silence. The one change made to a text is to take off a
clean outer pair of ``<think>`` tags around the reasoning, because the prompt brings its own; it is counted and said.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from medcot.data.files import RawRow
from medcot.data.sources import Table
from medcot.errors import DataError, did_you_mean
from medcot.records import Example, Quarantined

NATIVE = {"question": "Question", "reasoning": "Complex_CoT", "response": "Response"}

# Names seen for each field elsewhere. They only word the suggestion of an error; nothing is mapped by them.
_ELSEWHERE = {
    "question": ("question", "prompt", "instruction", "input", "query", "problem"),
    "reasoning": ("reasoning", "cot", "complexcot", "chainofthought", "thinking", "think", "thought", "rationale"),
    "response": ("response", "answer", "output", "completion", "solution", "final_answer"),
}
_WRAPPED = re.compile(r"\s*<think>(.*)</think>\s*", re.DOTALL)
_TAG = re.compile(r"</?think>")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Built:
    """The examples, the rows set aside, and what happened in sentences."""

    examples: list[Example]
    quarantined: list[Quarantined]
    sentences: list[str]


class _UnusableRow(Exception):
    """The reason why one row is set aside; never leaves this module."""


def build_examples(table: Table, columns: Mapping[str, str] | None = None) -> Built:
    """Turn rows into examples.

    Args:
        table: the raw rows.
        columns: which column is the ``question``, the ``reasoning``, the ``response``; those left out must have the
            native name.

    Raises:
        DataError: a column cannot be found, or no row is usable.
    """
    chosen, sentences = _choose_columns(table, columns or {})
    examples: list[Example] = []
    quarantined: list[Quarantined] = []
    num_unwrapped = 0
    for number, row in enumerate(table.rows, start=1):
        file_name, row_in_file = locate(table, number)
        try:
            texts, unwrapped = _read_row(row, chosen)
        except _UnusableRow as unusable:
            where = f" ({file_name}, row {row_in_file:,})" if len(table.parts) > 1 else ""
            quarantined.append(Quarantined(number, f"{unusable}{where}", row))
            continue
        num_unwrapped += unwrapped
        row_id = make_id(table.source, number)
        examples.append(Example(row_id, texts["question"], file_name, texts["reasoning"], texts["response"]))
    if num_unwrapped:
        sentences.append(f"{_rows(num_unwrapped)} had <think> tags around the reasoning; they were taken off.")
    if quarantined:
        sentences.append(_count_reasons(table, quarantined))
    if not examples:
        raise DataError(
            f"None of the {_rows(len(table.rows))} of '{table.source}' is usable; row 1: {quarantined[0].reason}",
            "Question, reasoning and response must each be text and not empty",
            "Check which columns hold them: data.columns.question=…, data.columns.reasoning=…, data.columns.response=…",
        )
    return Built(examples, quarantined, sentences)


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


def locate(table: Table, row_number: int) -> tuple[str, int]:
    """Return the file that a row came from and its number there; for a Hub data set its id and the same number."""
    before = 0
    for part in table.parts:
        if row_number <= before + part.num_rows:
            return part.name, row_number - before
        before += part.num_rows
    return table.source, row_number


def _choose_columns(table: Table, named: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return field → column for the three fields, and the sentences that say so."""
    unknown = [key for key in named if key not in NATIVE]
    if unknown:
        raise DataError(
            f"columns names '{unknown[0]}'", "The fields are " + ", ".join(NATIVE), did_you_mean(unknown[0], NATIVE)
        )
    chosen: dict[str, str] = {}
    sentences = [f"{note}." for note in table.notes]
    for field, native in NATIVE.items():
        column = named.get(field)
        if column is None:
            column = _find_native(table, native)
            how = "a name medcot knows"
        elif column not in table.columns:
            raise DataError(
                f"data.columns.{field}={column} names no column of '{table.source}'",
                f"Its columns are {_list(table.columns)}",
                did_you_mean(column, table.columns),
            )
        else:
            how = f"as data.columns.{field} says"
        if column is not None:
            chosen[field] = column
            sentences.append(f"Column '{column}' is the {field} ({how}).")
    _check_chosen(table, chosen)
    unused = [column for column in table.columns if column not in chosen.values()]
    if unused:
        sentences.append(f"Not used: {_list(unused)}.")
    return chosen, sentences


def _find_native(table: Table, native: str) -> str | None:
    """Return the column of the native name, else the only one that differs from it in case alone."""
    if native in table.columns:
        return native
    variants = [column for column in table.columns if column.strip().lower() == native.lower()]
    if len(variants) > 1:
        raise DataError(
            f"'{table.source}' has {_list(variants)}, which differ in case only",
            "One column must be meant",
            "Name it under data.columns",
        )
    return variants[0] if variants else None


def _check_chosen(table: Table, chosen: Mapping[str, str]) -> None:
    """Raise where a field has no column, suggesting one, or where one column serves two fields."""
    missing = [field for field in NATIVE if field not in chosen]
    if missing:
        free = [column for column in table.columns if column not in chosen.values()]
        lacks = " and ".join(f"the {field} ('{NATIVE[field]}')" for field in missing)
        remedies = [f"data.columns.{field}={_suggest(field, free) or '…'}" for field in missing]
        raise DataError(
            f"'{table.source}' has no column for {lacks}; its columns are {_list(table.columns)}",
            "Each row needs a question, a reasoning and a response",
            f"Name the column: {' '.join(remedies)}",
        )
    shared = [column for column, uses in Counter(chosen.values()).items() if uses > 1]
    if shared:
        fields = [field for field, column in chosen.items() if column == shared[0]]
        raise DataError(
            f"Column '{shared[0]}' is named as {' and '.join(fields)}",
            "Each field has a column of its own",
            f"Correct data.columns.{fields[-1]}",
        )


def _suggest(field: str, free: list[str]) -> str | None:
    """Return the free column whose name is nearest to what the field is called here or elsewhere."""
    plain = {re.sub(r"[\W_]+", "", column).lower(): column for column in free}
    for name in _ELSEWHERE[field]:
        near = difflib.get_close_matches(name.replace("_", ""), plain, n=1, cutoff=0.75)
        if near:
            return plain[near[0]]
    return None


def _read_row(row: RawRow, chosen: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """Return the three texts of a row, and whether think tags were taken off."""
    texts = {field: _read_text(row, field, column) for field, column in chosen.items()}
    wrapped = _WRAPPED.fullmatch(texts["reasoning"])
    if wrapped is not None:
        texts["reasoning"] = wrapped[1].strip()
        if not texts["reasoning"]:
            raise _UnusableRow(f"the reasoning ('{chosen['reasoning']}') is empty between its <think> tags")
    for field, text in texts.items():
        tag = _TAG.search(text)
        if tag is not None:
            raise _UnusableRow(
                f"the {field} ('{chosen[field]}') holds a stray {tag[0]}, which would end or start thinking there"
            )
    return texts, wrapped is not None


def _read_text(row: RawRow, field: str, column: str) -> str:
    what = f"the {field} ('{column}')"
    if column not in row:
        raise _UnusableRow(f"{what} is missing")
    value = row[column]
    if value is None:
        raise _UnusableRow(f"{what} is null")
    if not isinstance(value, str):
        raise _UnusableRow(f"{what} is not text but {type(value).__name__}")
    if not value.strip():
        raise _UnusableRow(f"{what} is empty")
    if _LONE_SURROGATE.search(value):  # JSON's \ud83d without its second half: no tokenizer can encode it
        raise _UnusableRow(f"{what} holds half a character (a lone surrogate)")
    return value


def _count_reasons(table: Table, quarantined: list[Quarantined]) -> str:
    """Return one sentence with how many rows were set aside, and why, the commonest reason first."""
    reasons = Counter(item.reason.split(" (" + locate(table, item.row_number)[0])[0] for item in quarantined)
    listed = "; ".join(f"{count:,} because {reason}" for reason, count in reasons.most_common(6))
    more = f"; {len(reasons) - 6} more reasons" if len(reasons) > 6 else ""
    return f"{_rows(len(quarantined))} of {len(table.rows):,} set aside: {listed}{more}."


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _list(names: list[str]) -> str:
    """Return up to twelve column names in quotation marks."""
    shown = ", ".join(f"'{name}'" for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
