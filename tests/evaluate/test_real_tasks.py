"""The real sets load whole, and every item of them can be graded: its gold answer is right, any other is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from medcot.evaluate.backends import Answer, Counts, Limits
from medcot.evaluate.lines import build_lines
from medcot.evaluate.scores import score
from medcot.evaluate.tasks import Item, Task, build_requests, load_task
from medcot.generate import Sampling
from medcot.records import Finish

SHARED = Path(__file__).parents[2] / "../shared/data"
SETS = {
    "medqa": ("MedQA-USMLE-4-options/test.jsonl", 1273, 4),
    "pubmedqa": ("PubMedQA/pqa_labeled.jsonl", 500, 3),
    "medmcqa": ("medmcqa/validation_head.jsonl", 100, 4),
    "mmlu-medical": ("mmlu-medical/test_head.jsonl", 100, 4),
    "medxpertqa": ("MedXpertQA/text_head.jsonl", 30, 10),
    "medical-o1-verifiable-problem": ("medical-o1-verifiable-problem/train.jsonl", 198, None),
}


def load(name: str) -> Task:
    path = SHARED / SETS[name][0]
    if not path.exists():
        pytest.skip(f"the real set is not here ({path})")
    return load_task(f"{name}={path}")


def right(item: Item) -> str:
    return str(item.example.gold)


def wrong(item: Item) -> str:
    return next((choice for choice in item.choices if choice != item.example.gold), "nothing of the kind")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("write", "accuracy"), [(right, 1.0), (wrong, 0.0)])
def test_every_item_is_graded(name: str, write, accuracy: float) -> None:
    task = load(name)
    _, num_items, num_options = SETS[name]
    assert (len(task.items), task.num_options) == (num_items, num_options)
    requests = build_requests(task, Sampling(0.6, 0.95), (1,), Limits(64, 64))
    answers = [
        Answer(
            item.example.id, 1, think="So.", answer=(text := f"It follows.\n\nFinal answer: {write(item)}"),
            text=f"So.</think>{text}", closed=True, finish=Finish.EOS, counts=Counts.EXACT,
        )
        for item in task.items
    ]  # fmt: skip
    found = score(build_lines(task, requests, answers, [request.question for request in requests]))
    assert found["accuracy"] == accuracy and found["unparsed"] == found["unfinished"] == 0
    assert found["n"] == num_items and len({request.item_id for request in requests}) == num_items
