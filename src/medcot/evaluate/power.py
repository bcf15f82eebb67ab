"""What a run can detect, said before it is paid for.

"No detectable change" means nothing until one knows which change would have been detected. That depends on how many
questions there are and on how many *flip* (right to wrong or wrong to right), not on the accuracy: with 20 % of MedQA's
1,273 questions flipping, a change has to be 3.6 points to be found four times in five, and a published "+1.5" is dice.

The test planned for is the one that is run: exact McNemar. The usual formula (R. J. Connor, Biometrics 43, 1987;
O. S. Miettinen, Biometrics 24, 1968) is for the test without its exactness and promises too much: for 200 questions and
20 % flips its 8.8 points are found by the exact test in 77 runs of 100, not in 80. So power is summed exactly: over the
number of flips, which is binomial, and given that over the gains, binomial again (the unconditional power that SAS
PROC POWER calls EXACT_COND; S. W. Duffy, Biometrics 40, 1984). Connor's formula serves as the first guess.

The flip rate is an assumption, and it is printed as one. It is not 0 even for a model compared with itself, when
answers are sampled: ``SeedSummary.seed_flip_rate`` measures that, ``Comparison.flip_rate`` what the rate became.

Several tasks: Holm's first step tests at alpha / tasks, so that is the level planned for. Several seeds: averaging
removes flips that are the dice's and none that are the model's, and nobody knows the mixture beforehand, so the plan
gives both ends: as with one seed (all flips last), and divided by the root of the seeds (all are dice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from medcot.errors import DataError

ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """What one task can show; effects and rates are fractions."""

    n: int
    flip_rate: float  # assumed
    alpha: float  # of the whole suite
    power: float
    num_tasks: int
    seeds: int
    detectable: float | None  # with one seed, or if no flip is dice; None: no change that this flip rate allows
    detectable_if_dice: float | None  # with that many seeds, if every flip is dice; equal to the other with one seed
    needed: dict[float, int | None]  # effect -> questions; None where the flip rate does not allow the effect

    def describe(self) -> str:
        """Return the plan in words, to be printed before the run."""
        told = f"{self.n:,} questions, {self.flip_rate:.0%} of them assumed to flip"
        test = f"exact McNemar, alpha {self.alpha:g}"
        if self.num_tasks > 1:
            test += f" over {self.num_tasks} tasks by Holm"
        chance = f"with {self.power:.0%} probability ({test})"
        wanted = [
            f"{needed:,} questions for {_in_points(effect)}"
            for effect, needed in self.needed.items()
            if needed is not None and needed > self.n
        ]
        needed = f" Needed: {', '.join(wanted)}." if wanted else ""
        if self.detectable is None:
            return f"{told}: no change can be found {chance}; the set is too small.{needed}"
        found = _in_points(self.detectable)
        if self.detectable_if_dice is not None and self.seeds > 1:
            found = f"{self.detectable_if_dice * 100:.1f} to {found} ({self.seeds} seeds; all flips chance, or none)"
        return f"{told}: a change of {found} is found {chance}.{needed}"


def compute_plan(
    n: int,
    flip_rate: float = 0.2,
    alpha: float = ALPHA,
    power: float = POWER,
    num_tasks: int = 1,
    seeds: int = 1,
    effects: tuple[float, ...] = (0.01, 0.02, 0.03, 0.05),
) -> Plan:
    """Return what a task of ``n`` questions can show, and how many questions smaller effects would need.

    Args:
        n: questions.
        flip_rate: assumed share of questions whose verdict changes, in either direction; above 0, at most 1.
        alpha: chance of any false verdict in the suite.
        power: chance of finding the effect.
        num_tasks: tasks that share ``alpha``.
        seeds: answers a question.
        effects: fractions for which the number of questions needed is given.

    Raises:
        DataError: a number outside its range.
    """
    level = alpha / max(1, num_tasks)
    detectable = minimum_detectable_effect(n, flip_rate, level, power)
    return Plan(
        n=n,
        flip_rate=flip_rate,
        alpha=alpha,
        power=power,
        num_tasks=num_tasks,
        seeds=seeds,
        detectable=detectable,
        detectable_if_dice=None if detectable is None else detectable / math.sqrt(seeds),
        needed={effect: items_needed(effect, flip_rate, level, power) for effect in effects},
    )


def compute_power(n: int, effect: float, flip_rate: float, alpha: float = ALPHA) -> float:
    """Return the probability that the exact McNemar test calls a change; at effect 0, of a false alarm.

    Args:
        n: questions.
        effect: true accuracy after minus before, a fraction, at most ``flip_rate`` in size.
        flip_rate: true share of questions that flip.
        alpha: level of the test, two-sided.

    Raises:
        DataError: a number outside its range.
    """
    _check(n, flip_rate, alpha)
    if abs(effect) > flip_rate * (1 + 1e-12):
        raise DataError(
            f"an effect of {effect} with a flip rate of {flip_rate}",
            "The accuracy cannot change by more than the share of questions that flip",
            "Assume a higher flip rate or a smaller effect",
        )
    from scipy.stats import binom

    # Flips further out have a probability below 1e-12 together.
    least, most = (int(x) for x in binom.ppf([1e-13, 1 - 1e-13], n, flip_rate))
    flips_F = np.arange(least, most + 1)
    critical_F = _largest_significant(flips_F, alpha)
    gain = min(1.0, max(0.0, (1 + effect / flip_rate) / 2))
    called_F = binom.cdf(critical_F, flips_F, gain) + binom.sf(flips_F - critical_F - 1, flips_F, gain)
    return float((binom.pmf(flips_F, n, flip_rate) * called_F).sum())


def minimum_detectable_effect(n: int, flip_rate: float, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Return the smallest change of accuracy that is found with the given power, as a fraction.

    ``None`` where even all flips in one direction would not do: there are too few of them.

    Args:
        n: questions.
        flip_rate: assumed share of questions that flip.
        alpha: level of the test, two-sided.
        power: chance of finding the effect, between ``alpha`` and 1.

    Raises:
        DataError: a number outside its range.
    """
    _check(n, flip_rate, alpha, power)
    if compute_power(n, flip_rate, flip_rate, alpha) < power:
        return None
    from scipy.optimize import brentq

    return float(brentq(lambda effect: compute_power(n, effect, flip_rate, alpha) - power, 0.0, flip_rate, xtol=1e-7))


