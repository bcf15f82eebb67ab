"""Figures as words: number formats, and the one sentence that says what the run proved.

The sentence has three forms only, after the paired test and not after the look of the bars: "improved", "got worse", or
"cannot be told". A difference with p >= 0.05 is never called an improvement, however large it is on five questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIGNIFICANCE = 0.05
UNEVEN = 0.001  # p-value below which the letters chosen are said not to fit the right ones: many are tested at once
_THIN = "\u202f"  # narrow no-break space: before the percent sign and units
_MINUS = "\N{MINUS SIGN}"
UNKNOWN = "\N{EN DASH}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage: ``0.56`` is ``"56.0 %"``."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f}{_THIN}%"


def points(delta: float | None) -> str:
    """Return a difference of two shares in percentage points, signed: ``0.54`` is ``"+54.0"``."""
    if delta is None:
        return UNKNOWN
    text = f"{100 * abs(delta):.1f}"
    return text if text == "0.0" else f"{'+' if delta > 0 else _MINUS}{text}"


def size(delta: float) -> str:
    """Return how large a difference of two shares is, in percentage points without a sign: ``"54.0"``."""
    return f"{100 * abs(delta):.1f}"


def p_text(p_value: float | None) -> str:
    """Return ``"p = 0.031"`` with two significant digits, or ``"p < 0.0001"``."""
    if p_value is None:
        return f"p {UNKNOWN}"
    if p_value < 1e-4:
        return "p < 0.0001"
    return f"p = {p_value:.3f}" if p_value >= 0.01 else f"p = {p_value:.1g}"


def count(value: Any) -> str:
    """Return a count with thousands separated: ``"12,345"``; what is not a number is not known."""
    return f"{value:,.0f}" if isinstance(value, int | float) else UNKNOWN


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with a few significant digits, in plain notation where that is readable."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "not a finite number"
    sign, magnitude = _MINUS if value < 0 else "", abs(float(value))
    if magnitude != 0 and not 1e-4 <= magnitude < 1e6:
        mantissa, exponent = f"{magnitude:.{digits - 1}e}".split("e")
        return f"{sign}{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return sign + (f"{magnitude:.{digits}g}" if magnitude < 1000 else f"{magnitude:,.0f}")


def params(value: float | None) -> str:
    """Return a parameter count as people say it: ``"134.5 M"``, ``"8.03 B"``."""
    if value is None:
        return UNKNOWN
    if value >= 1e9:
        return f"{value / 1e9:.2f}{_THIN}B"
    return f"{value / 1e6:.1f}{_THIN}M" if value >= 1e6 else count(value)


def seconds(value: float | None) -> str:
    """Return a duration: ``"0.8 s"``, ``"12 s"``, ``"4 min 05 s"``, ``"2 h 07 min"``."""
    if value is None:
        return UNKNOWN
    if value < 59.5:
        return f"{value:.{1 if value < 9.95 else 0}f}{_THIN}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{_THIN}min {rest:02d}{_THIN}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{_THIN}h {minutes:02d}{_THIN}min"


def gigabytes(value: float | None) -> str:
    """Return an amount of memory in GB with two digits behind the point."""
    return UNKNOWN if value is None else f"{value:.2f}{_THIN}GB"


def interval(ci95: Any) -> str:
    """Return a 95 % interval of shares as ``"46.2–65.3 %"``."""
    if not isinstance(ci95, list | tuple) or len(ci95) != 2:
        return UNKNOWN
    return f"{100 * ci95[0]:.1f}\N{EN DASH}{100 * ci95[1]:.1f}{_THIN}%"


def change_interval(ends: Any) -> str:
    """Return a 95 % interval of a difference in points, from two ends or a mapping of ``low`` and ``high``."""
    if isinstance(ends, Mapping):
        ends = [ends.get("low"), ends.get("high")]
    if not isinstance(ends, list | tuple) or len(ends) != 2 or None in ends:
        return UNKNOWN
    return f"{points(ends[0])} to {points(ends[1])}"


def join(names: Sequence[str]) -> str:
    """Return names as a list in a sentence: ``"a, b and c"``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "none"


_LABELS = {
    "r": "Rank r",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "init": "Initialisation",
    "cpu": "CPU",
    "gpu": "GPU",
    "gpus": "GPUs",
    "os": "OS",
    "memory_gb": "Memory, GB",
    "max_grad_norm": "Gradient norm at most",
    "cha2ds2_vasc": "CHA₂DS₂-VASc",
    "curb65": "CURB-65",
    "glasgow_fall": "Fall in Glasgow score",
    "mcisaac": "McIsaac score",
    "pack_years": "Pack-years",
    "qtc_hodges": "QTc (Hodges)",
    "unit_thousand": "Units (× 1000)",
    "winters_gap": "Winters' PaCO₂ gap",
    "bos_doubled": "BOS doubled",
    "bos_missing": "BOS missing",
    "eos_lost": "EOS lost",
    "removed_contaminated": "Removed: leaked questions",
    "removed_exact": "Removed: exact copies",
    "removed_near": "Removed: near copies",
    "masked_rows": "Rows with identifiers masked",
    "raw_rows": "Raw rows",
    "unfit": "Not encoded",
    "set_aside": "Set aside in all",
    "num_rows": "Rows",
    "max_tokens": "Limit, tokens",
}


