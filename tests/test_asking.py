"""Asking: which questions, how they are worded and drawn, and a sample file that everything later is made from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medcot import asking, prompt
from medcot.evaluate.grading import grade
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
BEFORE = ["no end of thought", "hm</think>I cannot say", "hm</think>Final answer: 6 mL"]
AFTER = ["so</think>Final answer: 4 mL", "so</think>Final answer: 9 mL", "so</think>Final answer: 6 mL"]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


class FakeModel:
    """Answers from a list instead of weights, and remembers how it was asked."""

    def __init__(self, answers: list[str], config: SimpleNamespace | None = None) -> None:
        self.answers, self.calls = answers, []
        self.generation_config = config or SimpleNamespace(do_sample=False, temperature=1.0, top_p=1.0)

    def generate(self, model: Any, tokenizer: Any, prompts: Any, *, on_progress: Any, **how: Any) -> list[Any]:
        assert model is self
        self.calls.append({"prompts": [prompt.decode(ids, tokenizer) for ids in prompts], **how})
        on_progress(len(prompts), len(prompts))
        graded = how["sampling"] == asking.GREEDY
        texts = self.answers if graded else ["asked</think>and answered"] * len(prompts)
        eos = tokenizer.eos_token_id
        tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return [
            ([*ids, eos], Finish.EOS) if "</think>" in text else (ids, Finish.LENGTH)
            for ids, text in zip(tokens, texts, strict=True)
        ]


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(Recipe(), ["prompt=short", *overrides])


def _ask(monkeypatch, tokenizer, answers: list[str], *overrides: str, problems=PROBLEMS) -> tuple[FakeModel, Any]:
    model = FakeModel(answers)
    monkeypatch.setattr(asking, "generate", model.generate)
    console = RunConsole(Console(file=io.StringIO()))
    return model, asking.answer_all(model, tokenizer, _recipe(*overrides), problems, console, graded_batch=100)


def test_the_tutorial_s_question_comes_first_and_no_question_twice(monkeypatch, tokenizer):
    questions = f"ask.questions={json.dumps(['Why?', prompt.TUTORIAL_QUESTION, 'Why?'])}"
    _, lines = _ask(monkeypatch, tokenizer, BEFORE, questions)
    asked = [line for line in lines if line["kind"] == "ask"]
    assert [line["question"] for line in asked] == [prompt.TUTORIAL_QUESTION, "Why?"]
    assert [line["id"] for line in asked] == ["ask-1", "ask-2"]


def test_only_graded_questions_carry_the_instruction(monkeypatch, tokenizer):
    model, lines = _ask(monkeypatch, tokenizer, BEFORE, "evaluate.instruction=End with one line.")
    asked, graded = (call["prompts"] for call in model.calls)
    assert asked == [f"{prompt.TUTORIAL_QUESTION}\n<think>"]
    assert graded == [f"{problem.question} End with one line.\n<think>" for problem in PROBLEMS]
    assert [line["question"] for line in lines[1:]] == [problem.question for problem in PROBLEMS]
    assert [line["prompt"] for line in lines[1:]] == graded


def test_asked_ones_are_sampled_and_graded_ones_decoded_greedily(monkeypatch, tokenizer):
    how = ["ask.max_new_tokens=7", "evaluate.max_new_tokens=9", "ask.seed=5"]
    model, _ = _ask(monkeypatch, tokenizer, BEFORE, *how)
    asked, graded = model.calls
    assert asked["sampling"] == Sampling(0.6, 0.95) and graded["sampling"] == Sampling(0.0, 1.0)
    assert (asked["max_new_tokens"], graded["max_new_tokens"], graded["batch_size"]) == (7, 9, 100)
    assert asked["seed"] == graded["seed"] == 5


def test_only_asked_questions_can_go_on_after_eos(monkeypatch, tokenizer):
    model, _ = _ask(monkeypatch, tokenizer, BEFORE, "ask.ignore_eos=true")
    assert [call["stop_at_eos"] for call in model.calls] == [False, True]
    model, _ = _ask(monkeypatch, tokenizer, BEFORE)
    assert [call["stop_at_eos"] for call in model.calls] == [True, True]


def test_without_graded_problems_only_questions_are_asked(monkeypatch, tokenizer):
    model, lines = _ask(monkeypatch, tokenizer, [], problems=[])
    assert len(model.calls) == 1 and [line["kind"] for line in lines] == ["ask"]
    assert asking.summarise_samples([], lines) is None


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
    assert asking.choose_sampling(FakeModel([], config), AskStage(**ask)) == Sampling(*wanted)


def test_a_sample_has_every_promised_key(monkeypatch, tokenizer):
    _, lines = _ask(monkeypatch, tokenizer, AFTER)
    keys = {"kind", "id", "topic", "question", "gold", "prompt", "text", "think", "answer", "closed", "finish"}
    keys |= {"outcome", "parsed", "num_prompt_tokens", "num_think_tokens", "num_answer_tokens"}
    assert all(line.keys() == keys for line in lines)
    asked, graded = lines[0], lines[1]
    assert asked["outcome"] is None and asked["gold"] is None and asked["text"] == "asked</think>and answered"
    assert (graded["think"], graded["answer"], graded["closed"]) == ("so", "Final answer: 4 mL", True)
    assert (graded["outcome"], graded["parsed"], graded["finish"]) == ("correct", "4 mL", "eos")
    assert graded["num_prompt_tokens"] == len(tokenizer(graded["prompt"]).input_ids)
    assert graded["num_think_tokens"] == len("so</think>")  # this tokenizer has a token a letter


def test_unfinished_and_unparsed_count_as_wrong(monkeypatch, tokenizer):
    _, lines = _ask(monkeypatch, tokenizer, BEFORE)
    summary = asking.summarise_samples(PROBLEMS, lines)
    assert [line["outcome"] for line in lines[1:]] == ["unfinished", "unparsed", "correct"]
    assert (summary["n"], summary["correct"], summary["unparsed"], summary["unfinished"]) == (3, 1, 1, 1)
    assert summary["topics"] == {"sums": {"n": 2, "correct": 0}, "more sums": {"n": 1, "correct": 1}}
    assert summary["style"]["completions"] == 4, "the asked question's style is measured too"


def test_what_is_read_back_is_summed_up_the_same(monkeypatch, tokenizer, tmp_path):
    _, before = _ask(monkeypatch, tokenizer, BEFORE)
    _, after = _ask(monkeypatch, tokenizer, AFTER)
    for name, lines in (("before", before), ("after", after)):
        write_lines(tmp_path / name, lines)
        assert read_lines(tmp_path / name) == lines
        assert asking.summarise_samples(PROBLEMS, read_lines(tmp_path / name)) == asking.summarise_samples(
            PROBLEMS, lines
        )
    change = asking.compare_samples(read_lines(tmp_path / "before"), read_lines(tmp_path / "after"))
    assert change == asking.compare_samples(before, after)
    assert (change["gained"], change["lost"], change["delta"]) == (1, 0, pytest.approx(1 / 3))
    assert change["p_value"] == 1.0  # one flip out of one


def test_grades_come_from_the_text_alone(monkeypatch, tokenizer):
    _, lines = _ask(monkeypatch, tokenizer, AFTER)
    for problem, line in zip(PROBLEMS, lines[1:], strict=True):
        assert grade(problem, asking._completion(line)) == asking._grade(line)


def test_the_table_sets_before_beside_after(monkeypatch, tokenizer):
    _, before = _ask(monkeypatch, tokenizer, BEFORE)
    _, after = _ask(monkeypatch, tokenizer, AFTER)
    columns, rows = asking.tabulate(before, list(reversed(after)))
    assert columns == ["kind", "topic", "question", "gold", "before", "after", "outcome before", "outcome after"]
    assert len(rows) == 4 and all(len(row) == len(columns) for row in rows)
    assert rows[1] == ["eval", "sums", PROBLEMS[0].question, "4 mL", BEFORE[0], AFTER[0], "unfinished", "correct"]
