"""Strict grading: one documented pattern, and whatever does not match it is wrong, counted and shown.

Published scores of the very same outputs differ by up to 11 points with the extractor, because most extractors guess:
they take the first letter that looks like an option, or the better of the first and the last match. Here nothing is
guessed. The rules, all of them:

1. Only what follows the last ``</think>`` counts (``Completion.answer``). No such tag: ``UNFINISHED``.
2. The last non-empty line must be ``Final answer: X``, in any case. Markdown bold (``**``) on that line is ignored,
   because models add it by habit and it changes no meaning; nothing else may stand around it. Otherwise ``UNPARSED``.
3. An earlier line of that form with another ``X`` makes the answer ``UNPARSED``: who answers twice has not answered.
   The same ``X`` again is fine; "same" means equal after case, white space and a trailing period are set aside.
4. Generation that hit its length limit before that line ended is ``UNPARSED``: "Final answer: 12" may have been on its
   way to 120.
5. ``X`` is then read by the kind of the gold answer; if it cannot be, ``UNPARSED``; if it can, right or ``WRONG``.
   - LETTER: one ASCII letter, in parentheses if it likes: ``B``, ``b.``, ``(B)``, ``B)``.
   - NUMBER: a decimal number, then its unit. Values are compared exactly, as decimals, so 85 is 85.0 and 1,200 is 1200;
     a comma only groups thousands. Units are compared after ``normalise_unit``; a unit that is missing, added or
     different is ``WRONG``. No range, no "about", no working.
   - TEXT: equality after Unicode compatibility form, case, white space and a trailing period are set aside.

A completion that was never produced (``None``) is ``FAILED``. Every outcome but ``CORRECT`` counts as wrong.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from medcot.errors import DataError
from medcot.records import AnswerKind, Completion, Example, Finish, Grade, Outcome

_FINAL_LINE = re.compile(r"final[ \t]+answer[ \t]*:[ \t]*(?P<answer>.*)", re.IGNORECASE)
_LETTER = re.compile(r"\(?(?P<letter>[A-Za-z])\)?")
# ASCII digits only: Decimal would also read other scripts' digits, and no gold answer is written in them.
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<digits>[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"[ \t]*(?P<unit>.*)"
)
# A unit starts with a letter, a sign of its own, or "/min". Anything else ("-90 mL", "/2", ",5 mg") is not a unit, and
# so what stood before it was not the whole number.
_UNIT_START = re.compile(r"(?:[^\W\d_]|[%‰°×]|/[ \t]*[^\W\d_])")

# One spelling each for the units of bedside arithmetic. Only spellings of the same unit stand here: nothing is
# converted, so mg and g, or mEq and mmol, stay different.
UNIT_ALIASES: dict[str, str] = {
    **dict.fromkeys(["mcg", "μg", "ug", "microgram", "micrograms"], "μg"),
    **dict.fromkeys(["mg", "mgs", "milligram", "milligrams"], "mg"),
    **dict.fromkeys(["g", "gm", "gms", "gram", "grams"], "g"),
    **dict.fromkeys(["kg", "kgs", "kilogram", "kilograms"], "kg"),
    **dict.fromkeys(["ml", "mls", "milliliter", "milliliters", "millilitre", "millilitres"], "ml"),
    **dict.fromkeys(["dl", "deciliter", "deciliters", "decilitre", "decilitres"], "dl"),
    **dict.fromkeys(["l", "liter", "liters", "litre", "litres"], "l"),
    **dict.fromkeys(["s", "sec", "secs", "second", "seconds"], "s"),
    **dict.fromkeys(["min", "mins", "minute", "minutes"], "min"),
    **dict.fromkeys(["h", "hr", "hrs", "hour", "hours"], "h"),
    **dict.fromkeys(["d", "day", "days"], "day"),
    **dict.fromkeys(["wk", "wks", "week", "weeks"], "week"),
    **dict.fromkeys(["mo", "month", "months"], "month"),
    **dict.fromkeys(["y", "yr", "yrs", "year", "years"], "year"),
    **dict.fromkeys(["unit", "units"], "unit"),
    **dict.fromkeys(["point", "points"], "point"),
    **dict.fromkeys(["drop", "drops", "gtt", "gtts"], "drop"),
    **dict.fromkeys(["tablet", "tablets"], "tablet"),
    **dict.fromkeys(["breath", "breaths"], "breath"),
    **dict.fromkeys(["beat", "beats"], "beat"),
    **dict.fromkeys(["%", "percent"], "%"),
}


def parse_final_answer(text: str) -> str | None:
    """Return ``X`` of the closing line ``Final answer: X``, or ``None`` where rules 2 and 3 above are not met."""
    lines = [line.replace("**", "").strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    matches = [match for line in lines if (match := _FINAL_LINE.fullmatch(line))]
    if not matches or matches[-1].string != lines[-1]:
        return None
    answers = [match["answer"].strip() for match in matches]
    final = answers[-1]
    if not final or _FINAL_LINE.search(final) or len({normalise_text(answer) for answer in answers}) > 1:
        return None
    return final


def grade(example: Example, completion: Completion | None) -> Grade:
    """Return the verdict on one completion by the rules above.

    Args:
        example: the problem; it must carry ``gold`` and ``answer_kind``.
        completion: what the model wrote, or ``None`` when generation itself broke.

    Raises:
        DataError: the example has no gold answer, or its gold answer does not have the form of its kind.
    """
    if example.gold is None or example.answer_kind is None:
        raise DataError(
            f"example '{example.id}' of {example.source} has gold {example.gold!r} and kind {example.answer_kind!r}",
            "Only an example with a gold answer and its kind can be graded",
            "Leave it out of the evaluation set, or give it both",
        )
    if completion is None:
        return Grade(Outcome.FAILED)
    if not completion.closed:
        return Grade(Outcome.UNFINISHED)
    cut = completion.finish is Finish.LENGTH and not completion.text.endswith("\n")
    final = None if cut else parse_final_answer(completion.answer)
    if final is None:
        return Grade(Outcome.UNPARSED)
    given, gold = _read(final, example.answer_kind), _read(example.gold, example.answer_kind)
    if gold is None:
        raise DataError(
            f"example '{example.id}' of {example.source} has gold {example.gold!r}",
            f"A gold answer of kind '{example.answer_kind}' must be readable as one",
            "Mend the gold answer or its kind",
        )
    if given is None:
        return Grade(Outcome.UNPARSED)
    return Grade(Outcome.CORRECT if given == gold else Outcome.WRONG, parsed=final)


def normalise_text(text: str) -> str:
    """Return text with compatibility forms, case, runs of white space and a trailing period set aside."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def normalise_unit(unit: str) -> str:
    """Return one spelling of a unit: ``"mL / hr"``, ``"ml/h"`` and ``"mL per hour"`` are all ``"ml/h"``.

    Case and white space are set aside, ``m²`` and ``m^2`` are ``m2``, the micro sign is the Greek letter, "per" is "/",
    and each word goes through ``UNIT_ALIASES``. Case may go because no two units of the table differ by it alone.
    """
    plain = unicodedata.normalize("NFKC", unit).casefold().replace("^", "").replace("×", "x")
    plain = re.sub(r"\bper\b", "/", plain)
    parts = ["".join(UNIT_ALIASES.get(word, word) for word in part.split()) for part in plain.split("/")]
    return "/".join(parts).removesuffix(".")


def _read(answer: str, kind: AnswerKind) -> object | None:
    """Return the answer in a form that compares equal exactly when two answers are the same; ``None``: not readable."""
    if kind is AnswerKind.LETTER:
        match = _LETTER.fullmatch(answer.strip().removesuffix("."))
        return match["letter"].upper() if match else None
    if kind is AnswerKind.NUMBER:
        return _read_number(answer)
    return normalise_text(answer) or None


def _read_number(answer: str) -> tuple[Decimal, str] | None:
    plain = answer.strip().removesuffix(".").rstrip().replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")
    match = _NUMBER.fullmatch(plain)
    if match is None or (match["unit"] and not _UNIT_START.match(match["unit"])):
        return None
    return Decimal(match["sign"] + match["digits"].replace(",", "")), normalise_unit(match["unit"])
