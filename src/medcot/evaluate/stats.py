"""The two formulas that say whether a change of accuracy can be believed.

Wilson's score interval, because the usual p ± 1.96 √(p(1−p)/n) gives nonsense near 0 and 1, and an untuned small model
starts at 0: for 0 of 100 it claims the accuracy is exactly 0, where Wilson says up to 3.7 %.
(E. B. Wilson, JASA 22, 1927; R. G. Newcombe, Statistics in Medicine 17, 1998, method 3.)

McNemar's test in its exact form, because the same questions are asked before and after: only those whose verdict
flipped carry evidence, and with no change each flip is a fair coin. (Q. McNemar, Psychometrika 12, 1947; exact form:
the two-sided binomial test on the flips.) Overlapping intervals are not a test of this; the p-value is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from medcot.errors import DataError


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
        return 1.0
    from scipy.stats import binom  # not at the top: half a second that `medcot --help` should not pay

    return float(min(1.0, 2.0 * binom.cdf(min(gained, lost), gained + lost, 0.5)))


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
