"""The figures of an evaluation, from its lines alone: one model on one task, and two models compared.

Every question asked stays in the denominator: unparsed, unfinished and failed answers are wrong, and each is counted
apart, so that a model which knows the answer but cannot stop thinking looks different from one which is mistaken. The
lenient score stands beside the strict one and decides nothing.

A comparison is of questions that both sides were asked in the same words; what only one of them has is left out of it,
and counted. The pooled figures of several tasks serve a headline; verdicts are given task by task, after Holm.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from medcot.errors import DataError
from medcot.evaluate.answers import read_number
from medcot.evaluate.letters import compare_choices, count_letters, original_letter
from medcot.evaluate.lines import Line, group_by_question, is_right, read_completion
from medcot.evaluate.phrases import normalise_phrase
from medcot.evaluate.power import ALPHA
from medcot.evaluate.resampling import summarise_seeds
from medcot.evaluate.style import measure_style
from medcot.evaluate.verdicts import Comparison, compare_tasks
from medcot.evaluate.votes import calibrate, count_votes, majority_accuracy
from medcot.records import AnswerKind, Completion, Finish, Outcome

SHARES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def score(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the figures of one model on one task (or one control of it), from all of its lines.

    Returns:
        - ``n`` questions, ``seeds`` answers each, ``answers`` in all; ``correct`` of these, and ``accuracy`` (0..1)
          with ``ci95`` ([low, high]) and ``ci_method``; with several seeds ``by_seed`` and ``seed_flip_rate``.
        - ``lenient``: the lenient score, ``{correct, accuracy}``.
        - ``unparsed``, ``unfinished``, ``failed``, ``cut`` (hit the length limit), ``forced`` (thinking was closed for
          the model): answers.
        - ``mean_think_tokens``, ``mean_answer_tokens`` over the completions there are (``None`` without any), and
          ``think_tokens``, ``answer_tokens`` with ``p10``, ``p50``, ``p90``, ``max``.
        - ``topics``: topic to ``{n, correct}``, by answers; empty where no question has one.
        - ``letters``: the histogram and floors of ``letters.count_letters``; ``None`` where answers are no choices.
        - ``votes``: ``majority`` (k to maj@k) and ``calibration``; ``None`` with one seed.
        - ``style``: the measures of ``style.measure_style``.

    Raises:
        DataError: no line, or questions with unequal numbers of answers.
    """
    if not lines:
        raise DataError("no answers", "A score needs a question", "Ask at least one")
    questions = list(group_by_question(lines).values())
    seeds = summarise_seeds([[is_right(line) for line in answers] for answers in questions])
    outcomes = Counter(line["outcome"] for line in lines)
    completions = [done for line in lines if (done := read_completion(line)) is not None]
    lenient = sum(line["lenient_outcome"] == Outcome.CORRECT for line in lines)
    return {
        "n": seeds.n,
        "seeds": seeds.seeds,
        "answers": len(lines),
        "correct": outcomes[Outcome.CORRECT],
        "accuracy": seeds.accuracy,
        "ci95": [seeds.interval.low, seeds.interval.high],
        "ci_method": seeds.interval.method.value,
        "by_seed": list(seeds.by_seed),
        "seed_flip_rate": seeds.seed_flip_rate,
        "lenient": {"correct": lenient, "accuracy": lenient / len(lines)},
        "unparsed": outcomes[Outcome.UNPARSED],
        "unfinished": outcomes[Outcome.UNFINISHED],
        "failed": outcomes[Outcome.FAILED],
        "cut": sum(done.finish is Finish.LENGTH for done in completions),
        "forced": sum(line["forced"] for line in lines),
        **_measure_lengths(completions),
        "topics": _count_topics(lines),
        "letters": _count_letters(lines),
        "votes": _count_votes(questions) if seeds.seeds > 1 else None,
        "style": measure_style(completions),
    }


