"""Better, worse, or no detectable change: two models compared over a suite of tasks.

The order is fixed, so that nothing can be picked afterwards: one test a task (exact McNemar with one seed, sign flips
over questions with several; the first is a case of the second), Holm's adjustment over all tasks, and only then the
verdict. "No detectable change" is no proof of sameness; the interval beside it says how large a change may still hide.

The interval is of one task by itself and at 95 %, so it is not adjusted and may leave out 0 where the verdict is "no
detectable change". The verdict decides; the interval tells the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medcot.errors import DataError
from medcot.evaluate.power import ALPHA
from medcot.evaluate.resampling import (
    Interval,
    Scores,
    SeedSummary,
    compute_flip_rate,
    interval_of_difference,
    paired_differences,
    sign_flip_test,
    summarise_seeds,
)
from medcot.evaluate.stats import Verdict, adjust_holm, decide


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed on one task; shares are fractions, and differences are after minus before."""

    task: str
    before: SeedSummary
    after: SeedSummary
    delta: float
    interval: Interval  # to quote
    bootstrap: Interval | None  # beside it; None where every question changed alike
    gained: int  # questions with more right answers than before
    lost: int
    flip_rate: float  # share of verdicts that differ between one seed before and one after
    p_value: float
    p_adjusted: float  # by Holm over the tasks compared together
    verdict: Verdict

    def describe(self) -> str:
        """Return the comparison as one sentence."""
        low, high = self.interval.low * 100, self.interval.high * 100
        exact = "p < 0.0001" if self.p_adjusted < 1e-4 else f"p = {self.p_adjusted:.4f}"
        return (
            f"{self.task}: {self.verdict}: {self.before.accuracy:.1%} → {self.after.accuracy:.1%},"
            f" {self.delta * 100:+z.1f} points (95 % interval {low:+z.1f} to {high:+z.1f});"
            f" {self.gained} of {self.before.n:,} questions gained, {self.lost} lost, {exact} after Holm"
        )


def compare_tasks(tasks: Mapping[str, tuple[Scores, Scores]], alpha: float = ALPHA, seed: int = 0) -> list[Comparison]:
    """Return the comparison of each task, in the order given, with Holm's adjustment over all of them.

    Args:
        tasks: name -> whether each answer was right before and after, by question (in the same order) and seed.
        alpha: chance of any false verdict over the whole suite, between 0 and 1.
        seed: of the bootstraps.

    Raises:
        DataError: a task with no question, with unequal numbers of answers, or whose two sides differ in length; or an
            alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise DataError(f"alpha {alpha}", "The chance of a false verdict lies between 0 and 1", "Use 0.05")
    p_values = [sign_flip_test(before, after) for before, after in tasks.values()]
    adjusted = adjust_holm(p_values)
    return [
        _compare(name, before, after, p_value, p_adjusted, alpha, seed)
        for (name, (before, after)), p_value, p_adjusted in zip(tasks.items(), p_values, adjusted, strict=True)
    ]


def _compare(
    task: str, before: Scores, after: Scores, p_value: float, p_adjusted: float, alpha: float, seed: int
) -> Comparison:
    differences_Q = paired_differences(before, after)
    delta = float(differences_Q.mean())
    interval, bootstrap = interval_of_difference(differences_Q, seed=seed)
    return Comparison(
        task=task,
        before=summarise_seeds(before, seed=seed),
        after=summarise_seeds(after, seed=seed),
        delta=delta,
        interval=interval,
        bootstrap=bootstrap,
        gained=int((differences_Q > 0).sum()),
        lost=int((differences_Q < 0).sum()),
        flip_rate=compute_flip_rate(before, after),
        p_value=p_value,
        p_adjusted=p_adjusted,
        verdict=decide(delta, p_adjusted, alpha),
    )
