"""Lines of evaluations that nobody made: seeded, of any size, with every kind of outcome and control."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from medcot.evaluate.backends import Answer, Counts, Limits
from medcot.evaluate.lines import Line, build_lines
from medcot.evaluate.results import Respondent
from medcot.evaluate.tasks import Item, Task, build_requests
from medcot.generate import Sampling
from medcot.records import AnswerKind, Example, Finish

LETTERS = ("A", "B", "C", "D")
TOPICS = ("cardiology", "renal medicine", "obstetrics & gynaecology")


def make_task(name: str = "medqa", num_items: int = 40, kind: AnswerKind = AnswerKind.LETTER) -> Task:
    """A task of made questions, their gold answers drawn evenly."""
    rng = random.Random(name)
    items = []
    for number in range(num_items):
        if kind is AnswerKind.LETTER:
            options: dict[str, str] | None = {letter: f"drug {letter}{number}" for letter in LETTERS}
            gold, choices = rng.choice(LETTERS), LETTERS
        elif kind is AnswerKind.YESNO:
            options, gold, choices = None, rng.choice(("yes", "no", "maybe")), ("yes", "no", "maybe")
        else:
            options, gold, choices = None, f"{number + 1} mL", ()
        example = Example(
            f"{name}-{number}", f"Question {number} about <b>dose</b> & rate?", name, options=options, gold=gold,
            answer_kind=kind, topic=TOPICS[number % len(TOPICS)],
        )  # fmt: skip
        items.append(Item(example, f"{example.question}\n\nOn the last line write Final answer: X.", choices))
    return Task(name, tuple(items), "0" * 64, num_items, len(choices) or None)


def make_lines(
    task: Task, accuracy: float, *, seeds: Sequence[int] = (0,), rng_seed: int = 0, cap: int | None = None
) -> list[Line]:
    """Lines of a model that is right with a chance; some of the rest are unparsed, unfinished or failed.

    Args:
        task: what is asked.
        accuracy: chance of a right answer.
        seeds: answers a question.
        rng_seed: of the model: another one is another model.
        cap: tokens of thinking at which it is closed for the model.
    """
    limits = Limits(cap or 2048, 64)
    requests = build_requests(task, Sampling(0.6, 0.95), seeds, limits)
    items = {item.example.id: item for item in task.items}
    answers = []
    for request in requests:
        rng = random.Random(f"{rng_seed} {request.item_id} {request.seed} {cap}")
        answers.append(_answer(items[request.item_id], request.seed, accuracy, rng, cap))
    return build_lines(task, requests, answers, [request.question for request in requests])


def make_respondent(name: str, accuracy: float, tasks: Sequence[Task], **settings: Any) -> Respondent:
    """A model with its lines on some tasks."""
    lines = [line for task in tasks for line in make_lines(task, accuracy, rng_seed=len(name), **settings)]
    facts = {"source": "made", "revision": None, "precision": "bf16", "adapter": None, "backend": "local"}
    return Respondent(name, facts, lines, {task.base: task.facts for task in tasks})


def _answer(item: Item, seed: int, accuracy: float, rng: random.Random, cap: int | None) -> Answer:
    gold = item.example.gold or ""
    fate = rng.random()
    long = rng.randrange(40, 3000)
    think = f"I weigh <script>alert({seed})</script> the options & decide. " * 3
    if fate < accuracy:
        answer = f"It is so.\n\nFinal answer: {gold}"
    elif fate > 0.97:
        return Answer(item.example.id, seed, error="TimeoutError: none came")
    elif fate > 0.92:
        return Answer(
            item.example.id, seed, text=think, think=think, finish=Finish.LENGTH, num_prompt_tokens=90,
            num_think_tokens=long, counts=Counts.EXACT, seconds=0.2,
        )  # fmt: skip
    elif fate > 0.85:
        answer = f"Perhaps {gold}, perhaps not."
    else:
        others = [choice for choice in item.choices if choice != gold] or ["99 mL"]
        answer = f"Final answer: {rng.choice(others)}"
    return Answer(
        item.example.id, seed, text=f"{think}</think>{answer}", think=think, answer=answer, closed=True,
        finish=Finish.EOS, num_prompt_tokens=90, num_think_tokens=min(long, cap or long), num_answer_tokens=12,
        counts=Counts.EXACT, seconds=0.2, forced=cap is not None and long > cap,
    )  # fmt: skip
