"""The letters: fit to the gold's, the floors, and what rotation shows."""

import math

import pytest
from scipy import stats as scipy_stats

from medcot.errors import DataError
from medcot.evaluate.letters import compare_choices, count_letters, original_letter


def test_histogram_by_hand():
    gold = list("AAAAABBBCC") * 4
    chosen = [*("A" * 30), *("B" * 4), *("C" * 2), *[None] * 4]
    result = count_letters(chosen, gold)
    assert result.chosen == {"A": 30, "B": 4, "C": 2} and result.gold == {"A": 20, "B": 12, "C": 8}
    theirs = scipy_stats.chisquare([30, 4, 2], [18, 10.8, 7.2])
    assert (result.chi_square, result.p_value) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert result.moved_share == pytest.approx(12 / 36)  # twelve of the A would have to be others
    assert (result.unread, result.enough, result.always_a, result.always_commonest) == (4, True, 0.5, 0.5)


def test_a_perfect_model_fits_perfectly():
    result = count_letters(list("ABCD") * 30, list("ABCD") * 30)
    assert (result.chi_square, result.p_value, result.moved_share) == (0, 1, 0)


def test_floors_differ():
    result = count_letters(list("ABBB"), list("ABBB"))
    assert (result.always_a, result.always_commonest, result.enough) == (0.25, 0.75, False)


def test_edges_of_the_histogram():
    never_right = count_letters(list("AABE"), list("AABB"))
    assert never_right.chi_square == math.inf and never_right.p_value == 0 and not never_right.enough
    silent = count_letters([None, None], ["A", "B"])
    assert (silent.chi_square, silent.p_value, silent.moved_share, silent.unread) == (None, None, None, 2)
    assert count_letters(["A"], ["A"]).p_value is None
    with pytest.raises(DataError):
        count_letters(["A"], [])
    with pytest.raises(DataError):
        count_letters([], [])


def test_letters_turn_back():
    assert [original_letter(shown, 1, "ABCD") for shown in "ABCD"] == ["D", "A", "B", "C"]
    options = dict(zip("ABCDE", ["v", "w", "x", "y", "z"], strict=True))
    for shift in range(5):
        shown = {letter: options["ABCDE"[(place - shift) % 5]] for place, letter in enumerate("ABCDE")}
        assert all(options[original_letter(letter, shift, "ABCDE")] == text for letter, text in shown.items())
    with pytest.raises(DataError, match="'E' of A, B, C, D"):
        original_letter("E", 1, "ABCD")


def test_flips_by_hand():
    result = compare_choices([list("AAA"), list("AAB"), list("ABC"), ["A", "A", None], [None] * 3])
    assert result.flip_rate == 4 / 5 and result.unread == 4
    assert result.disagreement == pytest.approx(1 - (3 + 1 + 0 + 1 + 0) / 15)
    assert result.low < 0.8 < result.high and (result.n, result.answers) == (5, 3)


def test_who_always_says_a_flips_everywhere_and_who_knows_never():
    turned = [[original_letter("A", shift, "ABCD") for shift in range(4)] for _ in range(20)]
    assert compare_choices(turned).flip_rate == compare_choices(turned).disagreement == 1
    assert compare_choices([["C"] * 4] * 20).flip_rate == compare_choices([["C"] * 4] * 20).disagreement == 0


@pytest.mark.parametrize("chosen", [[], [["A"]], [["A", "B"], ["A"]]])
def test_what_cannot_agree(chosen):
    with pytest.raises(DataError):
        compare_choices(chosen)