def label(key: str) -> str:
    """Return a key as a label: ``"peak_memory"`` is ``"Peak memory"``."""
    words = key.replace("_", " ").strip()
    return _LABELS.get(key, words[:1].upper() + words[1:])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the run proved: a word to print large, the sentence, and its tone."""

    tone: str  # "better", "worse", "mixed", "open", "none"
    headline: str
    sentence: str


def judge(facts: Mapping[str, Any]) -> Verdict:
    """Return the verdict on a run from its ``run.json``."""
    evaluation = facts.get("eval") or {}
    before, after = evaluation.get("before"), evaluation.get("after")
    status = facts.get("status")
    if not before and not after:
        return Verdict("none", "No graded evaluation", _why_none(status, evaluation))
    if not before or not after:
        side, there = ("before", before) if before else ("after", after or {})
        return Verdict(
            "none",
            "Only half of the comparison is there",
            f"Accuracy {side} training was {_accuracy(there)}; the run's status is “{status or 'not known'}”, and "
            "without the other side nothing can be said about the change.",
        )
    return _judge_run(evaluation, before, after)


def judge_data(doctor: Mapping[str, Any]) -> Verdict:
    """Return the data doctor's verdict in words, from data/report.json or the ``data.doctor`` of run.json."""
    accepted = set(doctor.get("accepted") or ())
    findings = [f for f in doctor.get("findings") or () if f.get("severity") in ("red", "yellow")]
    red = [str(f.get("id")) for f in findings if f["severity"] == "red" and f.get("id") not in accepted]
    overruled = [str(f.get("id")) for f in findings if f["severity"] == "red" and f.get("id") in accepted]
    yellow = [f for f in findings if f["severity"] == "yellow" and f.get("id") not in accepted]
    also = f" {_findings(len(yellow))} {'is' if len(yellow) == 1 else 'are'} for you to judge." if yellow else ""
    if overruled:
        also += f" Red, but accepted by the recipe: {join(overruled)}."
    if "source_unreadable" in red:
        return Verdict("worse", "This source cannot be read", "Nothing in it was looked at.")
    if doctor.get("verdict") == "red":
        what = f"{_findings(len(red))} {'stops' if len(red) == 1 else 'stop'} a run before its first step: {join(red)}."
        remedy = " Do what it says under each, or accept it by name in data.accept."
        return Verdict("worse", "Red: this data stops a run", f"{what}{remedy}{also}")
    if doctor.get("verdict") == "yellow":
        return Verdict("open", "Yellow: nothing stops a run, but look at this", also.strip())
    if doctor.get("verdict") == "clean":
        return Verdict("better", "Clean: no check found fault", f"Nothing stops a run or needs your judgement.{also}")
    return Verdict("none", "The data was not looked at", "There is no verdict of the data doctor's.")


def _findings(number: int) -> str:
    return f"{number} finding{'' if number == 1 else 's'}"


