"""Majorities and their calibration, against every choice of seeds written out and against drawn answers."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from medcot.errors import DataError
from medcot.evaluate.votes import Ballot, calibrate, count_votes, majority_accuracy


def ballot(letters, gold="A"):
    """One letter a seed; '-' is unread."""
    answers = [None if letter == "-" else letter for letter in letters]
    return count_votes(answers, [letter == gold for letter in letters])


@pytest.mark.parametrize(
    ("letters", "share", "correct"),
    [
        ("AAAB", 0.75, 1),
        ("ABBB", 0.75, 0),
        ("AABB", 0.5, 0.5),  # a tie is a coin
        ("ABCD", 0.25, 0.25),
        ("BBCC", 0.5, 0),
        ("AA--", 0.5, 1),  # unread answers are no candidate, and stay in the denominator
        ("A-BB", 0.5, 0),
        ("----", 0.0, 0),
        ("A", 1.0, 1),
    ],
)
def test_shares_and_majorities(letters, share, correct):
    assert (ballot(letters).share, ballot(letters).correct) == (share, correct)


def test_right_answers_are_one_candidate_however_spelled():
    assert count_votes(["85", "85.0", "90", None], [True, True, False, False]) == Ballot(2, (1,), 1)


@pytest.mark.parametrize("letters", ["AAABBC--", "ABCDEF", "AABBCC-", "BBBBAA", "-----A"])
def test_majority_of_k_is_the_mean_over_every_choice(letters):
    for k in range(1, len(letters) + 1):
        outcomes = []
        for chosen in itertools.combinations(letters, k):
            votes = Counter(letter for letter in chosen if letter != "-")
            top = max(votes.values(), default=0)
            winners = [letter for letter, count in votes.items() if count == top]
            outcomes.append(winners.count("A") / len(winners) if winners else 0)
        expected = sum(outcomes) / len(outcomes)
        assert majority_accuracy([ballot(letters)], k) == pytest.approx(expected, rel=1e-12)


def test_many_different_answers_are_quick():
    many = Ballot(3, (1,) * 61)
    # Right if two or three of the right ones are drawn, or by lot among 32 that differ.
    chance = majority_accuracy([many], 32)
    none, one = math.comb(61, 32), 3 * math.comb(61, 31)
    assert chance == pytest.approx(1 - (none + one) / math.comb(64, 32) + one / math.comb(64, 32) / 32, rel=1e-9)


def test_one_vote_is_the_mean_accuracy_and_more_help_who_is_mostly_right():
    ballots = [ballot("AAAB"), ballot("AABC"), ballot("BBBA")]
    assert majority_accuracy(ballots, 1) == pytest.approx(6 / 12)
    assert majority_accuracy(ballots[:2], 4) == 1.0 > majority_accuracy(ballots[:2], 1)
    assert majority_accuracy(ballots, 4) == pytest.approx(sum(b.correct for b in ballots) / 3)


def test_calibration_by_hand():
    result = calibrate([ballot("AAAA"), ballot("BBBB"), ballot("AAAB"), ballot("AAAB"), ballot("----")])
    assert [(line.share, line.n, line.correct) for line in result.table] == [(0.0, 1, 0), (0.75, 2, 1), (1.0, 2, 0.5)]
    assert result.ece == pytest.approx((1 * 0 + 2 * 0.25 + 2 * 0.5) / 5)
    # 2 questions at 3/4: |X - 1.5| is 1.5, .5, .5 with 1/16, 6/16, 9/16; shares of 0 and 1 leave nothing to chance.
    assert result.ece_if_calibrated == pytest.approx((1.5 / 16 + 0.5 * 15 / 16) / 5)


def test_a_calibrated_model_shows_the_error_that_chance_gives_it():
    rng = np.random.default_rng(9)
    shares = rng.integers(3, 9, size=150)
    expected = calibrate([Ballot(votes, (), 8 - votes) for votes in shares.tolist()]).ece_if_calibrated
    seen = []
    for _ in range(300):
        right = rng.random(150) < shares / 8
        # The winner has s of 8 votes, the rest is unread: no ties, and right with probability s / 8.
        ballots = [
            Ballot(votes, (), 8 - votes) if hit else Ballot(0, (votes,), 8 - votes)
            for votes, hit in zip(shares.tolist(), right, strict=True)
        ]
        seen.append(calibrate(ballots).ece)
    assert np.mean(seen) == pytest.approx(expected, rel=0.05)
    assert expected > 0.03  # the bias that a bare error would be mistaken for


def test_what_is_no_vote():
    with pytest.raises(DataError):
        count_votes([], [])
    with pytest.raises(DataError):
        count_votes(["A"], [True, False])
    with pytest.raises(DataError):
        count_votes([None], [True])
    with pytest.raises(DataError, match="maj@5"):
        majority_accuracy([ballot("AAAA")], 5)
    with pytest.raises(DataError):
        calibrate([])
