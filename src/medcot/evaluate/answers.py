"""What stands behind ``Final answer:``, by the kind of the gold answer: one pattern a kind, and nothing guessed.

A kind's reader returns ``None`` for what it cannot read, which makes the answer unparsed; what it can read is right or
wrong. Each pattern is the narrowest that lets pass what the prompt asks for:

- LETTER: one ASCII letter, in parentheses if it likes: ``B``, ``b.``, ``(B)``, ``B)``. Behind the letter and ``.``,
  ``)`` or ``:`` may stand exactly the text of that option (``B. Metformin``). With any other text behind it, letter and
  text may name two answers, and choosing one of them is where published extractors part by points; so it is not read.
  Nor is an option's text without its letter. A letter that no option has is read, and wrong.
- YESNO: ``yes``, ``no`` or ``maybe``, in any case; no reason behind it.
- NUMBER: a decimal number, if it likes times a power of ten (``1.2e5``, ``1.2 × 10^5``), then its unit. Values are
  compared exactly, as decimals, so 85 is 85.0 and 1,200 is 1200; a comma only groups thousands. Where the item has
  limits, both included, any value within them is right. Units are compared by ``normalise_unit``; one that is missing,
  added or different is wrong, and percent is not a fraction. No range, no "about", no working. Where the item's data
  set states no unit, any is right, as long as it is one unit and nothing more ("25 to 30" is not).
- TEXT: the same as gold or one of its aliases, by the steps of ``phrases``; dates are text too, each accepted way to
  write one an alias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from medcot.errors import DataError
from medcot.evaluate.phrases import is_same_phrase, normalise_text
from medcot.evaluate.units import normalise_unit
from medcot.records import Allowance, AnswerKind, Example

WORDS = ("yes", "no", "maybe")

_LETTER = re.compile(r"\(?(?P<letter>[A-Za-z])\)?")
_LETTER_AND_TEXT = re.compile(r"\(?(?P<letter>[A-Za-z])(?:\)[.:]?|[.:])[ \t]+(?P<text>\S.*)")
# ASCII digits only: Decimal would also read other scripts' digits, and no gold answer is written in them. Exponents end
# at three digits, which no measurement needs, so that no answer can make a comparison costly.
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<digits>[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?![0-9.])"
    r"|[ \t]*[×xX][ \t]*10(?:\^(?P<power>[+-]?[0-9]{1,3})(?![0-9.])|(?P<raised>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})))?"
    r"[ \t]*(?P<unit>.*)"
)
_RAISED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
# A unit starts with a letter, a sign of its own, or "/min". Anything else ("-90 mL", "/2", ",5 mg") is not a unit, and
# so what stood before it was not the whole number.
_UNIT_START = re.compile(r"(?:[^\W\d_]|[%‰°×]|/[ \t]*[^\W\d_])")
# One unit of whatever name: digits only as an exponent, or behind a slash as in mL/min/1.73 m2.
_ONE_UNIT = re.compile(
    r"(?!.*\b(?:to|or|and|than|plus|minus|but|if)\b)"
    r"(?:[^\W\d_](?:\^?[+-]?[1-4]\b)?|[%‰°²³⁻¹μ·.' \t]|/(?:[ \t]*[0-9]+(?:\.[0-9]+)?\b)?)*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number, its unit as ``normalise_unit`` spells it (``""`` where it has none), and the unit as written."""

    value: Decimal
    unit: str
    written: str


@dataclass(frozen=True, slots=True)
class Read:
    """An answer that could be read: in words for people, and whether it is right."""

    parsed: str
    right: bool


def judge(answer: str, example: Example) -> Read | None:
    """Read what stands behind ``Final answer:``; ``None`` where it has not the form of the gold answer's kind.

    Raises:
        DataError: the example cannot be graded, see ``check_gradable``.
    """
    gold, kind = check_gradable(example)
    allowance = example.allowance or Allowance()
    if kind is AnswerKind.LETTER:
        letter = read_letter(answer, example.options)
        return None if letter is None else Read(letter, letter == read_letter(gold, example.options))
    if kind is AnswerKind.YESNO:
        word = read_word(answer)
        return None if word is None else Read(word, word == read_word(gold))
    if kind is AnswerKind.NUMBER:
        given, wanted = read_number(answer), read_number(gold)
        assert wanted is not None, "check_gradable read it"
        if given is None or (allowance.any_unit and not _ONE_UNIT.fullmatch(given.written)):
            return None
        return Read(answer, _is_right_number(given, wanted, allowance))
    if not normalise_text(answer):
        return None
    return Read(answer, is_same_phrase(answer, (gold, *allowance.aliases)))


