r"""What a text must hold for a pattern to be worth running on it, asked so that most rows answer no at once.

A *gate* is a few words or *shapes*: the text with every digit made ``0`` and every letter ``a`` or ``A``. Looking for a
fixed string is a hundred times faster than a pattern, but forty gates over every text are still most of the work. So
before any gate come its *hints*, and these are asked once for all texts of a row together: without a hint in the row,
no text of it can pass the gate. Most are looked for in the row's *marks*, which is its shape without the small letters;
a fifth of the text is left, and in it ``-0-`` stands wherever it stood before. Hints follow from the gate, or are given
where a shorter question will do; they decide what is run, never what is found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = bytes(
    48 if 48 <= code < 58 else 65 if 65 <= code < 91 else 97 if 97 <= code < 123 else code for code in range(256)
)
_SMALL = bytes(range(97, 123))
DENSE = {
    4: re.compile(rb"0(?:[A .()-]{0,2}0){3}"),
    7: re.compile(rb"0(?:[ .()-]{0,2}0){6}"),
}  # digits close together, of a shape
_COMMON = b"0000"  # in so many of the hints that they are looked for only where it is

# In the marks; in the text, in small letters; a pattern in either, the text as it stands.
Hint = bytes | str | re.Pattern[bytes] | re.Pattern[str]


def make_shape(text: str) -> bytes:
    """Return the shape of a text, one byte a character."""
    return text.encode("ascii", "replace").translate(SHAPES)


def find_density(shape: bytes) -> int:
    """Return 7 or 4 where so many digits of a shape stand close together, else 0."""
    return next((digits for digits in (7, 4) if DENSE[digits].search(shape)), 0)


@dataclass(frozen=True, slots=True)
class Gate:
    """What a text must hold for a pattern to be worth running; an empty condition holds for every text.

    Attributes:
        words: one of these, in small letters and ASCII.
        exact: one of these as they stand.
        shapes: one of these shapes.
        sniff: a match of this pattern, which is quick to look for.
        dense: so many digits, 4 or 7, with next to nothing between them; left to the caller, who knows.
        hints: one of these must be in a row where anything behind the gate is to be found; where there are none, they
            are made from the above.
    """

    words: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    shapes: tuple[bytes, ...] = ()
    sniff: re.Pattern[str] | None = None
    dense: int = 0
    hints: tuple[Hint, ...] = ()

    def admits(self, text: str, lower: str, shape: bytes) -> bool:
        """Return whether a text may hold what is behind the gate, but for ``dense``."""
        return (
            (not self.shapes or _holds(shape, self.shapes))
            and (not self.words or _holds(lower, self.words))
            and (not self.exact or _holds(text, self.exact))
            and (self.sniff is None or self.sniff.search(text) is not None)
        )

    def find_hints(self) -> tuple[Hint, ...]:
        """Return its hints, given or made."""
        if self.hints:
            return self.hints
        if self.dense:
            return (DENSE[self.dense],)
        if self.shapes:
            return tuple(dict.fromkeys(shape.translate(None, b"a") for shape in self.shapes))
        assert self.words, "what stands in the text as it is, or is sniffed, needs hints of its own"
        return tuple(dict.fromkeys(map(_hint_at, self.words)))


class Hints:
    """The hints of many gates, each looked for once."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        behind: dict[Hint, list[int]] = {}
        for number, gate in enumerate(gates):
            for hint in gate.find_hints():
                behind.setdefault(hint, []).append(number)
        marks = [(hint, numbers) for hint, numbers in behind.items() if isinstance(hint, bytes)]
        words = [(hint, numbers) for hint, numbers in behind.items() if isinstance(hint, str)]
        patterns = [(hint, numbers) for hint, numbers in behind.items() if isinstance(hint, re.Pattern)]
        assert not any("k" in word for word, _ in words), "the Kelvin sign is the one other character that is small k"
        self._common = [pair for pair in marks if _COMMON in pair[0]]
        self._marks = [pair for pair in marks if _COMMON not in pair[0]]
        self._words = [(word.encode(), numbers) for word, numbers in words]
        self._in_marks = [(hint, numbers) for hint, numbers in patterns if isinstance(hint.pattern, bytes)]
        self._in_text = [(hint, numbers) for hint, numbers in patterns if isinstance(hint.pattern, str)]

    def find_open(self, text: str) -> list[int]:
        """Return the places of the gates that a text, or any part of it, may pass."""
        plain = text.encode("ascii", "replace")
        marks, lower = plain.translate(SHAPES, _SMALL), plain.lower()
        found = [numbers for hint, numbers in self._marks if hint in marks]
        if _COMMON in marks:
            found += [numbers for hint, numbers in self._common if hint in marks]
        found += [numbers for word, numbers in self._words if word in lower]
        found += [numbers for pattern, numbers in self._in_marks if pattern.search(marks)]
        found += [numbers for pattern, numbers in self._in_text if pattern.search(text)]
        return sorted(set().union(*found)) if found else []


def _hint_at(word: str) -> Hint:
    """Return the signs in a word, which stand in the marks too, or all of a word that has none."""
    signs = max(re.split("[a-z]+", word), key=lambda run: len(run.strip()))
    return signs.encode() if signs.strip() else word


def _holds(text: str | bytes, parts: tuple[str, ...] | tuple[bytes, ...]) -> bool:
    for part in parts:  # noqa: SIM110 any() over a generator takes three times as long
        if part in text:  # type: ignore[operator]  # both are str or both bytes
            return True
    return False
