"""Grade outputs that were made anywhere: a JSON Lines file in, each line back with its verdict.

A line holds ``output`` (a text, or null where generation broke), ``kind`` (letter, yesno, number or text) and ``gold``,
and where they apply:

- ``options``: letter → text, or a list of texts, for kind letter;
- ``unit``: of a number whose gold does not name it; ``"any"`` where no unit shall be judged;
- ``tolerance``: of a number. A number, or text that is one, is an absolute tolerance in gold's unit; ``"5%"`` is
  relative to gold; ``[lower, upper]`` are the limits themselves, as MedCalc-Bench states them;
- ``aliases``: a list of other right texts, for kind text;
- ``finish_reason`` or ``finish``: ``"length"`` where generation hit its limit, see rule 4 of ``grading``.

An ``output`` with neither ``<think>`` nor ``</think>`` is all answer, since most models do not think aloud and most
servers take the thinking out. Where the prompt itself opened the thinking, as R1's does, that would read thinking that
never closed as an answer; ``Thinking.FORCED`` says so. A field that does not apply may be null or empty; one that is
filled and has no meaning for the kind is an error, because it shows that the file and its reader disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from decimal import Context, Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, Never

from medcot.data.choices import read_options
from medcot.data.formats import parse_lines
from medcot.data.lines import Lines, no_rows, quote
from medcot.data.reading import UnusableRow
from medcot.errors import DataError, did_you_mean
from medcot.evaluate.answers import check_gradable, read_number
from medcot.evaluate.grading import grade
from medcot.evaluate.lenient import lenient
from medcot.evaluate.units import normalise_unit
from medcot.prompt import THINK_CLOSE, THINK_OPEN
from medcot.records import Allowance, AnswerKind, Completion, Example, Finish

VERDICT = ("outcome", "parsed", "lenient_outcome")  # what is put into a line
ANY_UNIT = "any"
_APPLIES = {"unit": AnswerKind.NUMBER, "tolerance": AnswerKind.NUMBER, "aliases": AnswerKind.TEXT}
_EXACT = Context(prec=200)  # limits are gold plus and minus a tolerance; the default 28 digits would round them


class Thinking(StrEnum):
    """How an output without a thinking tag is read."""

    TAGGED = "tagged"  # it is all answer
    FORCED = "forced"  # the prompt opened the thinking, so it is all thinking


def grade_file(
    path: Path | str,
    *,
    thinking: Thinking = Thinking.TAGGED,
    on_bad_line: Callable[[DataError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield each line of a JSON Lines file with ``outcome``, ``parsed`` and ``lenient_outcome`` put in.

    Other fields stay as they are; blank lines are passed over.

    Args:
        path: the file; packed if its name ends in .gz.
        thinking: how an output without a thinking tag is read.
        on_bad_line: called with what is wrong with a line that cannot be graded, which is then given back with
            ``error`` and without an outcome; without it, such a line is raised.

    Raises:
        DataError: the file cannot be read or has no lines, or a line cannot be graded; the message names the line.
    """
    path = Path(path)
    lines, is_empty = Lines(path, "JSON Lines", hashed=False), True
    try:
        for text in lines:
            row: dict[str, Any] = {"line": lines.number}  # what a line that is no JSON is given back as
            try:
                found = parse_lines(text.encode(), path, lines.number)
                if not found:
                    continue
                is_empty, row = False, found[0]
                graded = grade_line(row, f"Line {lines.number:,} of '{path}'", thinking=thinking)
            except DataError as error:
                if on_bad_line is None:
                    raise
                is_empty = False
                on_bad_line(error)
                graded = {key: value for key, value in row.items() if key not in VERDICT} | {"error": str(error)}
            yield graded
    finally:
        lines.close()
    if is_empty:
        raise no_rows(path, "holds no lines")


def grade_line(row: Mapping[str, Any], where: str, *, thinking: Thinking = Thinking.TAGGED) -> dict[str, Any]:
    """Return one line with its verdict put in; ``where`` names it in messages.

    Raises:
        DataError: it cannot be graded.
    """
    example = _read_example(row, where)
    output = _need(row, "output", where, "Write the model's text there, or null where generation broke")
    if output is not None and not isinstance(output, str):
        _refuse(where, "output", output, "'output' is a text, or null where generation broke", "Write it as a text")
    cut = "length" in (row.get("finish_reason"), row.get("finish"))
    completion = None if output is None else split_output(output, thinking, Finish.LENGTH if cut else Finish.EOS)
    strict = grade(example, completion)
    verdict = {"outcome": strict.outcome.value, "parsed": strict.parsed}
    return {**row, **verdict, "lenient_outcome": lenient(example, completion).outcome.value}


def split_output(text: str, thinking: Thinking, finish: Finish) -> Completion:
    """Return an output as a completion, its tokens not counted."""
    think, tag, answer = text.rpartition(THINK_CLOSE)
    is_open = not tag and (thinking is Thinking.FORCED or THINK_OPEN in text)
    if is_open:
        think, answer = text, ""
    return Completion(text, think.replace(THINK_OPEN, "").strip(), answer.strip(), not is_open, finish, 0, 0, 0)