def compare(before: Mapping[str, Sequence[Line]], after: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """Return what changed between two models, task by task and pooled, on the questions that both were asked.

    Args:
        before: task to its lines.
        after: the same; tasks that only one side has are left out.

    Returns:
        ``tasks``: a list of ``verdicts.Comparison`` as plain values, each with ``sentence`` (it in words),
        ``left_out`` (questions that one side lacks) and ``topics`` (topic to ``{n, before, after}``, by answers);
        ``pooled``: ``{n, delta, p_value, ci95, gained, lost, verdict}`` over all questions of all of them;
        ``missing``: tasks that one side lacks.

    Raises:
        DataError: nothing was asked of both.
    """
    names = [task for task in before if task in after]
    pairs = {task: _pair(before[task], after[task]) for task in names}
    pairs = {task: pair for task, pair in pairs.items() if pair[0]}
    if not pairs:
        raise DataError(
            f"no question is on both sides, of {_name(before)} and of {_name(after)}",
            "Two evaluations are compared on questions that both were asked, in the same words",
            "Evaluate both on the same tasks; a run whose recipe has evaluate.ask_form=false asks without the wish for"
            " the last line, as 'medcot eval' never does",
        )
    rights = {task: (_rights(was), _rights(now)) for task, (was, now, _) in pairs.items()}
    return {
        "tasks": [_describe(found, *pairs[found.task]) for found in compare_tasks(rights)],
        "pooled": _pool(rights),
        "missing": sorted((before.keys() | after.keys()) - pairs.keys()),
    }


def list_flips(before: Sequence[Line], after: Sequence[Line]) -> dict[str, list[tuple[Line, Line]]]:
    """Return the questions that were gained and lost, each with a line of both sides that shows it.

    With several seeds a question counts as gained where more of its answers are right than before.
    """
    flips: dict[str, list[tuple[Line, Line]]] = {"gained": [], "lost": []}
    was, now, _ = _pair(before, after)
    for old, new in zip(was, now, strict=True):
        shares = [statistics.fmean(map(is_right, side)) for side in (old, new)]
        if shares[0] == shares[1]:
            continue
        gained = shares[1] > shares[0]
        wrong, right = (old, new) if gained else (new, old)
        pair = (next(line for line in wrong if not is_right(line)), next(line for line in right if is_right(line)))
        flips["gained" if gained else "lost"].append(pair if gained else pair[::-1])
    return flips


def score_rotation(original: Sequence[Line], rotated: Sequence[Line], shift: int) -> dict[str, Any]:
    """Return how far answers follow their options when these move, over the questions read in both orders.

    An answer that names no option cannot be turned back; nor does it say anything about letters.

    Args:
        original: lines of the task itself.
        rotated: lines of the same questions with their options moved.
        shift: by how many places.

    Returns:
        ``letters.Agreement`` as plain values, and ``num_unread``: questions left out because one of the two answers
        named no option. Of no question read in both orders, ``n`` (0) and ``num_unread`` alone.
    """
    own = {(line["id"], line["seed"]): line for line in original}
    pairs = [(own[key], line) for line in rotated if (key := (line["id"], line["seed"])) in own]
    chosen = [
        [plain["parsed"], original_letter(turned["parsed"], shift, turned["choices"])]
        for plain, turned in pairs
        if plain["parsed"] in plain["choices"] and turned["parsed"] in turned["choices"]
    ]
    unread = {"num_unread": len(pairs) - len(chosen)}
    return {**asdict(compare_choices(chosen)), **unread} if chosen else {"n": 0, **unread}


def add_usage(lines: Sequence[Line]) -> dict[str, Any]:
    """Return what answers took.

    Returns:
        ``answers``, ``attempts``; ``prompt_tokens``, ``think_tokens`` and ``answer_tokens``, and in ``counts`` how many
        answers' tokens are exact, apportioned between the last two, or unknown and then counted as 0; ``cost``,
        ``None`` where that of an answer is unknown; ``seconds``, added up over answers, not by the clock. What attempts
        that broke off were billed is known to a service alone.
    """
    costs = [line["cost"] for line in lines if line["error"] is None]
    return {
        "answers": len(lines),
        "attempts": sum(line["num_attempts"] for line in lines),
        "prompt_tokens": sum(line["num_prompt_tokens"] for line in lines),
        "think_tokens": sum(line["num_think_tokens"] for line in lines),
        "answer_tokens": sum(line["num_answer_tokens"] for line in lines),
        "counts": dict(Counter(line["counts"] for line in lines)),
        "seconds": math.fsum(line["seconds"] for line in lines),
        "cost": None if None in costs or not costs else math.fsum(costs),
    }


def _measure_lengths(completions: Sequence[Completion]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in ("think", "answer"):
        counts = sorted(getattr(done, f"num_{part}_tokens") for done in completions)
        found[f"mean_{part}_tokens"] = statistics.fmean(counts) if counts else None
        marks = {name: counts[round(share * (len(counts) - 1))] for name, share in SHARES.items()} if counts else {}
        found[f"{part}_tokens"] = {**marks, "max": counts[-1]} if counts else None
    return found


def _count_topics(lines: Sequence[Line]) -> dict[str, dict[str, int]]:
    if all(line["topic"] is None for line in lines):
        return {}
    topics: dict[str, dict[str, int]] = {}
    for line in lines:
        counts = topics.setdefault(line["topic"] or "no topic", {"n": 0, "correct": 0})
        counts["n"] += 1
        counts["correct"] += is_right(line)
    return topics


def _count_letters(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Return the histogram of what was chosen; of letters where the first is a floor, and of yes, no and maybe."""
    kinds = {line["answer_kind"] for line in lines}
    if not kinds <= {AnswerKind.LETTER, AnswerKind.YESNO} or len(kinds) != 1:
        return None
    first = next((line["choices"][0] for line in lines if line["choices"]), lines[0]["gold"])
    return asdict(count_letters([line["parsed"] for line in lines], [line["gold"] for line in lines], first))


def _count_votes(questions: Sequence[Sequence[Line]]) -> dict[str, Any]:
    ballots = [count_votes([_spell(line) for line in lines], [is_right(line) for line in lines]) for lines in questions]
    sizes = range(1, len(questions[0]) + 1)
    return {
        "majority": {str(k): majority_accuracy(ballots, k) for k in sizes},
        "calibration": asdict(calibrate(ballots)),
    }


def _spell(line: Line) -> str | None:
    """Return an answer in the one spelling that votes are counted by: 99 mL, 99.0 mL and 99 ml. are one candidate."""
    parsed: str | None = line["parsed"]
    if parsed is None or line["answer_kind"] in (AnswerKind.LETTER, AnswerKind.YESNO):
        return parsed
    quantity = read_number(parsed) if line["answer_kind"] == AnswerKind.NUMBER else None
    return normalise_phrase(parsed) if quantity is None else f"{quantity.value.normalize():f} {quantity.unit}"


def _pair(before: Sequence[Line], after: Sequence[Line]) -> tuple[list[list[Line]], list[list[Line]], int]:
    """Return the lines of the questions that both sides have, in one order, and how many are on one side only."""
    was, now = group_by_question(before), group_by_question(after)
    shared = [key for key in was if key in now]
    return [was[key] for key in shared], [now[key] for key in shared], len(was) + len(now) - 2 * len(shared)


def _rights(questions: Sequence[Sequence[Line]]) -> list[list[bool]]:
    return [[is_right(line) for line in lines] for lines in questions]


def _describe(found: Comparison, was: list[list[Line]], now: list[list[Line]], left_out: int) -> dict[str, Any]:
    topics: dict[str, dict[str, int]] = {}
    for side, questions in (("before", was), ("after", now)):
        for topic, counts in _count_topics([line for lines in questions for line in lines]).items():
            row = topics.setdefault(topic, {"n": counts["n"], "before": 0, "after": 0})
            row[side] = counts["correct"]
    return {**asdict(found), "sentence": found.describe(), "left_out": left_out, "topics": topics}


def _pool(rights: Mapping[str, tuple[list[list[bool]], list[list[bool]]]]) -> dict[str, Any]:
    """Return one comparison over the questions of all tasks together."""
    was, now = ([right for pair in rights.values() for right in pair[side]] for side in (0, 1))
    (found,) = compare_tasks({"all": (was, now)})
    return {
        "n": found.before.n,
        "delta": found.delta,
        "ci95": [found.interval.low, found.interval.high],
        "p_value": found.p_value,
        "gained": found.gained,
        "lost": found.lost,
        "verdict": found.verdict.value,
        "alpha": ALPHA,
    }


def _name(tasks: Mapping[str, Any]) -> str:
    return ", ".join(tasks) or "none"
