"""``medcot eval``: tasks put to one or two models, into a folder that says what was found and how sure it is.

    load the tasks -> say what they can show -> open a model -> task, controls, budgets -> open the next -> report

What the questions can show is printed before the first of them is paid for. Every answer is kept as it comes
(``evaluate/store.py``), in medcot's cache and not in the folder, so that the same command, killed or finished, is never
paid for twice, also from another folder. Each task's lines and the results so far are on disk when the next begins.

A model with an adapter is asked after its plain base, whatever was asked for: the difference is the result. Controls
are asked of a few items with the first seed, since they are there to be looked at, not to be published.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot import __version__
from medcot import folder as folders
from medcot.answering import Answerer, Choice, open_answerers
from medcot.asking import FLIP_RATE, grade_task, plan_comparison, store_path
from medcot.errors import DataError, NetworkError, OutputError, RecipeError
from medcot.evaluate.backends import Ending, Limits
from medcot.evaluate.controls import blank_question, rotate_options, without_thinking
from medcot.evaluate.endpoint import Endpoint
from medcot.evaluate.lm_eval import export_lm_eval
from medcot.evaluate.results import (
    BUDGET,
    ITEMS,
    REPORT,
    RESULTS,
    Respondent,
    build_results,
    item_path,
    name_apart,
    read_json,
    read_respondents,
)
from medcot.evaluate.store import AnswerStore, Subject
from medcot.evaluate.tasks import Task, build_requests, load_suite
from medcot.generate import DEFAULT_TEMPERATURE, DEFAULT_TOP_P, Sampling
from medcot.machine import describe_machine, list_versions
from medcot.records import Run
from medcot.report.eval_page import render_evaluation
from medcot.report.eval_screen import print_plan, print_results
from medcot.secrets import SecretName, find_secret, redact
from medcot.train.progress import RunConsole

if TYPE_CHECKING:
    from rich.console import Console

    from medcot.evaluate.lines import Line

EVALS = Path("evals")
LM_EVAL = "lm-eval"  # folder of the export
CONTROLS = ("rotate", "blank", "no-thinking")


@dataclass(frozen=True, slots=True)
class Settings:
    """How questions are put; the same for every model.

    Attributes:
        limits: how long it may think and answer.
        temperature: of the draws; 0 is greedy.
        top_p: of the draws.
        seeds: one answer a question each.
        controls: of ``CONTROLS``.
        control_items: questions of each control.
        budgets: tokens of thinking to draw the curve over; none for no curve.
        flip_rate: share of questions assumed to change, for what can be shown.
    """

    limits: Limits
    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = DEFAULT_TOP_P
    seeds: tuple[int, ...] = (0,)
    controls: tuple[str, ...] = ()
    control_items: int = 50
    budgets: tuple[int, ...] = ()
    flip_rate: float = FLIP_RATE

    def __post_init__(self) -> None:
        """Refuse what could not be meant.

        Raises:
            RecipeError: an unknown control, a budget of nothing, or several greedy answers.
        """
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise RecipeError(f"'{unknown[0]}' is no control", "Controls are named in a list", f"{', '.join(CONTROLS)}")
        if any(budget < 1 for budget in self.budgets) or self.control_items < 1 or not self.seeds:
            raise RecipeError(
                f"budgets {list(self.budgets)}, {self.control_items} items of a control, {len(self.seeds)} seeds",
                "A budget is a number of tokens, and of items and seeds there is one at least",
                "Give numbers above 0",
            )
        if self.temperature == 0 and len(self.seeds) > 1:
            raise RecipeError(
                f"{len(self.seeds)} seeds with greedy answers", "Greedy answers are all alike", "Leave out --greedy"
            )

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p)

    @property
    def longest(self) -> Limits:
        """The most that any question is given."""
        return replace(self.limits, think_tokens=max(self.limits.think_tokens, *self.budgets, 0))

    def describe(self) -> dict[str, Any]:
        """Return the settings as results.json has them."""
        facts = asdict(self)
        return {**facts.pop("limits"), **facts}


@dataclass(frozen=True, slots=True)
class Round:
    """One task, or a control of it, as it is put; ``notes`` are of what that left out or changed."""

    task: Task
    limits: Limits
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_requests(self) -> int:
        """Answers that it asks for."""
        return len(self.task.items) * len(self.seeds)

    @property
    def label(self) -> str:
        """What its bar is called."""
        return self.task.name if self.task.control is None else f"{self.task.name}, {self.task.control}"


def evaluate(
    suite: str,
    who: Choice | Endpoint,
    settings: Settings,
    *,
    out: Path | None = None,
    keep_answers: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Put a suite to a model, and to its plain base where it has an adapter; return what results.json holds.

    Args:
        suite: tasks and suites, separated by commas.
        who: a model or a server.
        settings: how questions are put.
        out: the folder; ``evals/SUITE-TIME`` if ``None``.
        keep_answers: keep answers in medcot's cache and take them from there; else in the folder alone.
        console: where to draw.

    Raises:
        MedcotError: a mistake in suite, settings, model or folder, or nothing was answered. What was answered is kept,
            and the same call goes on from there.
    """
    screen = RunConsole(console)
    secret = find_secret(SecretName.HUGGING_FACE)
    with screen.stage("load tasks") as line:
        tasks = load_suite(suite, token=secret.value if secret else None)
        line.detail = f"{sum(len(task.items) for task in tasks):,} questions of {len(tasks)} tasks"
    rounds = [one for task in tasks for one in plan_rounds(task, settings)]
    compared = isinstance(who, Choice) and who.adapter is not None
    print_plan(
        tasks,
        seeds=len(settings.seeds),
        compared=compared,
        flip_rate=settings.flip_rate,
        num_requests=sum(one.num_requests for one in rounds) * (2 if compared else 1),
        console=screen.console,
    )
    evaluation = _Evaluation(_make_folder(suite, out), suite, tasks, settings, compared)
    with folders.held(Run(evaluation.folder)), evaluation.recorded():
        for answerer in open_answerers(who, tasks, settings.longest):
            _check_all(answerer, rounds, settings)
            evaluation.ask(answerer, rounds, screen, keep_answers=keep_answers and answerer.keeps)
    print_results(evaluation.facts, screen.console)
    screen.note(f"report: {evaluation.folder / REPORT}")
    _check_answered(evaluation.respondents)
    return read_json(evaluation.folder / RESULTS)