def _judge_run(evaluation: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    """Return the verdict on a change: of several tasks after Holm, of one the paired test's own."""
    tasks = [part for part in (evaluation.get("tasks") or {}).values() if isinstance(part, Mapping)]
    changes = [part["change"] for part in tasks if part.get("change")]
    if changes and len(tasks) > 1:
        return judge_changes([("the model before", "After training", changes)])
    delta, p_value = evaluation.get("delta"), evaluation.get("p_value")
    if changes:
        delta, p_value = changes[0]["delta"], changes[0]["p_adjusted"]
    if delta is None:
        delta = after["accuracy"] - before["accuracy"]
    change = (
        f"from {percent(before.get('accuracy'))} (95{_THIN}% interval {interval(before.get('ci95'))}) to "
        f"{percent(after.get('accuracy'))} ({interval(after.get('ci95'))}) on {count(after.get('n'))} questions"
    )
    test = f"{name_test(after)} {p_text(p_value)}"
    if delta == 0:
        return Verdict("open", "No change can be told", f"Accuracy stayed the same, {change}; {test}.")
    if p_value is None or p_value >= SIGNIFICANCE:
        way = "rise" if delta > 0 else "fall"
        why = f"a {way} of this size can be chance" if p_value is not None else "the paired test is missing"
        headline = f"Whether it {'improved' if delta > 0 else 'got worse'} cannot be told"
        return Verdict("open", headline, f"Accuracy went {change}, but {why}; {test}.")
    if delta > 0:
        return Verdict("better", f"Improved by {size(delta)} points", f"Accuracy improved {change}; {test}.")
    return Verdict("worse", f"Got worse by {size(delta)} points", f"Accuracy got worse, {change}; {test}.")


def name_test(score: Mapping[str, Any]) -> str:
    """Return the name of the paired test that a score of one or several seeds is compared by."""
    return "exact McNemar" if (score.get("seeds") or 1) == 1 else "sign-flip test over questions"


# Several tasks, several models ----------------------------------------------------------------------------------------

Change = Mapping[str, Any]  # one entry of scores.compare()["tasks"]
BETTER, WORSE, NO_CHANGE = "better", "worse", "no detectable change"
_MOST_NAMED, _MOST_IN_FULL = 6, 2  # tasks in a sentence


def judge_changes(comparisons: Sequence[tuple[str, str, Sequence[Change]]]) -> Verdict:
    """Return the verdict on some comparisons, each with the names of both sides and its tasks' changes, after Holm."""
    found = [(was, now, sort_changes(changes)) for was, now, changes in comparisons]
    if len(found) == 1:
        was, now, groups = found[0]
        tone, headline = _judge_groups(groups)
        return Verdict(tone, headline, f"{now} against {was}: {_say_groups(groups)}.")
    tones = {now: _judge_groups(groups)[0] for _, now, groups in found}
    said = [
        f"{kind}: {join([now for now in tones if tones[now] == tone])}"
        for tone, kind in _KINDS.items()
        if tone in tones.values()
    ]
    grave = {*tones.values()} - {"open"}
    tone = "open" if not grave else grave.pop() if len(grave) == 1 else "mixed"
    headline = f"Against {found[0][0]}, {'; '.join(said)}"
    counted = [f"{now}: {_lower(_judge_groups(groups)[1])}." for _, now, groups in found]
    return Verdict(tone, headline, " ".join(counted))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def sort_changes(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """Return the verdict in words to the changes that have it."""
    groups: dict[str, list[Change]] = {BETTER: [], WORSE: [], NO_CHANGE: []}
    for change in changes:
        groups[str(change["verdict"]) if str(change["verdict"]) in groups else NO_CHANGE].append(change)
    return groups


_KINDS = {"better": BETTER, "worse": WORSE, "mixed": "mixed over the tasks", "open": NO_CHANGE}


def _judge_groups(groups: Mapping[str, Sequence[Change]]) -> tuple[str, str]:
    better, worse, num_tasks = len(groups[BETTER]), len(groups[WORSE]), sum(map(len, groups.values()))
    if better and worse:
        return "mixed", f"Mixed: better on {better}, worse on {worse} of {num_tasks} tasks"
    if not better and not worse:
        return "open", f"No detectable change{f' on any of {num_tasks} tasks' if num_tasks > 1 else ''}"
    tone = BETTER if better else WORSE
    if num_tasks == 1:
        (change,) = groups[tone]
        return tone, f"{tone.capitalize()} by {size(change['delta'])} points"
    return tone, f"{tone.capitalize()} on {better or worse} of {num_tasks} tasks"


def _say_groups(groups: Mapping[str, Sequence[Change]]) -> str:
    told = groups[BETTER], groups[WORSE]
    is_brief = sum(map(len, told)) > _MOST_IN_FULL
    said = []
    for kind, changes in zip((BETTER, WORSE), told, strict=True):
        if changes:
            named = [_say_change(change, is_brief=is_brief) for change in changes[:_MOST_NAMED]]
            more = len(changes) - len(named)
            said.append(f"{kind} on {join([*named, f'{more} more'] if more else named)}")
    same = groups[NO_CHANGE]
    if said and same:
        others = "the other task" if len(same) == 1 else f"the other {len(same)} tasks"
        said.append(f"no detectable change on {others}")
    elif same:
        most = max(same, key=lambda change: abs(change["delta"]))
        largest = "the largest difference is on " if len(same) > 1 else ""
        said.append(f"{largest}{_say_change(most, is_brief=False)}")
    return "; ".join(said)


def _say_change(change: Change, *, is_brief: bool) -> str:
    if is_brief:
        return f"{change['task']} ({points(change['delta'])})"
    before, after = (percent((change.get(side) or {}).get("accuracy")) for side in ("before", "after"))
    adjusted = " after Holm" if change.get("p_adjusted") != change.get("p_value") else ""
    return (
        f"{change['task']} ({before} → {after}, {points(change['delta'])} points, 95{_THIN}% interval"
        f" {change_interval(change.get('interval'))}, {p_text(change.get('p_adjusted'))}{adjusted})"
    )


def _accuracy(side: Mapping[str, Any]) -> str:
    accuracy, questions = percent(side.get("accuracy")), count(side.get("n"))
    return f"{accuracy} (95{_THIN}% interval {interval(side.get('ci95'))}) on {questions} questions"


def _why_none(status: Any, evaluation: Mapping[str, Any]) -> str:
    if evaluation.get("source"):
        return f"The run's status is “{status or 'not known'}”; its evaluation has not been graded."
    return "The recipe names no evaluation set, so this run cannot say whether the model got better at anything."
