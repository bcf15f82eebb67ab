"""What a run can detect: against published sample sizes, against sums written out, and against drawn tables."""

import math

import numpy as np
import pytest

from medcot.errors import DataError
from medcot.evaluate.power import compute_plan, compute_power, connor, items_needed, minimum_detectable_effect
from medcot.evaluate.stats import mcnemar_p_values


def test_connor_gives_published_sample_sizes():
    # powersizes of R. J. Connor 1987 as at powerandsamplesize.com: p01 = 0.45, p10 = 0.05 -> 23
    assert math.ceil(connor(0.40, 0.50)) == 23
    # R package MESS, its own tests: power_mcnemar_test(paid = 0.05, psi = 9, power = 0.8)$n rounds to 22
    assert round(connor(0.40, 0.50)) == 22
    # a public calculator's worked case: discordant 0.30 and 0.15 -> 155
    assert math.ceil(connor(0.15, 0.45)) == 155


def test_power_gives_a_published_exact_value():
    # R package MESS, its own tests: n = 144, discordant 0.25 and 0.45, one-sided 0.025, exact -> 0.80
    assert compute_power(144, 0.20, 0.70) == pytest.approx(0.80, abs=0.005)


@pytest.mark.parametrize(
    ("n", "effect", "flip_rate"), [(25, 0.2, 0.4), (40, -0.1, 0.3), (12, 0.5, 0.5), (30, 0.0, 1.0)]
)
def test_power_equals_the_sum_over_all_tables(n, effect, flip_rate):
    gain, loss = (flip_rate + effect) / 2, (flip_rate - effect) / 2
    total = 0.0
    for gained in range(n + 1):
        for lost in range(n - gained + 1):
            if mcnemar_p_values(gained, lost) <= 0.05:
                ways = math.comb(n, gained) * math.comb(n - gained, lost)
                total += ways * gain**gained * loss**lost * (1 - flip_rate) ** (n - gained - lost)
    assert compute_power(n, effect, flip_rate) == pytest.approx(total, rel=1e-9)


def test_power_is_what_drawn_tables_show():
    rng = np.random.default_rng(3)
    for n, effect, flip_rate, alpha in ((200, 0.08, 0.2, 0.05), (1273, 0.03, 0.1, 0.01)):
        cells = ((flip_rate + effect) / 2, (flip_rate - effect) / 2, 1 - flip_rate)
        gained, lost, _ = rng.multinomial(n, cells, size=40_000).T
        share = (mcnemar_p_values(gained, lost) <= alpha).mean()
        assert compute_power(n, effect, flip_rate, alpha) == pytest.approx(share, abs=0.008)


def test_a_p_value_of_alpha_itself_is_a_change():
    assert mcnemar_p_values(5, 0) == 0.0625  # 2 / 32
    assert compute_power(5, 1.0, 1.0, alpha=0.0625) == pytest.approx(1)
    assert compute_power(5, 1.0, 1.0, alpha=0.0624) == 0


@pytest.mark.parametrize("n", [1, 5, 50, 200, 1273, 20_000])
@pytest.mark.parametrize("flip_rate", [0.02, 0.2, 1.0])
def test_false_alarms_never_exceed_alpha(n, flip_rate):
    assert compute_power(n, 0.0, flip_rate) <= 0.05


def test_medqa_needs_three_and_a_half_points():
    effect = minimum_detectable_effect(1273, 0.2)
    assert effect == pytest.approx(0.0357, abs=5e-5)
    # The figure that is usually quoted is the asymptotic one; the exact test asks for a little more.
    assert 2.8015852 * math.sqrt(0.2 / 1273) == pytest.approx(0.0351, abs=5e-5)
    assert compute_power(1273, effect, 0.2) == pytest.approx(0.8, abs=1e-4)
    assert compute_power(1273, 0.015, 0.2) < 0.25


def test_the_number_of_questions_is_the_smallest_that_does():
    for effect, flip_rate in ((0.05, 0.2), (-0.03, 0.1), (0.2, 0.2), (1.0, 1.0)):
        n = items_needed(effect, flip_rate)
        assert compute_power(n, effect, flip_rate) >= 0.8 > compute_power(n - 1, effect, flip_rate)
        assert connor(effect, flip_rate) <= n <= 1.2 * connor(effect, flip_rate) + 6
    # and back again
    assert minimum_detectable_effect(items_needed(0.05, 0.2), 0.2) == pytest.approx(0.05, rel=2e-3)


def test_what_cannot_be_found_is_said():
    assert minimum_detectable_effect(20, 0.1) is None
    assert items_needed(0.3, 0.2) is None
    assert "no change can be found" in compute_plan(20, 0.1).describe()


def test_the_plan_in_words():
    words = compute_plan(1273).describe()
    assert words.startswith("1,273 questions, 20% of them assumed to flip: a change of 3.6 points is found with 80% ")
    assert f"{items_needed(0.02, 0.2):,} questions for 2.0 points" in words
    assert "for 5.0 points" not in words  # fewer would do
    assert compute_plan(100_000).describe().endswith("alpha 0.05).")


def test_more_tasks_ask_for_more_and_more_seeds_for_less():
    one, many = compute_plan(500), compute_plan(500, num_tasks=5, seeds=4)
    assert many.detectable == minimum_detectable_effect(500, 0.2, 0.01) > one.detectable
    assert many.detectable_if_dice == pytest.approx(many.detectable / 2)
    assert "over 5 tasks by Holm" in many.describe() and "4 seeds" in many.describe()


@pytest.mark.parametrize(
    "wrong", [(0, 0.2), (10, 0.0), (10, 1.1), (10, 0.2, 0.0), (10, 0.2, 0.05, 1.0), (10, 0.2, 0.9, 0.8)]
)
def test_numbers_out_of_range_are_errors(wrong):
    with pytest.raises(DataError):
        minimum_detectable_effect(*wrong)


def test_an_effect_beyond_the_flips_is_an_error():
    with pytest.raises(DataError, match=r"flip rate of 0\.1"):
        compute_power(100, 0.2, 0.1)
    with pytest.raises(DataError):
        items_needed(0, 0.1)
