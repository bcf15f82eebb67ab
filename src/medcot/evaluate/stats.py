"""The formulas that say whether a change of accuracy can be believed; light, so that any room may ask.

Wilson's score interval, because the usual p ± 1.96 √(p(1−p)/n) gives nonsense near 0 and 1, and an untuned small model
starts at 0: for 0 of 100 it claims the accuracy is exactly 0, where Wilson says up to 3.7 %.
(E. B. Wilson, JASA 22, 1927; R. G. Newcombe, Statistics in Medicine 17, 1998, method 3.)

McNemar's test in its exact form, because the same questions are asked before and after: only those whose verdict
flipped carry evidence, and with no change each flip is a fair coin. (Q. McNemar, Psychometrika 12, 1947; exact form:
the two-sided binomial test on the flips.) Overlapping intervals are not a test of this; the p-value is.

Tango's score interval for the difference of two accuracies on the same questions, for the reason that speaks for
Wilson's: where nothing flipped, the usual interval and any bootstrap say the difference is exactly 0, and this one says
how far from 0 it may still be. (T. Tango, Statistics in Medicine 17, 1998; recommended by M. W. Fagerland, S. Lydersen
and P. Laake, Statistics in Medicine 33, 2014.)

Holm's adjustment over the tasks of a suite, because of twenty tasks that did not change one is expected to have
p < 0.05. It keeps the chance of any false verdict below alpha, whatever the tasks have in common, and is never weaker
than Bonferroni's. (S. Holm, Scandinavian Journal of Statistics 6, 1979.)

Several answers a question are in ``resampling``, what a run can detect in ``power``, all of it together in
``verdicts``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from statistics import NormalDist
from typing import TYPE_CHECKING

from medcot.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class Verdict(StrEnum):
    """What a comparison says, in the words that are printed."""

    BETTER = "better"
    WORSE = "worse"
    NO_CHANGE = "no detectable change"


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, as fractions.

    Args:
        k: successes.
        n: trials; with none, nothing is known, and the interval is (0, 1).
        confidence: coverage, between 0 and 1, both excluded.

    Raises:
        DataError: ``k`` outside 0..n, or a confidence outside (0, 1).
    """
    if not 0 <= k <= n or not 0 < confidence < 1:
        raise DataError(
            f"k={k} of n={n} at confidence {confidence}",
            "An interval needs 0 <= k <= n and a confidence between 0 and 1",
            "Check the counts",
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At k=0 and k=n one end is 0 or 1 by algebra; rounding would put it a hair beside.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test on paired verdicts.

    Args:
        before: whether each question was answered correctly before.
        after: the same questions, in the same order, after.

    Raises:
        DataError: the two differ in length.
    """
    gained, lost = count_flips(before, after)
    if gained + lost == 0:
        return 1.0  # by definition, and without the half second that importing scipy takes
    return float(mcnemar_p_values(gained, lost))


def mcnemar_p_values(gained: ArrayLike, lost: ArrayLike) -> NDArray[np.float64]:
    """Return the exact two-sided p-values of many tables at once; ``gained`` and ``lost`` are counts, broadcast."""
    import numpy as np
    from scipy.stats import binom  # not at the top: half a second that `medcot --help` should not pay

    flips = np.add(gained, lost)
    tails: NDArray[np.float64] = binom.cdf(np.minimum(gained, lost), flips, 0.5)
    return np.minimum(1.0, 2.0 * tails)


def count_flips(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """Return how many verdicts went from wrong to right, and how many from right to wrong.

    Raises:
        DataError: the two differ in length.
    """
    if len(before) != len(after):
        raise DataError(
            f"{len(before)} verdicts before and {len(after)} after",
            "A paired test needs the same questions, in the same order, on both sides",
            "Grade the same evaluation set before and after",
        )
    pairs = list(zip(before, after, strict=True))
    return sum(b < a for b, a in pairs), sum(b > a for b, a in pairs)


def tango(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of the accuracy after minus the accuracy before, as fractions.

    Args:
        gained: questions wrong before and right after.
        lost: questions right before and wrong after.
        n: all questions, those that did not flip included; with none, the interval is (-1, 1).
        confidence: coverage, between 0 and 1, both excluded.

    Raises:
        DataError: counts below 0 or above ``n`` in sum, or a confidence outside (0, 1).
    """
    if min(gained, lost) < 0 or gained + lost > n or not 0 < confidence < 1:
        raise DataError(
            f"gained={gained}, lost={lost} of n={n} at confidence {confidence}",
            "An interval needs counts of at least 0 that sum to at most n, and a confidence between 0 and 1",
            "Check the counts",
        )
    if n == 0:
        return -1.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    # Seen from the other side the same data are (lost, gained), so one end serves for both.
    return -_tango_upper(lost, gained, n, z), _tango_upper(gained, lost, n, z)


def _tango_upper(gained: int, lost: int, n: int, z: float) -> float:
    """Return the difference above the observed one at which the score statistic is ``-z``, by bisection."""
    low, high = (gained - lost) / n, 1.0
    for _ in range(60):  # halves an interval of at most 2: below the spacing of doubles after 54
        middle = (low + high) / 2
        low, high = (middle, high) if _tango_score(gained, lost, n, middle) > -z else (low, middle)
    return high


def _tango_score(gained: int, lost: int, n: int, delta: float) -> float:
    """Return Tango's statistic: how many standard errors the observed difference lies above ``delta``."""
    # The likelihood's maximum under a difference of delta puts the share of losses at the root of a quadratic.
    linear = (2 * n - gained + lost) * delta - gained - lost
    losses = (math.sqrt(max(0.0, linear * linear + 8 * n * lost * delta * (1 - delta))) - linear) / (4 * n)
    variance = n * (2 * losses + delta * (1 - delta))
    surplus = gained - lost - n * delta
    return surplus / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, surplus)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given; compare each with alpha.

    Raises:
        DataError: a value outside 0..1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise DataError(f"p-values {list(p_values)}", "Every p-value must lie between 0 and 1", "Check the tests")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def decide(delta: float, p_value: float, alpha: float = 0.05) -> Verdict:
    """Return the verdict on a difference whose (adjusted) p-value is given; at most ``alpha`` is a change."""
    if p_value > alpha or delta == 0:
        return Verdict.NO_CHANGE
    return Verdict.BETTER if delta > 0 else Verdict.WORSE
