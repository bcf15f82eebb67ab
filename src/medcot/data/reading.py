"""What one raw row becomes, and the texts it is made of: read as written, or refused with the reason.

A text is never repaired. It is refused when it is missing, null, empty, no text, or holds what would open or close
thinking where it stands. What is done to texts on purpose (a pair of ``<think>`` tags around the reasoning taken off,
one text cut into reasoning and answer at ``</think>``) is a ``Change``, so that it can be counted and said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from medcot.data.formats import RawRow
from medcot.records import AnswerKind

_WRAPPED = re.compile(r"\s*<think>(.*)</think>\s*", re.DOTALL)
_TAG = re.compile(r"</?think>")


class UnusableRow(Exception):
    """The reason why one row is set aside; never leaves ``medcot.data``."""


class Change(StrEnum):
    """What was done to rows that were kept: the sentence behind the number of rows."""

    UNWRAPPED = "had <think> tags around the reasoning; they were taken off."
    SPLIT = "had reasoning and answer in one text; it was split at </think>."
    SYSTEM_LEFT_OUT = "had the system message that all rows share; it was left out."
    SYSTEM_KEPT = "had a system message of their own; it was put before the question."
    BLANK_OPTION = "had options without a text; they were left out."
    STEM_CUT = "listed the options in the question too; they stand there once now."
    NO_REASONING = "came without a reasoning."
    LABEL_HIDDEN = "had no right answer, as in a test set that hides its labels."


@dataclass(frozen=True, slots=True)
class Given:
    """What was settled for all rows when their layout was recognised.

    Attributes:
        columns: field → column, where the layout leaves that open.
        system: the system message that all rows share, or none.
    """

    columns: Mapping[str, str]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Fields:
    """What one row became; ``lacks`` is why it has no reasoning, where it has none."""

    question: str
    reasoning: str | None = None
    response: str | None = None
    options: dict[str, str] | None = None
    gold: str | None = None
    answer_kind: AnswerKind | None = None
    topic: str | None = None
    lacks: str = "it has no reasoning"
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Thought:
    """A reasoning and what follows it; ``lacks`` is why there is none, where there is none."""

    reasoning: str | None
    answer: str
    lacks: str = ""
    changes: tuple[Change, ...] = ()


def read_text(row: RawRow, column: str, field: str, *, tags: bool = False) -> str:
    """Return a text as it is; ``tags`` says that think tags in it are the caller's to judge.

    Raises:
        UnusableRow: it is missing, null, empty, no text, cannot be encoded, or holds a think tag.
    """
    text, why = read_optional(row, column, field)
    if text is None:
        raise UnusableRow(why)
    if not tags:
        check_tags(text, f"the {field} ('{column}')")
    return text


def read_optional(row: RawRow, column: str, field: str) -> tuple[str | None, str]:
    """Return a text, or ``None`` and the reason where it is missing, null or empty; think tags are left to the caller.

    Raises:
        UnusableRow: it is no text, or cannot be encoded.
    """
    what = f"the {field} ('{column}')"
    if column not in row:
        return None, f"{what} is missing"
    value = row[column]
    if value is None:
        return None, f"{what} is null"
    text = check_text(value, what)
    return (text, "") if text and not text.isspace() else (None, f"{what} is empty")


def check_text(value: object, what: str) -> str:
    """Return a value that must be text.

    Raises:
        UnusableRow: it is not, or no tokenizer could encode it.
    """
    if not isinstance(value, str):
        raise UnusableRow(f"{what} is not text but {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON's \ud83d without its second half
            raise UnusableRow(f"{what} holds half a character (a lone surrogate)") from None
    return value


def check_tags(text: str, what: str) -> None:
    """Refuse a text that would end or start thinking where it stands.

    Raises:
        UnusableRow: it holds a think tag.
    """
    tag = _TAG.search(text)
    if tag is not None:
        raise UnusableRow(f"{what} holds a stray {tag[0]}, which would end or start thinking there")


def read_reasoning(row: RawRow, column: str) -> Thought:
    """Return the reasoning of a column of its own, without a clean outer pair of think tags; ``answer`` is empty.

    Raises:
        UnusableRow: it is no text, or holds stray think tags.
    """
    text, why = read_optional(row, column, "reasoning")
    if text is None:
        return Thought(None, "", why)
    return unwrap(text, f"the reasoning ('{column}')")


def unwrap(text: str, what: str) -> Thought:
    """Take a clean outer pair of think tags off a reasoning.

    Raises:
        UnusableRow: it holds other think tags.
    """
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is None:
        check_tags(text, what)
        return Thought(text, "")
    inner = wrapped[1].strip()
    check_tags(inner, what)
    if not inner:
        return Thought(None, "", f"{what} is empty between its <think> tags")
    return Thought(inner, "", "", (Change.UNWRAPPED,))


def split_answer(text: str, what: str) -> Thought:
    """Cut ``<think>reasoning</think>answer`` in two; the opening tag may be missing, where the prompt brought it.

    Raises:
        UnusableRow: other think tags, or nothing behind ``</think>``.
    """
    if "</think>" not in text:
        check_tags(text, what)
        return Thought(None, text, f"{what} holds no </think>, so no reasoning")
    before, _, after = text.partition("</think>")
    inner = before.lstrip().removeprefix("<think>").strip()
    check_tags(inner, f"the reasoning in {what}")
    check_tags(after, what)
    answer = after.strip()
    if not answer:
        raise UnusableRow(f"{what} is empty behind </think>")
    if not inner:
        return Thought(None, answer, f"the reasoning in {what} is empty between its <think> tags")
    return Thought(inner, answer, "", (Change.SPLIT,))


def read_topic(row: RawRow, *columns: str) -> str | None:
    """Return the first of these columns that holds a text."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
    return None


def read_columns(row: RawRow, given: Given) -> Fields:
    """Read question, reasoning and response, each from a column of its own; or the last two from one."""
    columns = given.columns
    question = read_text(row, columns["question"], "question")
    if "reasoning" in columns:
        thought = read_reasoning(row, columns["reasoning"])
        response = read_text(row, columns["response"], "response")
    else:
        what = f"the response ('{columns['response']}')"
        thought = split_answer(read_text(row, columns["response"], "response", tags=True), what)
        response = thought.answer
    return Fields(question, thought.reasoning, response, lacks=thought.lacks, changes=thought.changes)
