"""report.html of an evaluation or of a comparison: did it get better, by how much, and could these questions tell?

The order is that of a reader with one minute: the verdict in a sentence, the table, the same as a picture, and how
small a change these questions could show at all, for "no detectable change" means nothing without it. Then by topic,
the answers that changed with both texts, the controls that could explain a score away, thinking and its budget, several
answers to one question, and what it cost. The tables are those of a run's report (``eval_views``, ``eval_parts``).

What was not measured is named with the option that measures it, so that no absence reads as "fine".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from medcot.evaluate.letters import compare_choices
from medcot.evaluate.lines import Line, group_by_question, group_by_task
from medcot.evaluate.results import BLANK, ITEMS, NO_THINKING, REPORT, RESULTS, ROTATE, Respondent, item_path
from medcot.evaluate.scores import list_flips
from medcot.report import eval_charts, eval_words, words
from medcot.report.charts import Chart
from medcot.report.eval_tables import build_tables
from medcot.report.eval_views import (
    Model,
    TaskRow,
    View,
    build_lengths,
    build_topics,
    view_results,
)
from medcot.report.evidence import make_value_visible
from medcot.report.folder import Pair, build_sample
from medcot.report.page import INTENDED_USE, MAX_FOLDED, as_rows, build_timing, draw_page, write_page

MAX_PAIRS = 600  # on one page, over all groups; each group shows some
LEAST_FOLDED = 5
MAX_ERRORS = 5  # a model
MAX_OPEN_TOPICS = 3  # tasks up to which the tables of topics are unfolded


def render_evaluation(
    results: Mapping[str, Any], respondents: Sequence[Respondent], path: Path, *, title: str = "Evaluation"
) -> Path:
    """Draw the page of an evaluation or comparison, replacing an older one at once; return its path.

    Args:
        results: of ``build_results``, with what else ``results.json`` has: ``status``, ``settings``, ``plan`` and more,
            each of which may be missing.
        respondents: those that the results are of.
        path: the file to write.
        title: the page's heading.
    """
    context = build_context(results, respondents, title)
    # Names and texts are shown beside figures that a mark of direction in them could turn round.
    return write_page(path, draw_page("eval_page.html.j2", context, finalize=make_value_visible))


def build_context(results: Mapping[str, Any], respondents: Sequence[Respondent], title: str) -> dict[str, Any]:
    """Return everything the template names."""
    view = view_results(results)
    lines = {one.name: group_by_task(one.lines) for one in respondents}
    return {
        "title": title,
        "status": results.get("status"),
        "error": results.get("error"),
        "suite": _join_suite(results.get("suite")),
        "kind": results.get("kind") or "evaluation",
        "created": _say_when(results.get("created")),
        **build_tables(view),
        "verdict": eval_words.judge_evaluation(view, results),
        "notes": build_notes(results),
        "plans": build_plans(results, view),
        "errors": build_errors(respondents, view),
        "topics": [(row, found) for row in view.rows if (found := build_topics(row))],
        "max_open_topics": MAX_OPEN_TOPICS,
        "flips": build_flips(view, lines, are_here=not is_comparison(results)),
        "rotations": build_rotations(results, view, lines),
        "blanks": build_controls(results, view, BLANK),
        "plain_answers": build_controls(results, view, NO_THINKING),
        "not_measured": eval_words.name_missing(view, results),
        "lengths": build_lengths(view),
        "curves": build_curves(results, view),
        "usage": build_usage(results, view),
        "setup": build_setup(results),
        "timing": build_timing(results["timing"]) if isinstance(results.get("timing"), Mapping) else [],
        "files": build_files(results),
        "elsewhere": eval_words.say_where(results.get("folders") or ()) if is_comparison(results) else "",
        "intended_use": INTENDED_USE,
    }


def is_comparison(results: Mapping[str, Any]) -> bool:
    """Return whether the results are of several folders, where the answers stay."""
    return results.get("kind") == "comparison"


def build_files(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the files that lie beside the page, and what is in them."""
    items = [] if is_comparison(results) else [(f"{ITEMS}/", "every answer, a line each")]
    return [(RESULTS, "every figure"), *items, (REPORT, "this page")]


