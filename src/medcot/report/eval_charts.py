"""Curves of an evaluation: accuracy against the budget for thinking, maj@k, and votes against correctness.

Only numbers are drawn. Names of models and tasks come from anywhere and may be as long as a path or hold what a drawing
library takes for a formula, so they stand in the page around the drawing, as text. Each model has a mark of its own
besides its colour. Accuracies with their intervals are no drawing at all but lines of the page (``eval_parts``):
thirty of them must be as readable on a telephone as on a desk, and a drawing's letters shrink with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medcot.report.charts import AFTER, ANSWER, BEFORE, INK, LINE, MUTED, OPEN, SECOND, SIXTH, Chart, new_figure, to_svg
from medcot.report.eval_views import Model
from medcot.report.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"before": BEFORE, "after": AFTER, "second": SECOND, "answer": ANSWER, "sixth": SIXTH, "open": OPEN}
_MARKS = dict(zip(_COLOURS, "osD^vP", strict=True))
_APART = 0.04  # between models at one place, as a share of the distance to the next

Series = Sequence[tuple[Model, Sequence[tuple[float, float, float | None, float | None]]]]  # x, y, low, high


def draw_budgets(name: str, title: str, curves: Sequence[tuple[Model, Mapping[str, Any]]]) -> Chart:
    """Draw accuracy with its interval against tokens of thinking, on a scale that doubles; a line a model.

    Args:
        name: of the drawing, its own on the page.
        title: of the drawing.
        curves: ``budgets.Curve`` of each model, as plain values.
    """
    budgets = sorted({point["think_tokens"] for _, curve in curves for point in curve["points"]})
    places = {budget: float(place) for place, budget in enumerate(budgets)}
    series = [
        (model, [(places[p["think_tokens"]], p["accuracy"], *p["ci95"]) for p in curve["points"]])
        for model, curve in curves
    ]
    figure, axes = new_figure(4.2, 2.4)
    _draw(axes, series)
    axes.set_xticks(range(len(budgets)), [f"{budget:,}" for budget in budgets])
    axes.set_xlabel("tokens for thinking, at most", fontsize=7.5, color=MUTED, labelpad=3)
    reading = "; ".join(
        f"at {point['think_tokens']:,} {percent(point['accuracy'])}"
        for _, curve in curves[:1]
        for point in curve["points"]
    )
    return Chart(title, "", to_svg(figure, name, f"Accuracy by budget, first line: {reading}"), _legend(series))


def draw_majority(name: str, title: str, votes: Sequence[tuple[Model, Mapping[str, Any]]]) -> Chart:
    """Draw maj@k against k; a line a model."""
    series = [
        (model, [(float(k), share, None, None) for k, share in found["majority"].items()]) for model, found in votes
    ]
    figure, axes = new_figure(4.2, 2.4)
    _draw(axes, series)
    axes.set_xticks(range(1, 1 + max(int(k) for _, found in votes for k in found["majority"])))
    axes.set_xlabel("answers that vote, k", fontsize=7.5, color=MUTED, labelpad=3)
    reading = ", ".join(f"maj@{k} {percent(share)}" for k, share in votes[0][1]["majority"].items())
    return Chart(title, "", to_svg(figure, name, f"Majority vote, first line: {reading}"), _legend(series))


def draw_calibration(name: str, title: str, votes: Sequence[tuple[Model, Mapping[str, Any]]]) -> Chart:
    """Draw the share that was right, with its interval, against the share of votes; the diagonal is honest."""
    series = [
        (model, [(row["share"], row["correct"], row["low"], row["high"]) for row in found["calibration"]["table"]])
        for model, found in votes
    ]
    figure, axes = new_figure(4.2, 2.4)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    _draw(axes, series, step=0.25)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(-0.03, 1.06)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "1/4", "1/2", "3/4", "1"])
    axes.set_xlabel("share of the votes that the winner has", fontsize=7.5, color=MUTED, labelpad=3)
    reading = ", ".join(
        f"share {row['share']:.2f} right {percent(row['correct'])}" for row in votes[0][1]["calibration"]["table"]
    )
    return Chart(title, "", to_svg(figure, name, f"Votes against correctness, first line: {reading}"), _legend(series))


def _draw(axes: Axes, series: Series, *, step: float = 1.0) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for place, (model, points) in enumerate(series):
        colour = _COLOURS[model.tone]
        shift = (place - (len(series) - 1) / 2) * _APART * step
        xs, ys = [point[0] + shift for point in points], [point[1] for point in points]
        axes.plot(xs, ys, color=colour, linewidth=1.5, marker=_MARKS[model.tone], markersize=4)
        ranges = [(x, low, high) for x, (_, _, low, high) in zip(xs, points, strict=True) if low is not None]
        if ranges:
            axes.vlines(*zip(*ranges, strict=True), color=colour, linewidth=3.2, alpha=0.32)
    low, high = axes.get_ylim()
    axes.set_ylim(max(-0.03, low), min(1.03, max(high, low + 0.1)))
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}\u202f%"))
    axes.tick_params(labelcolor=INK)


def _legend(series: Series) -> tuple[tuple[str, str], ...]:
    return tuple((f"swatch-{model.tone}", model.name) for model, _ in series) if len(series) > 1 else ()