def items_needed(effect: float, flip_rate: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return the number of questions with which an effect is found with the given power, found by bisection.

    ``None`` where the effect exceeds the flip rate, so that it cannot happen.

    Raises:
        DataError: a number outside its range, or an effect of 0.
    """
    _check(1, flip_rate, alpha, power)
    if effect == 0:
        raise DataError("an effect of 0", "No number of questions finds what is not there", "Ask for an effect")
    if abs(effect) > flip_rate:
        return None
    high = math.ceil(connor(effect, flip_rate, alpha, power)) + 1
    while compute_power(high, effect, flip_rate, alpha) < power:
        high = math.ceil(high * 1.1) + 1
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        enough = middle > 0 and compute_power(middle, effect, flip_rate, alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def connor(effect: float, flip_rate: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the questions that McNemar's asymptotic test needs (R. J. Connor, Biometrics 43, 1987, page 209)."""
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    # At |effect| = flip_rate = 1 nothing varies; rounding must not make it less than nothing.
    spread = math.sqrt(max(0.0, flip_rate - effect * effect))
    return float(((z_alpha * math.sqrt(flip_rate) + z_power * spread) / effect) ** 2)


def _largest_significant(flips_F: NDArray[np.int64], alpha: float) -> NDArray[np.int64]:
    """Return, for each number of flips, the largest smaller count whose p-value is at most alpha; -1 where none is."""
    from scipy.stats import binom

    at_least_F: NDArray[np.float64] = binom.ppf(alpha / 2, flips_F, 0.5)
    # ppf gives the first count whose tail reaches alpha / 2; it counts only where the tail does not pass it.
    too_many_F: NDArray[np.bool_] = 2 * binom.cdf(at_least_F, flips_F, 0.5) > alpha
    return at_least_F.astype(np.int64) - too_many_F


def _check(n: int, flip_rate: float, alpha: float, power: float = POWER) -> None:
    if n < 1 or not 0 < flip_rate <= 1 or not 0 < alpha < power < 1:
        raise DataError(
            f"n={n}, flip rate {flip_rate}, alpha {alpha}, power {power}",
            "A plan needs n >= 1, a flip rate above 0 and at most 1, and 0 < alpha < power < 1",
            "Check the numbers",
        )


def _in_points(effect: float) -> str:
    return f"{effect * 100:.1f} points"
