"""The charts of the data report: how long rows are, what became of them, and how many each finding concerns.

Drawn as ``charts.py`` draws. Lengths spread over two powers of ten, so their bins (the doctor's own, each a third or a
half wider than the one before) are drawn equally wide, which is a logarithmic axis; prompt, reasoning, answer and the
whole row lie under one another on the same axis, so that a glance tells which of them makes rows long.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from medcot.report import words
from medcot.report.charts import AFTER, BAD, BEFORE, INK, LINE, MUTED, OPEN, SECOND, Chart, new_figure, to_svg

_PARTS = {"prompt": BEFORE, "reasoning": AFTER, "answer": SECOND, "row": INK}
_MOST_TICKS = 8
_MOST_FINDINGS = 12
_MOST_LETTERS = 32  # of an id
_LEAST_WIDEST = 0.1  # share that fills the chart, so that 2 % alone do not look like all


def draw_lengths(figures: Mapping[str, Any]) -> Chart | None:
    """Draw the histograms of the ``lengths`` finding's figures, with the limit; ``None`` without any."""
    parts = {name: figures["parts"][name]["histogram"] for name in _PARTS if name in (figures.get("parts") or {})}
    if not parts:
        return None
    edges = max((histogram["edges"] for histogram in parts.values()), key=len)
    limit = figures.get("max_tokens")
    figure, axes = new_figure(4.6, 0.5 + 0.62 * len(parts))
    for place, (name, histogram) in enumerate(reversed(parts.items())):
        most = max([*histogram["rows"], 1])
        for left, rows in enumerate(histogram["rows"]):
            over = name == "row" and limit is not None and histogram["edges"][left] >= limit
            height = max(0.78 * rows / most, 0.02 if rows else 0.0)  # one row in a million is seen too
            axes.bar(left + 0.5, height, 0.92, place, color=BAD if over else _PARTS[name], linewidth=0)
        axes.axhline(place, color=LINE, linewidth=0.8, zorder=0)
    if limit is not None and limit <= edges[-1]:
        at = _place(edges, limit)
        axes.plot([at, at], [0, len(parts)], color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.text(at, len(parts) + 0.02, f"limit {limit:,}", color=BAD, ha="center", va="bottom", fontsize=8)
    axes.set_yticks([place + 0.3 for place in range(len(parts))], [words.label(name) for name in reversed(parts)])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9)
    step = math.ceil(len(edges) / _MOST_TICKS)
    axes.set_xticks(range(0, len(edges), step), [f"{edge:,}" for edge in edges[::step]])
    axes.set_xlim(-0.1, len(edges) - 0.9)
    axes.set_ylim(0, len(parts) + (0.25 if limit is not None else 0))
    axes.set_xlabel("tokens, each bar a third or a half wider than the one before", fontsize=7.5, color=MUTED)
    reading = _read_lengths(figures, limit)
    return Chart("Tokens of a row", reading, to_svg(figure, "lengths", f"Tokens of a row: {reading}"))


def _read_lengths(figures: Mapping[str, Any], limit: int | None) -> str:
    row = figures["parts"].get("row") or {}
    reading = f"mean {words.count(row.get('mean'))}, {words.count(row.get('min'))} to {words.count(row.get('max'))}"
    return reading if limit is None else f"{reading}; limit {limit:,}"


def _place(edges: Sequence[int], tokens: int) -> float:
    """Return where a number of tokens lies on an axis of which each bin is one wide."""
    left = min(bisect_right(edges, tokens), len(edges) - 1) - 1
    return left + (tokens - edges[left]) / (edges[left + 1] - edges[left])


def list_steps(counts: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Return the way from raw rows to those that are trained on: label, rows left behind it, rows that it took.

    The first step takes none. Rows that no count accounts for get a step of their own.
    """
    numbers = {key: value for key, value in counts.items() if isinstance(value, int) and not isinstance(value, bool)}
    left = numbers.get("raw_rows")
    if left is None:
        return []
    steps = [(words.label("raw_rows"), left, 0)]
    removed = [key for key in numbers if key.startswith("removed")]
    for key in ("unreadable", *removed, "held_out", "unfit", "left_out"):
        if taken := numbers.get(key, 0):
            left -= taken
            steps.append((words.label(key), left, taken))
    last, label = ("rows", "Trained on") if "rows" in numbers else ("examples", "Examples")
    if last in numbers:
        if left > numbers[last]:
            steps.append(("Not encoded or left out", numbers[last], left - numbers[last]))
        repeats = ", with repeats" if left < numbers[last] else ""
        steps.append((f"{label}{repeats}", numbers[last], 0))
    return steps


def draw_way(counts: Mapping[str, Any]) -> Chart | None:
    """Draw what became of the raw rows, one bar a step; ``None`` where they are not known."""
    steps = list_steps(counts)
    if not steps or not steps[0][1]:
        return None
    figure, axes = new_figure(4.6, 0.25 + 0.3 * len(steps))
    widest = max(left for _, left, _ in steps)
    for place, (_, left, taken) in enumerate(steps):
        if taken:
            axes.barh(place, max(taken, widest / 300), 0.62, left, color=SECOND)
        else:
            axes.barh(place, left, 0.62, color=AFTER if place else BEFORE)
        text = f"\N{MINUS SIGN}{taken:,}" if taken else f"{left:,}"
        axes.text(left + taken + widest / 60, place, text, va="center_baseline", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(steps)), [name for name, _, _ in steps])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
    axes.set_xticks([])
    axes.set_xlim(0, widest * 1.16)
    axes.set_ylim(len(steps) - 0.5, -0.5)
    reading = f"{steps[0][1]:,} → {steps[-1][1]:,}"
    spoken = "; ".join(f"{name} {words.count(taken or left)}" for name, left, taken in steps)
    return Chart("What became of the rows", reading, to_svg(figure, "way", spoken))


def draw_findings(findings: Sequence[Mapping[str, Any]], num_rows: int) -> Chart | None:
    """Draw which share of all rows each red and yellow finding concerns; ``None`` where there is none."""
    grave = [f for f in findings if f.get("severity") in ("red", "yellow") and f.get("count")]
    shown = grave[:_MOST_FINDINGS]
    if not shown or num_rows <= 0:
        return None
    figure, axes = new_figure(4.6, 0.35 + 0.3 * len(shown))
    shares = [min(1.0, finding["count"] / num_rows) for finding in shown]
    widest = max(_LEAST_WIDEST, *shares)
    for place, (finding, share) in enumerate(zip(shown, shares, strict=True)):
        axes.barh(place, max(share, widest / 300), 0.62, color=BAD if finding["severity"] == "red" else OPEN)
        text = f"{words.percent(share)} · {finding['severity']}"
        axes.text(share + widest / 60, place, text, va="center_baseline", fontsize=8.5, color=INK)
    # An id is words_with_underscores; what else a foreign report puts there is not drawn.
    names = [words.label(re.sub(r"\W", "", str(finding["id"]), flags=re.ASCII)[:_MOST_LETTERS]) for finding in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
    axes.set_xticks([])
    axes.set_xlim(0, widest * 1.3)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    spoken = "; ".join(f"{name} {words.percent(share)}" for name, share in zip(names, shares, strict=True))
    reading = "" if len(shown) == len(grave) else f"the first {len(shown)} of {len(grave)}"
    return Chart("Share of the rows that a finding concerns", reading, to_svg(figure, "findings", spoken))
