"""Self-consistency: the majority of several answers (maj@k), and whether the size of the majority can be trusted.

A question asked k times has an answer that most seeds agree on, and the share that agrees is a confidence that costs
nothing more (X. Wang et al., "Self-Consistency Improves Chain of Thought Reasoning", ICLR 2023). Two things are easily
got wrong, and are decided here:

- A *tie* counts as the chance of picking the right one of the tied answers. "The first given" would make the figure
  depend on the order of the seeds, "right if any is right" would flatter.
- maj@k for k below the number of seeds is the mean over *all* choices of k seeds, counted exactly, not over the first k
  or a few drawn ones. At k = 1 it is the mean accuracy.

An answer that could not be read is no candidate, and stays in the denominator: two votes of B with two unread of four
are a share of one half. A question with no readable answer is wrong with confidence 0.

Calibration is the reliability table of vote share against correctness, one line for each share that occurred (shares
are multiples of 1/k: bins of equal width would mix or split them by rounding), and the expected calibration error, the
mean gap |right - confidence| weighted by questions (C. Guo et al., ICML 2017). The estimate is biased upwards: with few
questions in a line the gap is never 0, however honest the model. ``ece_if_calibrated`` says how large it would be on
average if the confidences were exactly right (the binomial's mean absolute deviation, De Moivre 1730; closed form in
P. Diaconis and S. Zabell, Statistical Science 6, 1991); an error no larger than that is no evidence of miscalibration.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from medcot.errors import DataError
from medcot.evaluate.stats import wilson


@dataclass(frozen=True, slots=True)
class Ballot:
    """The answers to one question: votes for the right one, for each wrong one, and for none."""

    right: int
    wrong: tuple[int, ...]  # largest first
    unread: int = 0

    @property
    def size(self) -> int:
        """How often the question was asked."""
        return self.right + sum(self.wrong) + self.unread

    @property
    def share(self) -> float:
        """The share of all answers that the winner has: the confidence."""
        return max(self.right, *self.wrong, 0) / self.size

    @property
    def correct(self) -> float:
        """The chance that the majority is right: 0 or 1, or a fraction at a tie."""
        top = max(self.right, *self.wrong, 0)
        return 1 / (1 + self.wrong.count(top)) if self.right == top > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Reliability:
    """The questions whose majority had one share of the votes."""

    share: float
    n: int
    correct: float  # the share of them that were right
    low: float  # Wilson, 95 %
    high: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Vote share against correctness; all but the counts are fractions."""

    n: int
    table: tuple[Reliability, ...]  # by rising share
    ece: float
    ece_if_calibrated: float  # what this many questions would show by chance


def count_votes(answers: Sequence[str | None], correct: Sequence[bool]) -> Ballot:
    """Return the ballot of one question.

    Args:
        answers: what each seed answered, in one spelling for each answer ("B", not "(B)"); ``None`` where unread.
        correct: whether each was graded right. All right answers are one candidate, however they are spelled.

    Raises:
        DataError: the two differ in length, are empty, or an unread answer is marked right.
    """
    impossible = any(right and answer is None for answer, right in zip(answers, correct, strict=False))
    if len(answers) != len(correct) or not answers or impossible:
        raise DataError(
            f"{len(answers)} answers and {len(correct)} verdicts",
            "A vote needs at least one answer, a verdict for each, and no unread answer that is right",
            "Pass the answers and verdicts of the same question",
        )
    wrong = Counter(answer for answer, right in zip(answers, correct, strict=True) if answer is not None and not right)
    unread = sum(answer is None for answer in answers)
    return Ballot(sum(map(bool, correct)), tuple(sorted(wrong.values(), reverse=True)), unread)


def majority_accuracy(ballots: Sequence[Ballot], k: int) -> float:
    """Return maj@k: the chance that the majority of k of the seeds is right, over all choices of k, over questions.

    Raises:
        DataError: no ballot, or a ``k`` below 1 or above the size of a ballot.
    """
    if not ballots or not 1 <= k <= min(ballot.size for ballot in ballots):
        raise DataError(
            f"maj@{k} of {len(ballots)} questions",
            "maj@k needs a question, and every question asked at least k times",
            "Ask with more seeds, or choose a smaller k",
        )
    return sum(_chance_right(ballot, k) for ballot in ballots) / len(ballots)


@lru_cache(maxsize=65536)
def _chance_right(ballot: Ballot, k: int) -> float:
    """Return the chance that the majority of k seeds drawn from a ballot without replacement is right."""
    # For each number of right votes drawn: ways to draw the others, by how many are drawn and how many tie with them.
    total = 0.0
    for right in range(1, min(ballot.right, k) + 1):
        ways: dict[tuple[int, int], int] = {(right, 1): math.comb(ballot.right, right)}
        for votes in ballot.wrong:
            grown: dict[tuple[int, int], int] = defaultdict(int)
            for (drawn, tied), count in ways.items():
                for taken in range(min(votes, right, k - drawn) + 1):
                    grown[drawn + taken, tied + (taken == right)] += count * math.comb(votes, taken)
            ways = grown
        total += sum(count * math.comb(ballot.unread, k - drawn) / tied for (drawn, tied), count in ways.items())
    return total / math.comb(ballot.size, k)


def calibrate(ballots: Sequence[Ballot]) -> Calibration:
    """Return vote share against correctness of the majorities of all seeds.

    Raises:
        DataError: no ballot.
    """
    if not ballots:
        raise DataError("no questions", "Calibration needs at least one", "Ask at least one question")
    groups: dict[float, list[float]] = defaultdict(list)
    for ballot in ballots:
        groups[ballot.share].append(ballot.correct)
    table, gap, chance_gap = [], 0.0, 0.0
    for share, correct in sorted(groups.items()):
        rate = sum(correct) / len(correct)
        # Ties count as fractions, so a line's count of right answers need not be whole; Wilson takes the nearest.
        table.append(Reliability(share, len(correct), rate, *wilson(round(sum(correct)), len(correct))))
        gap += len(correct) * abs(rate - share)
        chance_gap += _mean_deviation(len(correct), share)
    return Calibration(len(ballots), tuple(table), gap / len(ballots), chance_gap / len(ballots))


def _mean_deviation(n: int, p: float) -> float:
    """Return the mean of |X - np| for a binomial X: twice v C(n, v) p^v (1 - p)^(n - v + 1) at v = floor(np) + 1."""
    if p in (0.0, 1.0):
        return 0.0
    v = math.floor(n * p) + 1
    log_choose = math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1)
    return 2 * v * math.exp(log_choose + v * math.log(p) + (n - v + 1) * math.log1p(-p))
