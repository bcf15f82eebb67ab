"""The formulas against published values and against sums written out by hand."""

import math
import subprocess
import sys

import pytest

from medcot.errors import DataError
from medcot.evaluate.stats import count_flips, mcnemar_exact, wilson


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


def test_importing_evaluation_loads_neither_torch_nor_scipy():
    code = "import sys, medcot.evaluate; print([m for m in ('torch', 'scipy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
