"""How often the verdict is wrong where nothing changed, and how often it finds what the plan says it can find.

Nothing changed: each question has a chance of being answered rightly (beta distributed, 55 % on average, with the
spread that gives the flip rate), and the same chances answer twice. Something changed: each question gains, loses or
stays with the probabilities of the flip rate and of the effect that ``power`` prints for it. Both go through the tests
that ``verdicts`` decides with. "Connor" is the power that the exact test has at the smaller effect for which the usual
formula promises 80 %. The interval rows count how often 95 % intervals hold the truth, with four seeds a question and a
quarter of the variance between questions; the plain percentile bootstrap stands beside for comparison.

A share of 1,000 is itself uncertain by ±1.4 points at 5 % and ±2.5 at 80 % (95 %).

    python bench/eval_false_positives.py --save
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from medcot.evaluate.power import ALPHA, compute_power, connor, minimum_detectable_effect
from medcot.evaluate.resampling import sign_flip_test, summarise_seeds
from medcot.evaluate.stats import adjust_holm, mcnemar_p_values
from medcot.machine import describe_machine
from results import format_table, save_result

SIZES = (200, 500, 1273)  # 1,273 is MedQA's test set
FLIP_RATES = (0.1, 0.2, 0.3)
ACCURACY = 0.55
SEED = 3407
Verdicts = NDArray[np.bool_]


def draw_chances(rng: np.random.Generator, shape: tuple[int, ...], flip_rate: float) -> NDArray[np.float64]:
    """Return each question's chance of a right answer, such that two seeds differ on ``flip_rate`` of the questions."""
    # Of a beta distribution E[2p(1-p)] = 2 a (1-a) k / (k+1), with a its mean and k the sum of its parameters.
    ratio = flip_rate / (2 * ACCURACY * (1 - ACCURACY))
    weight = ratio / (1 - ratio)
    return rng.beta(ACCURACY * weight, (1 - ACCURACY) * weight, size=shape)


def draw_same(rng: np.random.Generator, runs: int, n: int, flip_rate: float) -> tuple[Verdicts, Verdicts]:
    """Return two sets of verdicts of one and the same model, run by question."""
    chances_RQ = draw_chances(rng, (runs, n), flip_rate)
    return rng.random((runs, n)) < chances_RQ, rng.random((runs, n)) < chances_RQ


def draw_changed(
    rng: np.random.Generator, runs: int, n: int, flip_rate: float, effect: float
) -> tuple[Verdicts, Verdicts]:
    """Return verdicts before and after a true change of accuracy, run by question."""
    chance_RQ = rng.random((runs, n))
    gained_RQ = chance_RQ < (flip_rate + effect) / 2
    lost_RQ = ~gained_RQ & (chance_RQ < flip_rate)
    steady_RQ = ~gained_RQ & ~lost_RQ & (rng.random((runs, n)) < ACCURACY)
    return lost_RQ | steady_RQ, gained_RQ | steady_RQ


def share_called(before_RQ: Verdicts, after_RQ: Verdicts) -> float:
    """Return the share of runs whose exact McNemar test calls a change."""
    gained_R, lost_R = (after_RQ & ~before_RQ).sum(axis=1), (before_RQ & ~after_RQ).sum(axis=1)
    return float((mcnemar_p_values(gained_R, lost_R) <= ALPHA).mean())


def share_called_with_seeds(runs: int, n: int, flip_rate: float, seeds: tuple[int, int]) -> float:
    """Return the share of runs in which sign flips call a change of a model that did not change."""
    rng, called = np.random.default_rng(SEED), 0
    for _ in range(runs):
        chances_Q1 = draw_chances(rng, (n, 1), flip_rate)
        before, after = ((rng.random((n, count)) < chances_Q1).tolist() for count in seeds)
        called += sign_flip_test(before, after) <= ALPHA
    return called / runs


def share_called_in_suite(runs: int, n: int, flip_rate: float, num_tasks: int) -> tuple[float, float]:
    """Return the shares of suites with any change called after Holm, and without it."""
    rng = np.random.default_rng(SEED)
    before, after = draw_same(rng, runs * num_tasks, n, flip_rate)
    p_values = mcnemar_p_values((after & ~before).sum(axis=1), (before & ~after).sum(axis=1))
    suites = p_values.reshape(runs, num_tasks)
    holm = np.mean([min(adjust_holm(suite.tolist())) <= ALPHA for suite in suites])
    return float(holm), float((suites.min(axis=1) <= ALPHA).mean())


