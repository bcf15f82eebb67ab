"""Is it the medicine or the letter: what a multiple-choice model picks when the options move.

Benchmarks are not balanced: always answering "A" scores 32 % on MedMCQA's dev set, where a coin of four sides has 25 %.
A model that fell into a letter during training can therefore look as if it had learned something. Three views:

- The *histogram* of the letters chosen beside the gold's, with the chi-square test of fit to the gold's shares. The
  test takes the answers for independent draws; since right answers follow the gold, it errs towards finding nothing.
  It needs expected counts of 5 (W. G. Cochran, Biometrics 10, 1954); ``enough`` says whether they are there.
- The *floors*: what always-"A", and always the commonest letter, would score on these very questions.
- *Rotation*: the same question with its options moved round by one, two, ... places. A model that knows the answer
  follows it. The flip rate is the share of questions where it did not always follow, and grows with the number of
  rotations; ``disagreement``, the chance that two rotations differ, does not, and compares across set-ups. Sampled
  answers differ without any rotation: measure ``compare_choices`` on as many seeds of the unmoved question too, and
  read the difference. (C. Zheng et al., "Large Language Models Are Not Robust Multiple Choice Selectors", ICLR 2024.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from medcot.errors import DataError
from medcot.evaluate.stats import wilson


@dataclass(frozen=True, slots=True)
class LetterHistogram:
    """Letters chosen and letters that were right; shares are fractions."""

    chosen: dict[str, int]  # letter -> count, every letter of either side, in order
    gold: dict[str, int]
    unread: int  # answers without a letter, counted nowhere else
    moved_share: float | None  # share of the letters chosen that would have to change to match the gold's shares
    chi_square: float | None  # None without an answer, or with one letter only
    p_value: float | None
    enough: bool  # whether every expected count is at least 5
    always_a: float  # accuracy of always answering the first letter
    always_commonest: float  # accuracy of always answering the gold's commonest letter


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether several answers to one question, turned back to its own letters, are the same; shares are fractions."""

    n: int
    answers: int  # a question
    flip_rate: float  # share of questions whose answers are not all the same letter
    low: float  # Wilson, 95 %
    high: float
    disagreement: float  # the chance that two answers to a question differ
    unread: int


def count_letters(chosen: Sequence[str | None], gold: Sequence[str], first: str = "A") -> LetterHistogram:
    """Return the histogram of the letters chosen against the gold's.

    Args:
        chosen: the letter of each answer; ``None`` where none could be read.
        gold: the right letter of each question.
        first: the letter of the always-A floor.

    Raises:
        DataError: the two differ in length, or are empty.
    """
    if len(chosen) != len(gold) or not gold:
        raise DataError(
            f"{len(chosen)} answers and {len(gold)} gold letters",
            "A histogram needs a gold letter for each of at least one answer",
            "Pass the answers and gold letters of the same questions",
        )
    picked, right = Counter(letter for letter in chosen if letter is not None), Counter(gold)
    letters = sorted(picked.keys() | right.keys())
    total = picked.total()
    expected = {letter: right[letter] * total / len(gold) for letter in letters}
    chi_square, p_value = _test_fit([picked[letter] for letter in letters], [expected[letter] for letter in letters])
    return LetterHistogram(
        chosen={letter: picked[letter] for letter in letters},
        gold={letter: right[letter] for letter in letters},
        unread=len(gold) - total,
        moved_share=sum(abs(picked[x] - expected[x]) for x in letters) / (2 * total) if total else None,
        chi_square=chi_square,
        p_value=p_value,
        enough=total > 0 and min(expected.values()) >= 5,
        always_a=right[first] / len(gold),
        always_commonest=max(right.values()) / len(gold),
    )


def _test_fit(observed: Sequence[int], expected: Sequence[float]) -> tuple[float | None, float | None]:
    if not sum(observed) or len(observed) < 2:
        return None, None
    if any(count and not fit for count, fit in zip(observed, expected, strict=True)):
        return math.inf, 0.0  # a letter that is never right cannot come from the gold's distribution
    from scipy.stats import chisquare

    result = chisquare(observed, expected)
    return float(result.statistic), float(result.pvalue)


def original_letter(shown: str, shift: int, letters: Sequence[str]) -> str:
    """Return the question's own letter for one chosen after the options were moved ``shift`` places down.

    With a shift of 1 the option A is shown as B, and the last as A: ``original_letter("B", 1, "ABCD")`` is ``"A"``.

    Raises:
        DataError: a letter that was not shown.
    """
    if shown not in letters:
        raise DataError(
            f"letter {shown!r} of {', '.join(letters)}",
            "Only a letter that was shown can be turned back",
            "Count the answer as unread",
        )
    return letters[(list(letters).index(shown) - shift) % len(letters)]


def compare_choices(chosen: Sequence[Sequence[str | None]]) -> Agreement:
    """Return how often answers to the same question differ.

    Args:
        chosen: for each question its answers, by rotation or by seed, as the question's own letters; ``None`` where
            none could be read, which agrees with nothing.

    Raises:
        DataError: no question, fewer than two answers to one, or different numbers of answers.
    """
    lengths = {len(answers) for answers in chosen}
    if len(lengths) != 1 or min(lengths) < 2:
        raise DataError(
            f"{len(chosen)} questions with {sorted(lengths)} answers each",
            "Agreement needs at least two answers to each question, and as many to each",
            "Ask every question in every rotation",
        )
    answers = lengths.pop()
    votes = [Counter(letter for letter in row if letter is not None) for row in chosen]
    flipped = sum(max(count.values(), default=0) < answers for count in votes)
    agreeing = sum(math.comb(times, 2) for count in votes for times in count.values())
    return Agreement(
        n=len(chosen),
        answers=answers,
        flip_rate=flipped / len(chosen),
        low=wilson(flipped, len(chosen))[0],
        high=wilson(flipped, len(chosen))[1],
        disagreement=1 - agreeing / (len(chosen) * math.comb(answers, 2)),
        unread=sum(letter is None for row in chosen for letter in row),
    )