def read_letter(answer: str, options: Mapping[str, str] | None) -> str | None:
    """Return the letter, in upper case, of an answer of kind LETTER."""
    plain = answer.strip()
    match = _LETTER.fullmatch(plain.removesuffix("."))
    if match:
        return match["letter"].upper()
    match = _LETTER_AND_TEXT.fullmatch(plain)
    letter = match["letter"].upper() if match else ""
    if match and options and letter in options and is_same_phrase(match["text"], [options[letter]]):
        return letter
    return None


def read_word(answer: str) -> str | None:
    """Return the word, in lower case, of an answer of kind YESNO."""
    word = answer.strip().removesuffix(".").rstrip().lower()
    return word if word in WORDS else None


def read_number(answer: str) -> Quantity | None:
    """Return value and unit of an answer of kind NUMBER."""
    plain = answer.strip().removesuffix(".").rstrip().replace("\N{MINUS SIGN}", "-")
    match = _NUMBER.fullmatch(plain)
    if match is None or (match["unit"] and not _UNIT_START.match(match["unit"])):
        return None
    exponent = match["exponent"] or match["power"] or (match["raised"] or "0").translate(_RAISED)
    value = Decimal(f"{match['sign']}{match['digits'].replace(',', '')}E{exponent}")
    return Quantity(value, normalise_unit(match["unit"]), match["unit"])


def read_limits(allowance: Allowance) -> tuple[Decimal, Decimal] | None:
    """Return the limits as numbers; ``None`` where there are none, or where they are no two numbers in order."""
    if allowance.limits is None:
        return None
    lower, upper = (read_number(limit) for limit in allowance.limits)
    if lower is None or upper is None or lower.unit or upper.unit or lower.value > upper.value:
        return None
    return lower.value, upper.value


def check_gradable(example: Example) -> tuple[str, AnswerKind]:
    """Return gold and kind of an example that can be graded.

    Raises:
        DataError: it has no gold answer, or one that has not the form of its kind, or limits that do not hold it.
    """
    gold, kind = example.gold, example.answer_kind
    if gold is None or kind is None:
        raise DataError(
            f"example '{example.id}' of {example.source} has gold {gold!r} and kind {kind and kind.value!r}",
            "Only an example with a gold answer and its kind can be graded",
            "Leave it out of the evaluation set, or give it both",
        )
    rule = _find_fault(gold, kind, example.options, example.allowance or Allowance())
    if rule:
        raise DataError(f"example '{example.id}' of {example.source} has gold {gold!r}", rule, "Mend the item")
    return gold, kind


def _find_fault(gold: str, kind: AnswerKind, options: Mapping[str, str] | None, allowance: Allowance) -> str | None:
    """Return the rule that an item breaks, or ``None``."""
    if kind is AnswerKind.LETTER:
        letter = read_letter(gold, options)
        if letter is None or (options and letter not in options):
            named = f", one of {', '.join(options)}" if options else ""
            return f"A gold answer of kind 'letter' is one letter{named}"
    elif kind is AnswerKind.YESNO and read_word(gold) is None:
        return "A gold answer of kind 'yesno' is yes, no or maybe"
    elif kind is AnswerKind.TEXT and not normalise_text(gold):
        return "A gold answer of kind 'text' is not empty"
    elif kind is AnswerKind.NUMBER:
        quantity, limits = read_number(gold), read_limits(allowance)
        if quantity is None:
            return "A gold answer of kind 'number' is a decimal number with its unit, if it has one"
        if allowance.limits is not None and (limits is None or not limits[0] <= quantity.value <= limits[1]):
            return f"Limits are two numbers with gold between them, not {' and '.join(allowance.limits)}"
    return None


def _is_right_number(given: Quantity, wanted: Quantity, allowance: Allowance) -> bool:
    limits = read_limits(allowance)
    close = given.value == wanted.value if limits is None else limits[0] <= given.value <= limits[1]
    return close and (allowance.any_unit or given.unit == wanted.unit)