def _check_answered(respondents: Sequence[Respondent]) -> None:
    """Raise ``NetworkError`` where somebody gave no answer at all: its noughts are no result."""
    for respondent in respondents:
        errors = [line["error"] for line in respondent.lines if line["error"] is not None]
        if errors and len(errors) == len(respondent.lines):
            raise NetworkError(
                f"'{respondent.name}' gave none of {len(errors):,} answers. The last error: {errors[-1]}",
                "A score needs answers; these count as failed",
                "Mend the cause: the same command asks again what failed",
            )


def plan_rounds(task: Task, settings: Settings) -> list[Round]:
    """Return how a task is put: itself, then its controls, then the budgets from the largest down.

    The thinking of a small budget is the beginning of a large one's, so that the largest is written first and the
    others cut from it.
    """
    limits = settings.limits
    notes: tuple[str, ...] = ()
    if limits.ending is Ending.LIKELIHOOD and not all(item.choices for item in task.items):
        limits = replace(limits, ending=Ending.FORCED)
        notes = (f"{task.name} has no choices to compare: its answers are forced and written.",)
    rounds = [Round(task, limits, settings.seeds, notes)]
    rounds += [_plan_control(name, task, limits, settings) for name in settings.controls]
    for budget in sorted(set(settings.budgets), reverse=True):
        capped = replace(settings.limits, think_tokens=budget, ending=Ending.FORCED)
        rounds.append(Round(replace(task, control=f"{BUDGET}{budget}"), capped, settings.seeds))
    return rounds


def _plan_control(name: str, task: Task, limits: Limits, settings: Settings) -> Round:
    """Return a control of a few items; one that the task does not allow has none, and says why."""
    seeds, most = settings.seeds[:1], settings.control_items
    if name == "no-thinking":
        return Round(without_thinking(_take(task, most)), limits, seeds)
    try:
        made = _take(rotate_options(task) if name == "rotate" else blank_question(task), most)
    except DataError as error:
        return Round(replace(task, items=(), control=name), limits, seeds, (f"No {name} control: {error.value}.",))
    own = made.sentences[len(task.sentences) :]
    return Round(made, limits, seeds, tuple(f"{task.name}, {name}: {sentence}" for sentence in own))


def _take(task: Task, most: int) -> Task:
    return replace(task, items=task.items[:most])


def _check_all(answerer: Answerer, rounds: Sequence[Round], settings: Settings) -> None:
    """Word one request of each round, so that what a back end cannot be asked is said before any of it is paid for."""
    for one in rounds:
        requests = build_requests(_take(one.task, 1), settings.sampling, one.seeds[:1], one.limits)
        for request in requests:
            answerer.backend.prompt_of(request)


def _make_folder(suite: str, out: Path | None, kind: str = "evaluation") -> Path:
    """Make the folder, or take one of an earlier evaluation (or comparison), whose results are then replaced.

    Raises:
        OutputError: it holds other things, or cannot be made.
    """
    name = "-".join(part for part in suite.replace(":", "-").replace("/", "-").split(",") if part)
    folder = out or folders.free_name(EVALS / f"{name[:60]}-{time.strftime('%Y%m%d-%H%M%S')}")
    ours = (folder / RESULTS).is_file() and read_json(folder / RESULTS).get("kind") == kind
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"'{folder}' holds something else than {'an' if kind == 'evaluation' else 'a'} {kind}",
            "Results go to a new folder, or over older ones of their kind",
            "Name another with --out",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be made: {error.strerror}", "Results need a folder", "Name another with --out"
        ) from None
    return folder


