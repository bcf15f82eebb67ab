"""The page of runs: all of them, and one in full, drawn again whenever its files have grown.

A run writes ``metrics.jsonl`` line by line and replaces ``run.json`` whole (``folder.py``), so a page can read both at
any time. It asks for their sizes and times every two seconds, and reads and draws only what has changed; a job's own
process is never asked for anything, so that watching a run cannot disturb it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from medcot.errors import MedcotError
from medcot.folder import read_lines
from medcot.records import Run
from medcot.report import charts, words
from medcot.ui.drawing import draw, panel
from medcot.ui.shelf import Shelf, read_facts, stamp

EVERY_S = 2.0
_KINDS = {"complete": "good", "failed": "bad", "stopped": "warn", "running": ""}

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A run in the list."""

    name: str
    status: str
    kind: str
    steps: str
    loss: str
    accuracy: str


def build_lines(shelf: Shelf) -> list[Line]:
    """Return the list of runs, the newest first."""
    return [_build_line(name, read_facts(run)) for name, run in shelf.runs().items()]


def _build_line(name: str, facts: Facts) -> Line:
    train, evaluation = facts.get("train") or {}, facts.get("eval") or {}
    status = str(facts.get("status") or "not known")
    loss = [train.get(key) for key in ("loss_first", "loss_last")]
    sides = [(evaluation.get(side) or {}).get("accuracy") for side in ("before", "after")]
    return Line(
        name,
        status,
        _KINDS.get(status, ""),
        words.count(train.get("steps")),
        " → ".join(words.number(value) for value in loss) if None not in loss else words.UNKNOWN,
        " → ".join(words.percent(value) for value in sides) if None not in sides else words.UNKNOWN,
    )


def build_figures(facts: Facts, metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the key figures of a run as label and value; while it trains, those of its last logged step."""
    train, model = facts.get("train") or {}, facts.get("model") or {}
    steps = [line for line in metrics if "loss" in line]
    last: Facts = steps[-1] if steps else {}
    figures: list[tuple[str, Any]] = [
        ("Status", facts.get("status")),
        ("Model", model.get("source")),
        ("Parameters", words.params(model["params"]) if model.get("params") else None),
        ("Steps", words.count(train.get("steps", last.get("step")))),
        ("Loss", words.number(train.get("loss_last", last.get("loss"))) if last or train else None),
        ("Time of training", words.seconds(train.get("seconds", last.get("elapsed_s"))) if last or train else None),
        ("Tokens per second", words.count(train.get("tokens_per_s", last.get("tokens_per_s"))) if last else None),
        ("Peak memory", words.gigabytes(train["peak_memory_gb"]) if train.get("peak_memory_gb") else None),
    ]
    return [(label, str(value)) for label, value in figures if value is not None]


def draw_run(shelf: Shelf, name: str | None) -> str:
    """Return a run: verdict, key figures and curves as they stand."""
    if not name:
        return draw("hint", "No run is chosen.")
    try:
        run = shelf.find(name)
        facts = read_facts(run)
        metrics = read_lines(run.metrics) if run.metrics.is_file() else []
    except MedcotError as error:
        return draw("notice", error.value, error.rule, error.remedy)
    except ValueError as error:  # a line of metrics.jsonl that is no JSON
        return draw(
            "notice", f"metrics.jsonl cannot be read: {error}", "It has one JSON object a line", "Mend the line"
        )
    error_text = str(facts.get("error") or "")
    figures, drawn = build_figures(facts, metrics), charts.draw_training(metrics)
    return draw("run", name, words.judge(facts), error_text, figures, drawn)


def draw_report(shelf: Shelf, name: str | None) -> str:
    """Return a run's report in a frame that can do nothing but be read."""
    if not name:
        return draw("hint", "No run is chosen.")
    try:
        run = shelf.find(name)
    except MedcotError as error:
        return draw("notice", error.value, error.rule, error.remedy)
    if not run.report.is_file():
        return draw("hint", "This run has no report.html yet; “medcot report” draws one from what there is.")
    return draw("framed", name, run.report.read_text(encoding="utf-8", errors="replace"))


def take_stamp(shelf: Shelf, name: str | None) -> list[Any]:
    """Return what changes when the list or the run has: compared as it is, and kept by the browser's session."""
    runs = shelf.runs()
    chosen: Run | None = runs.get(name) if name else None
    listed = [[each, [list(part) for part in stamp(run)[:1]]] for each, run in runs.items()]
    return [listed, [list(part) for part in stamp(chosen)] if chosen else []]


def build_page(shelf: Shelf, name: str | None) -> gr.Timer:
    """Build the page, inside a tab; the timer that keeps it up to date is returned, to be stopped on other tabs."""
    table = panel(draw("shelf", build_lines(shelf)), elem_id="runs-table")
    run = gr.Dropdown(list(shelf.runs()), value=name, label="Run", elem_id="runs-run")
    detail = panel(draw_run(shelf, name), elem_id="runs-detail")
    show = gr.Button("Show the report", elem_id="runs-show")
    report = panel(draw("hint", ""), elem_id="runs-report")
    seen = gr.State(take_stamp(shelf, name))
    timer = gr.Timer(EVERY_S, active=False)

    def on_tick(chosen: str | None, last: list[Any]) -> Any:
        now = take_stamp(shelf, chosen)
        if now == last:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        names = list(shelf.runs())
        # A value is set only where there is none: by now somebody may have chosen another.
        more: dict[str, Any] = {} if chosen in names else {"value": next(iter(names), None)}
        choices = gr.Dropdown(choices=names, **more)
        return draw("shelf", build_lines(shelf)), choices, draw_run(shelf, chosen), now

    def on_choose(chosen: str | None) -> Any:
        return draw_run(shelf, chosen), draw("hint", ""), take_stamp(shelf, chosen)

    # One at a time and in order, else what was drawn for the choice before could come last.
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    quiet |= {"concurrency_limit": 1, "concurrency_id": "runs"}
    timer.tick(on_tick, [run, seen], [table, run, detail, seen], **quiet)
    run.change(on_choose, run, [detail, report, seen], **quiet)
    show.click(lambda chosen: draw_report(shelf, chosen), run, report, **quiet)
    return timer
