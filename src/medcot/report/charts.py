"""The report's charts as inline SVG.

Matplotlib draws, and the page dresses: text stays text (so it takes the page's font and can be selected), and the
colours are stand-ins that are replaced by CSS variables, so that one drawing is legible on a light page, on a dark one
and on paper. The object interface is used, not pyplot: no global figure list, no display, no state left behind.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcot.report.words import interval, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins: colours nothing else uses, each replaced by a variable of page.css.
_COLOURS = {
    "#0a0001": "var(--ink)",
    "#0a0002": "var(--muted)",
    "#0a0003": "var(--line)",
    "#0a0004": "var(--before)",
    "#0a0005": "var(--after)",
    "#0a0006": "var(--second)",
    "#0a0007": "var(--bad)",
    "#0a0008": "var(--open)",
    "#0a0009": "var(--answer)",
    "#0a000a": "var(--sixth)",
}
INK, MUTED, LINE, BEFORE, AFTER, SECOND, BAD, OPEN, ANSWER, SIXTH = _COLOURS
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True, slots=True)
class Chart:
    """One drawn figure: caption parts for the page and the SVG itself."""

    title: str
    reading: str  # the figures in words: "3.21 → 0.84"
    svg: str
    legend: tuple[tuple[str, str], ...] = ()  # CSS class of the swatch, label


def draw_accuracy(sides: Sequence[tuple[str, Mapping[str, Any]]]) -> Chart:
    """Draw accuracy with its interval, one row a side, on an axis from 0 to 100 %.

    Args:
        sides: ``("before" | "after", eval figures)`` pairs.
    """
    figure, axes = new_figure(5.0, 0.42 + 0.46 * len(sides))
    for row, (name, side) in enumerate(reversed(sides)):
        colour = BEFORE if name == "before" else AFTER
        low, high = (100 * end for end in side["ci95"])
        middle = 100 * side["accuracy"]
        axes.plot([low, high], [row, row], color=colour, linewidth=6, alpha=0.32, solid_capstyle="butt")
        axes.plot([middle], [row], "o", color=colour, markersize=8)
        on_right = high < 70
        axes.text(
            high + 2.5 if on_right else low - 2.5,
            row,
            f"{percent(side['accuracy'])}",
            va="center_baseline",
            ha="left" if on_right else "right",
            fontsize=10,
            fontweight="bold",
            color=INK,
        )
    axes.set_yticks(range(len(sides)), [name.capitalize() for name, _ in reversed(sides)], fontsize=9, color=INK)
    axes.set_xticks(range(0, 101, 20), [f"{tick}\u202f%" for tick in range(0, 101, 20)])
    axes.set_xlim(-1.5, 101.5)
    axes.set_ylim(-0.55, len(sides) - 0.45)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    reading = "; ".join(f"{name} {percent(side['accuracy'])} ({interval(side['ci95'])})" for name, side in sides)
    method = "Wilson " if all((side.get("seeds") or 1) == 1 for _, side in sides) else ""
    return Chart(f"Accuracy with 95\u202f% {method}intervals", reading, to_svg(figure, "accuracy", reading))


def draw_training(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw loss, learning rate, gradient norm, tokens per second and memory over optimizer steps.

    A series that no line of ``metrics.jsonl`` carries is left out.
    """
    charts = [
        _draw_losses(metrics),
        _draw_series(metrics, "Learning rate", [("learning_rate", AFTER, "")], reading=_peak),
        _draw_series(metrics, "Gradient norm", [("grad_norm", AFTER, "")], reading=_median),
        _draw_series(
            metrics,
            "Tokens per second",
            [("tokens_per_s", AFTER, "all tokens"), ("trained_tokens_per_s", SECOND, "trained tokens")],
            reading=_median,
        ),
        _draw_series(metrics, "Memory, GB", [("memory_gb", AFTER, "")], reading=_peak),
    ]
    return [chart for chart in charts if chart is not None]


def _draw_losses(metrics: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draw the training's loss and, where rows were held out, theirs: where they part, a model memorises."""
    series = [("loss", AFTER, "training rows"), ("validation_loss", SECOND, "held-out rows")]
    held_out = _collect(metrics, "validation_loss")[1]
    if not held_out:
        return _draw_series(metrics, "Training loss", series[:1], reading=_first_to_last, from_zero=False)

    def reading(values: Sequence[float]) -> str:
        return f"{_first_to_last(values)}; held-out rows {_first_to_last(held_out)}"

    return _draw_series(metrics, "Loss", series, reading=reading, from_zero=False)


def _draw_series(
    metrics: Sequence[Mapping[str, Any]],
    title: str,
    series: Sequence[tuple[str, str, str]],
    *,
    reading: Any,
    from_zero: bool = True,
) -> Chart | None:
    drawn = []
    figure, axes = new_figure(3.6, 1.95)
    for key, colour, name in series:
        steps, values = _collect(metrics, key)
        if values:
            marker = "o" if len(values) < 25 else None
            axes.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3.2)
            drawn.append((values, "swatch-after" if colour == AFTER else "swatch-second", name))
    if not drawn:
        return None
    top = max(max(values) for values, _, _ in drawn)
    bottom = min(min(values) for values, _, _ in drawn)
    if from_zero:
        axes.set_ylim(0, top * 1.12 if top > 0 else 1)
    elif top == bottom:
        axes.set_ylim(bottom - 0.5, top + 0.5)
    _format_axes(axes)
    words = reading(drawn[0][0])
    legend = tuple((swatch, name) for _, swatch, name in drawn if name) if len(drawn) > 1 else ()
    name = series[0][0].replace("_", "-")
    return Chart(title, words, to_svg(figure, name, f"{title} by optimizer step: {words}"), legend)


def _collect(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return steps and finite values of one metric; others are left out, never drawn as zero."""
    found = [
        (float(line["step"]), float(line[key]))
        for line in metrics
        if isinstance(line.get("step"), int | float) and isinstance(line.get(key), int | float)
    ]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _first_to_last(values: Sequence[float]) -> str:
    return f"{number(values[0])} → {number(values[-1])}" if len(values) > 1 else number(values[0])


def _peak(values: Sequence[float]) -> str:
    return f"peak {number(max(values))}"


def _median(values: Sequence[float]) -> str:
    return f"median {number(sorted(values)[len(values) // 2])}"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure in the page's style, in inches, and its axes."""
    import matplotlib as mpl  # not at the top: half a second that only drawing should pay
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.tick_params(length=0, pad=5)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, axes


def _format_axes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.03)
    axes.set_xlabel("optimizer step", fontsize=7.5, color=MUTED, labelpad=3)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an SVG element to stand inside a page: own ids, theme colours, a spoken description."""
    import html

    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Several drawings share one page, so each keeps its ids to itself.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, variable)
    start = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg[: svg.index(">")])
    spoken = html.escape(description, quote=True)
    return f'{start} class="chart" role="img" aria-label="{spoken}"{svg[svg.index(">") :]}'.strip()
