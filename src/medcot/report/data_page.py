"""data/report.html: what the data doctor found, for a person who must decide whether to train on it.

The verdict first, in words; then each finding with its remedy and the very texts it means, side by side; then how long
rows are, where they come from and what became of them. One file without a script or a request, in the look of the run's
report. All that it shows goes through ``evidence.make_visible`` at the last moment, in the template's environment, so
that no text can be forgotten: nothing in a data set can open a tag, turn the line around or hide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medcot.errors import DataError
from medcot.report import data_charts, words
from medcot.report.evidence import NAMES, clean, make_value_visible
from medcot.report.findings import ORDER, FindingView, build_findings
from medcot.report.lineage import build_lineage
from medcot.report.page import draw_page

VERSION = 1  # of data/report.json
MAX_OPEN = 1  # red findings that are unfolded from the start

LIMITS = (
    "These checks see form, not medicine: a row that passes can still be wrong. Identifiers are masked on this page by"
    " rules that do not know bare names, so read it before you share it; it is no de-identification."
)

_MEASURES = [("mean", "Mean"), ("sd", "Standard deviation"), ("min", "Least"), ("5", "5 % have at most"),
             ("50", "Median"), ("95", "95 % have at most"), ("99", "99 % have at most"), ("max", "Most"),
             ("tokens", "Sum")]  # fmt: skip


def render_data_page(report: Mapping[str, Any]) -> str:
    """Return the page of a data/report.json.

    Raises:
        DataError: the report has another version than this code reads.
    """
    if report.get("version") != VERSION:
        raise DataError(
            f"A data report of version {report.get('version')!r}",
            f"This medcot draws version {VERSION}",
            "Have the data doctor look again, or draw the page with the medcot that wrote the report",
        )
    return draw_page("data_page.html.j2", build_context(report), finalize=make_value_visible)


def build_context(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything the template names."""
    raw = report.get("findings") or []
    counts = report.get("counts") or {}
    findings = build_findings(report)
    charts = [data_charts.draw_findings(raw, _num_rows(counts)), data_charts.draw_way(counts)]
    lengths = next((f.get("figures") or {} for f in raw if f.get("id") == "lengths"), {})
    lineage = build_lineage(report.get("sources") or [])
    return {
        "title": " + ".join(line.name for line in lineage.lines) or "Training data",
        "verdict_word": report.get("verdict"),
        "date": report.get("date"),
        "medcot": report.get("medcot"),
        "verdict": words.judge_data(report),
        "tally": [(word, sum(f.severity == word for f in findings)) for word in ORDER],
        "findings": findings,
        "open_places": [place for place, finding in enumerate(findings) if _is_open(finding)][:MAX_OPEN],
        "charts": [chart for chart in charts if chart is not None],
        "lengths_chart": data_charts.draw_lengths(lengths),
        "lengths_says": [f.says for f in findings if f.id in ("lengths", "over_length")],
        "measures": build_measures(lengths),
        "policies": build_policies(lengths),
        "lineage": lineage,
        "counts": [(words.label(str(key)), _say(value)) for key, value in counts.items()],
        "sentences": [clean(str(sentence)) for sentence in report.get("sentences") or []],
        "names": NAMES,
        "limits": LIMITS,
    }


def build_measures(lengths: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """Return the parts of a row, and a line a measure with its value for each part."""
    parts: Mapping[str, Any] = lengths.get("parts") or {}
    flat = [{**part, **(part.get("percentiles") or {})} for part in parts.values()]
    return [words.label(name) for name in parts], [
        (label, [part.get(key) for part in flat]) for key, label in _MEASURES if flat
    ]


def build_policies(lengths: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the limit and padding would do, as label and sentence."""
    over, padding = lengths.get("over_limit") or {}, lengths.get("padding") or {}
    drop, cut = over.get("drop") or {}, over.get("truncate_think") or {}
    lines = []
    if over.get("rows"):
        lines = [
            ("Rows over the limit", words.count(over["rows"])),
            ("over_length: drop", f"loses {words.count(drop.get('rows_lost'))} rows with"
             f" {words.count(drop.get('tokens_lost'))} tokens"),
            ("over_length: truncate_think", f"takes {words.count(cut.get('reasoning_lost'))} tokens out of"
             f" {words.count(cut.get('shortened'))} rows, and loses {words.count(cut.get('rows_lost'))} rows"),
        ]  # fmt: skip
    for key, label in [("to_longest", "Padding to a batch's longest row"), ("to_limit", "Padding to the limit")]:
        if waste := padding.get(key):
            share = words.percent(waste.get("share"))
            lines.append((label, f"would waste {words.count(waste.get('wasted'))} tokens, {share}"))
    return lines


def _is_open(finding: FindingView) -> bool:
    return finding.severity == "red" and not finding.is_accepted


def _num_rows(counts: Mapping[str, Any]) -> int:
    rows = counts.get("raw_rows") or counts.get("rows") or 0
    return rows if isinstance(rows, int) else 0


def _say(value: Any) -> str:
    if isinstance(value, float):
        return words.number(value)
    return words.count(value) if isinstance(value, int) else clean(str(value))
