"""One graded answer as one line of JSON: all that a score, a comparison, a page or a reader needs of it.

Whatever answered, and whenever, a line looks the same: the question as it was put, the text as it came, how it was
read, and what it cost. Scores are added up from lines alone (``scores.py``), so a finished evaluation can be scored
again, compared with another and exported on any machine, and anyone can check a verdict with a pager. A run's
``samples/before.jsonl`` and ``samples/after.jsonl`` hold such lines too, beside the questions that are only asked.

A line names its task without its size, so that the 200 questions of ``medqa:200`` are found among those of ``medqa``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medcot.evaluate.backends import Answer, Request
from medcot.evaluate.grading import grade
from medcot.evaluate.lenient import lenient
from medcot.evaluate.tasks import Item, Task
from medcot.records import Completion, Finish, Outcome

Line = dict[str, Any]
# By which lines of two evaluations are known to be of one question: the question as put and its gold among them, so
# that a set which changed under its name, or was worded otherwise, is never compared.
Identity = tuple[str, str | None, str, str, str | None]


def build_lines(
    task: Task, requests: Sequence[Request], answers: Sequence[Answer], prompts: Sequence[str]
) -> list[Line]:
    """Grade the answers to a task, strictly and leniently; one line each, in the order of the requests.

    Args:
        task: what was asked.
        requests: as ``build_requests`` made them of it.
        answers: one for each request, in their order.
        prompts: all that the model read, for each request.
    """
    items = {item.example.id: item for item in task.items}
    return [
        _build_line(task, items[request.item_id], answer, text)
        for request, answer, text in zip(requests, answers, prompts, strict=True)
    ]


def _build_line(task: Task, item: Item, answer: Answer, prompt_text: str) -> Line:
    example, completion = item.example, answer.completion
    strict = grade(example, completion)
    return {
        "kind": "eval",
        "task": task.base,
        "control": task.control,
        "id": example.id,
        "seed": answer.seed,
        "topic": example.topic,
        "question": item.prompt,
        "gold": example.gold,
        "answer_kind": None if example.answer_kind is None else example.answer_kind.value,
        "choices": list(item.choices),
        "prompt": prompt_text,
        **describe_completion(completion),
        "outcome": strict.outcome.value,
        "parsed": strict.parsed,
        "lenient_outcome": lenient(example, completion).outcome.value,
        "forced": answer.forced,
        "log_probs": answer.log_probs,
        "counts": answer.counts.value,
        "seconds": answer.seconds,
        "cost": answer.cost,
        "num_attempts": answer.num_attempts,
        "served_by": answer.served_by,
        "error": answer.error,
    }


def describe_completion(completion: Completion | None) -> dict[str, Any]:
    """Return a completion's part of a line; of none, texts are empty and the finish is null."""
    return {
        "text": completion.text if completion else "",
        "think": completion.think if completion else "",
        "answer": completion.answer if completion else "",
        "closed": completion.closed if completion else False,
        "finish": completion.finish.value if completion else None,
        "num_prompt_tokens": completion.num_prompt_tokens if completion else 0,
        "num_think_tokens": completion.num_think_tokens if completion else 0,
        "num_answer_tokens": completion.num_answer_tokens if completion else 0,
    }


def read_completion(line: Mapping[str, Any]) -> Completion | None:
    """Return the completion that a line describes; ``None`` where generation failed."""
    if line["finish"] is None:
        return None
    return Completion(
        text=line["text"],
        think=line["think"],
        answer=line["answer"],
        closed=line["closed"],
        finish=Finish(line["finish"]),
        num_prompt_tokens=line["num_prompt_tokens"],
        num_think_tokens=line["num_think_tokens"],
        num_answer_tokens=line["num_answer_tokens"],
    )


def is_right(line: Mapping[str, Any]) -> bool:
    """Return whether a line was graded correct."""
    return line["outcome"] == Outcome.CORRECT


def identify(line: Mapping[str, Any]) -> Identity:
    """Return what two evaluations of one question have in common."""
    return line["task"], line["control"], line["id"], line["question"], line["gold"]


def group_by_task(lines: Sequence[Line]) -> dict[str, dict[str | None, list[Line]]]:
    """Return task to control to lines, in the order they were asked; ``None`` is the task itself."""
    groups: dict[str, dict[str | None, list[Line]]] = {}
    for line in lines:
        if line["kind"] == "eval":
            groups.setdefault(line["task"], {}).setdefault(line["control"], []).append(line)
    return groups


def drop_control(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of a control as if they were of the task itself, so that the two can be compared."""
    return [{**line, "control": None} for line in lines]


def group_by_question(lines: Sequence[Line]) -> dict[Identity, list[Line]]:
    """Return each question's lines, one a seed, in the order they were asked."""
    groups: dict[Identity, list[Line]] = {}
    for line in lines:
        groups.setdefault(identify(line), []).append(line)
    return groups
