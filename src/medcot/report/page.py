"""The report page: the facts of a run arranged for a reader who has one minute, then for one who has an hour.

One file, opened from disk: the style sheet and the charts stand in the page, there is no script, and a content security
policy forbids every request, so that not even a mistake in the template could call out. Text that came from a model, a
data set or a recipe is never trusted: Jinja escapes everything but our own charts and style sheet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from medcot.evaluate.style import measure_style
from medcot.records import Run
from medcot.report import charts, words
from medcot.report.eval_tables import build_tables
from medcot.report.eval_views import (
    Model,
    TopicRow,
    View,
    build_pooled_topics,
    build_topics,
    view_run,
)
from medcot.report.findings import build_findings
from medcot.report.folder import Folder, Pair, Sample, read_folder
from medcot.report.lineage import build_lineage

MAX_FOLDED = 250  # graded questions a group shows; the page says how many more there are and where
MAX_REASONS = 20

INTENDED_USE = (
    "For research and education. Not for diagnosis, treatment or any other decision about a patient. The model can be"
    " wrong while sounding certain, and the figures on this page hold for the questions they were measured on only."
)

_STYLE_ROWS: list[tuple[str, str, str]] = [
    ("think_tokens_mean", "Thinking, mean tokens", "count"),
    ("think_tokens_median", "Thinking, median tokens", "count"),
    ("answer_tokens_mean", "Answer, mean tokens", "count"),
    ("answer_tokens_median", "Answer, median tokens", "count"),
    ("one_paragraph_share", "Answers in one paragraph", "percent"),
    ("list_share", "Answers with bullets or a numbered list", "percent"),
    ("repeated_4gram_share", "Four-word runs that repeat", "percent"),
    ("foreign_letter_share", "Letters outside Latin and Greek script", "percent"),
    ("foreign_run_share", "Texts with a run of such letters", "percent"),
]


def render_report(run: Run) -> Path:
    """Draw ``report.html`` from the run folder alone, replacing an older one at once; return its path.

    Raises:
        DataError: the folder has no readable ``run.json``.
    """
    return write_page(run.report, draw_page("page.html.j2", build_context(read_folder(run), run.folder.name)))


def write_page(path: Path, page: str) -> Path:
    """Write a page whole, replacing an older one at once; return its path."""
    partial = path.with_suffix(f"{path.suffix}.partial")
    # A lone surrogate, which JSON can carry and UTF-8 cannot, becomes a character reference and shows as U+FFFD.
    partial.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(partial, path)
    return path


def draw_page(template: str, context: Mapping[str, Any], *, finalize: Callable[[Any], Any] | None = None) -> str:
    """Return a page of this package, its style sheet inside; ``finalize`` sees each value before it is escaped."""
    from markupsafe import Markup  # not at the top: only drawing needs it

    css = (resources.files("medcot.report") / "page.css").read_text(encoding="utf-8")
    environment = make_environment(autoescape=True, finalize=finalize)
    environment.globals.update(css=Markup(css), safe_svg=Markup)  # our own files and drawings, and nothing else
    page: str = environment.get_template(template).render(context)
    return page


def build_context(folder: Folder, folder_name: str) -> dict[str, Any]:
    """Return everything the template names; it formats, and decides nothing."""
    facts = folder.facts
    evaluation = facts.get("eval") or {}
    sides = [(name, evaluation[name]) for name in ("before", "after") if evaluation.get(name)]
    view = view_run(evaluation)
    return {
        "title": folder.recipe.get("name")
        or (facts["recipe"] if isinstance(facts.get("recipe"), str) else folder_name),
        "folder_name": folder_name,
        "description": folder.recipe.get("description") or "",
        "facts": facts,
        "status": facts.get("status") or "status not known",
        "notes": [*folder.notes, *_odd_metrics(folder.metrics)],
        "verdict": words.judge(facts),
        "sides": dict(sides),
        "eval": evaluation,
        "num_failed": sum(side.get("failed") or 0 for _, side in sides),
        "accuracy_chart": charts.draw_accuracy(sides) if sides else None,
        **build_tables(view),
        "test_name": words.name_test(sides[0][1] if sides else {}),
        "topics": build_topic_tables(view, sides),
        "training_charts": charts.draw_training(folder.metrics),
        "setup": build_setup(folder),
        "data": {name: part for name, part in _data_parts(facts).items() if name != "doctor"},
        "doctor": build_doctor(folder),
        "lineage": build_lineage(folder.sources),
        "reasons": folder.quarantine_reasons[:MAX_REASONS],
        "num_more_reasons": max(0, len(folder.quarantine_reasons) - MAX_REASONS),
        "style_columns": build_style(folder, sides),
        "style_rows": _STYLE_ROWS,
        "asked": folder.pairs("ask"),
        "groups": build_groups(folder.pairs("eval")),
        "max_folded": MAX_FOLDED,
        "artifacts": {k: v for k, v in (facts.get("artifacts") or {}).items() if v},
        "timing": build_timing(facts.get("timing") or {}),
        "recipe_text": folder.recipe_text,
        "intended_use": INTENDED_USE,
    }


def _data_parts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in (facts.get("data") or {}).items() if isinstance(part, dict)}


def build_doctor(folder: Folder) -> dict[str, Any] | None:
    """Return the data doctor's verdict and what it asks to be looked at; ``None`` where it was not asked."""
    if not folder.doctor:
        return None
    return {
        "verdict": words.judge_data(folder.doctor),
        "findings": [finding for finding in build_findings(folder.doctor) if finding.is_grave],
        "page": folder.data_page,
    }


