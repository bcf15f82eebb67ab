"""What both pages with an evaluation on them take to their templates, several answers to one question included.

In a file of its own because a run's report needs it as the evaluation's page does, and neither imports the other's
template or builders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medcot.report import eval_charts
from medcot.report.charts import Chart
from medcot.report.eval_views import OUTCOMES, Model, TaskRow, View, build_letters, build_outcomes
from medcot.report.eval_words import describe_calibration, describe_letters


def build_tables(view: View) -> dict[str, Any]:
    """Return what the macros of ``eval_parts`` are given, by the names that both templates use."""
    return {
        "view": view,
        "outcomes": build_outcomes(view),
        "outcome_names": OUTCOMES,
        "letters": [(line, describe_letters(line)) for line in build_letters(view)],
        "votes": build_votes(view),
    }


@dataclass(frozen=True, slots=True)
class Votes:
    """One task's several answers: drawings, and each model's score with what its votes are worth."""

    row: TaskRow
    charts: tuple[Chart, ...]
    models: tuple[tuple[Model, Mapping[str, Any], str], ...]


def build_votes(view: View) -> list[Votes]:
    """Return the drawings and sentences of each task that was asked several times."""
    found = []
    for place, row in enumerate(view.rows):
        scores = [(model, score) for model, score in zip(view.models, row.scores, strict=True) if score]
        voted = [(model, score) for model, score in scores if score.get("votes")]
        if voted:
            votes = [(model, score["votes"]) for model, score in voted]
            charts = (
                eval_charts.draw_majority(f"majority-{place}", "Accuracy of the majority of k answers", votes),
                eval_charts.draw_calibration(f"calibration-{place}", "Right, by share of the votes", votes),
            )
            told = [(model, score, describe_calibration(score["votes"]["calibration"])) for model, score in voted]
            found.append(Votes(row, charts, tuple(told)))
    return found
