"""The results of an evaluation on a terminal, and the table that stands beside graded lines.

The order is that of the page: the verdicts in words first, then every score with its interval and what was lost on the
way to it, and only then what qualifies them: floors, controls, budgets, costs. A verdict is a sign, a word and a
colour, so that no colour is needed; the lenient score is dim, because it decides nothing. In a narrow window the
columns that say least give way; in a file every row is one line with its task and its model, for ``grep``.

``medcot grade`` prints its lines to standard output and its table beside it, so that a pipe stays JSON Lines. What is
printed before an evaluation, tasks and plan, is ``plan_screen``'s.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console

from medcot.evaluate.results import NO_THINKING, ROTATE
from medcot.evaluate.stats import Verdict, wilson
from medcot.records import Outcome
from medcot.report import words
from medcot.report.eval_words import describe_agreement, describe_worth
from medcot.report.evidence import make_visible
from medcot.report.plan_screen import print_plan, print_tasks
from medcot.report.screen import Cell, Column, Part, Screen, Sections

__all__ = ["print_grades", "print_plan", "print_results", "print_tasks"]

WIDE = 116  # columns of a window from which on a table has all of its own

_VERDICTS: dict[str, Part] = {
    Verdict.BETTER: ("+ better", "bold green"),
    Verdict.WORSE: ("\N{MINUS SIGN} worse", "bold red"),
    Verdict.NO_CHANGE: ("= no detectable change", "bold yellow"),
}
_TONES = {"better": "bold green", "worse": "bold red", "mixed": "bold yellow", "open": "bold yellow"}
_CONTROLS = {"blank": "question left out", NO_THINKING: "no thinking"}
_ROTATED = "options moved by "

Found = Mapping[str, Any]


def print_results(results: Found, console: Console) -> None:
    """Print what ``build_results`` returned."""
    screen = Screen(console)
    if results["comparisons"]:
        _say_verdict(results["comparisons"], screen)
    _print_notes(results.get("notes") or (), screen)
    _print_models(results["models"], screen)
    _print_scores(results, screen)
    for change in results["comparisons"]:
        _print_comparison(change, screen)
    if any(results["controls"].values()):
        _print_controls(results["controls"], screen)
    for model, curves in results["budgets"].items():
        for task, curve in curves.items():
            _print_curve(_visible(model), _visible(task), curve, screen)
    _print_usage(results, screen)


def _visible(text: object) -> str:
    """Return a text that came from a file or a server, with what would move the terminal written out."""
    return make_visible(str(text))


def _begin(title: str, screen: Screen) -> None:
    screen.skip()
    screen.say((title, "bold"))


def _say_verdict(changes: Sequence[Found], screen: Screen) -> None:
    """Say what all comparisons come to, as the page does."""
    verdict = words.judge_changes([(one["before"], one["after"], one["tasks"]) for one in changes])
    screen.say((_visible(verdict.headline), _TONES.get(verdict.tone, "bold")))
    screen.say((_visible(verdict.sentence), ""))
    screen.skip()


def _print_notes(notes: Sequence[str], screen: Screen) -> None:
    """Print what must be known before any figure is believed: conditions that differ, questions left out."""
    for note in notes:
        screen.say((_visible(note), "yellow"))
    if notes:
        screen.skip()


def _shorten(names: Iterable[str], screen: Screen) -> dict[str, str]:
    """Return each model's name as a table has it: without its organisation on a terminal, where it stays its own."""
    visible = {name: _visible(name) for name in names}
    last = Counter(name.rpartition("/")[2] for name in visible.values())
    return {
        name: full if screen.is_plain or last[short := full.rpartition("/")[2]] > 1 or not short else short
        for name, full in visible.items()
    }


def _print_models(models: Sequence[Found], screen: Screen) -> None:
    for model in models:
        told = ((key, model.get(key)) for key in ("source", "revision", "precision", "adapter", "backend", "server"))
        facts = [
            f"adapter {_visible(fact)}" if key == "adapter" else _visible(fact)
            for key, fact in told
            if fact is not None and fact != model["name"]
        ]
        screen.say((_visible(model["name"]), "bold"), (f"  {', '.join(facts)}" if facts else "", "dim"))
        for note in model.get("notes") or ():
            screen.say((_visible(note), "dim"), indent=2)


# Scores ---------------------------------------------------------------------------------------------------------------