def build_topic_tables(
    view: View, sides: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[tuple[str, Sequence[Model], list[TopicRow]]]:
    """Return the topics of each task, or of all questions together where tasks are not told apart."""
    if len(view.rows) > 1:
        return [(row.task, view.models, rows) for row in view.rows if (rows := build_topics(row))]
    models, rows = build_pooled_topics(sides)
    return [("", models, rows)] if rows else []


def build_setup(folder: Folder) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what was run as titled lists of label and value: model, adapter, training, outcome, machine, versions."""
    facts, recipe = folder.facts, folder.recipe
    train = facts.get("train") or {}
    model = {**(facts.get("model") or {})}
    if isinstance(model.get("params"), int | float):
        model["params"] = words.params(model["params"])
    groups = [
        ("Model", {"source": model.pop("source", None), "parameters": model.pop("params", None), **model}),
        ("Adapter (LoRA)", recipe.get("lora") or {}),
        ("Training", {"prompt style": (recipe.get("prompt") or {}).get("style"), **(recipe.get("train") or {})}),
        ("Outcome of training", _train_figures(train)),
        ("Machine", facts.get("machine")),
    ]
    found = [(title, rows) for title, values in groups if (rows := as_rows(values))]
    versions = facts.get("versions") or {}
    return [
        *found,
        *([("Versions", [(str(name), str(version)) for name, version in versions.items()])] if versions else []),
    ]


def _train_figures(train: Mapping[str, Any]) -> dict[str, Any]:
    rest = dict(train)
    first, last = rest.pop("loss_first", None), rest.pop("loss_last", None)
    figures: dict[str, Any] = {"steps": rest.pop("steps", None)}
    if first is not None or last is not None:
        figures["loss"] = f"{words.number(first)} → {words.number(last)}"
    for key, label, form in [
        ("seconds", "time", words.seconds),
        ("tokens_per_s", "tokens/s", words.count),
        ("trained_tokens_per_s", "trained tokens/s", words.count),
        ("peak_memory_gb", "peak memory", words.gigabytes),
    ]:
        if (value := rest.pop(key, None)) is not None:
            figures[label] = form(value)
    return {**figures, **rest}


def as_rows(values: Any) -> list[tuple[str, str]]:
    """Return facts as labels and values, what is empty left out; a lone text has no label."""
    if isinstance(values, str):
        return [("", values)]
    if not isinstance(values, Mapping):
        return []
    return [
        (words.label(str(key)), _as_text(value)) for key, value in values.items() if value not in (None, "", {}, [])
    ]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return words.number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_as_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_as_text(inner) for inner in value)
    return str(value)


def build_style(
    folder: Folder, sides: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Return the style measures as (column group, side to measures); ``run.json`` has precedence."""
    graded = {name: side["style"] for name, side in sides if side.get("style")}
    columns = []
    for kind, title in [("ask", "Asked questions"), ("eval", "Graded questions")]:
        measured = {
            name: measure_style([done for sample in samples if sample.kind == kind and (done := sample.completion)])
            for name, samples in [("before", folder.before), ("after", folder.after)]
        }
        if kind == "eval":
            measured = {**measured, **graded}
        present = {name: style for name, style in measured.items() if style.get("completions")}
        if present:
            columns.append((title, present))
    return columns


def build_groups(pairs: Iterable[Pair]) -> list[tuple[str, str, list[Pair]]]:
    """Return the graded questions by how their verdict moved, as (title, CSS class, pairs), empty groups left out."""
    titles = {
        (False, True): ("Wrong before, right after", "gained"),
        (True, False): ("Right before, wrong after", "lost"),
        (False, False): ("Wrong both times", "both-wrong"),
        (True, True): ("Right both times", "both-right"),
        (True, None): ("Right before; not asked after", "half"),
        (False, None): ("Wrong before; not asked after", "half"),
        (None, True): ("Right after; not asked before", "half"),
        (None, False): ("Wrong after; not asked before", "half"),
    }
    groups: dict[tuple[bool | None, bool | None], list[Pair]] = {key: [] for key in titles}
    for pair in pairs:
        groups[_right(pair.before), _right(pair.after)].append(pair)
    return [(*titles[key], members) for key, members in groups.items() if members]


def _right(sample: Sample | None) -> bool | None:
    return None if sample is None else sample.correct


def build_timing(timing: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return (stage, seconds, share of the longest stage) in run order; a total, if given, keeps no bar."""
    stages = [(str(stage), float(value)) for stage, value in timing.items() if isinstance(value, int | float)]
    longest = max((value for stage, value in stages if stage != "total"), default=0.0)
    return [(stage, value, value / longest if longest > 0 and stage != "total" else 0.0) for stage, value in stages]


def _odd_metrics(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    odd = sum(isinstance(line.get("loss"), float) and not math.isfinite(line["loss"]) for line in metrics)
    return [f"{odd} logging step(s) have a loss that is not a finite number; the chart leaves them out."] if odd else []


def make_environment(*, autoescape: bool, finalize: Callable[[Any], Any] | None = None) -> Any:
    """Return the Jinja environment of this package: strict about names, with the filters of ``words``."""
    import jinja2  # not at the top: only drawing needs it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medcot.report", "."),
        autoescape=autoescape,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        points=words.points,
        p_text=words.p_text,
        count=words.count,
        number=words.number,
        seconds=words.seconds,
        interval=words.interval,
        change_interval=words.change_interval,
        label=words.label,
    )
    return environment