def _say_when(created: Any) -> str:
    """Return an ISO time to the minute, as people write it; what is none stays as it is."""
    try:
        return f"{datetime.fromisoformat(str(created)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return str(created or "")


def _join_suite(suite: Any) -> str:
    return ", ".join(map(str, suite)) if isinstance(suite, list | tuple) else str(suite or "")


def build_notes(results: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before any figure: what is not there yet, what differs, what was left out."""
    unfinished = results.get("status") not in (None, "complete", "finished")
    notes = ["Not all questions were answered; the figures are of those that were."] if unfinished else []
    return [*notes, *map(str, results.get("notes") or ())] + [
        f"{it['after']} against {it['before']}: no question of {words.join(it['missing'])} was put to both, so nothing"
        " is said of it."
        for it in results.get("comparisons") or ()
        if it.get("missing")
    ]


def build_errors(respondents: Sequence[Respondent], view: View) -> list[tuple[Model, str, int]]:
    """Return why answers failed, the commonest reasons of each model first, controls included."""
    models = {model.key: model for model in view.models}
    return [
        (models[one.name], str(error), times)
        for one in respondents
        for error, times in Counter(line["error"] for line in one.lines if line.get("error")).most_common(MAX_ERRORS)
    ]


# What these questions can show ----------------------------------------------------------------------------------------


def build_plans(results: Mapping[str, Any], view: View) -> list[tuple[str, str, list[tuple[Model, Mapping[str, Any]]]]]:
    """Return each task with what was said of it before the run, and the changes that came of it."""
    sentences = {plan["task"]: str(plan.get("sentence") or "") for plan in results.get("plan") or ()}
    changes = {
        row.task: [(pair[1], it) for pair, it in zip(view.comparisons, row.changes, strict=True) if it]
        for row in view.rows
    }
    return [(task, sentence, changes.get(task, [])) for task, sentence in sentences.items()]


# Questions that flipped -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flips:
    """The questions of one task that one comparison gained or lost, the first of them with both texts."""

    before: Model
    after: Model
    task: str
    kind: str  # "gained" or "lost"
    total: int
    pairs: tuple[Pair, ...]
    rest: str


def build_flips(
    view: View, lines: Mapping[str, Mapping[str, Mapping[str | None, list[Line]]]], *, are_here: bool
) -> list[Flips]:
    """Return the groups of questions that flipped, by comparison, task and direction, empty ones left out.

    Args:
        view: of the results.
        lines: model to task to control to lines.
        are_here: whether the files of these lines lie beside the page.
    """
    groups = [
        (before, after, row.task, kind, pairs)
        for place, (before, after) in enumerate(view.comparisons)
        for row in view.rows
        if row.changes[place]
        for kind, pairs in list_flips(lines[before.key][row.task][None], lines[after.key][row.task][None]).items()
        if pairs
    ]
    most = min(MAX_FOLDED, max(LEAST_FOLDED, MAX_PAIRS // max(1, len(groups))))
    return [
        Flips(
            before, after, task, kind, len(pairs),
            tuple(Pair(build_sample(old), build_sample(new)) for old, new in pairs[:most]),
            eval_words.say_fewer(
                most,
                len(pairs),
                [_name_file(model, task) for model in (before, after)] if are_here else ["the folders compared"],
            ),
        )
        for before, after, task, kind, pairs in groups
    ]  # fmt: skip


def _name_file(model: Model, task: str) -> str:
    return item_path(Path(), model.key, task, None).as_posix()


# Controls -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ControlRow:
    """One control of one task and model, beside the task's own score, with what follows from it."""

    row: TaskRow
    model: Model
    control: str
    found: Mapping[str, Any]
    score: Mapping[str, Any] | None
    says: str


def build_controls(results: Mapping[str, Any], view: View, control: str) -> list[ControlRow]:
    """Return the lines of all controls whose name begins so."""
    controls = results.get("controls") or {}
    nothing = (None,) * len(view.models)
    rows = {task: TaskRow(task, {}, nothing, ()) for by_task in controls.values() for task in by_task}
    rows = {row.task: row for row in view.rows} | {task: row for task, row in rows.items() if task not in view.tasks}
    return [
        ControlRow(row, model, name, found, row.scores[place], _say_control(name, found, row.scores[place]))
        for row in rows.values()
        for place, model in enumerate(view.models)
        for name, found in ((controls.get(model.key) or {}).get(row.task) or {}).items()
        if name.startswith(control)
    ]


def _say_control(control: str, found: Mapping[str, Any], score: Mapping[str, Any] | None) -> str:
    if control == BLANK:
        return eval_words.describe_blank(found, score)
    if "agreement" in found:
        return eval_words.describe_agreement(found["agreement"])
    return eval_words.describe_worth(found["change"]) if control == NO_THINKING and found.get("change") else ""


def build_rotations(
    results: Mapping[str, Any], view: View, lines: Mapping[str, Mapping[str, Mapping[str | None, list[Line]]]]
) -> list[tuple[ControlRow, float | None]]:
    """Return each rotation with how often two seeds of the question as it stands differ; ``None`` with one seed."""
    return [
        (line, _differ_by_seed(lines[line.model.key][line.row.task][None]))
        for line in build_controls(results, view, ROTATE)
        if line.found.get("agreement")
    ]


def _differ_by_seed(lines: Sequence[Line]) -> float | None:
    """Return the chance that two answers to one question, drawn alike and both read, are not the same."""
    answers = [[line["parsed"] for line in found] for found in group_by_question(lines).values()]
    pairs = [pair for given in answers for pair in combinations(given, 2) if None not in pair]
    return compare_choices(pairs).disagreement if pairs else None


# Thinking, cost, settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curves:
    """One task's accuracy by budget: the drawing, and each model's points with what they recommend."""

    task: str
    chart: Chart
    models: tuple[tuple[Model, Mapping[str, Any]], ...]


def build_curves(results: Mapping[str, Any], view: View) -> list[Curves]:
    """Return a drawing a task whose budgets were tried."""
    budgets = results.get("budgets") or {}
    found: dict[str, list[tuple[Model, Mapping[str, Any]]]] = {}
    for model in view.models:
        for task, curve in (budgets.get(model.key) or {}).items():
            found.setdefault(task, []).append((model, curve))
    return [
        Curves(task, eval_charts.draw_budgets(f"budgets-{place}", task, curves), tuple(curves))
        for place, (task, curves) in enumerate(found.items())
    ]


def build_usage(results: Mapping[str, Any], view: View) -> list[tuple[Model, Mapping[str, Any], float | None]]:
    """Return what each model took, with tokens written per second."""
    usage = results.get("usage") or {}
    found = []
    for model in view.models:
        if took := usage.get(model.key):
            written = took["think_tokens"] + took["answer_tokens"]
            found.append((model, took, written / took["seconds"] if took["seconds"] > 0 and written else None))
    return found


def build_setup(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return models, settings, machine and versions as titled lists of label and value."""
    models = results.get("models") or ()
    groups = [
        *((str(model["name"]), _list_facts(model)) for model in models),
        ("Settings", results.get("settings")),
        ("Machine", results.get("machine")),
    ]
    found = [(title, rows) for title, values in groups if (rows := as_rows(values))]
    versions = results.get("versions") or {}
    return [*found, *([("Versions", [(str(k), str(v)) for k, v in versions.items()])] if versions else [])]


def _list_facts(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is and how it was asked, as one list."""
    facts = {key: value for key, value in model.items() if key not in ("name", "settings")}
    return {**facts, **(model.get("settings") or {})}
