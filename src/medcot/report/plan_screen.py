"""What is printed before an evaluation: which tasks there are, and what those asked for can show.

A result of "no detectable change" is bought with hours, so what could be detected is said before they are spent: for
two models the smallest change that will be found (``power``), for one the width that its interval will have. The flip
rate that this rests on is an assumption, and stands in the same sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from medcot.data.benchmarks import BENCHMARKS
from medcot.evaluate.general import NUM_ITEMS
from medcot.evaluate.general import SOURCE as GENERAL
from medcot.evaluate.power import compute_plan
from medcot.evaluate.stats import wilson
from medcot.evaluate.tasks import CLINIC, CLINIC_ITEMS, SUITES, TASKS, Task
from medcot.records import AnswerKind
from medcot.report import words
from medcot.report.evidence import make_visible
from medcot.report.screen import Cell, Column, Screen

WIDE = 130  # columns of a window from which on a task is one line
# What is asked for, of tasks that are not lettered questions only; those with words of their own name them.
KINDS: dict[str, tuple[AnswerKind, ...]] = {
    "bioasq": (AnswerKind.TEXT,),
    "medcalc-bench": (AnswerKind.NUMBER, AnswerKind.TEXT),
    "medical-o1-verifiable-problem": (AnswerKind.TEXT,),
    CLINIC: (AnswerKind.NUMBER, AnswerKind.TEXT),
    GENERAL: (AnswerKind.NUMBER, AnswerKind.LETTER),
}
_OWN = {CLINIC: CLINIC_ITEMS, GENERAL: NUM_ITEMS}


def kinds_of(name: str) -> tuple[AnswerKind, ...]:
    """Return the kinds of answer that a task of the table has."""
    return (AnswerKind.YESNO,) if TASKS[name].words else KINDS.get(name, (AnswerKind.LETTER,))


def print_tasks(console: Console) -> None:
    """Print the tasks and the suites that can be asked for by name."""
    screen = Screen(console)
    one_line = screen.has_room(WIDE)
    columns = [Column("task"), Column("items", right=True), Column("options", right=True), Column("answer")]
    columns += [Column("what it is", folds=True), Column("where it is", folds=True)] if one_line else []
    if one_line:
        screen.tabulate(columns, [_bold(*_task_cells(name), TASKS[name].about, _place(name)) for name in TASKS])
    else:
        _print_in_two_lines(columns, screen)
    screen.skip()
    screen.tabulate([Column("suite"), Column("its tasks", folds=True)],
                    [_bold(name, ", ".join(tasks)) for name, tasks in SUITES.items()])  # fmt: skip
    screen.skip()
    examples = (
        ("medqa", "all items of a task"),
        ("medqa:200", "200 of them, chosen by their content: the same ones from the Hub and from a file"),
        ("medqa=FILE", "from a file in the Hub's schema; medqa=FILE:200 is 200 of them"),
        ("FILE or org/name", "a set of your own under its own name, if its layout is known"),
        ("quick,medbullets", "a suite and a task"),
    )
    screen.tabulate([Column(""), Column("", folds=True)], [_bold(*example) for example in examples])


def _print_in_two_lines(columns: Sequence[Column], screen: Screen) -> None:
    """Print each task's figures, and below them, dim, what and where it is."""
    rows = [[column.head for column in columns], *map(_task_cells, TASKS)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for name, row in zip([None, *TASKS], rows, strict=True):
        placed = zip(row, columns, widths, strict=True)
        first, *rest = (f"{text:>{width}}" if column.right else f"{text:<{width}}" for text, column, width in placed)
        screen.say((first, "bold" if name else "dim"), (f"  {'  '.join(rest)}".rstrip(), "" if name else "dim"))
        if name:
            screen.say((f"{TASKS[name].about}; {_place(name)}", "dim"), indent=2)


def _task_cells(name: str) -> list[str]:
    known = BENCHMARKS.get(TASKS[name].benchmark or "")
    num_items = _OWN.get(name, known.num_items if known else None)
    options = len(TASKS[name].words) or (known.num_options if known else None)
    kinds = ", ".join("yes/no" if kind is AnswerKind.YESNO else kind.value for kind in kinds_of(name))
    return [name, words.count(num_items), "" if options is None else str(options), kinds]


def _bold(first: str, *rest: str) -> list[Cell]:
    return [(first, "bold"), *rest]


def _place(name: str) -> str:
    """Return where a task's items are from."""
    if name in _OWN:
        return "made by medcot"
    entry = TASKS[name]
    if entry.benchmark is None:
        return f"from a file: {entry.remedy[0].lower()}{entry.remedy[1:]}"
    known = BENCHMARKS[entry.benchmark]
    config = entry.config or known.config
    return f"Hub: {known.hub_id}" + (f", {config}" if config else "")


def print_plan(
    tasks: Sequence[Task], *, seeds: int, compared: bool, flip_rate: float, num_requests: int, console: Console
) -> None:
    """Print what is about to be asked, and what it can show.

    Args:
        tasks: as loaded; their controls are asked besides, and counted in ``num_requests``.
        seeds: answers a question.
        compared: whether two models will be.
        flip_rate: share of questions assumed to change their verdict.
        num_requests: answers that will be asked for in all.
        console: where to.
    """
    screen = Screen(console)
    columns = [Column("task", folds=True), Column("items", right=True), Column("of", right=True),
               Column("options", right=True), Column("sha256")]  # fmt: skip
    columns += [] if compared else [Column("interval at 50 %", right=True)]
    screen.tabulate(columns, [_plan_cells(task, compared=compared) for task in tasks])
    for task in tasks:
        for sentence in task.sentences:
            screen.say((make_visible(f"{task.name}: {sentence}"), "dim"))
    if compared:
        screen.skip()
        screen.say(("What can be told from chance", "bold"))
        told: dict[str, list[str]] = {}  # tasks of one size can show the same
        for task in tasks:
            plan = compute_plan(len(task.items), flip_rate, num_tasks=len(tasks), seeds=seeds).describe()
            told.setdefault(plan, []).append(make_visible(task.name))
        for plan, names in told.items():
            screen.say((words.join(names), "bold cyan"))
            screen.say((plan if len(names) == 1 else f"Each: {plan}", ""), indent=2)
    screen.skip()
    answers = "1 answer" if num_requests == 1 else f"{num_requests:,} answers"
    screen.say((f"{answers} in all" + (f", {seeds} to each question." if seeds > 1 else "."), "bold"))


def _plan_cells(task: Task, *, compared: bool) -> list[Cell]:
    n = len(task.items)
    low, high = wilson(n // 2, n)
    half: list[Cell] = [] if compared else [f"±{100 * (high - low) / 2:.1f} points"]
    options = "" if task.num_options is None else str(task.num_options)
    return [
        (make_visible(task.name), "bold"),
        f"{n:,}",
        f"{task.num_available:,}",
        options,
        (task.sha256[:12], "dim"),
        *half,
    ]
