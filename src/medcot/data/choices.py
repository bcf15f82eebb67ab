"""Multiple choice: options in the many forms that data sets write them, the right one as a letter, one stated form.

Whatever a data set calls them, options become ``{"A": text, "B": text, …}`` without gaps, the right one a letter of
them, and the question as a model reads it is the stem, an empty line, and one line ``A. text`` an option. That form is
stated here once; whoever wants the stem alone (to compare questions) takes ``find_stem``.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence

from medcot.data.reading import Change, Part, UnusableRow, check_tags, check_text
from medcot.records import Example, Problem

_LABELS = (("key", "value"), ("letter", "content"), ("label", "text"), ("aid", "atext"))
_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*", re.MULTILINE)
_LISTED = re.compile(r"\n\s*Answer Choices:\s*\(A\).*\Z", re.DOTALL)


def format_question(stem: str, options: Mapping[str, str]) -> str:
    """Return the question with its options, as a model reads it."""
    return stem.rstrip() + _format_options(options)


def find_stem(example: Example) -> str:
    """Return an example's question without its options."""
    return example.question.removesuffix(_format_options(example.options)) if example.options else example.question


def _format_options(options: Mapping[str, str]) -> str:
    return "\n\n" + "\n".join(f"{letter}. {text}" for letter, text in options.items())


def read_options(value: object, column: str) -> tuple[dict[str, str], tuple[Change, ...]]:
    """Return letter → text of a list or an object of options, or of a text that is one of these in JSON or in lines.

    Raises:
        UnusableRow: there are not from 2 to 26 of them, or they cannot be told.
    """
    what = Part("options", f"the options ('{column}')")
    pairs = _read_pairs(value, what)
    kept = [(key, text) for key, text in pairs if text is not None and not (isinstance(text, str) and not text.strip())]
    letters = [key for key, _ in kept]
    if len(letters) < 2:
        raise what.refuse("are fewer than two", Problem.MISSING)
    if letters != list(string.ascii_uppercase[: len(letters)]):
        raise what.refuse("are not named A, B, C and so on without a gap", Problem.FORM)
    options = {letter: check_text(text, what).strip() for letter, text in kept}
    for text in options.values():
        check_tags(text, what)
    return options, (Change.BLANK_OPTION,) if len(kept) < len(pairs) else ()


def read_letter(value: object, options: Mapping[str, str], column: str) -> str | None:
    """Return the right option's letter from a letter, ``(B)``, or a list of one; ``None`` for null or empty.

    Raises:
        UnusableRow: it names no option.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return None
    letter = value.strip().strip("().").upper() if isinstance(value, str) else None
    if letter not in options:
        raise UnusableRow(f"the answer ('{column}') names none of the options", "gold", Problem.FORM)
    return letter


def read_index(value: object, options: Mapping[str, str], column: str, *, first: int) -> str | None:
    """Return the right option's letter from its number; ``None`` for null or -1, by which test sets hide it.

    Raises:
        UnusableRow: it is no number of an option.
    """
    number = as_index(value)
    if value is None or number == -1:
        return None
    if number is None or not first <= number < first + len(options):
        last = first + len(options) - 1
        raise UnusableRow(f"the answer ('{column}') is no number from {first} to {last}", "gold", Problem.FORM)
    return string.ascii_uppercase[number - first]


def as_index(value: object) -> int | None:
    """Return a whole number, or a text cell that is one; else ``None``."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,2}", value.strip()):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def match_text(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the one option that reads like the answer, case and punctuation aside."""
    found = [letter for letter, text in options.items() if _plain(text) == _plain(answer)]
    return found[0] if len(found) == 1 else None


def check_same(text: object, letter: str | None, options: Mapping[str, str], column: str) -> None:
    """Refuse a row whose answer text is neither the right option's text nor its letter.

    Raises:
        UnusableRow: it is another.
    """
    if letter is None or not isinstance(text, str) or not text.strip():
        return
    if text.strip() != options[letter] and text.strip().upper() != letter and _plain(text) != _plain(options[letter]):
        raise UnusableRow(f"the right option's text is not the answer ('{column}')", "gold", Problem.CONFLICT)


def cut_listed(stem: str, options: Mapping[str, str]) -> tuple[str, tuple[Change, ...]]:
    """Take the tail ``Answer Choices: (A) … (B) …`` off a question where it lists just these options."""
    listed = _LISTED.search(stem)
    if listed is None or not all(f"({letter}) {text}" in listed[0] for letter, text in options.items()):
        return stem, ()
    return stem[: listed.start()], (Change.STEM_CUT,)


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def _read_pairs(value: object, what: Part) -> list[tuple[str, object]]:
    if isinstance(value, str):
        return _read_text(check_text(value, what), what)
    if isinstance(value, Mapping):
        pairs = [(str(key).strip().strip("().").upper(), text) for key, text in value.items()]
        return sorted(pairs, key=lambda pair: pair[0])
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if not any(isinstance(item, Mapping) for item in value):
            if len(value) > 26:
                raise what.refuse("are more than 26", Problem.FORM)
            return list(zip(string.ascii_uppercase, value, strict=False))
        return sorted((_read_pair(item, what) for item in value), key=lambda pair: pair[0])
    if value is None:
        raise what.refuse("are missing or null", Problem.MISSING)
    raise what.refuse(f"are no list but {type(value).__name__}", Problem.TYPE)


def _read_pair(item: object, what: Part) -> tuple[str, object]:
    if isinstance(item, Mapping):
        for key, text in _LABELS:
            if key in item and text in item:
                number = as_index(item[key])
                if number is not None:  # HEAD-QA counts its options from 1
                    return (string.ascii_uppercase[number - 1] if 1 <= number <= 26 else "?"), item[text]
                return str(item[key]).strip().upper(), item[text]
    raise what.refuse("hold an option in a form that is not known", Problem.FORM)


def _read_text(text: str, what: Part) -> list[tuple[str, object]]:
    """Read JSON, or lines ``A. text`` with or without ``Answer Choices:`` above."""
    if text.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise what.refuse("are a text that looks like JSON and is none", Problem.FORM) from None
        return _read_pairs(value, what)
    body = text.strip().removeprefix("Answer Choices:")
    starts = list(_LINE.finditer(body))
    if not starts or body[: starts[0].start()].strip():
        raise what.refuse("are a text, and not lines 'A. …'", Problem.FORM)
    stops = [start.start() for start in starts[1:]] + [len(body)]
    return [(start[1], body[start.end() : stop].strip()) for start, stop in zip(starts, stops, strict=True)]
