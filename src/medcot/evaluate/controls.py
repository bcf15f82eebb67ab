"""Controls: what a score would be if the model did not do what the score is read as.

Each is a transformation of a task, so that everything downstream treats it as one more task: the options turned round
(an answer that stays with its letter did not read them; Zheng et al. 2024, arXiv:2309.03882), the question left out
(what is right without it was guessed from the options, or known by heart; Balepur et al. 2024, arXiv:2402.12483), no
thinking (what the chain of thought is worth), and the floor of always giving the same letter.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import replace

from medcot.data.choices import find_stem, format_question
from medcot.errors import DataError
from medcot.evaluate.backends import Answer, Counts
from medcot.evaluate.tasks import Item, Task
from medcot.records import AnswerKind, Finish

# Options that speak of one another, or of their places, mean something else when they are turned round.
_BOUND = re.compile(
    r"\b(all|none|both|neither|either|any|two) (of|the)\b|\babove\b|\bbelow\b|\boptions?\b|\bboth\b"
    r"|\b[A-E](,| and| or| &|\+) ?[A-E]\b",
    re.IGNORECASE,
)


def rotate_options(task: Task, shift: int = 1) -> Task:
    """Move each option's text ``shift`` letters on, and gold with it; items whose options refer to others stay out.

    Raises:
        DataError: nothing is left that has lettered options.
    """
    lettered = [item for item in _lettered(task) if item.example.options]
    free = [item for item in lettered if not any(_BOUND.search(text) for text in (item.example.options or {}).values())]
    sentences = (
        f"{len(task.items) - len(free):,} of {len(task.items):,} items left out: options that speak of others.",
    )
    items = tuple(_rotate(item, shift) for item in free)
    _refuse_none(task, items, "has no item whose options can change places")
    return replace(task, items=items, control=f"rotate-{shift}", sentences=task.sentences + sentences)


def blank_question(task: Task) -> Task:
    """Leave the question out and keep the options.

    Raises:
        DataError: the task has no lettered options.
    """
    items = tuple(
        replace(item, prompt=item.prompt.replace(find_stem(item.example).strip(), "", 1).strip())
        for item in _lettered(task)
    )
    _refuse_none(task, items, "has no options to choose from without the question")
    return replace(task, items=items, control="blank")


def without_thinking(task: Task) -> Task:
    """Have every answer begin behind an empty thinking block."""
    return replace(task, control="no-thinking", thinks=False)


def answer_always(task: Task, choice: str | None = None) -> list[Answer]:
    """Return the floor: the same choice for every item, the first one where none is named.

    Raises:
        DataError: the items have nothing to choose from, or not this.
    """
    answers = []
    for item in task.items:
        given = choice or (item.choices[0] if item.choices else None)
        if given is None or given not in item.choices:
            raise DataError(
                f"'{item.example.id}' has the choices {', '.join(item.choices) or 'none'}",
                f"The floor answers {given or 'the first choice'} to every item",
                "Take a task with options",
            )
        text = f"Final answer: {given}"
        answers.append(
            Answer(
                item.example.id, 0, text=f"</think>{text}", answer=text, closed=True, finish=Finish.EOS,
                counts=Counts.EXACT,
            )
        )  # fmt: skip
    return answers


def _lettered(task: Task) -> list[Item]:
    return [item for item in task.items if item.example.answer_kind is AnswerKind.LETTER and item.example.options]


def _refuse_none(task: Task, items: Sequence[Item], what: str) -> None:
    if not items:
        raise DataError(f"'{task.name}' {what}", "This control needs lettered options", "Leave it out for this task")


def _rotate(item: Item, shift: int) -> Item:
    example = item.example
    options = example.options
    assert options and example.gold is not None, "only lettered items get here"
    letters, size = string.ascii_uppercase[: len(options)], len(options)
    texts = list(options.values())
    turned = {letter: texts[(number - shift) % size] for number, letter in enumerate(letters)}
    moved = replace(
        example,
        question=format_question(find_stem(example), turned),
        options=turned,
        gold=letters[(letters.index(example.gold) + shift) % size],
    )
    return Item(moved, item.prompt.replace(example.question.strip(), moved.question.strip(), 1), item.choices)
