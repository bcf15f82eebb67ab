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
from dataclasses import asdict, dataclass, field, replace
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


_IDENTITY = ("source", "base_url", "revision", "precision", "adapter_sha256")


@dataclass(frozen=True, slots=True)
class Respondent:
    """One model and what it answered.

    Attributes:
        name: what it goes by in a table.
        facts: what it is: ``source``, ``revision``, ``precision``, ``adapter``, ``adapter_sha256``, ``backend``, ...
        lines: all of its lines, controls and budgets included.
        tasks: task to ``Task.facts``, as far as known.
        base: the name of its plain base among the respondents; ``None`` where it is no tuned model, or has none here.
    """

    name: str
    facts: Mapping[str, Any]
    lines: Sequence[Line]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: str | None = None


def build_results(respondents: Sequence[Respondent]) -> dict[str, Any]:
    """Return the figures of some respondents, and how they compare.

    A tuned model is compared with its own plain base, and with the first tuned model; where none has a base among
    them, each is compared with the first.

    Returns:
        - ``models``: name and facts of each.
        - ``tasks``: task to its facts.
        - ``scores``: name to task to ``scores.score``.
        - ``controls``: name to task to control to ``{n, accuracy, ci95, unparsed, unfinished}``, and of a rotation
          ``agreement``, of the others ``change`` against the task itself.
        - ``budgets``: name to task to ``budgets.Curve``.
        - ``comparisons``: ``before``, ``after`` (names), and ``scores.compare``; none for one respondent.
        - ``usage``: name to ``scores.add_usage``.
        - ``notes``: in what the models were asked otherwise than each other.

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
    return {
        "models": [{"name": one.name, "base": one.base, **one.facts} for one in respondents],
        "tasks": {task: facts for one in reversed(respondents) for task, facts in one.tasks.items()},
        "scores": {name: {task: score(lines) for task, lines in tasks.items()} for name, tasks in plain.items()},
        "controls": {name: _score_controls(tasks) for name, tasks in groups.items()},
        "budgets": {name: _build_curves(tasks) for name, tasks in groups.items()},
        "comparisons": [
            {"before": was, "after": now, **compare(plain[was], plain[now])} for was, now in _pair(respondents)
        ],
        "usage": {one.name: add_usage(one.lines) for one in respondents},
        "notes": _list_differences(respondents),
    }


def _pair(respondents: Sequence[Respondent]) -> list[tuple[str, str]]:
    """Return who is compared with whom."""
    tuned = [one for one in respondents if one.base is not None]
    if not tuned:
        return [(respondents[0].name, other.name) for other in respondents[1:]]
    own = [(str(one.base), one.name) for one in tuned]
    return own + [(tuned[0].name, other.name) for other in tuned[1:]]


def _list_differences(respondents: Sequence[Respondent]) -> list[str]:
    """Say in what models were asked otherwise than the first, since a difference of scores may come from there."""
    first, notes = respondents[0], []
    for other in respondents[1:]:
        was, now = _list_conditions(first.facts), _list_conditions(other.facts)
        parts = [f"{key} {was[key]} against {now[key]}" for key in was if key in now and was[key] != now[key]]
        parts += [
            f"another {task} (sha256 {first.tasks[task]['sha256'][:12]} against {facts['sha256'][:12]})"
            for task, facts in other.tasks.items()
            if task in first.tasks and first.tasks[task]["sha256"] != facts["sha256"]
        ]
        if parts:
            notes.append(f"{first.name} and {other.name} were asked differently: {'; '.join(parts)}.")
    return notes


def _list_conditions(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer depends on besides the model, in words."""
    settings = {**(facts.get("settings") or {})}
    if "style" in facts:
        settings["style"] = facts["style"]
    think, answer = settings.get("think_tokens") or 0, settings.get("answer_tokens") or 0
    if settings.get("ending") == "written":
        settings |= {"tokens": think + answer}
    elif settings:
        settings |= {"tokens of thinking": think, "tokens of the answer": answer}
    wanted = ("ending", "tokens", "tokens of thinking", "tokens of the answer", "temperature", "top_p", "style")
    return {key: settings[key] for key in wanted if settings.get(key) is not None}


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
    if control == BLANK:
        found["letters"] = whole["letters"]  # of these few questions, whose floor may be another than all questions'
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
        others, renamed = tuple(kept), {}
        for one in respondents:
            twin = next((other for other in others if _is_same(one, other)), None)
            if twin is not None:
                renamed[one.name] = twin.name
                continue
            taken = {other.name for other in kept}
            name = one.name if one.name not in taken else f"{one.name} ({folder})"
            renamed[one.name] = name
            kept.append(replace(one, name=name, base=None if one.base is None else renamed.get(one.base, one.base)))
    return kept


def _is_same(one: Respondent, other: Respondent) -> bool:
    """Whether two are one model that gave the same answers: the base that two runs have in common."""
    if any(one.facts.get(key) != other.facts.get(key) for key in _IDENTITY):
        return False
    first, second = (
        {(identify(line), line["seed"]): line["text"] for line in it.lines if line["kind"] == "eval"}
        for it in (one, other)
    )
    return first == second


def _read_evaluation(folder: Path) -> list[Respondent]:
    results = read_json(folder / RESULTS)
    found = []
    for model in results["models"]:
        facts = {"settings": results.get("settings"), **model}
        name, base = facts.pop("name"), facts.pop("base", None)
        paths = sorted((folder / ITEMS / slug(name)).glob("*.jsonl"))
        lines = [line for path in paths for line in _read_lines(path)]
        if not lines:
            raise DataError(
                f"'{folder}' holds no answers of '{name}'",
                f"They lie in {ITEMS}/, a line each; a comparison's folder has none of its own",
                "Name the folders that were compared",
            )
        found.append(Respondent(name, facts, lines, results["tasks"], base))
    return found


def _read_run(run: Run) -> list[Respondent]:
    facts = read_json(run.facts)
    model, evaluation = facts.get("model") or {}, facts.get("eval") or {}
    recipe = facts.get("recipe") or {}
    stage = recipe.get("evaluate") or {}
    settings = {
        "think_tokens": stage.get("max_new_tokens"),
        "answer_tokens": 0,
        "ending": "written",
        "temperature": stage.get("temperature"),
        "top_p": stage.get("top_p"),
        "style": (recipe.get("prompt") or {}).get("style"),
    }
    base = f"{model.get('source', 'base')}, untrained"
    found = []
    for side, name in (("before", base), ("after", run.folder.resolve().name)):
        path = run.samples / f"{side}.jsonl"
        lines = [line for line in _read_lines(path) if line["kind"] == "eval"] if path.is_file() else []
        if any("task" not in line for line in lines):
            raise DataError(
                f"'{run.folder}' was made by an older medcot", "Its answers do not say of which task they are",
                "Evaluate its model with 'medcot eval --run'",
            )  # fmt: skip
        if lines:
            tuned = side == "after"
            more = {"adapter": str(run.adapter), "adapter_sha256": evaluation.get("adapter_sha256")} if tuned else {}
            known = {**model, "settings": settings, **more}
            found.append(Respondent(name, known, lines, evaluation.get("tasks") or {}, base if tuned else None))
    if len(found) < 2:
        raise DataError(
            f"'{run.folder}' holds no graded answers of both before and after",
            "A run grades questions where its recipe names some in evaluate.source",
            "Evaluate its model with 'medcot eval --run'",
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
