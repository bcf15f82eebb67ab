"""Several seeds: against scipy, statsmodels, the McNemar test, and every permutation written out."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from medcot.errors import DataError
from medcot.evaluate.power import minimum_detectable_effect
from medcot.evaluate.resampling import (
    Method,
    bootstrap_mean,
    compute_flip_rate,
    interval_of_difference,
    paired_differences,
    sign_flip_test,
    summarise_seeds,
)
from medcot.evaluate.stats import mcnemar_exact, tango, wilson

TWELVE = [  # 12 questions, 3 seeds
    *([0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]),
    *([0, 0, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1]),
]


def draw(rng, n, seeds, accuracy=0.5, weight=1.0):
    chances = rng.beta(accuracy * weight, (1 - accuracy) * weight, size=(n, 1))
    return (rng.random((n, seeds)) < chances).tolist()


def test_standard_error_is_clustered_by_question():
    summary = summarise_seeds(TWELVE)
    # statsmodels 0.15.0: OLS on a constant, cov_type="cluster", its small-sample correction
    assert summary.standard_error == pytest.approx(0.11236664, abs=1e-8)
    assert (summary.n, summary.seeds, summary.accuracy) == (12, 3, 0.5)
    assert summary.design_effect == pytest.approx(0.11236664**2 / (0.25 / 36), abs=1e-6)  # 1.8: not 36 trials
    assert summary.by_seed == pytest.approx((0.5, 4 / 12, 8 / 12))


def test_flips_between_seeds_are_counted_over_all_pairs():
    pairs = [a != b for row in TWELVE for a, b in itertools.combinations(row, 2)]
    assert summarise_seeds(TWELVE).seed_flip_rate == pytest.approx(sum(pairs) / len(pairs))
    assert summarise_seeds([[True], [False]]).seed_flip_rate is None


def test_one_seed_has_wilsons_interval():
    summary = summarise_seeds([[True]] * 30 + [[False]] * 70)
    assert (summary.interval.low, summary.interval.high) == wilson(30, 100)
    assert summary.interval.method is Method.WILSON


def test_where_all_questions_are_alike_the_interval_is_wilsons_of_the_questions():
    interval = summarise_seeds([[False] * 4] * 50).interval
    assert (interval.low, interval.high) == wilson(0, 50) and interval.method is Method.WILSON


def test_bootstrap_gives_what_scipys_bca_gives():
    rng = np.random.default_rng(5)
    for accuracy, n in ((0.5, 120), (0.08, 60)):
        values = np.mean(draw(rng, n, 4, accuracy), axis=1)
        theirs = scipy_stats.bootstrap(
            (values,), np.mean, n_resamples=10_000, method="BCa", vectorized=True, rng=np.random.default_rng(1)
        ).confidence_interval
        width = theirs.high - theirs.low
        assert bootstrap_mean(values, seed=0) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_a_skewed_bootstrap_is_corrected_for_bias_and_skew():
    values = np.array([0.0, 0.02, 0.05, 0.06, 0.11, 0.14, 0.2, 0.31, 0.55, 1.0])
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="BCa", vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval
    ends = bootstrap_mean(values, num_resamples=50_000)
    assert ends == pytest.approx((theirs.low, theirs.high), abs=0.012 * (theirs.high - theirs.low))


def test_bootstrap_is_a_function_of_its_seed():
    values = np.mean(TWELVE, axis=1)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_bootstrap_refuses_what_it_cannot_resample():
    with pytest.raises(DataError, match="1 of them distinct"):
        bootstrap_mean(np.zeros(10))
    with pytest.raises(DataError):
        bootstrap_mean(np.array([0.0, 1.0]), confidence=1.0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(300):
        interval = summarise_seeds(draw(rng, 80, 4, accuracy=0.3)).interval
        held += interval.low <= 0.3 <= interval.high
    assert 0.92 <= held / 300 <= 0.98


def test_one_seed_a_side_is_mcnemars_test():
    rng = np.random.default_rng(2)
    for n in (1, 7, 60, 1273):
        for accuracy in (0.02, 0.5):
            before, after = draw(rng, n, 1, accuracy), draw(rng, n, 1, 0.6)
            flat = [row[0] for row in before], [row[0] for row in after]
            assert sign_flip_test(before, after) == pytest.approx(mcnemar_exact(*flat), rel=1e-9)


@pytest.mark.parametrize(("seeds_before", "seeds_after"), [(1, 1), (2, 2), (3, 3), (1, 4), (2, 3)])
def test_sign_flips_equal_every_permutation_written_out(seeds_before, seeds_after):
    rng = np.random.default_rng(seeds_before * 10 + seeds_after)
    for _ in range(5):
        before, after = draw(rng, 9, seeds_before), draw(rng, 9, seeds_after, 0.7)
        steps = paired_differences(before, after) * seeds_before * seeds_after
        steps = np.round(steps).astype(int)
        sums = [abs(int(np.dot(signs, steps))) for signs in itertools.product((-1, 1), repeat=9)]
        expected = sum(value >= abs(steps.sum()) for value in sums) / len(sums)
        assert sign_flip_test(before, after) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_agree_with_scipys_permutation_test():
    rng = np.random.default_rng(8)
    before, after = draw(rng, 12, 4), draw(rng, 12, 4, 0.7)
    sides = np.mean(after, axis=1), np.mean(before, axis=1)
    theirs = scipy_stats.permutation_test(
        sides, lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_test(before, after) == pytest.approx(theirs.pvalue, rel=1e-9)


def test_far_tails_keep_their_precision():
    before, after = [[False] * 4] * 200, [[True] * 4] * 199 + [[True, False, False, False]]
    assert sign_flip_test(before, after) == pytest.approx(2 * 0.5**200, rel=1e-9)


def test_nothing_changed_is_no_evidence():
    assert sign_flip_test(TWELVE, TWELVE) == 1.0
    assert sign_flip_test(TWELVE, [row[::-1] for row in TWELVE]) == 1.0  # which seed was right does not matter


def test_seeds_find_what_the_plan_says_if_all_flips_are_dice():
    # Every question alike: 2 p (1 - p) = 0.2, so that all flips are chance, and 4 seeds halve what is detectable.
    rng, n, middle = np.random.default_rng(6), 300, (1 - math.sqrt(0.6)) / 2
    effect = minimum_detectable_effect(n, 0.2) / 2
    found = 0
    for _ in range(400):
        before, after = (rng.random((n, 4)) < middle + side * effect / 2 for side in (-1, 1))
        found += sign_flip_test(before.tolist(), after.tolist()) <= 0.05
    assert 0.75 <= found / 400 <= 0.85


def test_intervals_of_a_difference():
    before = [[False]] * 40 + [[True]] * 60
    after = [[True]] * 12 + [[False]] * 28 + [[False]] * 3 + [[True]] * 57
    quoted, beside = interval_of_difference(paired_differences(before, after))
    assert quoted.method is Method.TANGO and (quoted.low, quoted.high) == tango(12, 3, 100)
    assert beside.method is Method.BCA
    assert (beside.low, beside.high) == pytest.approx((quoted.low, quoted.high), abs=0.01)
    same, none = interval_of_difference(np.zeros(100))
    assert none is None and (same.low, same.high) == tango(0, 0, 100)
    several, twin = interval_of_difference(paired_differences(TWELVE, TWELVE[::-1]))
    assert several is twin and several.method is Method.BCA and several.low < 0 < several.high


def test_flip_rate_with_one_seed_is_the_share_of_flips():
    assert compute_flip_rate([[1], [1], [0], [0]], [[1], [0], [0], [1]]) == 0.5
    pairs = [a != b for row, other in zip(TWELVE, TWELVE[::-1], strict=True) for a in row for b in other]
    assert compute_flip_rate(TWELVE, TWELVE[::-1]) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("scores", [[], [[]], [[True], [True, False]]])
def test_holes_are_errors(scores):
    with pytest.raises(DataError, match="Count an answer that failed as wrong"):
        summarise_seeds(scores)


def test_sides_of_unequal_length_are_errors():
    with pytest.raises(DataError, match="11 questions before and 12 after"):
        sign_flip_test(TWELVE[1:], TWELVE)
