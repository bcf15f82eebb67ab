"""A whole evaluation as one object: who answered, every line, and the figures that follow from them.

``Respondent`` is one model (a base, the same with an adapter, a served one) with all of its lines; ``build_results``
turns some of them into ``results.json``: scores, controls, curves over the budget, and the comparison of each with the
first. Nothing else knows more than the lines do, so ``medcot compare`` is this function over respondents read from
several folders, and a run's before and after are two respondents.

Files of an evaluation's folder::

    results.json                  what build_results returns, with the settings and the machine
    items/MODEL/TASK.jsonl        one line an answer (lines.py); TASK.CONTROL.jsonl for a control
    report.html                   the page
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medcot.errors import DataError
from medcot.evaluate.budgets import build_curve
from medcot.evaluate.lines import Line, drop_control, group_by_task, identify
from medcot.evaluate.scores import add_usage, compare, score, score_rotation
from medcot.records import Run

RESULTS = "results.json"
ITEMS = "items"
REPORT = "report.html"
BUDGET, ROTATE, BLANK, NO_THINKING = "budget-", "rotate-", "blank", "no-thinking"  # how controls are named


@dataclass(frozen=True, slots=True)
class Respondent:
    """One model and what it answered.

    Attributes:
        name: what it goes by in a table.
        facts: what it is: ``source``, ``revision``, ``precision``, ``adapter``, ``adapter_sha256``, ``backend``, ...
        lines: all of its lines, controls and budgets included.
        tasks: task to ``Task.facts``, as far as known.
    """

    name: str
    facts: Mapping[str, Any]
    lines: Sequence[Line]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def build_results(respondents: Sequence[Respondent]) -> dict[str, Any]:
    """Return the figures of some respondents, each compared with the first.

    Returns:
        - ``models``: name and facts of each.
        - ``tasks``: task to its facts.
        - ``scores``: name to task to ``scores.score``.
        - ``controls``: name to task to control to ``{n, accuracy, ci95, unparsed, unfinished}``, and of a rotation
          ``agreement``, of the others ``change`` against the task itself.
        - ``budgets``: name to task to ``budgets.Curve``.
        - ``comparisons``: ``before``, ``after`` (names), and ``scores.compare``; none for one respondent.
        - ``usage``: name to ``scores.add_usage``.

    Raises:
        DataError: no respondent, or two of one name, or one without a line.
    """
    names = [one.name for one in respondents]
    if not names or len(set(names)) < len(names) or not all(one.lines for one in respondents):
        raise DataError(
            f"results of {', '.join(names) or 'nobody'}",
            "Each model has a name of its own, and at least one answer",
            "Name folders that hold different evaluations",
        )
    groups = {one.name: group_by_task(one.lines) for one in respondents}
    plain = {
        name: {task: found[None] for task, found in tasks.items() if None in found} for name, tasks in groups.items()
    }
    first = names[0]
    return {
        "models": [{"name": one.name, **one.facts} for one in respondents],
        "tasks": {task: facts for one in reversed(respondents) for task, facts in one.tasks.items()},
        "scores": {name: {task: score(lines) for task, lines in tasks.items()} for name, tasks in plain.items()},
        "controls": {name: _score_controls(tasks) for name, tasks in groups.items()},
        "budgets": {name: _build_curves(tasks) for name, tasks in groups.items()},
        "comparisons": [{"before": first, "after": name, **compare(plain[first], plain[name])} for name in names[1:]],
        "usage": {one.name: add_usage(one.lines) for one in respondents},
    }


def _score_controls(tasks: Mapping[str, Mapping[str | None, list[Line]]]) -> dict[str, dict[str, Any]]:
    return {
        task: {
            control: _score_control(control, lines, found.get(None, []))
            for control, lines in found.items()
            if control is not None and not control.startswith(BUDGET)
        }
        for task, found in tasks.items()
        if any(control is not None and not control.startswith(BUDGET) for control in found)
    }


def _score_control(control: str, lines: list[Line], original: list[Line]) -> dict[str, Any]:
    whole = score(lines)
    found = {key: whole[key] for key in ("n", "accuracy", "ci95", "unparsed", "unfinished")}
    if not original:
        return found
    if control.startswith(ROTATE):
        return {**found, "agreement": score_rotation(original, lines, int(control.removeprefix(ROTATE)))}
    # A question left out changes the words asked, so only its id tells which question it was.
    asked = {(line["id"], line["seed"]): line["question"] for line in original}
    same = [{**line, "question": asked.get((line["id"], line["seed"]))} for line in drop_control(lines)]
    (change,) = compare({"": original}, {"": same})["tasks"]
    return {**found, "change": {key: change[key] for key in ("delta", "interval", "p_value", "left_out")}}


def _build_curves(tasks: Mapping[str, Mapping[str | None, list[Line]]]) -> dict[str, Any]:
    curves = {}
    for task, found in tasks.items():
        by_budget = {
            int(control.removeprefix(BUDGET)): lines
            for control, lines in found.items()
            if control is not None and control.startswith(BUDGET)
        }
        if by_budget:
            curves[task] = asdict(build_curve(by_budget))
    return curves


# Folders --------------------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    """Return a name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def item_path(folder: Path, model: str, task: str, control: str | None) -> Path:
    """Return where the lines of a model on a task lie."""
    return folder / ITEMS / slug(model) / f"{slug(task)}{'' if control is None else f'.{slug(control)}'}.jsonl"


