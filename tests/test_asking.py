"""Asking: which questions, how they are drawn and kept, and lines that everything later is made from."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from made_lines import make_task
from medcot import asking, prompt
from medcot.evaluate.backends import Answer, Counts, Limits, OnAnswer, Request, answer_failed
from medcot.evaluate.lines import read_completion
from medcot.evaluate.store import AnswerStore, Subject
from medcot.evaluate.tasks import Item, Task
from medcot.folder import read_lines, write_lines
from medcot.generate import Sampling
from medcot.recipe import AskStage, Recipe, load_recipe
from medcot.records import AnswerKind, Example, Finish
from medcot.train.progress import RunConsole

PROBLEMS = [
    Example("p1", "Two and two, in mL?", "t", gold="4 mL", answer_kind=AnswerKind.NUMBER, topic="sums"),
    Example("p2", "Three and two, in mL?", "t", gold="5 mL", answer_kind=AnswerKind.NUMBER, topic="sums"),
    Example("p3", "Four and two, in mL?", "t", gold="6 mL", answer_kind=AnswerKind.NUMBER, topic="more sums"),
]
TASK = Task("sums.jsonl", tuple(Item(problem, problem.question) for problem in PROBLEMS), "0" * 64, 3)
BEFORE = ["no end of thought", "hm</think>I cannot say", "hm</think>Final answer: 6 mL"]
AFTER = ["so</think>Final answer: 4 mL", "so</think>Final answer: 9 mL", "so</think>Final answer: 6 mL"]
GREEDY = Sampling(0.0, 1.0)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


class FakeModel:
    """Answers the asked questions from a list instead of weights, and remembers how it was asked."""

    def __init__(self, config: SimpleNamespace | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.generation_config = config or SimpleNamespace(do_sample=False, temperature=1.0, top_p=1.0)

    def generate(self, model: Any, tokenizer: Any, prompts: Any, *, on_progress: Any, **how: Any) -> list[Any]:
        assert model is self
        self.calls.append({"prompts": [prompt.decode(ids, tokenizer) for ids in prompts], **how})
        on_progress(len(prompts), len(prompts))
        ids = tokenizer("asked</think>and answered", add_special_tokens=False).input_ids
        return [([*ids, tokenizer.eos_token_id], Finish.EOS)] * len(prompts)


class FakeBackend:
    """Answers graded questions from a list; a text of ``None`` is one that failed."""

    def __init__(self, texts: Sequence[str | None]) -> None:
        self.texts = dict(zip((problem.id for problem in PROBLEMS), texts, strict=True))
        self.asked: list[Request] = []

    def prompt_of(self, request: Request) -> str:
        return f"{request.question}\n<think>"

    def answer(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        for request in requests:
            self.asked.append(request)
            text = self.texts[request.item_id]
            on_answer(answer_failed(request, "nothing came") if text is None else _answer(request, text))


def _answer(request: Request, text: str) -> Answer:
    think, tag, answer = text.partition("</think>")
    finish = Finish.EOS if tag else Finish.LENGTH
    return Answer(
        request.item_id, request.seed, text, think, answer, bool(tag), finish, 9, len(think), len(answer), Counts.EXACT
    )


def _console() -> RunConsole:
    return RunConsole(Console(file=io.StringIO()))


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(Recipe(), ["prompt=short", *overrides])


def _ask(monkeypatch, tokenizer, *overrides: str) -> tuple[FakeModel, Any]:
    model = FakeModel()
    monkeypatch.setattr(asking, "generate", model.generate)
    return model, asking.ask_questions(model, tokenizer, _recipe(*overrides), _console())


def _grade(path: Path, texts: Sequence[str | None], backend: FakeBackend | None = None) -> list[dict[str, Any]]:
    backend = backend or FakeBackend(texts)
    with AnswerStore(path) as store:
        lines, _ = asking.grade_task(
            backend,
            TASK,
            sampling=GREEDY,
            seeds=(5,),
            limits=Limits(9, 0),
            store=store,
            subject=Subject(str(texts), None, TASK.sha256),
            console=_console(),
            label="sums",
        )
    return lines


def test_the_tutorial_s_question_comes_first_and_no_question_twice(monkeypatch, tokenizer):
    questions = f"ask.questions={json.dumps(['Why?', prompt.TUTORIAL_QUESTION, 'Why?'])}"
    model, lines = _ask(monkeypatch, tokenizer, questions)
    assert [line["question"] for line in lines] == [prompt.TUTORIAL_QUESTION, "Why?"]
    assert [line["id"] for line in lines] == ["ask-1", "ask-2"]
    assert model.calls[0]["prompts"] == [f"{question}\n<think>" for question in (prompt.TUTORIAL_QUESTION, "Why?")]


def test_asked_questions_are_sampled_as_the_recipe_says(monkeypatch, tokenizer):
    model, _ = _ask(monkeypatch, tokenizer, "ask.max_new_tokens=7", "ask.seed=5", "ask.ignore_eos=true")
    (asked,) = model.calls
    assert (asked["sampling"], asked["max_new_tokens"], asked["seed"]) == (Sampling(0.6, 0.95), 7, 5)
    assert asked["stop_at_eos"] is False
    model, _ = _ask(monkeypatch, tokenizer)
    assert model.calls[0]["stop_at_eos"] is True


@pytest.mark.parametrize(
    ("own", "ask", "wanted"),
    [
        ((True, 0.7, 0.8), {}, (0.7, 0.8)),
        ((True, 0.7, 0.8), {"temperature": 0.0}, (0.0, 0.8)),
        ((True, 0.7, 0.8), {"top_p": 0.5}, (0.7, 0.5)),
        ((True, None, None), {}, (0.6, 0.95)),
        ((False, 0.7, 0.8), {}, (0.6, 0.95)),
    ],
)
def test_the_recipe_goes_before_the_model_and_the_model_before_r1(own, ask, wanted):
    config = SimpleNamespace(**dict(zip(("do_sample", "temperature", "top_p"), own, strict=True)))
    assert asking.choose_sampling(FakeModel(config), AskStage(**ask)) == Sampling(*wanted)


def test_lines_of_both_kinds_can_stand_in_one_file(monkeypatch, tokenizer, tmp_path):
    _, asked = _ask(monkeypatch, tokenizer)
    graded = _grade(tmp_path / "store", AFTER)
    assert asked[0].keys() < graded[0].keys()
    assert asked[0]["outcome"] is None and asked[0]["text"] == "asked</think>and answered"
    line = graded[0]
    assert (line["think"], line["answer"], line["closed"]) == ("so", "Final answer: 4 mL", True)
    assert (line["outcome"], line["parsed"], line["finish"]) == ("correct", "4 mL", "eos")
    assert (line["task"], line["seed"], line["prompt"]) == ("sums.jsonl", 5, f"{PROBLEMS[0].question}\n<think>")


def test_unfinished_unparsed_and_failed_count_as_wrong(tmp_path):
    lines = _grade(tmp_path / "store", [*BEFORE[:2], None])
    assert [line["outcome"] for line in lines] == ["unfinished", "unparsed", "failed"]
    assert read_completion(lines[2]) is None and lines[2]["error"] == "nothing came"


def test_what_was_answered_is_not_asked_again_but_what_failed_is(tmp_path):
    texts = [AFTER[0], None, AFTER[2]]
    first = _grade(tmp_path / "store", texts)
    backend = FakeBackend(AFTER)
    second = _grade(tmp_path / "store", texts, backend)
    assert [request.item_id for request in backend.asked] == ["p2"]
    assert [line["outcome"] for line in second] == ["correct", "wrong", "correct"] and first[0] == second[0]


def test_before_and_after_are_summed_up_from_what_is_on_disk(monkeypatch, tokenizer, tmp_path):
    _, asked = _ask(monkeypatch, tokenizer)
    before, after = ([*asked, *_grade(tmp_path / name, texts)] for name, texts in (("b", BEFORE), ("a", AFTER)))
    for name, lines in (("before", before), ("after", after)):
        write_lines(tmp_path / name, lines)
        assert read_lines(tmp_path / name) == lines
    found = asking.summarise_samples([TASK], read_lines(tmp_path / "before"), read_lines(tmp_path / "after"))
    assert (found["n"], found["gained"], found["lost"], found["delta"]) == (3, 1, 0, pytest.approx(1 / 3))
    assert found["p_value"] == 1.0  # one flip out of one
    was = found["before"]
    assert (was["correct"], was["unparsed"], was["unfinished"]) == (1, 1, 1)
    assert was["topics"] == {"sums": {"n": 2, "correct": 0}, "more sums": {"n": 1, "correct": 1}}
    assert was["style"]["completions"] == 4, "the asked question's style is measured too"
    task = found["tasks"]["sums.jsonl"]
    assert task["sha256"] == TASK.sha256 and task["change"]["verdict"] == "no detectable change"
    assert asking.summarise_samples([], asked, asked) == {}


def test_the_table_sets_before_beside_after(monkeypatch, tokenizer, tmp_path):
    _, asked = _ask(monkeypatch, tokenizer)
    before, after = ([*asked, *_grade(tmp_path / name, texts)] for name, texts in (("b", BEFORE), ("a", AFTER)))
    columns, rows = asking.tabulate(before, list(reversed(after)))
    assert columns == ["kind", "topic", "question", "gold", "before", "after", "outcome before", "outcome after"]
    assert len(rows) == 4 and all(len(row) == len(columns) for row in rows)
    assert rows[1] == ["eval", "sums", PROBLEMS[0].question, "4 mL", BEFORE[0], AFTER[0], "unfinished", "correct"]


def test_a_base_is_known_by_all_that_its_answers_depend_on(tiny_folder, tmp_path):
    from dataclasses import replace

    from medcot.model import load

    loaded = load(str(tiny_folder), precision="fp32", max_seq_length=64)
    name = asking.name_base(loaded, accelerated=True)
    assert name == asking.name_base(loaded, accelerated=True) != asking.name_base(loaded, accelerated=False)
    assert name == asking.name_base(replace(loaded, source="by another path"), accelerated=True)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert asking.name_base(replace(loaded, resolved=str(tmp_path)), accelerated=True) != name
    assert asking.name_base(replace(loaded, revision="c0ffee"), accelerated=True) != name


def test_the_longest_prompt_is_counted_and_one_that_cannot_be_put_is_not(tokenizer):
    task = make_task(num_items=3)
    style = prompt.Style.SHORT
    longest = asking.count_prompt_tokens([task], style, tokenizer)
    assert longest == max(len(prompt.encode_prompt(item.prompt, style, tokenizer)) for item in task.items)
    forged = Task("f.jsonl", (Item(PROBLEMS[0], "</think>" * 999),), "0" * 64, 1)
    assert asking.count_prompt_tokens([task, forged], style, tokenizer) == longest


def test_weights_on_disk_are_known_by_what_is_in_them(tmp_path):
    import os

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    stamp = asking.stamp_weights(tmp_path)
    (tmp_path / "README.md").write_text("a log beside it")
    os.utime(weights, (1, 1))
    assert asking.stamp_weights(tmp_path) == stamp
    changed = bytearray(3_000_000)
    changed[::1000] = b"x" * 3000
    weights.write_bytes(bytes(changed))
    assert asking.stamp_weights(tmp_path) != stamp
