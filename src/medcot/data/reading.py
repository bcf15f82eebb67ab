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
from medcot.records import AnswerKind, Problem

_WRAPPED = re.compile(r"\s*<think>(.*)</think>\s*", re.DOTALL)
_TAG = re.compile(r"</?think>")


class UnusableRow(Exception):
    """The reason why one row is set aside; never leaves ``medcot.data``.

    Attributes:
        field: the part of an example that it fails in, where it is one.
        problem: what is wrong with that part.
    """

    def __init__(self, reason: str, field: str | None = None, problem: Problem | None = None) -> None:
        super().__init__(reason)
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a row: the field that it becomes, and what messages call it."""

    field: str
    words: str

    def __str__(self) -> str:
        return self.words

    def refuse(self, says: str, problem: Problem) -> UnusableRow:
        """Return the reason to raise; ``says`` goes on where ``words`` end."""
        return UnusableRow(f"{self.words} {says}", self.field, problem)


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
    """What one row became; ``lacks`` is why it has no reasoning, where that is more than that there is none."""

    question: str
    reasoning: str | None = None
    response: str | None = None
    options: dict[str, str] | None = None
    gold: str | None = None
    answer_kind: AnswerKind | None = None
    topic: str | None = None
    lacks: UnusableRow | None = None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Thought:
    """A reasoning and what follows it; ``lacks`` is why there is none, where there is none."""

    reasoning: str | None
    answer: str
    lacks: UnusableRow | None = None
    changes: tuple[Change, ...] = ()


def read_text(row: RawRow, column: str, field: str, *, called: str = "", tags: bool = False) -> str:
    """Return a text as it is; ``tags`` says that think tags in it are the caller's to judge.

    Args:
        row: the row.
        column: where the text is.
        field: the field that it becomes.
        called: what messages call it, where that is another name.
        tags: see above.

    Raises:
        UnusableRow: it is missing, null, empty, no text, cannot be encoded, or holds a think tag.
    """
    what = Part(field, f"the {called or field} ('{column}')")
    text = _read_optional(row, column, what)
    if isinstance(text, UnusableRow):
        raise text
    if not tags:
        check_tags(text, what)
    return text


def _read_optional(row: RawRow, column: str, what: Part) -> str | UnusableRow:
    """Return a text, or the reason why there is none: missing, null, empty; think tags are left to the caller.

    Raises:
        UnusableRow: it is no text, or cannot be encoded.
    """
    if column not in row:
        return what.refuse("is missing", Problem.MISSING)
    value = row[column]
    if value is None:
        return what.refuse("is null", Problem.NULL)
    text = check_text(value, what)
    return text if text and not text.isspace() else what.refuse("is empty", Problem.EMPTY)


def check_text(value: object, what: Part) -> str:
    """Return a value that must be text.

    Raises:
        UnusableRow: it is not, or no tokenizer could encode it.
    """
    if not isinstance(value, str):
        raise what.refuse(f"is not text but {type(value).__name__}", Problem.TYPE)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON's \ud83d without its second half
            raise what.refuse("holds half a character (a lone surrogate)", Problem.ENCODING) from None
    return value


def check_tags(text: str, what: Part) -> None:
    """Refuse a text that would end or start thinking where it stands.

    Raises:
        UnusableRow: it holds a think tag.
    """
    tag = _TAG.search(text)
    if tag is not None:
        raise what.refuse(f"holds a stray {tag[0]}, which would end or start thinking there", Problem.TAGS)


def read_reasoning(row: RawRow, column: str) -> Thought:
    """Return the reasoning of a column of its own, without a clean outer pair of think tags; ``answer`` is empty.

    Raises:
        UnusableRow: it is no text, or holds stray think tags.
    """
    what = Part("reasoning", f"the reasoning ('{column}')")
    text = _read_optional(row, column, what)
    return Thought(None, "", text) if isinstance(text, UnusableRow) else unwrap(text, what)


def unwrap(text: str, what: Part) -> Thought:
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
        return Thought(None, "", what.refuse("is empty between its <think> tags", Problem.EMPTY))
    return Thought(inner, "", changes=(Change.UNWRAPPED,))


def split_answer(text: str, what: Part) -> Thought:
    """Cut ``<think>reasoning</think>answer`` in two; the opening tag may be missing, where the prompt brought it.

    Raises:
        UnusableRow: other think tags, or nothing behind ``</think>``.
    """
    if "</think>" not in text:
        check_tags(text, what)
        lacks = f"{what} holds no </think>, so no reasoning"
        return Thought(None, text, UnusableRow(lacks, "reasoning", Problem.MISSING))
    before, _, after = text.partition("</think>")
    inner = before.lstrip().removeprefix("<think>").strip()
    thinking = Part("reasoning", f"the reasoning in {what}")
    check_tags(inner, thinking)
    check_tags(after, what)
    answer = after.strip()
    if not answer:
        raise what.refuse("is empty behind </think>", Problem.EMPTY)
    if not inner:
        return Thought(None, answer, thinking.refuse("is empty between its <think> tags", Problem.EMPTY))
    return Thought(inner, answer, changes=(Change.SPLIT,))


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
        what = Part("response", f"the response ('{columns['response']}')")
        thought = split_answer(read_text(row, columns["response"], "response", tags=True), what)
        response = thought.answer
    return Fields(question, thought.reasoning, response, lacks=thought.lacks, changes=thought.changes)
