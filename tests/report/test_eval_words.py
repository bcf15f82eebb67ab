"""What the figures of an evaluation say: verdicts over tasks and models, letters, controls, calibration."""

import math
from dataclasses import asdict

import pytest

from medcot.evaluate.letters import count_letters
from medcot.report.eval_views import build_letters, view_results
from medcot.report.eval_words import (
    describe_agreement,
    describe_blank,
    describe_calibration,
    describe_letters,
    describe_worth,
    judge_evaluation,
)
from medcot.report.words import judge_changes


def _change(task, delta, verdict, before=0.5):
    sides = {"before": {"accuracy": before}, "after": {"accuracy": before + delta}}
    interval = {"low": delta - 0.05, "high": delta + 0.05}
    return {"task": task, "delta": delta, "verdict": verdict, "interval": interval, "p_adjusted": 0.01, **sides}


UP, DOWN, SAME = _change("a", 0.2, "better"), _change("b", -0.1, "worse"), _change("c", 0.03, "no detectable change")


@pytest.mark.parametrize(
    ("changes", "tone", "headline", "says"),
    [
        ([UP], "better", "Better by 20.0 points", "better on a (50.0 % → 70.0 %, +20.0 points"),
        ([DOWN], "worse", "Worse by 10.0 points", "worse on b"),
        ([SAME], "open", "No detectable change", "c (50.0 % → 53.0 %, +3.0 points, 95 % interval −2.0 to +8.0"),
        ([UP, SAME], "better", "Better on 1 of 2 tasks", "no detectable change on the other task"),
        ([UP, DOWN, SAME], "mixed", "Mixed: better on 1, worse on 1 of 3 tasks", "worse on b (50.0 % → 40.0 %"),
        ([SAME, SAME], "open", "No detectable change on any of 2 tasks", "the largest difference is on c"),
        ([UP] * 9, "better", "Better on 9 of 9 tasks", "a (+20.0) and 3 more"),
    ],
)  # fmt: skip
def test_the_verdict_counts_tasks_after_holm(changes, tone, headline, says):
    verdict = judge_changes([("base", "tuned", changes)])
    assert (verdict.tone, verdict.headline) == (tone, headline)
    assert says in verdict.sentence.replace("\u202f", " ")


@pytest.mark.parametrize(
    ("kinds", "tone"),
    [([UP, SAME], "better"), ([SAME, SAME], "open"), ([UP, DOWN], "mixed"), ([DOWN, DOWN], "worse")],
)
def test_several_models_have_one_tone(kinds, tone):
    assert judge_changes([("base", f"m{place}", [kind]) for place, kind in enumerate(kinds)]).tone == tone


def _letters(chosen, gold, seeds=1):
    letters = asdict(count_letters(list(chosen), list(gold)))
    if letters["chi_square"] == math.inf:
        letters["chi_square"] = None  # as results.json has it
    score = {"n": len(gold), "seeds": seeds, "letters": letters}
    found = view_results({"models": [{"name": "m"}], "scores": {"m": {"t": score}}})
    return describe_letters(build_letters(found)[0])


@pytest.mark.parametrize(
    ("chosen", "gold", "says"),
    [
        ("A" * 60 + "B" * 20, "AB" * 40, "Leans: 25.0 % would have to move"),
        ("AB" * 40, "AB" * 40, "No clear lean"),
        ("A" * 51 + "B" * 29, "AB" * 40, "No clear lean (chi-square 6.0, p = 0.014)"),  # one model of many
        ("C" * 8, "AB" * 4, "never right"),
        ("AB", "AB", "Too few to tell"),
        ("AA", "AA", "One choice only"),
        ([None] * 4, "ABAB", "No answer had a choice"),
        ([*("AB" * 20), None], "AB" * 20 + "A", "1 answer could not be read"),
    ],
)
def test_a_lean_to_a_letter_in_words(chosen, gold, says):
    assert says in _letters(chosen, gold).replace("\u202f", " ")


def test_several_answers_to_a_question_are_not_tested_as_draws():
    once = _letters("A" * 20 + "B" * 12, "AB" * 16)
    often = _letters("A" * 160 + "B" * 96, "AB" * 128, seeds=8).replace("\u202f", " ")
    assert "No clear lean" in once
    assert "12.5 % would have to move" in often and "p <" not in often and "chi-square" not in often
    assert "never right" in _letters("C" * 8, "AB" * 4, seeds=8)


@pytest.mark.parametrize(
    ("ci95", "tone", "says"),
    [([0.31, 0.5], "none", ", above the 30.0 % of always"), ([0.2, 0.5], "open", "which is not above the 30.0 %")],
)
def test_one_model_must_be_above_the_floor_with_its_whole_interval(ci95, tone, says):
    letters = {"letters": {"always_commonest": 0.3}}
    score = {"n": 50, "answers": 50, "failed": 0, "accuracy": 0.4, "ci95": ci95, **letters}
    results = {"models": [{"name": "m"}], "scores": {"m": {"medqa": score}}}
    verdict = judge_evaluation(view_results(results), results)
    assert (verdict.tone, verdict.headline.replace("\u202f", " ")) == (tone, "40.0 % on medqa")
    assert says in verdict.sentence.replace("\u202f", " ")


def test_controls_in_words():
    floor = {"letters": {"always_commonest": 0.3}}
    assert "Above the 30.0" in describe_blank({"ci95": [0.31, 0.5]}, floor)
    assert "Below the 30.0" in describe_blank({"ci95": [0.1, 0.29]}, floor)
    assert (
        "No different" in describe_blank({"ci95": [0.2, 0.4]}, floor) and describe_blank({"ci95": [0, 1]}, None) == ""
    )
    own = {"ci95": [0.31, 0.5], "letters": {"always_commonest": 0.4}}
    assert "No different from the 40.0" in describe_blank(own, floor)
    assert "No different from the 40.0" in describe_blank(own, None)
    assert "Above the 30.0" in describe_blank(own | {"letters": None}, floor)
    change = {"delta": -0.2, "interval": {"low": -0.3, "high": -0.1}, "p_value": 0.001}
    assert describe_worth(change).startswith("Thinking gains accuracy: +20.0 points (+10.0 to +30.0), p")
    assert "costs" in describe_worth(change | {"delta": 0.2}) and "no difference" in describe_worth(
        change | {"p_value": 0.5}
    )


def test_what_followed_in_words():
    read = {"n": 72, "flip_rate": 0.125, "num_unread": 8}
    assert describe_agreement(read).replace("\u202f", " ") == "12.5 % of 72 did not follow, 8 not read"
    assert describe_agreement(read | {"num_unread": 0}).endswith("did not follow")
    assert describe_agreement({"n": 0, "num_unread": 8}) == "Nothing can be told: none of 8 was read in both orders"


def test_calibration_says_which_way():
    row = {"share": 0.5, "n": 40, "correct": 0.9, "low": 0.8, "high": 0.95}
    off = {"n": 40, "table": [row], "ece": 0.4, "ece_if_calibrated": 0.06}
    assert "right more often than its share" in describe_calibration(off)
    assert "right less often" in describe_calibration(off | {"table": [row | {"correct": 0.1}]})
    assert "no sign" in describe_calibration(off | {"ece": 0.05})
