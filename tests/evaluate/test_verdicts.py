"""Better, worse, or no detectable change, over a suite."""

import pytest

from medcot.errors import DataError
from medcot.evaluate.stats import Verdict, mcnemar_exact, tango
from medcot.evaluate.verdicts import compare_tasks


def task(gained, lost, both=50, neither=50):
    """One seed a side."""
    before = [[False]] * gained + [[True]] * lost + [[True]] * both + [[False]] * neither
    after = [[True]] * gained + [[False]] * lost + [[True]] * both + [[False]] * neither
    return before, after


def test_each_verdict():
    better, worse, same = compare_tasks({"up": task(30, 5), "down": task(5, 30), "flat": task(10, 8)})
    assert [c.verdict for c in (better, worse, same)] == [Verdict.BETTER, Verdict.WORSE, Verdict.NO_CHANGE]
    assert (better.gained, better.lost, better.task) == (30, 5, "up")
    assert better.delta == pytest.approx(25 / 135) and better.flip_rate == pytest.approx(35 / 135)
    assert (better.interval.low, better.interval.high) == tango(30, 5, 135)
    flat = task(10, 8)
    assert same.p_value == pytest.approx(mcnemar_exact([r[0] for r in flat[0]], [r[0] for r in flat[1]]))


def test_holm_can_take_a_verdict_back():
    borderline = task(20, 8)  # p = 0.036
    (alone,) = compare_tasks({"it": borderline})
    among = compare_tasks({"it": borderline, "other": task(9, 9), "third": task(5, 6)})[0]
    assert alone.verdict is Verdict.BETTER and among.verdict is Verdict.NO_CHANGE
    assert among.p_value == alone.p_value == alone.p_adjusted
    assert among.p_adjusted == pytest.approx(3 * alone.p_value)


def test_several_seeds_make_the_same_change_plain():
    # Half of the questions are dice; one seed each hides what eight show.
    dice = [[seed % 2 == 0 for seed in range(8)] for _ in range(40)]
    better = [[seed % 4 != 3 for seed in range(8)] for _ in range(40)]
    steady = [[True] * 8] * 40
    (many,) = compare_tasks({"it": (dice + steady, better + steady)})
    assert many.verdict is Verdict.BETTER and many.delta == pytest.approx(0.125)
    assert many.before.seeds == 8 and many.interval.low > 0 and many.bootstrap == many.interval


def test_words():
    (comparison,) = compare_tasks({"medqa": task(30, 5, both=500, neither=465)})
    assert comparison.describe() == (
        "medqa: better: 50.5% → 53.0%, +2.5 points (95 % interval +1.4 to +3.8);"
        " 30 of 1,000 questions gained, 5 lost, p < 0.0001 after Holm"
    )
    assert "no detectable change" in compare_tasks({"x": task(3, 3)})[0].describe()


def test_nothing_to_compare():
    assert compare_tasks({}) == []
    with pytest.raises(DataError):
        compare_tasks({"x": ([[True]], [[True], [False]])})
    with pytest.raises(DataError, match="alpha 1"):
        compare_tasks({"x": task(1, 1)}, alpha=1)