def _read_example(row: Mapping[str, Any], where: str) -> Example:
    kinds = [kind.value for kind in AnswerKind]
    kind = _need(row, "kind", where, f"Write one of {', '.join(kinds)}")
    if kind not in kinds:
        _refuse(where, "kind", kind, f"'kind' is one of {', '.join(kinds)}", did_you_mean(str(kind), kinds))
    gold = _need(row, "gold", where, "Write the right answer there, or take the line out")
    kind = AnswerKind(kind)
    number = isinstance(gold, int | float) and not isinstance(gold, bool) and kind is AnswerKind.NUMBER
    if not number and not isinstance(gold, str):
        _refuse(where, "gold", gold, "'gold' is a text, or a number for kind number", "Write the right answer there")
    for field, owner in _APPLIES.items():
        if row.get(field) not in (None, "", []) and kind is not owner:
            _refuse(where, field, row[field], f"'{field}' applies to kind {owner.value}, not {kind.value}", "Remove it")
    gold, allowance = str(gold), Allowance(aliases=_read_aliases(row, where))
    if kind is AnswerKind.NUMBER:
        gold, allowance = _read_quantity(row, gold, where)
    options = _read_options(row, where) if kind is AnswerKind.LETTER else None
    example = Example(where, "", "", gold=gold, answer_kind=kind, options=options, allowance=allowance)
    try:
        check_gradable(example)
    except DataError as error:
        raise DataError(f"{where} has 'gold' {quote(gold)}", error.rule, "Mend the line") from error
    return example


def _read_quantity(row: Mapping[str, Any], gold: str, where: str) -> tuple[str, Allowance]:
    """Return gold with its unit, and the limits that the tolerance sets."""
    quantity, unit = read_number(gold), row.get("unit") or ""
    unit = unit.strip() if isinstance(unit, str) else unit
    if quantity is None:
        _refuse(where, "gold", gold, "Gold of kind number is a decimal number, with its unit or without", "Mend it")
    if not isinstance(unit, str):
        _refuse(where, "unit", unit, "'unit' is a text", "Write it as a text, or null for none")
    any_unit = unit.lower() == ANY_UNIT
    if unit and not any_unit:
        if quantity.unit and quantity.unit != normalise_unit(unit):
            _refuse(where, "unit", unit, f"Gold is {quote(gold)}, and has a unit of its own", "Keep one of the two")
        if read_number(f"0 {unit}") is None:
            _refuse(where, "unit", unit, "A unit begins with a letter, a sign like % or a /", "Write it like mL/h")
        gold = gold if quantity.unit else f"{gold} {unit}"
    tolerance = row.get("tolerance")
    limits = None if tolerance in (None, "", []) else _read_tolerance(tolerance, quantity.value, where)
    return gold, Allowance(limits, any_unit=any_unit)


def _read_tolerance(tolerance: object, gold: Decimal, where: str) -> tuple[str, str]:
    if isinstance(tolerance, list) and len(tolerance) == 2:
        limits = [_read_plain(limit) for limit in tolerance]
        if limits[0] is not None and limits[1] is not None:
            return str(limits[0]), str(limits[1])
    is_relative = isinstance(tolerance, str) and tolerance.strip().endswith("%")
    width = _read_plain(tolerance.strip()[:-1] if isinstance(tolerance, str) and is_relative else tolerance)
    if width is None or width < 0:
        rule = "A tolerance is a number of 0 or more in gold's unit, a text like '5%', or [lower, upper]"
        _refuse(where, "tolerance", tolerance, rule, "Write it in one of these forms")
    if is_relative:
        width = _EXACT.multiply(_EXACT.abs(gold), _EXACT.scaleb(width, -2))
    return str(_EXACT.subtract(gold, width)), str(_EXACT.add(gold, width))


def _read_plain(value: object) -> Decimal | None:
    """Return a number, or a text that is one without a unit."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    quantity = read_number(str(value))
    return quantity.value if quantity is not None and not quantity.unit else None


def _read_aliases(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    aliases = row.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        _refuse(where, "aliases", aliases, "'aliases' is a list of texts", "Write them as a list, or null for none")
    return tuple(aliases)


def _read_options(row: Mapping[str, Any], where: str) -> dict[str, str] | None:
    options = row.get("options")
    if options in (None, "", [], {}):
        return None
    try:
        return read_options(options, "options")[0]
    except UnusableRow as error:
        rule = f"Options are letter → text, or a list of texts; {error}"
        raise DataError(f"{where} has 'options' {quote(repr(options))}", rule, "Mend the line") from error


def _need(row: Mapping[str, Any], field: str, where: str, remedy: str) -> Any:
    if field not in row:
        rule = "Each line has the fields output, kind and gold"
        raise DataError(f"{where} has no field '{field}'", rule, remedy)
    return row[field]


def _refuse(where: str, field: str, value: object, rule: str, remedy: str) -> Never:
    shown = quote(value) if isinstance(value, str) else repr(value)
    raise DataError(f"{where} has '{field}' {shown}", rule, remedy)
