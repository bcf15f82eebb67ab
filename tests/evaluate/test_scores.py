"""Figures of an evaluation follow from its lines, and two evaluations are compared on what both were asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from made_lines import make_lines, make_respondent, make_task
from medcot.errors import DataError
from medcot.evaluate.budgets import build_curve
from medcot.evaluate.lines import is_right
from medcot.evaluate.results import build_results, item_path, name_apart, slug
from medcot.evaluate.scores import add_usage, compare, list_flips, score, score_rotation
from medcot.evaluate.stats import Verdict, mcnemar_exact, wilson
from medcot.records import AnswerKind

TASK = make_task(num_items=200)


def test_every_answer_is_counted_once() -> None:
    found = score(make_lines(TASK, 0.6))
    wrong = found["answers"] - found["correct"] - found["unparsed"] - found["unfinished"] - found["failed"]
    assert found["n"] == found["answers"] == 200 and wrong > 0
    assert min(found[key] for key in ("correct", "unparsed", "unfinished", "failed")) > 0
    assert found["ci95"] == list(wilson(found["correct"], 200))
    assert found["lenient"]["correct"] >= found["correct"]
    assert sum(counts["correct"] for counts in found["topics"].values()) == found["correct"]
    assert found["think_tokens"]["p10"] <= found["think_tokens"]["p50"] <= found["think_tokens"]["max"]
    assert found["letters"]["always_a"] == pytest.approx(sum(it.example.gold == "A" for it in TASK.items) / 200)
    assert found["votes"] is None


def test_several_seeds_vote() -> None:
    found = score(make_lines(TASK, 0.6, seeds=range(4)))
    assert (found["n"], found["seeds"], found["answers"]) == (200, 4, 800)
    assert found["votes"]["majority"]["1"] == pytest.approx(found["accuracy"])
    assert found["votes"]["majority"]["4"] > found["accuracy"]
    assert len(found["by_seed"]) == 4 and found["seed_flip_rate"] > 0


def test_a_comparison_is_the_paired_test_with_holm() -> None:
    other = make_task("pubmedqa", 100, AnswerKind.YESNO)
    before = {"medqa": make_lines(TASK, 0.4), "pubmedqa": make_lines(other, 0.5)}
    after = {"medqa": make_lines(TASK, 0.7, rng_seed=1), "pubmedqa": make_lines(other, 0.5, rng_seed=1)}
    found = compare(before, after)
    medqa, pubmedqa = found["tasks"]
    rights = [[is_right(line) for line in side["medqa"]] for side in (before, after)]
    assert medqa["p_value"] == pytest.approx(mcnemar_exact(*rights))
    assert medqa["p_adjusted"] == pytest.approx(2 * medqa["p_value"]) and medqa["verdict"] is Verdict.BETTER
    assert pubmedqa["verdict"] is Verdict.NO_CHANGE
    assert found["pooled"]["n"] == 300 and found["pooled"]["gained"] == medqa["gained"] + pubmedqa["gained"]
    assert sum(row["after"] for row in medqa["topics"].values()) == sum(rights[1])


def test_only_questions_asked_of_both_in_the_same_words_are_compared() -> None:
    before = make_lines(TASK, 0.4)[:150]
    after = make_lines(TASK, 0.6, rng_seed=1)[50:]
    after[0] = {**after[0], "question": "Put otherwise?"}
    (found,) = compare({"medqa": before}, {"medqa": after})["tasks"]
    assert found["before"]["n"] == 99 and found["left_out"] == 50 + 50 + 2
    with pytest.raises(DataError, match="same words"):
        compare({"medqa": before}, {"pubmedqa": after})


def test_flips_show_a_wrong_and_a_right_answer() -> None:
    before, after = make_lines(TASK, 0.4, seeds=(0, 1)), make_lines(TASK, 0.7, seeds=(0, 1), rng_seed=1)
    flips = list_flips(before, after)
    change = compare({"": before}, {"": after})["tasks"][0]
    assert (len(flips["gained"]), len(flips["lost"])) == (change["gained"], change["lost"])
    assert all(not is_right(old) and is_right(new) for old, new in flips["gained"])
    assert all(is_right(old) and not is_right(new) for old, new in flips["lost"])


def test_a_rotation_that_follows_its_options_agrees() -> None:
    lines = [line for line in make_lines(TASK, 1.0) if line["parsed"]]
    followed = [{**line, "parsed": "ABCD"[("ABCD".index(line["parsed"]) + 1) % 4]} for line in lines]
    assert score_rotation(lines, followed, 1)["flip_rate"] == 0
    assert score_rotation(lines, lines, 1)["flip_rate"] == 1


def test_an_answer_that_names_no_option_is_left_out_of_the_rotation() -> None:
    lines = [line for line in make_lines(TASK, 1.0) if line["parsed"]]
    odd = [{**lines[0], "parsed": "F"}, {**lines[1], "parsed": None}, *lines[2:]]
    found = score_rotation(lines, odd, 1)
    assert (found["n"], found["num_unread"]) == (len(lines) - 2, 2)
    assert score_rotation(lines[:1], odd[:1], 1) == {"n": 0, "num_unread": 1}


def test_votes_are_counted_by_value_not_by_spelling() -> None:
    task = make_task("medcalc-bench", 1, AnswerKind.NUMBER)
    lines = make_lines(task, 1.0, seeds=range(5))
    wrong = {"outcome": "wrong", "lenient_outcome": "wrong"}
    spelled = [
        {**line, **wrong, "parsed": text} for line, text in zip(lines, ("99 mL", "99.0 mL", "99 ml."), strict=False)
    ]
    right = [{**line, "outcome": "correct", "parsed": "1 mL"} for line in lines[3:]]
    assert score([*spelled, *right])["votes"]["majority"]["5"] == 0


def test_the_smallest_budget_not_seen_to_lose_is_recommended() -> None:
    chances = {256: 0.2, 512: 0.5, 1024: 0.805, 2048: 0.81}
    curve = build_curve({cap: make_lines(TASK, chance, cap=cap) for cap, chance in chances.items()})
    assert [point.think_tokens for point in curve.points] == sorted(chances)
    assert curve.recommended in (1024, 2048) and "Serve with" in curve.sentence
    if curve.recommended != curve.best:
        assert "-0." in curve.sentence, "it is no better than the best"
    assert "none can be recommended" in build_curve({64: make_lines(TASK, 0.0, cap=64)}).sentence
    alone = build_curve({64: make_lines(TASK, 0.5, cap=64)})
    assert "every smaller one" not in alone.sentence and alone.recommended == 64
    assert curve.points[0].p_value < 0.001 and curve.points[0].delta < -0.3
    assert curve.points[0].forced_share > curve.points[-1].forced_share


def test_results_hold_controls_curves_and_comparisons() -> None:
    tasks = [TASK, replace(TASK, control="rotate-1"), replace(TASK, control="no-thinking")]
    caps = [replace(TASK, control=f"budget-{cap}") for cap in (256, 1024)]
    base, tuned = make_respondent("base", 0.4, [*tasks, *caps]), make_respondent("tuned", 0.6, [*tasks, *caps])
    found = build_results([base, tuned])
    assert [model["name"] for model in found["models"]] == ["base", "tuned"]
    assert set(found["controls"]["base"]["medqa"]) == {"rotate-1", "no-thinking"}
    assert "agreement" in found["controls"]["tuned"]["medqa"]["rotate-1"]
    assert found["controls"]["tuned"]["medqa"]["no-thinking"]["change"]["delta"] == 0
    assert len(found["budgets"]["tuned"]["medqa"]["points"]) == 2
    (change,) = found["comparisons"]
    assert (change["before"], change["after"], change["pooled"]["verdict"]) == ("base", "tuned", "better")
    assert found["usage"]["base"] == add_usage(base.lines) and found["usage"]["base"]["answers"] == 1000


def test_names_are_kept_apart_and_the_same_answers_shown_once() -> None:
    base, tuned = make_respondent("base", 0.4, [TASK]), make_respondent("tuned", 0.6, [TASK])
    other = replace(make_respondent("a longer name", 0.5, [TASK]), name="tuned")
    found = name_apart({"one": [base, tuned], "two": [base, other]})
    assert [it.name for it in found] == ["base", "tuned", "tuned (two)"]
    with pytest.raises(DataError, match="name of its own"):
        build_results([base, base])


def test_a_path_is_made_of_any_name(tmp_path) -> None:
    assert slug("deepseek-ai/R1: 8B") == "deepseek-ai-R1-8B" and slug("…") == "model"
    assert item_path(tmp_path, "a/b", "builtin:clinic", "rotate-1").name == "builtin-clinic.rotate-1.jsonl"


def test_usage_says_how_far_it_can_be_trusted() -> None:
    lines = [{**line, "cost": 0.1, "num_attempts": 2} for line in make_lines(TASK, 1.0)[:3]]
    lines[1]["counts"] = "apportioned"
    failed = {**lines[2], "error": "no", "cost": None, "counts": "unknown"}
    found = add_usage([*lines[:2], failed])
    assert (found["answers"], found["attempts"], found["cost"]) == (3, 6, pytest.approx(0.2))
    assert found["counts"] == {"exact": 1, "apportioned": 1, "unknown": 1}
    assert add_usage([{**lines[0], "cost": None}, lines[1]])["cost"] is add_usage([failed])["cost"] is None