def read_respondents(folder: Path) -> list[Respondent]:
    """Return who answered in a folder: of an evaluation, or of a run (its model before and after).

    Raises:
        DataError: the folder is neither, or a file of it cannot be read.
    """
    if (folder / RESULTS).is_file():
        return _read_evaluation(folder)
    if Run(folder).facts.is_file():
        return _read_run(Run(folder))
    raise DataError(
        f"'{folder}' holds neither {RESULTS} nor run.json",
        "Evaluations and runs are compared by their folders",
        "Name one that 'medcot eval' or 'medcot run' has filled",
    )


def name_apart(groups: Mapping[str, Sequence[Respondent]]) -> list[Respondent]:
    """Return all respondents of some folders with names of their own; one that several folders share, once.

    Args:
        groups: a folder's short name to its respondents.
    """
    kept: list[Respondent] = []
    for folder, respondents in groups.items():
        for one in respondents:
            if any(_is_same(one, other) for other in kept):
                continue
            name = one.name if one.name not in {other.name for other in kept} else f"{one.name} ({folder})"
            kept.append(Respondent(name, one.facts, one.lines, one.tasks))
    return kept


def _is_same(one: Respondent, other: Respondent) -> bool:
    """Whether two gave the same answers to the same questions: the base that two runs have in common."""
    first, second = (
        {(identify(line), line["seed"]): line["text"] for line in it.lines if line["kind"] == "eval"}
        for it in (one, other)
    )
    return first == second


def _read_evaluation(folder: Path) -> list[Respondent]:
    results = read_json(folder / RESULTS)
    found = []
    for model in results["models"]:
        facts = {key: value for key, value in model.items() if key != "name"}
        paths = sorted((folder / ITEMS / slug(model["name"])).glob("*.jsonl"))
        lines = [line for path in paths for line in _read_lines(path)]
        found.append(Respondent(model["name"], facts, lines, results["tasks"]))
    return found


def _read_run(run: Run) -> list[Respondent]:
    facts = read_json(run.facts)
    base = facts.get("model") or {}
    tasks = (facts.get("eval") or {}).get("tasks") or {}
    found = []
    for side, name in (("before", f"{base.get('source', 'base')}, untrained"), ("after", run.folder.resolve().name)):
        path = run.samples / f"{side}.jsonl"
        lines = [line for line in _read_lines(path) if line["kind"] == "eval"] if path.is_file() else []
        if lines:
            adapter = str(run.adapter) if side == "after" else None
            found.append(Respondent(name, {**base, "adapter": adapter}, lines, tasks))
    if not found:
        raise DataError(
            f"'{run.folder}' holds no graded answers",
            "A run grades questions where its recipe names some in evaluate.source",
            "Evaluate its model with 'medcot eval'",
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the facts in a file.

    Raises:
        DataError: it is not one whole JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"'{path}' is no whole JSON: {error}", "It is written whole", "Make it again") from error
    if not isinstance(value, dict):
        raise DataError(f"'{path}' is no JSON object", "Facts are one object", "Make it again")
    return value


def _read_lines(path: Path) -> list[Line]:
    """Return a file's lines; one cut short by a kill is left out, as it is at its end."""
    texts = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines(): model text may hold U+2028
    try:
        return [json.loads(text) for text in texts]
    except ValueError as error:
        raise DataError(f"'{path}' is no JSON Lines: {error}", "Each line is one answer", "Make it again") from error