_SCORE = [Column("model", folds=True), Column("strict", right=True), Column("95 % CI", right=True),
          Column("lenient", right=True), Column("un-\nparsed", right=True), Column("un-\nfinished", right=True),
          Column("failed", right=True), Column("cut", right=True)]  # fmt: skip
_SCORE_WIDE = [Column(head, right=True) for head in ("forced", "think\ntokens", "answer\ntokens", "answers")]


def _print_scores(results: Found, screen: Screen) -> None:
    """Print each task with all of its models, and what would be right without reading the questions."""
    _begin("Scores", screen)
    names = _shorten(results["scores"], screen)
    table = Sections(screen, "task", _SCORE + (_SCORE_WIDE if screen.has_room(WIDE) else []))
    for task in dict.fromkeys(task for tasks in results["scores"].values() for task in tasks):
        by_model = {model: tasks[task] for model, tasks in results["scores"].items() if task in tasks}
        table.open(_visible(task) if screen.is_plain else _name_task(task, by_model, results["tasks"].get(task) or {}))
        for model, found in by_model.items():
            table.add(names[model], *_score_cells(found), *(_length_cells(found) if screen.has_room(WIDE) else ()))
        lettered = [found["letters"] for found in by_model.values() if found["letters"]]
        for letters in lettered[:1]:
            table.add("always the first", words.percent(letters["always_a"]), style="dim")
            table.add("always commonest", words.percent(letters["always_commonest"]), style="dim")
    table.print()
    for model, tasks in results["scores"].items():
        for task, found in tasks.items():
            _say_letters(f"{_visible(model)} on {_visible(task)}", found, screen)
            _say_votes(f"{_visible(model)} on {_visible(task)}", found, screen)


def _name_task(task: str, by_model: Mapping[str, Found], facts: Found) -> str:
    """Return a task's heading: its name, how often it was asked, and which set it is."""
    sizes = sorted({(found["n"], found["seeds"]) for found in by_model.values()})
    asked = " or ".join(f"{n:,} questions" + (f" × {seeds} seeds" if seeds > 1 else "") for n, seeds in sizes)
    digest = f", sha256 {facts['sha256'][:8]}" if facts.get("sha256") else ""
    return f"{_visible(task)}: {asked}{digest}"


def _score_cells(found: Found) -> list[Cell]:
    return [
        (words.percent(found["accuracy"]), "bold"),
        _range(found["ci95"]),
        (words.percent(found["lenient"]["accuracy"]), "dim"),
        *(_lost(found[key]) for key in ("unparsed", "unfinished", "failed", "cut")),
    ]


def _length_cells(found: Found) -> list[Cell]:
    means = (found["mean_think_tokens"], found["mean_answer_tokens"])
    return [_lost(found["forced"]), *(words.count(mean) for mean in means), f"{found['answers']:,}"]


def _lost(count: int) -> Cell:
    return (f"{count:,}", "yellow") if count else ("0", "dim")


def _range(ci95: Sequence[float]) -> str:
    """Return an interval of shares in percent: ``46.2–65.3``."""
    return f"{100 * ci95[0]:.1f}\N{EN DASH}{100 * ci95[1]:.1f}"


def _say_letters(who: str, found: Found, screen: Screen) -> None:
    """Say it where a model's letters cannot come from the right ones' shares.

    The test takes answers for independent draws, which several to one question are not.
    """
    letters = found["letters"]
    if not letters or found["seeds"] > 1 or not letters["enough"] or letters["p_value"] is None:
        return
    if letters["p_value"] >= words.UNEVEN:
        return
    chosen = ", ".join(f"{_visible(name)} {count:,}" for name, count in letters["chosen"].items())
    right = ", ".join(f"{_visible(name)} {count:,}" for name, count in letters["gold"].items())
    leaning = f"it leans to some of them ({words.p_text(letters['p_value'])})"
    screen.say((f"{who} chose {chosen}, where {right} are right: {leaning}.", "yellow"))


def _say_votes(who: str, found: Found, screen: Screen) -> None:
    if found["votes"]:
        k, share = list(found["votes"]["majority"].items())[-1]
        said = f"{who}: the majority of {k} answers is right on {words.percent(share)} of the questions, one answer on"
        screen.say((f"{said} {words.percent(found['accuracy'])}.", "dim"))


# Comparisons ----------------------------------------------------------------------------------------------------------