def tabulate_verdicts(runs: int, sizes: Sequence[int]) -> tuple[list[list[str]], list[float], list[float]]:
    """Return the rows of the main table, and the shares called without and with a change."""
    rows, false, found = [], [], []
    for n in sizes:
        for flip_rate in FLIP_RATES:
            rng = np.random.default_rng(SEED)
            effect = minimum_detectable_effect(n, flip_rate)
            assert effect is not None, "every size and rate of this table allows some effect"
            usual = brentq(lambda d, n=n, rate=flip_rate: connor(d, rate) - n, 1e-4, flip_rate)
            false.append(share_called(*draw_same(rng, runs, n, flip_rate)))
            found.append(share_called(*draw_changed(rng, runs, n, flip_rate, effect)))
            rows.append(
                [
                    *(f"{n:,}", f"{flip_rate:.0%}", f"{false[-1]:.1%}", f"{compute_power(n, 0.0, flip_rate):.1%}"),
                    *(f"{effect * 100:.1f}", f"{found[-1]:.1%}"),
                    f"{usual * 100:.1f}: {compute_power(n, usual, flip_rate):.1%}",
                ]
            )
    return rows, false, found


def tabulate_seeds(runs: int) -> list[list[str]]:
    """Return how often a change is called where there is none, with several seeds and with several tasks."""
    rows = [
        [f"sign flips, {seeds[0]} seeds before and {seeds[1]} after", f"{n:,}", f"{called:.1%}"]
        for n in (60, 200, 500)
        for seeds in ((4, 4), (1, 4))
        for called in [share_called_with_seeds(runs, n, 0.2, seeds)]
    ]
    holm, without = share_called_in_suite(runs, 200, 0.2, 5)
    return [
        *rows,
        ["any of 5 tasks, after Holm", "200", f"{holm:.1%}"],
        ["any of 5 tasks, without it", "200", f"{without:.1%}"],
    ]


def tabulate_intervals(runs: int) -> list[list[str]]:
    """Return how often intervals of the accuracy hold it, with four seeds a question."""
    rows = []
    for n in (60, 200):
        for accuracy in (0.02, 0.05, 0.25, 0.55):
            rng, held, held_percentile = np.random.default_rng(SEED), 0, 0
            for _ in range(runs):
                right_QS = rng.random((n, 4)) < rng.beta(accuracy * 3, (1 - accuracy) * 3, size=(n, 1))
                interval = summarise_seeds(right_QS.tolist()).interval
                held += interval.low <= accuracy <= interval.high
                low, high = percentile(right_QS.mean(axis=1), rng)
                held_percentile += low <= accuracy <= high
            rows.append([f"{accuracy:.0%}", f"{n:,}", f"{held / runs:.1%}", f"{held_percentile / runs:.1%}"])
    return rows


def percentile(values_Q: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float]:
    """Return the plain percentile bootstrap interval of the mean."""
    levels, counts = np.unique(values_Q, return_counts=True)
    means = rng.multinomial(len(values_Q), counts / len(values_Q), size=10_000) @ levels / len(values_Q)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def describe(runs: int, sizes: Sequence[int]) -> tuple[str, str]:
    """Return the printed tables as Markdown, and the result in a few words."""
    rows, false, found = tabulate_verdicts(runs, sizes)
    columns = [
        "questions",
        "flip rate",
        "false alarms",
        "expected",
        "detectable, points",
        "found",
        "Connor, points: found",
    ]
    details = (
        f"{runs:,} simulated comparisons a line, seed {SEED}; exact McNemar at alpha {ALPHA}, one seed a question.\n\n"
        f"{format_table(columns, rows)}\n\nNothing changed, flip rate 20 %:\n\n"
        f"{format_table(['test', 'questions', 'called a change'], tabulate_seeds(runs))}\n\n"
        "How often 95 % intervals hold the true accuracy, 4 seeds a question:\n\n"
        f"{format_table(['accuracy', 'questions', 'ours', 'percentile bootstrap'], tabulate_intervals(runs))}"
    )
    result = (
        f"one seed a question: of {runs:,} comparisons without a change at most {max(false):.1%} are called one; at the"
        " printed detectable"
        f" effect {min(found):.1%} to {max(found):.1%} are"
    )
    return details, result


def main() -> None:
    """Print the tables, and keep them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated comparisons a line")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of questions")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    details, result = describe(options.runs, options.sizes)
    print(f"{describe_machine()}\n\n{details}\n\n{result}")
    if options.save:
        save_result("eval_false_positives", describe_machine(), result, details)


if __name__ == "__main__":
    main()
