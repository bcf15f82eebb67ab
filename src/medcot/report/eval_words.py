"""What the figures of an evaluation say, in sentences.

A score alone proves little, so that of a single model stands beside what needs no medicine: always giving the commonest
letter of these questions. A comparison has its verdict from the paired tests after Holm, never from how far apart two
intervals look. Where nothing can be said, that is what is said, with what would have had to be there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medcot.report.eval_views import LetterRow, View
from medcot.report.words import (
    SIGNIFICANCE,
    UNEVEN,
    Verdict,
    change_interval,
    count,
    interval,
    join,
    judge_changes,
    p_text,
    percent,
    points,
    size,
)

_MOST_SCORES = 6
Facts = Mapping[str, Any]


def judge_evaluation(view: View, results: Facts) -> Verdict:
    """Return the verdict on an evaluation: of its comparisons, or of its one model's scores."""
    silent = [model.name for place, model in enumerate(view.models) if _is_silent(view, place)]
    if silent:
        who = "the model" if len(view.models) == 1 else join(silent)
        return Verdict("worse", f"No answer came from {who}", "All of its questions failed, and count as wrong.")
    comparisons = [it for it in results.get("comparisons") or () if it["tasks"]]
    if comparisons:
        verdict = judge_changes([(it["before"], it["after"], it["tasks"]) for it in comparisons])
        return Verdict(verdict.tone, verdict.headline, f"{verdict.sentence}{_say_power(verdict.tone, results)}")
    return _judge_scores(view)


def _is_silent(view: View, place: int) -> bool:
    scores = [score for row in view.rows if (score := row.scores[place])]
    return bool(scores) and all(score["failed"] == score["answers"] for score in scores)


def _say_power(tone: str, results: Facts) -> str:
    """Say which change would have been found, where none was."""
    found = [plan["detectable"] for plan in results.get("plan") or () if plan.get("detectable")]
    if tone != "open" or not found:
        return ""
    least, most = (size(end) for end in (min(found), max(found)))
    change = f"{least} points" if least == most else f"{least} to {most} points, by task,"
    return f" That is no proof of sameness: a change of {change} was likely to be found, a smaller one was not."


def _judge_scores(view: View) -> Verdict:
    cells = [(row.task, score) for row, _, score in view.cells()]
    if not cells:
        return Verdict("none", "No graded answers", "No question was asked as it stands; there are controls only.")
    lowest, highest = (by(score["accuracy"] for _, score in cells) for by in (min, max))
    headline = (
        f"{percent(cells[0][1]['accuracy'])} on {cells[0][0]}"
        if len(cells) == 1
        else f"{percent(lowest)} to {percent(highest)} on {len(cells)} tasks"
    )
    said = [_say_score(task, score) for task, score in cells[:_MOST_SCORES]]
    more = f"; and {len(cells) - _MOST_SCORES} more below" if len(cells) > _MOST_SCORES else ""
    guessed = any(score.get("letters") and not is_above_floor(score) for _, score in cells)
    return Verdict("open" if guessed else "none", headline, f"{'; '.join(said)}{more}.")


def _say_score(task: str, score: Facts) -> str:
    text = f"{task} {percent(score['accuracy'])} ({interval(score['ci95'])}"
    if not score.get("letters"):
        return f"{text})"
    floor = percent(score["letters"]["always_commonest"])
    if is_above_floor(score):
        return f"{text}, above the {floor} of always giving the commonest answer)"
    return f"{text}, which is not above the {floor} of always giving the commonest answer)"


def is_above_floor(score: Facts) -> bool:
    """Return whether a score's whole interval is above what always giving the commonest answer would reach."""
    return bool(score["ci95"][0] > score["letters"]["always_commonest"])


def describe_letters(line: LetterRow) -> str:
    """Return whether a model leans to a letter, in words.

    The test takes answers for independent draws, which several to one question are not: of these the share alone is
    told. JSON has no infinity, so the chi-square of a letter that is never right may be lost, and its p-value is not.
    """
    letters = line.letters
    chi_square, p_value = letters["chi_square"], letters["p_value"]
    noun = "answer" if letters["unread"] == 1 else "answers"
    unread = f" {count(letters['unread'])} {noun} could not be read." if letters["unread"] else ""
    if letters["moved_share"] is None:
        return "No answer had a choice that could be read."
    if p_value is None:
        return f"One choice only, so nothing to lean to.{unread}"
    if chi_square is None or math.isinf(chi_square):
        return f"Gives an answer that is never right here.{unread}"
    moved = f"{percent(letters['moved_share'])} would have to move to match the right ones"
    if line.seeds > 1:
        return f"{moved}; not tested, for answers to one question are no independent draws.{unread}"
    test = f"chi-square {chi_square:.1f}, {p_text(p_value)}"
    if not letters["enough"]:
        return f"Too few to tell ({test}, but some answers are expected fewer than 5 times).{unread}"
    if p_value < UNEVEN:
        return f"Leans: {moved} ({test}).{unread}"
    return f"No clear lean ({test}).{unread}"