def _print_comparison(change: Found, screen: Screen) -> None:
    """Print one model against another, task by task."""
    _begin(f"{_visible(change['after'])} against {_visible(change['before'])}", screen)
    figures = [Column(head, right=True) for head in ("points", "95 % CI", "gained/\nlost", "p (Holm)")]
    columns = [Column("task", folds=True), Column("verdict", folds=True), *figures]
    rows: list[list[Cell]] = [
        [
            _visible(one["task"]),
            _VERDICTS[one["verdict"]],
            (words.points(one["delta"]), _VERDICTS[one["verdict"]][1]),
            words.change_interval(one["interval"]),
            f"{one['gained']:,}/{one['lost']:,}",
            _p(one["p_adjusted"]),
        ]
        for one in change["tasks"]
    ]
    pooled = change["pooled"]
    if len(change["tasks"]) > 1:
        cells = ["all pooled", "", words.points(pooled["delta"]), words.change_interval(pooled["ci95"]),
                 f"{pooled['gained']:,}/{pooled['lost']:,}", _p(pooled["p_value"])]  # fmt: skip
        rows.append([(cell, "dim") for cell in cells])
    screen.tabulate(columns, rows)
    for sentence in _qualify(change):
        screen.say((sentence, "dim"))


def _qualify(change: Found) -> list[str]:
    """Return what a reader of a comparison should know."""
    said = []
    if len(change["tasks"]) > 1:
        said.append(
            f"Verdicts are after Holm's adjustment over {len(change['tasks'])} tasks; an interval is of its task by "
            "itself, and of the pooled questions the p-value is not adjusted."
        )
    left_out = sum(one["left_out"] for one in change["tasks"])
    if left_out:
        said.append(f"{left_out:,} questions left out, which only one of the two was asked in these words.")
    if change["missing"]:
        said.append(f"Not compared, since one side lacks them: {_visible(words.join(change['missing']))}.")
    return said


def _p(p_value: float) -> str:
    return words.p_text(p_value).removeprefix("p ").removeprefix("= ")


# Controls, budgets, usage ---------------------------------------------------------------------------------------------


def _print_controls(controls: Mapping[str, Mapping[str, Mapping[str, Found]]], screen: Screen) -> None:
    """Print each control beside what it changed against the task itself."""
    _begin("Controls", screen)
    figures = [Column(head, right=True) for head in ("n", "strict", "95 % CI")]
    columns = [Column("control", folds=True), *figures, Column("effect", folds=True)]
    if screen.has_room(WIDE):
        columns += [Column("un-\nparsed", right=True), Column("un-\nfinished", right=True)]
    table = Sections(screen, "model and task", columns)
    for model, tasks in controls.items():
        for task, by_control in tasks.items():
            table.open(f"{_visible(model)} on {_visible(task)}")
            for control, found in by_control.items():
                share: Cell = (words.percent(found["accuracy"]), "bold")
                cells = [
                    _name_control(control),
                    f"{found['n']:,}",
                    share,
                    _range(found["ci95"]),
                    _say_effect(control, found),
                ]
                lost = [_lost(found[key]) for key in ("unparsed", "unfinished")] if screen.has_room(WIDE) else []
                table.add(*cells, *lost)
    table.print()


def _name_control(control: str) -> str:
    if control.startswith(ROTATE):
        return _ROTATED + control.removeprefix(ROTATE)
    return _CONTROLS.get(control, _visible(control))


def _say_effect(control: str, found: Found) -> str:
    """Return what a control shows: what thinking is worth, how many answers stayed behind, or the score's change."""
    if "agreement" in found:
        return describe_agreement(found["agreement"])
    if "change" in found and control == NO_THINKING:
        return describe_worth(found["change"])
    if "change" in found:
        change = found["change"]
        return f"{words.points(change['delta'])} ({words.change_interval(change['interval'])})"
    return ""


def _print_curve(model: str, task: str, curve: Found, screen: Screen) -> None:
    """Print accuracy against the budget for thinking, and the budget to serve with."""
    _begin(f"{model} on {task}, by tokens for thinking", screen)
    columns = [Column(head, right=True) for head in ("cap", "strict", "95 % CI", "forced", "points", "95 % CI", "p")]
    columns[4] = Column("against\nthe best", right=True)
    rows: list[list[Cell]] = []
    for point in curve["points"]:
        cap = point["think_tokens"]
        is_best = cap == curve["best"]
        rows.append([
            (f"{cap:,}", "bold green" if cap == curve["recommended"] else ""),
            (words.percent(point["accuracy"]), "bold"),
            _range(point["ci95"]),
            words.percent(point["forced_share"], 0),
            "best" if is_best else words.points(point["delta"]),
            "" if is_best else words.change_interval(point["delta_ci95"]),
            "" if is_best else _p(point["p_value"]),
        ])  # fmt: skip
    screen.tabulate(columns, rows, indent=2)
    screen.say((_visible(curve["sentence"]), "bold green"))


