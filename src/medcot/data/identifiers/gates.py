r"""What a text must hold for a pattern to be worth running on it, asked so that most rows say no at once.

A *gate* asks for a few words or *shapes*: the text with every digit made ``0`` and every letter ``a`` or ``A``. Looking
for a fixed string costs a hundredth of a pattern, but forty gates at every text were still most of the work. So before
the gates come *hints*, asked of all texts of a row together: where a row has no hint of a gate, nothing behind the gate
can be found in it. A hint is a pattern too, but one that begins with a character as it stands, which CPython looks for
with memchr; best in the row's *marks*, its shape without small letters, where a fifth of the text is left
and ``-00-`` stands wherever it stood before. Hints decide what is run, never what is found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

_SHAPES = bytes(
    48 if 48 <= code < 58 else 65 if 65 <= code < 91 else 97 if 97 <= code < 123 else code for code in range(256)
)
_SMALL_LETTERS = bytes(range(97, 123))
_DENSE = {
    4: r"0(?:[A .()-]{0,2}0){3}",
    7: r"0(?:[ .()-]{0,2}0){6}",
}  # so many digits close together, in a shape
_IS_DENSE = {digits: re.compile(pattern).search for digits, pattern in _DENSE.items()}


class View(StrEnum):
    """In what a hint is looked for."""

    MARKS = "marks"  # "?" is a character beyond ASCII, never a question mark
    SMALL = "small letters"
    TEXT = "text"


class Hint(NamedTuple):
    """A pattern, and in what it is looked for."""

    view: View
    pattern: str


def in_marks(*patterns: str) -> tuple[Hint, ...]:
    """Return hints that are looked for in the marks."""
    return tuple(Hint(View.MARKS, pattern) for pattern in patterns)


def in_small(*patterns: str) -> tuple[Hint, ...]:
    """Return hints that are looked for in the text in small letters."""
    return tuple(Hint(View.SMALL, pattern) for pattern in patterns)


def in_text(*patterns: str) -> tuple[Hint, ...]:
    """Return hints that are looked for in the text as it stands."""
    return tuple(Hint(View.TEXT, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Gate:
    """What a text must hold for a pattern to be worth running; an empty condition holds for every text.

    Attributes:
        words: one of these, in small letters and ASCII.
        exact: one of these as they stand.
        shapes: one of these shapes.
        sniff: a match of this pattern, which is quick to look for.
        dense: so many digits, 4 or 7, with next to nothing between them; left to the caller, who knows.
        hints: one of these is in every row in which something behind the gate can be found; where none are given, they
            are made from ``dense``, ``shapes`` or ``words``, whichever comes first.
    """

    words: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    sniff: re.Pattern[str] | None = None
    dense: int = 0
    hints: tuple[Hint, ...] = ()

    def admits(self, text: str, small: str, shape: str) -> bool:
        """Return whether a text may hold what is behind the gate, but for ``dense``."""
        return (
            (not self.shapes or _holds(shape, self.shapes))
            and (not self.words or _holds(small, self.words))
            and (not self.exact or _holds(text, self.exact))
            and (self.sniff is None or self.sniff.search(text) is not None)
        )

    def find_hints(self) -> tuple[Hint, ...]:
        """Return its hints, given or made."""
        if self.hints:
            return self.hints
        if self.dense:
            return in_marks(_DENSE[self.dense])
        if self.shapes:
            marks = dict.fromkeys(shape.replace("a", "") for shape in self.shapes)
            return in_marks(*map(re.escape, marks))
        assert self.words, "what stands in the text as it is, or is sniffed, needs hints of its own"
        return in_small(*map(re.escape, self.words))


class Hints:
    """The hints of some gates, each looked for once."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        behind: dict[Hint, list[int]] = {}
        for place, gate in enumerate(gates):
            for hint in gate.find_hints():
                behind.setdefault(hint, []).append(place)
        self._marks, self._small, self._text = (
            [(re.compile(hint.pattern).search, places) for hint, places in behind.items() if hint.view is view]
            for view in View
        )

    def find_open(self, row: str) -> list[int]:
        """Return the places of the gates that a text, or any part of it, may pass; in order."""
        plain = _make_plain(row)
        marks = plain.translate(_SHAPES, _SMALL_LETTERS).decode()
        small = plain.lower().decode()
        if row.isascii():
            marks = marks.replace("?", " ")
        found = [places for search, places in self._marks if search(marks)]
        found += [places for search, places in self._small if search(small)]
        found += [places for search, places in self._text if search(row)]
        return sorted(set().union(*found)) if found else []


def make_small_and_shape(text: str) -> tuple[str, str]:
    """Return a text in small letters, and its shape; both have a character for each of its own."""
    plain = _make_plain(text)
    return plain.lower().decode(), plain.translate(_SHAPES).decode()


def find_density(shape: str) -> int:
    """Return 7 or 4 where so many digits of a shape stand close together, else 0."""
    return next((digits for digits in (7, 4) if _IS_DENSE[digits](shape)), 0)


def _make_plain(text: str) -> bytes:
    return text.encode("ascii", "replace")


def _holds(text: str, parts: tuple[str, ...]) -> bool:
    for part in parts:  # noqa: SIM110 any() over a generator takes three times as long
        if part in text:
            return True
    return False
