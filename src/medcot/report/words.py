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
    """What the run proved: a word to print large, the sentence, and which of better, worse, open or none it is."""

    tone: str  # "better", "worse", "open", "none"
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
    return _judge_change(evaluation, before, after)


def judge_data(doctor: Mapping[str, Any]) -> Verdict:
    """Return the data doctor's verdict in words, from data/report.json or the ``data.doctor`` of run.json."""
    accepted = set(doctor.get("accepted") or ())
    findings = [f for f in doctor.get("findings") or () if f.get("severity") in ("red", "yellow")]
    red = [str(f.get("id")) for f in findings if f["severity"] == "red" and f.get("id") not in accepted]
    overruled = [str(f.get("id")) for f in findings if f["severity"] == "red" and f.get("id") in accepted]
    yellow = [f for f in findings if f["severity"] == "yellow" and f.get("id") not in accepted]
    also = f" {_findings(len(yellow))} {'is' if len(yellow) == 1 else 'are'} for you to judge." if yellow else ""
    if overruled:
        also += f" Red, but accepted by the recipe: {_join(overruled)}."
    if "source_unreadable" in red:
        return Verdict("worse", "This source cannot be read", "Nothing in it was looked at.")
    if doctor.get("verdict") == "red":
        what = (
            f"{_findings(len(red))} {'stops' if len(red) == 1 else 'stop'} a run before its first step: {_join(red)}."
        )
        remedy = " Do what it says under each, or accept it by name in data.accept."
        return Verdict("worse", "Red: this data stops a run", f"{what}{remedy}{also}")
    if doctor.get("verdict") == "yellow":
        return Verdict("open", "Yellow: nothing stops a run, but look at this", also.strip())
    if doctor.get("verdict") == "clean":
        return Verdict("better", "Clean: no check found fault", f"Nothing stops a run or needs your judgement.{also}")
    return Verdict("none", "The data was not looked at", "There is no verdict of the data doctor's.")


def _findings(number: int) -> str:
    return f"{number} finding{'' if number == 1 else 's'}"


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "none"


def _judge_change(evaluation: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    delta, p_value = evaluation.get("delta"), evaluation.get("p_value")
    if delta is None:
        delta = after["accuracy"] - before["accuracy"]
    change = (
        f"from {percent(before.get('accuracy'))} (95{_THIN}% interval {interval(before.get('ci95'))}) to "
        f"{percent(after.get('accuracy'))} ({interval(after.get('ci95'))}) on {count(after.get('n'))} questions"
    )
    test = f"exact McNemar {p_text(p_value)}"
    if delta == 0:
        return Verdict("open", "No change can be told", f"Accuracy stayed the same, {change}; {test}.")
    if p_value is None or p_value >= SIGNIFICANCE:
        way = "rise" if delta > 0 else "fall"
        why = f"a {way} of this size can be chance" if p_value is not None else "the paired test is missing"
        headline = f"Whether it {'improved' if delta > 0 else 'got worse'} cannot be told"
        return Verdict("open", headline, f"Accuracy went {change}, but {why}; {test}.")
    if delta > 0:
        return Verdict("better", f"Improved by {points(delta)[1:]} points", f"Accuracy improved {change}; {test}.")
    return Verdict("worse", f"Got worse by {points(delta)[1:]} points", f"Accuracy got worse, {change}; {test}.")


def _accuracy(side: Mapping[str, Any]) -> str:
    accuracy, questions = percent(side.get("accuracy")), count(side.get("n"))
    return f"{accuracy} (95{_THIN}% interval {interval(side.get('ci95'))}) on {questions} questions"


def _why_none(status: Any, evaluation: Mapping[str, Any]) -> str:
    if evaluation.get("source"):
        return f"The run's status is “{status or 'not known'}”; its evaluation has not been graded."
    return "The recipe names no evaluation set, so this run cannot say whether the model got better at anything."
