"""Texts as words and word n-grams, in the one way in which this package compares texts.

Two texts count as the same when only their dress differs. ``normalise`` takes the dress off:

- Unicode NFKC, case folded, NFKC again (folding can undo composition): full-width letters, ligatures and
  superscripts become what a reader takes them for. Marks stay: without them Hindi, Thai or vocalised Arabic would lose
  letters, and "Sjögren" is spelt in one way by a copyist.
- Format characters (zero-width joiners, soft hyphens, marks of writing direction, byte order marks, emoji selectors)
  vanish; a copy from a PDF or a web page differs from its source in little else.
- Punctuation, symbols and white space become one space. Signs that carry the meaning of a clinical sentence stay, as
  words of their own: + < = > and the mathematical symbols (≤, ±, ×), and the minus of a number that follows no word.
  "HBsAg + / anti-HBs −5" must not equal its opposite. ``Signs.DROP`` leaves them out.
- Scripts written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give one word a character, so that an
  n-gram of words is there an n-gram of characters. A segmenter would need a dictionary for each language, and would cut
  the same sentence differently in different surroundings. Korean has spaces; right-to-left text is stored in reading
  order and needs nothing.

Search for copies wants more: signs dropped, and by ``fold_numbers`` each run of digits becomes ``0``, so that a
question with another age and other laboratory values still shares its n-grams. Folding leaves every word in its place.

N-grams are compared by 64-bit hashes, made for many texts at once with NumPy: a word is a polynomial over its bytes and
an n-gram one over its words, both modulo 2**64, read off cumulative sums. The cost is linear in the text and the same
for every n, so that a row of 10 MB is merely long; ``hash()`` would differ from process to process, and hashing n-grams
one by one in Python is some seven times slower. Among 10**8 different n-grams one chance collision is expected in
some 4,000 data sets (n²/2 / 2**64). It can be forced by someone who wants to; what a hash says is therefore looked at
again, word by word, before anybody is told that a question leaked.

Sources: Unicode Standard Annex 15 (normalisation forms) and 44 (categories); the finaliser is splitmix64
(https://prng.di.unimi.it/splitmix64.c).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

VERSION = 1  # raise it when any text is normalised or hashed otherwise: cached tallies name it

_BLOCK_BYTES = 1 << 18  # hashed at once: bounds the scratch arrays to some 10 MB, whatever the text
_SIGNS = "+<=>"
_UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0ecf\u1000-\u103f\u1050-\u108f\u1780-\u17d3"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # radicals, kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_STRETCH = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_NUMBER = re.compile(r"\d+")
_MINUS = re.compile(r"-(?<!\w-)(?=\d)")  # begins with one character, which is quick to look for
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_FEW = 40  # characters that are cheaper to replace one by one
_EMOJI_SELECTORS = range(0xFE00, 0xFE10)
_FRACTION_SLASH = 0x2044  # a mathematical symbol by category; NFKC makes it of ½


class Signs(StrEnum):
    """What becomes of mathematical signs."""

    KEEP = "keep"
    DROP = "drop"


class _Table(dict[int, str]):
    """What each character becomes, found when it is first met."""

    def __init__(self, keep_signs: bool) -> None:
        super().__init__()
        self._keep_signs = keep_signs
        for code in range(128):
            self[code] = chr(code) if chr(code).isalnum() or (keep_signs and chr(code) in _SIGNS) else " "
        self._ascii = bytes(ord(self[code]) if code < 128 else code for code in range(256))

    def apply(self, text: str) -> str:
        """Return what ``str.translate`` would, some ten times as fast where characters beyond ASCII are few."""
        others = set() if text.isascii() else set(_BEYOND_ASCII.findall(text))
        if len(others) > _FEW:
            return text.translate(self)
        text = text.encode("utf-8", "surrogatepass").translate(self._ascii).decode("utf-8", "surrogatepass")
        for char in others:  # none of them is in what another becomes
            new = self[ord(char)]
            if new != char:
                text = text.replace(char, new)
        return text

    def __missing__(self, code: int) -> str:
        """Decide by the character's category."""
        char = chr(code)
        kind = unicodedata.category(char)
        if kind == "Cf" or code in _EMOJI_SELECTORS:
            new = ""
        elif _IS_UNSPACED.match(char) and kind[0] in "LMN":
            new = f" {char} "
        elif kind[0] in "LMN":
            new = char
        else:
            new = f" {char} " if kind == "Sm" and self._keep_signs and code != _FRACTION_SLASH else " "
        self[code] = new
        return new


_TABLES = {Signs.KEEP: _Table(keep_signs=True), Signs.DROP: _Table(keep_signs=False)}


def normalise(text: str, signs: Signs = Signs.KEEP) -> str:
    """Return a text's words, one space apart, without case, punctuation and typography; empty where it has none."""
    return " ".join(list_words(text, signs))


def list_words(text: str, signs: Signs = Signs.KEEP) -> list[str]:
    """Return the words of ``normalise``, apart."""
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if signs is Signs.KEEP:
        if "-" in text:
            text = _MINUS.sub("\N{MINUS SIGN}", text)
        for sign in _SIGNS:
            text = text.replace(sign, f" {sign} ")
    return _TABLES[signs].apply(text).split()


def fold_numbers(text: str) -> str:
    """Return a normalised text with each run of digits, of any script, as ``0``."""
    return _NUMBER.sub("0", text)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Part of a text between spaces (one character of an unspaced script) and the words that it becomes."""

    start: int
    stop: int
    words: tuple[str, ...]


def cut_stretches(text: str, signs: Signs = Signs.KEEP) -> Iterator[Stretch]:
    """Yield a text's stretches with their places, so that what was found among words can be shown in the text itself.

    Their words are those of ``normalise`` but for letters that would have been composed across two stretches.
    """
    for match in _STRETCH.finditer(text):
        words = list_words(match[0], signs)
        if words:
            yield Stretch(match.start(), match.end(), tuple(words))


def excerpt(text: str, most: int = 2_000) -> str:
    """Return a text as it is shown to a person: whole, or its beginning and how much more there is."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