def describe_agreement(agreement: Facts) -> str:
    """Return how many answers stayed behind when their options moved, of those that could be read in both orders."""
    num_read, num_unread = agreement["n"], agreement["num_unread"]
    if not num_read:
        return f"Nothing can be told: none of {count(num_unread)} was read in both orders"
    unread = f", {count(num_unread)} not read" if num_unread else ""
    return f"{percent(agreement['flip_rate'])} of {count(num_read)} did not follow{unread}"


def describe_blank(control: Facts, score: Facts | None) -> str:
    """Return what answering without the question shows, against the floor of the control's own questions.

    A control asks few of the task's questions, whose commonest answer is another share; the task's stands in for it
    where the control's is not known.
    """
    letters = control.get("letters") or (score or {}).get("letters")
    if not letters:
        return ""
    floor = percent(letters["always_commonest"])
    low, high = control["ci95"]
    if low > letters["always_commonest"]:
        return f"Above the {floor} of the commonest answer: the options give some away, or are known by heart."
    if high < letters["always_commonest"]:
        return f"Below the {floor} of the commonest answer, as it should be without the question."
    return f"No different from the {floor} of always giving the commonest answer."


def describe_worth(change: Facts) -> str:
    """Return what thinking adds; the change is of answering without it, so it is turned round."""
    ends = change["interval"]
    worth = {"delta": -change["delta"], "interval": {"low": -ends["high"], "high": -ends["low"]}}
    told = f"{describe_change(worth)}, {p_text(change['p_value'])}"
    if change["p_value"] >= SIGNIFICANCE:
        return f"Thinking makes no difference that can be told: {told}."
    return f"Thinking {'gains' if worth['delta'] > 0 else 'costs'} accuracy: {told}."


def describe_calibration(calibration: Facts) -> str:
    """Return how far the share of votes can be taken for a chance of being right."""
    error, chance = calibration["ece"], calibration["ece_if_calibrated"]
    text = f"Calibration error {100 * error:.1f} points, where {100 * chance:.1f} would come by chance alone"
    if error <= chance:
        return f"{text}: no sign that the share of votes misleads."
    gap = sum(row["n"] * (row["correct"] - row["share"]) for row in calibration["table"]) / calibration["n"]
    way = "more" if gap > 0 else "less"
    return f"{text}: the winner is right {way} often than its share of the votes says."


def describe_change(change: Facts) -> str:
    """Return a difference with its interval: ``"+3.0 points (−1.0 to +7.0)"``."""
    return f"{points(change['delta'])} points ({change_interval(change['interval'])})"


def name_missing(view: View, results: Facts) -> list[tuple[str, str]]:
    """Return each control that was not measured, with the option that measures it."""
    by_model: Mapping[str, Any] = results.get("controls") or {}
    asked = {name for tasks in by_model.values() for controls in tasks.values() for name in controls}
    lettered = any(row.floors for row in view.rows)
    wanted = [
        ("Whether answers follow their options when these change places", "rotate", lettered),
        ("What can be guessed without the question", "blank", lettered),
        ("What thinking is worth", "no-thinking", True),
    ]
    missing = [
        (what, f"--controls {name}")
        for what, name, applies in wanted
        if applies and not any(control.startswith(name) for control in asked)
    ]
    if not any((results.get("budgets") or {}).values()):
        missing.append(("Accuracy against the budget for thinking", "--budgets 256,512,1024,2048"))
    if view.num_seeds == 1:
        missing.append(("How far answers differ from draw to draw", "--seeds 4"))
    return missing


def say_fewer(shown: int, there: int, where: Sequence[str]) -> str:
    """Return where the rest of a list is; nothing where all of it is shown."""
    return f"{there - shown:,} more are lines of {' and '.join(where)}." if there > shown else ""


def say_where(folders: Sequence[str]) -> str:
    """Return where the answers of a comparison are, whose own folder has none."""
    names = f": {join(folders)}" if folders else ""
    return f"Every answer is a line of a file in the folders compared{names}."
