"""A row of the table of nasty answers, and short ways to write many."""

from __future__ import annotations

from dataclasses import dataclass

from medcot.records import Allowance, AnswerKind, Example, Outcome

C, W, U, F = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSED, Outcome.UNFINISHED
DRUGS = {"A": "Lisinopril", "B": "Metformin", "C": "Insulin glargine", "D": "Vitamin B"}


@dataclass(frozen=True, slots=True)
class Nasty:
    """One row; ``cut`` says that generation hit its length limit."""

    kind: AnswerKind
    gold: str
    output: str
    strict: Outcome
    parsed: str | None
    lenient: Outcome
    options: dict[str, str] | None = None
    allowance: Allowance | None = None
    cut: bool = False

    @property
    def example(self) -> Example:
        """What it is graded against."""
        return Example(
            "q1", "?", "test", gold=self.gold, answer_kind=self.kind, options=self.options, allowance=self.allowance
        )


def letters(*rows: tuple[object, ...], options: dict[str, str] | None = None, cut: bool = False) -> list[Nasty]:
    return [Nasty(AnswerKind.LETTER, *row, options=options, cut=cut) for row in rows]  # type: ignore[arg-type]


def words(*rows: tuple[object, ...]) -> list[Nasty]:
    return [Nasty(AnswerKind.YESNO, *row) for row in rows]  # type: ignore[arg-type]


def numbers(*rows: tuple[object, ...], allowance: Allowance | None = None, cut: bool = False) -> list[Nasty]:
    return [Nasty(AnswerKind.NUMBER, *row, allowance=allowance, cut=cut) for row in rows]  # type: ignore[arg-type]


def texts(*rows: tuple[object, ...], aliases: tuple[str, ...] = ()) -> list[Nasty]:
    return [Nasty(AnswerKind.TEXT, *row, allowance=Allowance(aliases=aliases)) for row in rows]  # type: ignore[arg-type]