# Hashes --------------------------------------------------------------------------------------------------------------


def mix(values: Hashes) -> Hashes:
    """Return values in which every bit depends on all bits of what went in (splitmix64's finaliser)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_BASE = 0x9E3779B97F4A7C17  # odd, so that it has an inverse; 3 modulo 4, so that swapped words differ in 63 bits
_INVERSE = pow(_BASE, -1, 1 << 64)
_BYTES = mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # a random number for each byte
_BYTES[[0x0A, 0x20]] = 0  # what stands between words adds nothing to them


def _make_powers(base: int, num: int) -> Hashes:
    powers = np.full(num, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


@functools.lru_cache(maxsize=4)
def _keep_powers(base: int) -> Hashes:
    powers = _make_powers(base, _BLOCK_BYTES)
    powers.flags.writeable = False
    return powers


def _powers(base: int, num: int) -> Hashes:
    """Return base**0 … base**(num-1) modulo 2**64."""
    return _keep_powers(base)[:num] if num <= _BLOCK_BYTES else _make_powers(base, num)


@dataclass(frozen=True, slots=True)
class HashedWords:
    """The words of several normalised texts, one text after another, as hashes.

    Attributes:
        words: a hash for each word.
        offsets: where each text begins in ``words``, and the end: one more than there are texts.
    """

    words: Hashes
    offsets: Offsets

    @property
    def lengths(self) -> Offsets:
        """Words in each text."""
        return np.diff(self.offsets)


def hash_words(texts: Sequence[str]) -> HashedWords:
    """Hash every word of normalised texts."""
    data = "".join(f"{text}\n" for text in texts).encode()
    hashes: list[Hashes] = []
    ends: list[Offsets] = []
    start = num_words = 0
    while start < len(data):
        stop = _find_cut(data, start)
        words, line_ends = _hash_block(np.frombuffer(data, np.uint8, stop - start, start))
        hashes.append(words)
        ends.append(line_ends + num_words)
        num_words += len(words)
        start = stop
    offsets = np.concatenate([np.zeros(1, np.int64), *ends])
    return HashedWords(np.concatenate([np.zeros(0, np.uint64), *hashes]), offsets)


def _find_cut(data: bytes, start: int) -> int:
    """Return the end of the block that begins at ``start``: behind a space or line end, no word is cut."""
    limit = start + _BLOCK_BYTES
    if limit >= len(data):
        return len(data)
    cut = max(data.rfind(b" ", start, limit), data.rfind(b"\n", start, limit)) + 1
    if cut > start:
        return cut
    after = [place for place in (data.find(b" ", limit), data.find(b"\n", limit)) if place >= 0]
    return min(after) + 1


def _hash_block(codes: NDArray[np.uint8]) -> tuple[Hashes, Offsets]:
    """Return the hashes of a block's words, and how many words lie before each of its line ends."""
    gaps = np.flatnonzero((codes == 0x20) | (codes == 0x0A))
    starts = np.concatenate([np.zeros(1, np.int64), gaps[:-1] + 1])
    sums = np.add.reduceat(_BYTES[codes] * _powers(_BASE, len(codes)), starts)
    is_word = gaps > starts  # an empty text leaves a line end without a word
    words = mix(sums * _powers(_INVERSE, len(codes))[starts])[is_word]
    return words, np.cumsum(is_word)[codes[gaps] == 0x0A]


class Windows:
    """Hashes of any run of words in hashed texts, each in constant time after one pass."""

    def __init__(self, hashed: HashedWords) -> None:
        num = len(hashed.words)
        self.hashed = hashed
        self._sums = np.zeros(num + 1, np.uint64)
        np.cumsum(hashed.words * _powers(_BASE, num), dtype=np.uint64, out=self._sums[1:])
        self._inverse = _powers(_INVERSE, num + 1)

    def hash_runs(self, starts: Offsets, stops: Offsets) -> Hashes:
        """Return the hash of the words from each start up to its stop; runs of different length differ."""
        sums = (self._sums[stops] - self._sums[starts]) * self._inverse[starts]
        return mix(sums + (stops - starts).astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93))

    def hash_texts(self) -> Hashes:
        """Return one hash for each text as a whole."""
        return self.hash_runs(self.hashed.offsets[:-1], self.hashed.offsets[1:])

    def hash_ngrams(self, n: int) -> tuple[Hashes, Offsets]:
        """Return the hashes of all runs of ``n`` words that lie within one text, and the word where each begins."""
        last = self.hashed.offsets[1:] - n  # of each text: where its last run begins
        counts = np.maximum(last - self.hashed.offsets[:-1] + 1, 0)
        first = np.repeat(self.hashed.offsets[:-1] - (np.cumsum(counts) - counts), counts)
        starts = np.arange(counts.sum(), dtype=np.int64) + first
        return self.hash_runs(starts, starts + n), starts

    def hash_shingles(self, n: int) -> tuple[Hashes, Offsets]:
        """Return each text's n-grams, or the whole text where it is shorter, and where each text's begin (and end)."""
        offsets = self.hashed.offsets
        counts = np.where(self.hashed.lengths > 0, np.maximum(self.hashed.lengths - n + 1, 1), 0)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        starts = np.arange(bounds[-1], dtype=np.int64) + np.repeat(offsets[:-1] - bounds[:-1], counts)
        return self.hash_runs(starts, np.minimum(starts + n, np.repeat(offsets[1:], counts))), bounds
