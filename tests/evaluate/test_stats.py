"""The formulas against published values and against sums written out by hand."""

import math
import subprocess
import sys

import pytest

from medcot.errors import DataError
from medcot.evaluate.stats import (
    Verdict,
    adjust_holm,
    count_flips,
    decide,
    mcnemar_exact,
    mcnemar_p_values,
    tango,
    wilson,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_table(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 100), (1, 7), (50, 100), (56, 100), (100, 100)])
def test_wilson_ends_solve_the_score_equation(k, n):
    # The definition: the ends are where |p_hat - p| = z * sqrt(p (1 - p) / n).
    z = 1.959963984540054
    for end in wilson(k, n):
        assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert wilson(5, 10, confidence=0.99)[0] < wilson(5, 10)[0]


@pytest.mark.parametrize(("k", "n", "confidence"), [(-1, 10, 0.95), (11, 10, 0.95), (1, 10, 1.0), (1, 10, 0.0)])
def test_wilson_refuses_impossible_counts(k, n, confidence):
    with pytest.raises(DataError):
        wilson(k, n, confidence)


def verdicts(gained, lost, both_right=3, both_wrong=4):
    before = [False] * gained + [True] * lost + [True] * both_right + [False] * both_wrong
    after = [True] * gained + [False] * lost + [True] * both_right + [False] * both_wrong
    return before, after


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 0.0625),  # 2 * 1/32
        (6, 0, 0.03125),
        (9, 1, 2 * (1 + 10) / 1024),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),  # both tails together pass 1
    ],
)
def test_mcnemar_by_hand_and_in_both_directions(gained, lost, p):
    assert mcnemar_exact(*verdicts(gained, lost)) == pytest.approx(p, rel=1e-12)
    assert mcnemar_exact(*verdicts(lost, gained)) == pytest.approx(p, rel=1e-12)


def test_mcnemar_equals_the_binomial_sum_written_out():
    for flips in range(1, 40):
        for lost in range(flips + 1):
            tail = sum(math.comb(flips, i) for i in range(min(lost, flips - lost) + 1))
            expected = min(1.0, 2 * tail / 2**flips)
            assert mcnemar_exact(*verdicts(flips - lost, lost)) == pytest.approx(expected, rel=1e-9)


def test_questions_that_did_not_flip_change_nothing():
    assert mcnemar_exact(*verdicts(9, 1, 0, 0)) == mcnemar_exact(*verdicts(9, 1, 500, 500))


def test_unpaired_verdicts_are_an_error():
    with pytest.raises(DataError, match="1 verdicts before and 2 after"):
        mcnemar_exact([True], [True, False])


def test_flips_are_counted_by_direction():
    assert count_flips(*verdicts(7, 2)) == (7, 2)


def test_mcnemar_of_published_tables():
    # R package contingencytables, its own tests: complete response before and after consolidation (Cavo 2012).
    assert mcnemar_p_values(6, 16) == pytest.approx(0.052479, abs=5e-7)
    many = mcnemar_p_values([0, 0, 9, 16], [0, 5, 1, 6])
    assert many == pytest.approx([1.0, 0.0625, 2 * 11 / 1024, 0.052479], abs=5e-7)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "confidence", "low", "high", "digits"),
    [
        # R package contingencytables, its own tests (Cavo 2012: 59, 6, 16, 80)
        (6, 16, 161, 0.95, -0.1240, -0.0054, 4),
        # R package ratesci, the check beside pairbinci (1, 1, 7, 12: airway hyper-responsiveness, Bentur 2009)
        (1, 7, 21, 0.95, -0.517, -0.026, 3),
        # R package PropCIs, scoreci.mp(25, 28, 618, conf.level = 0.90)
        (28, 25, 618, 0.90, -0.0148, 0.0247, 4),
    ],
)
def test_tango_gives_published_intervals(gained, lost, n, confidence, low, high, digits):
    assert tango(gained, lost, n, confidence) == pytest.approx((low, high), abs=0.5 * 10**-digits)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 60), (3, 0, 60), (12, 30, 200), (0, 1, 2), (7, 7, 14)])
def test_tango_ends_solve_the_score_equation_by_brute_force(gained, lost, n):
    # The definition, with the constrained likelihood's maximum searched for instead of solved for.
    z = 1.959963984540054
    for end in tango(gained, lost, n):
        shares = [min(1, max(0, -end)) + i / 200_000 for i in range(200_001)]  # of losses; gains are that plus end
        shares = [q for q in shares if q + end >= 0 and 2 * q + end <= 1]

        def fit(q, end=end):
            cells = ((gained, q + end), (lost, q), (n - gained - lost, 1 - 2 * q - end))
            return sum(k * math.log(p) if p > 0 else -math.inf for k, p in cells if k)

        best = max(shares, key=fit)
        spread = math.sqrt((2 * best + end - end * end) / n)
        assert abs((gained - lost) / n - end) == pytest.approx(z * spread, rel=2e-3)


def test_tango_at_the_edges():
    z2 = 1.959963984540054**2
    assert tango(0, 0, 100) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)))  # nothing flipped; by algebra
    assert tango(20, 0, 20)[1] == 1.0 and tango(0, 20, 20)[0] == -1.0
    assert tango(0, 0, 0) == (-1.0, 1.0)
    assert tango(5, 9, 50) == pytest.approx(tuple(-end for end in reversed(tango(9, 5, 50))))


@pytest.mark.parametrize("counts", [(-1, 0, 5), (0, -1, 5), (3, 3, 5)])
def test_tango_refuses_impossible_counts(counts):
    with pytest.raises(DataError):
        tango(*counts)
    with pytest.raises(DataError):
        tango(1, 1, 5, 1.0)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [  # statsmodels 0.15.0, multipletests(..., method="holm")
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        (
            [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 1.0],
            [0.0013, 0.0048, 0.0209, 0.095, 0.1809, 0.2224, 0.2224, 0.2224, 0.2295, 1.0, 1.0, 1.0, 1.0],
        ),
        ([0.04, 0.04, 0.5, 0.02], [0.12, 0.12, 0.5, 0.08]),
        ([], []),
        ([0.04], [0.04]),
    ],
)
def test_holm_gives_what_statsmodels_gives(p_values, adjusted):
    assert adjust_holm(p_values) == pytest.approx(adjusted, abs=1e-12)


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(DataError, match=r"1\.2"):
        adjust_holm([0.5, 1.2])


def test_the_verdict_needs_both_a_p_value_and_a_direction():
    assert decide(0.03, 0.05) is Verdict.BETTER
    assert decide(-0.03, 0.05) is Verdict.WORSE
    assert decide(0.03, 0.0501) is Verdict.NO_CHANGE
    assert decide(0.03, 0.05, alpha=0.01) is Verdict.NO_CHANGE
    assert decide(0.0, 0.01) is Verdict.NO_CHANGE
    assert [str(verdict) for verdict in Verdict] == ["better", "worse", "no detectable change"]


def test_importing_evaluation_loads_neither_torch_nor_scipy():
    code = "import sys, medcot.evaluate; print([m for m in ('torch', 'scipy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
