"""An evaluation arranged as the rows of its tables: the same for its own page and for a run's report.

Both know scores by model and task and changes by task, kept in different places: ``results.json`` by model first,
``run.json`` by task first, with "before" and "after" for models. Here they become one ``View``, and every table of
either page is built from that, so that a figure cannot be called one thing on one page and another on the other.
Figures stay as they were computed; the templates format them. What a figure means in words is in ``words`` and
``eval_words``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Facts = Mapping[str, Any]

# Colours by place, named as in page.css: the first is what the others are compared with.
TONES = ("before", "after", "second", "answer", "sixth", "open")
_SHORT_SHA = 12


@dataclass(frozen=True, slots=True)
class Model:
    """One column: its key in the figures, what the page calls it, and its colour."""

    key: str
    name: str
    tone: str


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task: what it is, each model's score, and each comparison's change; ``None`` where it was not asked."""

    task: str
    facts: Facts
    scores: tuple[Facts | None, ...]
    changes: tuple[Facts | None, ...]

    @property
    def num_questions(self) -> list[int]:
        """How many questions were asked, each number once: one where all models were asked the same."""
        return sorted({int(score["n"]) for score in self.scores if score})

    @property
    def short_sha256(self) -> str:
        """What of the checksum fits into a table."""
        sha256 = str(self.facts.get("sha256") or "")
        return f"{sha256[:_SHORT_SHA]}…" if sha256 else ""

    @property
    def floors(self) -> Facts | None:
        """The floors ``always_a`` and ``always_commonest`` of these questions; ``None`` where nothing is chosen."""
        return next((score["letters"] for score in self.scores if score and score.get("letters")), None)


