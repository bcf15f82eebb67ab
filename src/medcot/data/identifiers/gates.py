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
        kinds: dict[str, list[tuple[Hint, list[int]]]]
