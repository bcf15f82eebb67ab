"""Rows held out of training: which side a row falls on is decided by its question alone.

The usual way is to shuffle the rows with a seed and cut. Then one added row, another order or a second file changes
sides for all, last month's validation rows are trained on today, and a question that comes twice, with two chains of
thought, falls on both sides: the loss on it measures memory. Here a row's side follows from a keyed hash of its
question, normalised as duplicates are (``words.py``): case, punctuation and spacing do not matter. So

- the same question is always on the same side, whatever its reasoning, answer, file, position or neighbours, in every
  process, on every machine, and in every mixture that uses the same seed;
- rows can be decided one by one, as they stream past;
- a larger fraction holds out what the smaller one did, and more.

The price is that the size is met only in expectation: of n different questions, fraction x n are held out, give or take
the binomial's sqrt(n x fraction x (1 - fraction)). A fraction of 0 holds out nothing and one of 1 everything, exactly.
Options and reasoning do not count, so questions that share one stem ("Which of these is true?") stay together.

The hash is BLAKE2b of 64 bits, with the seed in its key (RFC 7693; Python's ``hash`` differs from process to process).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from medcot.data.words import normalise
from medcot.errors import DataError
from medcot.records import Example

_NUM_PLACES = 2**64


class Side(StrEnum):
    """Where a row belongs."""

    TRAIN = "train"
    VALIDATION = "validation"


@dataclass(frozen=True, slots=True)
class Split:
    """The rule that holds rows out.

    Attributes:
        fraction: share of the questions, 0 to 1.
        seed: chooses which; the same seed always chooses the same.
    """

    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:  # NaN too
            raise DataError(f"a validation fraction of {self.fraction}", "It is a share", "Choose one from 0 to 1")

    def side(self, question: str) -> Side:
        """Return the side that a question, and every row that asks it, belongs to."""
        held_out = find_place(question, self.seed) < int(self.fraction * _NUM_PLACES)
        return Side.VALIDATION if held_out else Side.TRAIN

    def assign(self, examples: Iterable[Example]) -> Iterator[tuple[Side, Example]]:
        """Yield each example with its side, in order; nothing is kept."""
        return ((self.side(example.question), example) for example in examples)


def find_place(question: str, seed: int) -> int:
    """Return a question's place among the 2**64 that fractions cut: uniform, and its own for each seed."""
    # A question of nothing but signs and symbols has no words; it stands for itself.
    text = normalise(question) or question
    return int.from_bytes(_hash(seed, text.encode("utf-8", "surrogatepass")), "big")


def _hash(seed: int, data: bytes) -> bytes:
    hasher = _keyed(seed).copy()
    hasher.update(data)
    return hasher.digest()


@functools.lru_cache(maxsize=8)
def _keyed(seed: int) -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8, key=f"medcot validation {seed}".encode())


def check_sides(split: Split, train: Sequence[Example], validation: Sequence[Example]) -> None:
    """Refuse a split with nothing on one side.

    Raises:
        DataError: a side is empty; the remedy names the fraction at which it would not be.
    """
    if train and validation:
        return
    places = {find_place(example.question, split.seed) for example in (*train, *validation)}
    met = f"data.validation={split.fraction:g} of {len(places):,} different questions"
    if len(places) < 2:
        raise DataError(
            met,
            "Each question is wholly trained on or wholly held out, so two sides need two questions",
            "Check that the column of the question is the right one, or set data.validation=null",
        )
    rule = "What is held out is chosen by a hash of the question, so the share of a small set is met by chance"
    if not validation:
        value, enough = f"{met} holds out none", f"{_round_up(min(places) + 1):g} or more"
    else:
        value, enough = f"{met} leaves none to train on", f"{_round_down(max(places)):g} or less"
    raise DataError(value, rule, f"Set data.validation={enough}, another data.seed, or data.validation=null")


def _round_up(place: int) -> float:
    """Return the least fraction of four digits that cuts above all places below ``place``."""
    return math.ceil(place / _NUM_PLACES * 10_000) / 10_000


def _round_down(place: int) -> float:
    """Return the greatest fraction of four digits that does not reach ``place``."""
    return math.floor(place / _NUM_PLACES * 10_000) / 10_000