_USAGE = ("answers", "tokens\nread", "tokens\nthought", "tokens\nanswered", "tok/s")


def _print_usage(results: Found, screen: Screen) -> None:
    """Print what the answers took."""
    _begin("Usage", screen)
    usage: Mapping[str, Found] = results["usage"]
    names = _shorten(usage, screen)
    columns = [Column("model", folds=True), *(Column(head, right=True) for head in _USAGE)]
    more = {"at-\ntempts": any(used["attempts"] != used["answers"] for used in usage.values()),
            "cost": any(used["cost"] is not None for used in usage.values())}  # fmt: skip
    columns += [Column(head, right=True) for head, is_told in more.items() if is_told]
    rows: list[list[Cell]] = []
    for model, used in usage.items():
        tokens = [used[f"{part}_tokens"] for part in ("prompt", "think", "answer")]
        is_known = any(tokens)  # a server that tells no counts leaves noughts
        speed = (tokens[1] + tokens[2]) / used["seconds"] if is_known and used["seconds"] else None
        cells = [*(words.count(count if is_known else None) for count in tokens), words.count(speed)]
        further = zip((words.count(used["attempts"]), words.number(used["cost"], 4)), more.values(), strict=True)
        rows.append([names[model], f"{used['answers']:,}", *cells, *(cell for cell, is_told in further if is_told)])
    screen.tabulate(columns, rows)
    for model, used in usage.items():
        if "apportioned" in used["counts"]:
            said = "the server counts tokens in all; thinking and answer share them by their characters"
            screen.say((f"{_visible(model)}: {said}.", "dim"))
    if any(model.get("backend") == "endpoint" for model in results["models"]):
        screen.say(("A server's tok/s is of one answer at a time, however many were asked for together.", "dim"))


# Grades ---------------------------------------------------------------------------------------------------------------


def print_grades(
    graded: Iterable[Found], stream: TextIO | None = None, console: Console | None = None, *, summary: bool = False
) -> None:
    """Print graded lines as JSON Lines, each as it comes, and then a table of them.

    Args:
        graded: what ``grade_file`` yields.
        stream: where the lines go; standard output if ``None``.
        console: where the table goes; standard error if ``None``.
        summary: whether there is a table though the stream is no terminal.
    """
    stream = sys.stdout if stream is None else stream
    counts: dict[str, Counter[str]] = {}
    for line in graded:
        if "outcome" in line:  # else it could not be graded, and says why
            tally = counts.setdefault(line["kind"], Counter())
            tally[line["outcome"]] += 1
            tally["lenient"] += line["lenient_outcome"] == Outcome.CORRECT
        stream.write(_dump(line, stream.encoding) + "\n")
    stream.flush()
    if counts and (summary or stream.isatty()):
        _print_tally(counts, Screen(Console(stderr=True) if console is None else console))


def _dump(line: Found, encoding: str | None) -> str:
    """Return a line as JSON in its own characters, or with escapes where the stream cannot carry them."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(line)
    return text


def _print_tally(counts: Mapping[str, Counter[str]], screen: Screen) -> None:
    """Print each kind as a column: there are few kinds, and many things to say of each."""
    whole = Counter[str]()
    for tally in counts.values():
        whole += tally
    columns = dict(counts) | ({"all": whole} if len(counts) > 1 else {})
    cells = [_tally_cells(tally) for tally in columns.values()]
    heads = [*(outcome.value for outcome in Outcome), "all", "strict", "95 % CI", "lenient"]
    rows = [[(head, "dim"), *row] for head, *row in zip(heads, *cells, strict=True)]
    screen.tabulate([Column(""), *(Column(kind, right=True) for kind in columns)], rows)


def _tally_cells(tally: Counter[str]) -> list[Cell]:
    n = sum(tally[outcome] for outcome in Outcome)
    correct = tally[Outcome.CORRECT]
    return [
        f"{correct:,}",
        f"{tally[Outcome.WRONG]:,}",
        *(_lost(tally[outcome]) for outcome in (Outcome.UNPARSED, Outcome.UNFINISHED, Outcome.FAILED)),
        f"{n:,}",
        (words.percent(correct / n), "bold"),
        _range(wilson(correct, n)),
        (words.percent(tally["lenient"] / n), "dim"),
    ]
