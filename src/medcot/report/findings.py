"""The data doctor's findings as the pages, the card and the terminal show them: the worst first, safe to print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medcot.report import words
from medcot.report.evidence import Passage, Piece, Shown, clean, make_visible, read_evidence, read_says

ORDER = ("red", "yellow", "info")
SIGNS = {"red": "\N{MULTIPLICATION X}", "yellow": "\N{BLACK UP-POINTING TRIANGLE}", "info": "i"}

_LONG_FIGURE = 120  # characters from which a text among the figures is shown in a box
_DRAWN = ("histogram", "percentiles", "edges")  # shown as charts and tables


@dataclass(frozen=True, slots=True)
class FindingView:
    """A finding, every text of it masked and visible.

    Attributes:
        sign: what stands for its severity besides colour and word.
        is_accepted: whether the recipe accepts it, so that it stops nothing.
        rows: ids of the first rows.
        num_more: rows beyond those.
        figures: label and value.
        shown: its evidence.
    """

    id: str
    severity: str
    sign: str
    is_accepted: bool
    count: int
    says: str
    fix: str
    rows: tuple[str, ...]
    num_more: int
    figures: tuple[tuple[str, str], ...]
    shown: tuple[Shown, ...]

    @property
    def is_grave(self) -> bool:
        """Whether a person should look at it."""
        return self.severity != "info"


def build_findings(doctor: Mapping[str, Any]) -> list[FindingView]:
    """Return the findings of data/report.json, or of run.json's ``data.doctor``, the worst first."""
    accepted = set(doctor.get("accepted") or ())
    findings = sorted(doctor.get("findings") or (), key=lambda f: (_rank(f), f.get("id") in accepted))
    return [_build(finding, finding.get("id") in accepted) for finding in findings]


def _rank(finding: Mapping[str, Any]) -> int:
    severity = finding.get("severity")
    return ORDER.index(severity) if severity in ORDER else len(ORDER)


def _build(finding: Mapping[str, Any], is_accepted: bool) -> FindingView:
    severity = make_visible(str(finding.get("severity")))
    rows, count = finding.get("rows") or (), int(finding.get("count") or 0)
    figures = list(_flatten(finding.get("figures") or {}))
    long = [Passage(label, (Piece(text),)) for label, text in figures if len(text) > _LONG_FIGURE or "\n" in text]
    shown = [*read_evidence(finding), *([Shown("", (), tuple(long), ())] if long else [])]
    return FindingView(
        id=make_visible(str(finding.get("id"))),
        severity=severity,
        sign=SIGNS.get(severity, "?"),
        is_accepted=is_accepted,
        count=count,
        says=read_says(finding),
        fix=clean(str(finding.get("fix") or "")),
        rows=tuple(make_visible(str(row)) for row in rows),
        num_more=max(0, count - len(rows)) if rows else 0,
        figures=tuple(figure for figure in figures if len(figure[1]) <= _LONG_FIGURE and "\n" not in figure[1]),
        shown=tuple(shown),
    )


def _flatten(figures: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield plain JSON as labels and values, each label with those of what holds it; what is drawn is left out."""
    for key, value in figures.items():
        if key in _DRAWN:
            continue
        label = f"{above}, {str(key).replace('_', ' ')}" if above else words.label(str(key))
        if isinstance(value, Mapping):
            yield from _flatten(value, label)
        else:
            yield make_visible(label), _say(str(key), value)


def _say(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return words.count(value)
    if isinstance(value, float):
        return words.percent(value) if key in ("rate", "share") else words.number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_say(key, inner) for inner in value)
    return clean(str(value))
