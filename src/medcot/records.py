"""The nouns that travel between rooms: plain frozen records, no behaviour beyond naming their own parts.

Everything here is standard library only, so that any module, however early in the import order, may use it.
A span is a half-open range ``(start, stop)`` of token positions in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

Span = tuple[int, int]


class AnswerKind(StrEnum):
    """What a gold answer is, and so how it is graded."""

    LETTER = "letter"
    YESNO = "yesno"  # yes, no or maybe
    NUMBER = "number"  # a number with its unit, if it has one
    TEXT = "text"


class Outcome(StrEnum):
    """What became of one answer; everything but ``CORRECT`` counts as wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"  # thinking closed, but no final answer in the documented form
    UNFINISHED = "unfinished"  # thinking never closed
    FAILED = "failed"  # no text at all: generation itself broke


class Finish(StrEnum):
    """Why generation stopped."""

    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Allowance:
    """In what an answer may differ from gold and still be right.

    ``limits`` are the smallest and the largest right number, both included, as decimal text that no float has rounded;
    ``aliases`` are other right texts; ``any_unit`` says that gold's data set states no unit, so that none is judged.
    """

    limits: tuple[str, str] | None = None
    aliases: tuple[str, ...] = ()
    any_unit: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One medical problem; ``reasoning`` and ``response`` are what a model is trained to write."""

    id: str
    question: str
    source: str  # where it came from, e.g. "builtin:clinic" or a file name
    reasoning: str | None = None  # the chain of thought, without tags
    response: str | None = None
    options: dict[str, str] | None = None  # letter -> text
    gold: str | None = None
    answer_kind: AnswerKind | None = None
    topic: str | None = None  # a clinic family or a benchmark's subject; reports count by it
    allowance: Allowance | None = None  # None: only gold itself is right


@dataclass(frozen=True, slots=True)
class Row:
    """An example as tokens: ``labels[i]`` is ``input_ids[i]`` where the token carries loss, -100 elsewhere.

    ``think`` ends with the tokens of ``</think>``; ``answer`` is what lies between it and ``eos``.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    question: Span
    think: Span
    answer: Span
    eos: Span

    @property
    def num_tokens(self) -> int:
        """All tokens of the row."""
        return len(self.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss; the first token of a row is never predicted, so it never counts."""
        return sum(label != -100 for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated text split at the last ``</think>``; ``think`` is all of it when the tag never came."""

    text: str
    think: str
    answer: str
    closed: bool  # whether </think> was written
    finish: Finish
    num_prompt_tokens: int
    num_think_tokens: int
    num_answer_tokens: int


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one completion: ``parsed`` is the answer that was read, ``None`` where none could be."""

    outcome: Outcome
    parsed: str | None = None


class Problem(StrEnum):
    """What keeps a field of a raw row from being used, for programs; people read the reason."""

    MISSING = "missing"
    NULL = "null"
    EMPTY = "empty"
    TYPE = "type"  # no text, no list, no number, where one must be
    ENCODING = "encoding"  # no tokenizer could take it
    TAGS = "tags"  # it would open or close thinking
    FORM = "form"  # it does not read as its layout says
    CONFLICT = "conflict"  # two parts of the row say different things


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A raw row that could not become an example, kept with the reason.

    ``field`` is the part of an example that it fails in ("question", "reasoning", "response", "options", "gold",
    "chat"), where it is one.
    """

    row_number: int  # 1-based, as an editor or spreadsheet counts
    reason: str
    row: dict[str, object] = field(default_factory=dict)
    field: str | None = None
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """The folder a job fills."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.folder / "recipe.yaml"

    @property
    def facts(self) -> Path:
        """``run.json``: every fact of the run, for machines."""
        return self.folder / "run.json"

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``: one line a logging step."""
        return self.folder / "metrics.jsonl"

    @property
    def data(self) -> Path:
        """Quarantined rows and what the data was."""
        return self.folder / "data"

    @property
    def samples(self) -> Path:
        """``before.jsonl`` and ``after.jsonl``: every question asked and every answer given."""
        return self.folder / "samples"

    @property
    def checkpoints(self) -> Path:
        """Trainer checkpoints, for ``--resume``."""
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The LoRA adapter and tokenizer, in PEFT's format."""
        return self.folder / "adapter"

    @property
    def merged(self) -> Path:
        """16-bit weights with the adapter merged in, when asked for."""
        return self.folder / "merged"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.folder / "report.html"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / "README.md"