@dataclass
class _Evaluation:
    """An evaluation under way: its folder, who has answered, and the facts so far."""

    folder: Path
    suite: str
    tasks: Sequence[Task]
    settings: Settings
    compared: bool
    respondents: list[Respondent] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep results.json true: running, complete, stopped by its user, or failed with the error's words."""
        started_s = time.monotonic()
        self.facts = {
            "kind": "evaluation",
            "medcot": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": "running",
            "suite": self.suite,
            "settings": self.settings.describe(),
            "plan": self._plan(),
            "machine": describe_machine(),
            "versions": list_versions(),
            "models": [],
        }
        try:
            yield
            self._record(timing={"all": round(time.monotonic() - started_s, 3)})
            render_evaluation({**self.facts, "status": "complete"}, self.respondents, self.folder / REPORT)
            export_lm_eval(self.facts, self.respondents, self.folder / LM_EVAL)
            self._record(status="complete")
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            words = redact(f"{type(error).__name__}: {error}")
            self._record(status="stopped" if stopped else "failed", error=words)
            if self.respondents:  # what there is, can be looked at
                render_evaluation(self.facts, self.respondents, self.folder / REPORT)
            raise

    def ask(self, answerer: Answerer, rounds: Sequence[Round], screen: RunConsole, *, keep_answers: bool) -> None:
        """Put every round to somebody; lines and results are on disk after each."""
        lines: list[Line] = []
        path = store_path(answerer.model, answerer.adapter_sha256) if keep_answers else self.folder / "answers.jsonl"
        if not keep_answers:
            screen.note(f"answers are kept in {path} alone; --out {self.folder} goes on with them")
        if not self.respondents:  # of an evaluation that asked otherwise; its answers are elsewhere
            for old in (ITEMS, LM_EVAL):
                shutil.rmtree(self.folder / old, ignore_errors=True)
        num_asked = 0
        with screen.stage(answerer.name) as stage, AnswerStore(path) as store:
            for one in rounds:
                self.notes.update(dict.fromkeys(one.notes))
                if not one.task.items:
                    continue
                found, asked = grade_task(
                    answerer.backend,
                    one.task,
                    sampling=self.settings.sampling,
                    seeds=one.seeds,
                    limits=one.limits,
                    store=store,
                    subject=Subject(answerer.model, answerer.adapter_sha256, one.task.sha256),
                    console=screen,
                    label=one.label,
                )
                num_asked += asked
                lines += found
                self._keep(answerer, one, found, lines, num_asked)
            stage.detail = f"{len(lines):,} answers, {len(lines) - num_asked:,} of them found from before"

    def _keep(self, answerer: Answerer, one: Round, found: list[Line], lines: list[Line], num_asked: int) -> None:
        item_file = item_path(self.folder, answerer.name, one.task.base, one.task.control)
        item_file.parent.mkdir(parents=True, exist_ok=True)
        folders.write_lines(item_file, found)
        facts = {**answerer.facts, "num_asked": num_asked, "num_found": len(lines) - num_asked}
        tasks = {task.base: task.facts for task in self.tasks}
        self.respondents = [other for other in self.respondents if other.name != answerer.name]
        facts["settings"] = self.facts["settings"]
        self.respondents.append(Respondent(answerer.name, facts, tuple(lines), tasks, answerer.base))
        results = build_results(self.respondents)
        self._record(**{**results, "notes": [*self.notes, *results["notes"]]})

    def _record(self, **facts: Any) -> None:
        self.facts.update(facts)
        folders.write_json(self.folder / RESULTS, self.facts)

    def _plan(self) -> list[dict[str, Any]]:
        settings = self.settings
        if not self.compared:
            return []
        return plan_comparison(self.tasks, seeds=len(settings.seeds), flip_rate=settings.flip_rate)


def compare(paths: Sequence[Path], *, out: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Compare what several folders hold, each model with the first; return what results.json would hold.

    Args:
        paths: folders of evaluations and runs; a model that several of them share is shown once.
        out: where results.json and report.html go; ``None`` for nowhere.
        console: where to draw.

    Raises:
        DataError: a folder that holds neither, or fewer than two models, or nothing that they were both asked.
        OutputError: ``out`` holds something else.
    """
    names = [path.resolve().name for path in paths]
    labels = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    respondents = name_apart({label: read_respondents(path) for label, path in zip(labels, paths, strict=True)})
    if len(respondents) < 2:
        raise DataError(
            f"{', '.join(labels)} hold the answers of one model, '{respondents[0].name}'",
            "A comparison needs two",
            "Name another folder",
        )
    about = {"kind": "comparison", "medcot": __version__, "folders": [str(path) for path in paths]}
    results = {**about, **build_results(respondents)}
    screen = RunConsole(console)
    print_results(results, screen.console)
    if out is not None:
        folder = _make_folder("", out, "comparison")
        folders.write_json(folder / RESULTS, results)
        render_evaluation(results, respondents, folder / REPORT, title="Comparison")
        screen.note(f"report: {folder / REPORT}")
    return results