@dataclass(frozen=True, slots=True)
class View:
    """All of an evaluation: its models, which of them are compared, and a row a task."""

    models: tuple[Model, ...]
    comparisons: tuple[tuple[Model, Model], ...]
    rows: tuple[TaskRow, ...]

    @property
    def has_one_base(self) -> bool:
        """Whether the comparisons are those of every other model with the first."""
        return [(before, after) for before, after in self.comparisons] == [
            (self.models[0], model) for model in self.models[1:]
        ]

    @property
    def num_seeds(self) -> int:
        """The most answers that any question was given."""
        return max((score.get("seeds") or 1 for _, _, score in self.cells()), default=1)

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, in order."""
        return [row.task for row in self.rows]

    def cells(self) -> Iterator[tuple[TaskRow, Model, Facts]]:
        """Give every score there is, task by task, with its row and model."""
        for row in self.rows:
            for model, score in zip(self.models, row.scores, strict=True):
                if score:
                    yield row, model, score

    @property
    def sentences(self) -> list[tuple[str, str]]:
        """What reading the tasks said: task and sentence."""
        return [(row.task, str(sentence)) for row in self.rows for sentence in row.facts.get("sentences") or ()]


def view_results(results: Facts) -> View:
    """Arrange what ``evaluate.results.build_results`` returned."""
    scores = results.get("scores") or {}
    names = [str(model["name"]) for model in results.get("models") or ()]
    tones = TONES if len(names) > 1 else ("after",)
    models = {name: Model(name, name, tones[place % len(tones)]) for place, name in enumerate(names)}
    comparisons = results.get("comparisons") or []
    changes = [{change["task"]: change for change in comparison["tasks"]} for comparison in comparisons]
    facts = results.get("tasks") or {}
    tasks = dict.fromkeys([task for name in names for task in scores.get(name) or {}])
    return View(
        models=tuple(models.values()),
        comparisons=tuple((models[it["before"]], models[it["after"]]) for it in comparisons),
        rows=tuple(
            TaskRow(
                task,
                facts.get(task) or {},
                tuple((scores.get(name) or {}).get(task) for name in names),
                tuple(by_task.get(task) for by_task in changes),
            )
            for task in tasks
        ),
    )


def view_run(evaluation: Facts) -> View:
    """Arrange the ``eval`` of a ``run.json``; it has no row where an older medcot wrote it."""
    sides = [side for side in ("before", "after") if evaluation.get(side)]
    models = tuple(Model(side, side.capitalize(), side) for side in sides)
    rows = tuple(
        TaskRow(str(task), part, tuple(part.get(side) for side in sides), (part.get("change"),)[: len(sides) - 1])
        for task, part in (evaluation.get("tasks") or {}).items()
        if isinstance(part, Mapping)
    )
    return View(models, ((models[0], models[1]),) if len(models) == 2 else (), rows)


# What became of the answers -------------------------------------------------------------------------------------------

OUTCOMES = (
    ("correct", "Correct"),
    ("wrong", "Wrong"),
    ("unparsed", "No readable final answer"),
    ("unfinished", "Thinking never closed"),
    ("failed", "Generation failed"),
)


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """Shares of all answers of one model to one task; the five outcomes add up to 1, the others overlap them."""

    row: TaskRow
    model: Model
    answers: int
    shares: dict[str, float]
    cut: float | None
    forced: float | None


def build_outcomes(view: View) -> list[OutcomeRow]:
    """Return a line for each task and model."""
    found = []
    for row, model, score in view.cells():
        answers = score.get("answers") or score["n"]
        counts = {key: score.get(key) or 0 for key, _ in OUTCOMES if key != "wrong"}
        counts["wrong"] = max(0, answers - sum(counts.values()))
        over = max(1, answers)
        cut, forced = (None if score.get(key) is None else score[key] / over for key in ("cut", "forced"))
        shares = {key: counts[key] / over for key, _ in OUTCOMES}
        found.append(OutcomeRow(row, model, answers, shares, cut, forced))
    return found


# Topics ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TopicChange:
    """After minus before: of right answers, or of their share where one side gave more answers to a question."""

    delta: float
    is_share: bool


@dataclass(frozen=True, slots=True)
class TopicRow:
    """Right answers of one topic: (correct, of how many) a model, and after minus before a comparison."""

    name: str
    n: int
    counts: tuple[tuple[int, int] | None, ...]
    changes: tuple[TopicChange | None, ...]


def build_topics(row: TaskRow) -> list[TopicRow]:
    """Return one line a topic of a task, in the order they were met; changes are of the questions both were asked."""
    topics = dict.fromkeys([topic for score in row.scores if score for topic in score.get("topics") or {}])
    return [_build_topic(row, topic) for topic in topics]


def _build_topic(row: TaskRow, topic: str) -> TopicRow:
    counts = []
    for score in row.scores:
        found = ((score or {}).get("topics") or {}).get(topic)
        counts.append((int(found["correct"]), int(found["n"])) if found else None)
    changes: list[TopicChange | None] = []
    for place, change in enumerate(row.changes, 1):
        found = ((change or {}).get("topics") or {}).get(topic)
        # Of a topic that only one side calls so, nothing was asked of both.
        if not found or not counts[0] or not counts[place]:
            changes.append(None)
        else:
            changes.append(_shift_shared(found, row.scores[0] or {}, row.scores[place] or {}))
    return TopicRow(topic, max(count[1] for count in counts if count), tuple(counts), tuple(changes))


def _shift_shared(found: Facts, before: Facts, after: Facts) -> TopicChange:
    """Return the change on the questions that both sides were asked; how many answers these had is the first side's.

    A model gives the same number of answers to each question, so that the other side's follows from it.
    """
    was, now = (score.get("seeds") or 1 for score in (before, after))
    return _shift((int(found["before"]), int(found["n"])), (int(found["after"]), int(found["n"]) * now / was))


def _shift(before: tuple[int, float], after: tuple[int, float]) -> TopicChange:
    """Return the change between two counts, each (correct, of how many)."""
    if before[1] == after[1]:
        return TopicChange(after[0] - before[0], is_share=False)
    return TopicChange(after[0] / after[1] - before[0] / before[1], is_share=True)


def build_pooled_topics(sides: Sequence[tuple[str, Facts]]) -> tuple[list[Model], list[TopicRow]]:
    """Return the columns and lines of a run's topics over all of its tasks together.

    Args:
        sides: ``before`` and ``after``, or one of them, each with its pooled score.
    """
    models = [Model(side, side.capitalize(), side) for side, _ in sides]
    scores = tuple(score for _, score in sides)
    rows = build_topics(TaskRow("", {}, scores, (None,) * (len(scores) - 1)))
    return models, [replace(row, changes=tuple(_shift_counts(row.counts))) for row in rows]


def _shift_counts(counts: Sequence[tuple[int, int] | None]) -> Iterator[TopicChange | None]:
    """Give the change of each count from the first; ``None`` where a side was not asked."""
    for after in counts[1:]:
        yield _shift(counts[0], after) if counts[0] and after else None


# Letters --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LetterRow:
    """What one model chose on one task: (letter, share of the letters chosen, share of gold)."""

    row: TaskRow
    model: Model
    bars: tuple[tuple[str, float | None, float], ...]
    letters: Facts
    seeds: int  # answers a question

    @property
    def top(self) -> float:
        """The largest share, to which the drawing is scaled."""
        return max(max(chosen or 0.0, gold) for _, chosen, gold in self.bars)


def build_letters(view: View) -> list[LetterRow]:
    """Return a line for each task with something to choose from, and model."""
    found = []
    for row, model, score in view.cells():
        if not (letters := score.get("letters")):
            continue
        chosen, gold = letters["chosen"], letters["gold"]
        read, known = sum(chosen.values()), sum(gold.values())
        bars = tuple(
            (str(letter), chosen.get(letter, 0) / read if read else None, gold.get(letter, 0) / known if known else 0.0)
            for letter in sorted({*chosen, *gold})
        )
        found.append(LetterRow(row, model, bars, letters, score.get("seeds") or 1))
    return found


# Lengths --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LengthRow:
    """Tokens of thinking and of answer: ``p10``, ``p50``, ``p90``, ``max``; ``longest`` is the page's widest p90."""

    row: TaskRow
    model: Model
    think: Facts
    answer: Facts | None
    longest: int


def build_lengths(view: View) -> list[LengthRow]:
    """Return a line for each task and model that wrote anything."""
    longest = max((score["think_tokens"]["p90"] for *_, score in view.cells() if score.get("think_tokens")), default=0)
    return [
        LengthRow(row, model, score["think_tokens"], score.get("answer_tokens"), longest)
        for row, model, score in view.cells()
        if score.get("think_tokens")
    ]
