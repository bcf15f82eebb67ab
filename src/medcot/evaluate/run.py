"""One evaluation added up, and two compared: the figures of ``run.json``'s ``eval`` and nothing else.

Every question asked stays in the denominator: unparsed, unfinished and failed answers are wrong, and each is counted
apart so that a model which knows the answer but cannot stop thinking looks different from one which is mistaken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medcot.errors import DataError
from medcot.evaluate.stats import count_flips, mcnemar_exact, wilson
from medcot.records import Completion, Example, Grade, Outcome


def summarise(
    examples: Sequence[Example], completions: Sequence[Completion | None], grades: Sequence[Grade]
) -> dict[str, Any]:
    """Return the figures of one evaluation in the shape of ``run.json``'s ``eval.before``.

    Args:
        examples: the questions, in order.
        completions: the model's text for each; ``None`` where generation failed.
        grades: the verdict on each.

    Returns:
        ``n``, ``correct``, ``accuracy`` (0..1), ``ci95`` (Wilson, ``[low, high]``), ``unparsed``, ``unfinished``,
        ``failed``, ``mean_think_tokens`` and ``mean_answer_tokens`` (over the completions there are; ``None`` without
        any), and ``topics``: topic to ``{n, correct}``, in order of first appearance; empty when no example has one.

    Raises:
        DataError: the three differ in length, or are empty.
    """
    if not (len(examples) == len(completions) == len(grades)) or not examples:
        raise DataError(
            f"{len(examples)} examples, {len(completions)} completions and {len(grades)} grades",
            "An evaluation needs one completion and one grade for each of at least one example",
            "Pass the three lists of the same evaluation",
        )
    outcomes = [grade.outcome for grade in grades]
    correct = outcomes.count(Outcome.CORRECT)
    written = [completion for completion in completions if completion is not None]
    return {
        "n": len(examples),
        "correct": correct,
        "accuracy": correct / len(examples),
        "ci95": list(wilson(correct, len(examples))),
        "unparsed": outcomes.count(Outcome.UNPARSED),
        "unfinished": outcomes.count(Outcome.UNFINISHED),
        "failed": outcomes.count(Outcome.FAILED),
        "mean_think_tokens": _mean([completion.num_think_tokens for completion in written]),
        "mean_answer_tokens": _mean([completion.num_answer_tokens for completion in written]),
        "topics": _count_topics(examples, outcomes),
    }


def compare(before: Sequence[Grade], after: Sequence[Grade]) -> dict[str, Any]:
    """Return what changed between two gradings of the same questions in the same order.

    Returns:
        ``delta`` (accuracy after minus before, a fraction), ``p_value`` (exact McNemar, two-sided), ``gained`` (wrong
        before, right after) and ``lost`` (right before, wrong after).

    Raises:
        DataError: the two differ in length, or are empty.
    """
    right_before = [grade.outcome is Outcome.CORRECT for grade in before]
    right_after = [grade.outcome is Outcome.CORRECT for grade in after]
    gained, lost = count_flips(right_before, right_after)
    if not right_before:
        raise DataError("no grades", "Nothing can be compared without a question", "Grade at least one question")
    return {
        "delta": (gained - lost) / len(right_before),
        "p_value": mcnemar_exact(right_before, right_after),
        "gained": gained,
        "lost": lost,
    }


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _count_topics(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    if all(example.topic is None for example in examples):
        return {}
    topics: dict[str, dict[str, int]] = {}
    for example, outcome in zip(examples, outcomes, strict=True):
        counts = topics.setdefault(example.topic or "no topic", {"n": 0, "correct": 0})
        counts["n"] += 1
        counts["correct"] += outcome is Outcome.CORRECT
    return topics
