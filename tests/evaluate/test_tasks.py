"""The suite: names, what a task holds, the same sample from any order, and the controls."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from medcot.data.benchmarks import BENCHMARKS
from medcot.data.choices import find_stem
from medcot.errors import DataError
from medcot.evaluate.answers import check_gradable
from medcot.evaluate.backends import Ending, Limits
from medcot.evaluate.controls import answer_always, blank_question, rotate_options, without_thinking
from medcot.evaluate.general import FAMILIES, make_general
from medcot.evaluate.grading import grade
from medcot.evaluate.tasks import SUITES, TASKS, Wanted, build_requests, load_task, parse_suite, parse_task
from medcot.generate import Sampling
from medcot.records import AnswerKind, Completion, Finish, Outcome

SHARED = Path(__file__).parents[2] / "../shared/data"


def real(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"the real set is not here ({SHARED / path})")
    return SHARED / path


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exam(number: int, gold: str = "B", **options: str) -> dict[str, Any]:
    options = options or {letter: f"{letter.lower()}{number}" for letter in "ABCD"}
    return {"question": f"Which is {number}?", "options": options, "answer_idx": gold, "answer": options[gold]}


def completion(line: str) -> Completion:
    return Completion(line, "", line, True, Finish.EOS, 1, 1, 1)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("medqa", Wanted("medqa")),
        ("medqa:200", Wanted("medqa", None, 200)),
        ("medqa=my/test.jsonl", Wanted("medqa", "my/test.jsonl")),
        (" medqa = my/test.jsonl:50 ", Wanted("medqa", "my/test.jsonl", 50)),
        ("pubmedqa-no-abstract=x.jsonl", Wanted("pubmedqa-no-abstract", "x.jsonl")),
        ("builtin:clinic", Wanted("builtin:clinic")),
        ("builtin:clinic:40", Wanted("builtin:clinic", None, 40)),
        ("my/own.jsonl:7", Wanted("my/own.jsonl", "my/own.jsonl", 7)),
        ("C:\\data\\own.jsonl", Wanted("C:\\data\\own.jsonl", "C:\\data\\own.jsonl")),
    ],
)
def test_names_are_read(text: str, wanted: Wanted) -> None:
    assert parse_task(text) == wanted


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("medqa:0", "has no item"),
        ("medqua", "Did you mean 'medqa'"),
        ("medqa[:200]", r"Write medqa:200"),
        ("builtin:clinc", "Did you mean 'builtin:clinic'"),
        ("bioasq-yesno", "MIRAGE"),
    ],
)
def test_wrong_names_are_refused(text: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_task(text)


def test_suites_name_tasks() -> None:
    assert parse_suite("builtin, medqa:9") == [*map(parse_task, SUITES["builtin"]), Wanted("medqa", None, 9)]
    for name in SUITES:
        assert len(parse_suite(name)) == len(SUITES[name])
    with pytest.raises(DataError, match="builtin:clinic more than once"):
        parse_suite("builtin,builtin:clinic:5")
    with pytest.raises(DataError, match="no task"):
        parse_suite(" , ")


def test_every_benchmark_is_a_task() -> None:
    assert {entry.benchmark for entry in TASKS.values()} - {None} == set(BENCHMARKS)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "num_items", "num_options", "kind", "asks"),
    [
        ("medqa", "MedQA-USMLE-4-options/test.jsonl", 1273, 4, AnswerKind.LETTER, "(A, B, C or D)"),
        ("pubmedqa", "PubMedQA/pqa_labeled.jsonl", 500, 3, AnswerKind.YESNO, "yes, no or maybe"),
        ("pubmedqa-no-abstract", "PubMedQA/pqa_labeled.jsonl", 500, 3, AnswerKind.YESNO, "yes, no or maybe"),
        ("medmcqa", "medmcqa/validation_head.jsonl", 100, 4, AnswerKind.LETTER, "the letter"),
        ("mmlu-medical", "mmlu-medical/test_head.jsonl", 100, 4, AnswerKind.LETTER, "the letter"),
        ("medxpertqa", "MedXpertQA/text_head.jsonl", 30, 10, AnswerKind.LETTER, "I or J"),
        (
            "medical-o1-verifiable-problem", "medical-o1-verifiable-problem/train.jsonl", 198, None, AnswerKind.TEXT,
            "a short phrase",
        ),
    ],
)  # fmt: skip
def test_real_sets(name: str, path: str, num_items: int, num_options: int | None, kind: AnswerKind, asks: str) -> None:
    task = load_task(f"{name}={real(path)}")
    assert (len(task.items), task.num_available, task.num_options) == (num_items, num_items, num_options)
    assert task.facts["num_items"] == num_items and len(task.sha256) == 64
    assert len({item.example.id for item in task.items}) == num_items
    for item in task.items:
        assert item.example.answer_kind is kind
        check_gradable(item.example)
        assert item.prompt.startswith(item.example.question.strip()) and asks in item.prompt.splitlines()[-1]
        gold = f"Final answer: {item.example.gold}"
        assert grade(item.example, completion(gold)).outcome is Outcome.CORRECT


def test_the_abstract_is_shown_or_not() -> None:
    path = real("PubMedQA/pqa_labeled.jsonl")
    shown, hidden = load_task(f"pubmedqa={path}"), load_task(f"pubmedqa-no-abstract={path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [item.example.question for item in hidden.items] == [row["question"].strip() for row in rows]
    assert [item.example.gold for item in hidden.items] == [row["final_decision"] for row in rows]
    for item, row in zip(shown.items, rows, strict=True):
        assert row["context"]["contexts"][0] in item.prompt and "A. yes" not in item.prompt
    assert hidden.sha256 == shown.sha256 and hidden.items[0].choices == ("yes", "no", "maybe")


def test_a_sample_is_the_same_in_any_order(tmp_path: Path) -> None:
    rows = [exam(number) for number in range(60)]
    first = load_task(f"medqa={write(tmp_path / 'a.jsonl', *rows)}:20")
    random.Random(3).shuffle(rows)
    second = load_task(f"medqa={write(tmp_path / 'b.jsonl', *rows)}:20")
    questions = [item.example.question for item in first.items]
    assert questions == [item.example.question for item in second.items] and len(questions) == 20
    longer = load_task(f"medqa={tmp_path / 'a.jsonl'}:35")
    assert [item.example.question for item in longer.items[:20]] == questions
    assert (longer.name, longer.num_available, longer.sha256) == ("medqa:35", 60, first.sha256)
    assert questions != [f"Which is {number}?" for number in range(20)]
    over = load_task(f"medqa={tmp_path / 'a.jsonl'}:99")
    assert len(over.items) == 60 and "99 items were asked for, and there are 60." in over.sentences


def test_options_as_promised_and_answers_that_are_known(tmp_path: Path) -> None:
    five = {"A": "a", "B": "b", "C": "c", "D": "d", "E": "e"}
    path = write(tmp_path / "x.jsonl", exam(1, **five), {**exam(2, **five), "answer_idx": None, "answer": None})
    with pytest.raises(DataError, match="medqa has 4"):
        load_task(f"medqa={path}")
    task = load_task(f"medqa-5={path}")
    assert (len(task.items), task.num_options) == (1, 5)
    assert "1 items without a known answer left out." in task.sentences


def test_yes_and_no_from_a_file(tmp_path: Path) -> None:
    row = {"question": "Is it so?", "options": {"A": "yes", "B": "no"}, "answer": "B"}
    (item,) = load_task(f"bioasq-yesno={write(tmp_path / 'b.jsonl', row)}").items
    assert (item.example.gold, item.choices, item.example.question) == ("no", ("yes", "no"), "Is it so?")
    assert item.prompt.endswith("where X is yes or no.")
    with pytest.raises(DataError, match="They are yes, no in this set"):
        load_task(f"bioasq-yesno={write(tmp_path / 'c.jsonl', {**row, 'options': {'A': 'yes', 'B': 'perhaps'}})}")


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("25.2381", ["25.2381", "24", "26.5 mL/min", "23.98"], ["23.97", "26.51"]),
        ("38.0", ["38", "39.9"], ["40", "36"]),
        ("-4.0", ["-4.1"], ["-4.3", "4.0"]),
        ("4", ["4", "4.0", "4 points"], ["4.1", "5"]),
        ("07/24/2023", ["07/24/2023", "7/24/2023"], ["24/07/2023", "07/25/2023"]),
        ("('14 weeks', '2 days')", ["14 weeks, 2 days", "14 weeks and 2 days"], ["14 weeks", "14 weeks, 3 days"]),
    ],
)
def test_medcalc_allows_what_its_scorer_allows(tmp_path: Path, gold: str, right: list[str], wrong: list[str]) -> None:
    row = {
        "Patient Note": "A man.", "Question": "How much?", "Ground Truth Answer": gold,
        "Ground Truth Explanation": "So.", "Calculator Name": "c",
    }  # fmt: skip
    (item,) = load_task(f"medcalc-bench={write(tmp_path / 'm.jsonl', row)}").items
    for answers, outcome in ((right, Outcome.CORRECT), (wrong, Outcome.WRONG)):
        for answer in answers:
            assert grade(item.example, completion(f"Final answer: {answer}")).outcome is outcome, answer


def test_own_problems_need_no_file() -> None:
    clinic, general = load_task("builtin:clinic"), load_task("builtin:general")
    assert (len(clinic.items), len(general.items)) == (200, 200)
    short = load_task("builtin:clinic:40")
    assert short.items == clinic.items[:40] and short.sha256 == clinic.sha256
    assert len(Counter(item.example.topic for item in short.items)) == 20
    for item in (*clinic.items, *general.items):
        check_gradable(item.example)
        assert "Final answer: X" in item.prompt


def test_requests_of_several_seeds() -> None:
    task, sampling, limits = load_task("builtin:general:4"), Sampling(0.6, 0.95), Limits(64, 16, Ending.FORCED)
    requests = build_requests(task, sampling, [1, 2], limits)
    assert [(r.item_id, r.seed) for r in requests] == [(i.example.id, seed) for seed in (1, 2) for i in task.items]
    assert requests[1].choices == ("A", "B", "C", "D") and requests[0].choices == ()
    silent = build_requests(without_thinking(task), sampling, [1], limits)
    assert {r.limits for r in silent} == {Limits(0, 16, Ending.FORCED)}


# --- the guard outside medicine ---------------------------------------------------------------------------------------


def test_general_problems_are_certain_and_balanced() -> None:
    examples = make_general()
    assert [e.id for e in examples] == [e.id for e in make_general(300)[:200]]
    assert len({e.question for e in examples}) == 200 and len({e.id for e in examples}) == 200
    assert Counter(e.topic for e in examples) == dict.fromkeys(FAMILIES, 20)
    letters = Counter(e.gold for e in examples if e.answer_kind is AnswerKind.LETTER)
    assert sum(letters.values()) == 100 and min(letters[letter] for letter in "ABCD") >= 15
    for example in examples:
        if example.options:
            assert len(set(example.options.values())) == 4
    assert [e.id for e in make_general(20, seed=1)] != [e.id for e in examples[:20]]


def test_general_answers_follow_from_the_text() -> None:
    """Two families solved from their wording alone."""
    import re

    for example in make_general(400):
        numbers = [int(n) for n in re.findall(r"\d+", example.question)]
        if example.topic == "journey":
            length, speed, hours = numbers
            assert int(example.gold or "") == length - speed * hours
        if example.topic == "mean":
            assert int(example.gold or "") * 4 == sum(numbers)
        if example.topic == "shop":
            price, other, count, other_count, paid = numbers
            assert int(example.gold or "") == paid - price * count - other * other_count > 0
        if example.topic == "order":
            taller = dict(re.findall(r"(\w+) is taller than (\w+)", example.question))
            (name,) = set(taller) - set(taller.values())
            line = [name]
            while line[-1] in taller:
                line.append(taller[line[-1]])
            place = re.search(r"the (second|third|fourth) tallest", example.question)
            assert place is not None and example.options is not None
            wanted = line[["second", "third", "fourth"].index(place[1]) + 1]
            assert example.options[example.gold or ""] == wanted
        if example.topic == "handed_on":
            thing = re.search(r"has (the \w+ \w+) in the end", example.question)
            assert thing is not None and example.options is not None
            assert (
                example.options[example.gold or ""] == re.findall(rf"gives {thing[1]} to (\w+)", example.question)[-1]
            )


# --- controls ---------------------------------------------------------------------------------------------------------


def test_options_turn_round_and_gold_with_them(tmp_path: Path) -> None:
    bound = exam(2, A="x", B="y", C="z", D="All of the above")
    task = load_task(f"medqa={write(tmp_path / 'a.jsonl', exam(1), bound, exam(3, 'D'))}")
    turned = rotate_options(task)
    assert [item.example.id for item in turned.items] == ["medqa:1", "medqa:3"] and turned.control == "rotate-1"
    first, last = (item.example for item in turned.items)
    assert first.options == {"A": "d1", "B": "a1", "C": "b1", "D": "c1"} and (first.gold, last.gold) == ("C", "A")
    assert "A. d1\nB. a1\nC. b1\nD. c1\n\nOn the last line" in turned.items[0].prompt
    assert "1 of 3 items left out: options that speak of others." in turned.sentences
    full = rotate_options(task, 4).items[0]
    assert full.example == task.items[0].example and full.prompt == task.items[0].prompt


def test_rotation_keeps_the_right_text_on_real_items() -> None:
    task = load_task(f"medqa={real('MedQA-USMLE-4-options/test.jsonl')}")
    by_id = {item.example.id: item.example for item in task.items}
    for shift in (1, 2, 3):
        turned = rotate_options(task, shift)
        assert len(turned.items) > 1200
        for item in turned.items:
            before, after = by_id[item.example.id], item.example
            assert before.options and after.options and before.gold and after.gold
            assert before.options[before.gold] == after.options[after.gold] and before.gold != after.gold
            assert find_stem(before) == find_stem(after) and after.question.strip() in item.prompt


def test_the_question_left_out() -> None:
    task = load_task(f"medqa={real('MedQA-USMLE-4-options/test.jsonl')}")
    blank = blank_question(task)
    assert len(blank.items) == 1273 and blank.control == "blank"
    for item, whole in zip(blank.items, task.items, strict=True):
        assert item.prompt.startswith("A. ") and find_stem(whole.example).strip() not in item.prompt
        assert item.example == whole.example and whole.prompt.endswith(item.prompt)


def test_controls_that_need_letters_say_so(tmp_path: Path) -> None:
    row = {"question": "Is it so?", "options": {"A": "yes", "B": "no"}, "answer": "B"}
    task = load_task(f"bioasq-yesno={write(tmp_path / 'b.jsonl', row)}")
    for control in (rotate_options, blank_question):
        with pytest.raises(DataError, match="needs lettered options"):
            control(task)
    with pytest.raises(DataError, match="choices none"):
        answer_always(load_task("builtin:clinic:3"))


def test_the_floor_of_always_a() -> None:
    task = load_task(f"medqa={real('MedQA-USMLE-4-options/test.jsonl')}")
    grades = [grade(i.example, a.completion) for i, a in zip(task.items, answer_always(task), strict=True)]
    assert Counter(g.outcome for g in grades) == {Outcome.CORRECT: 353, Outcome.WRONG: 920}
    pubmed = load_task(f"pubmedqa={real('PubMedQA/pqa_labeled.jsonl')}")
    answers = answer_always(pubmed, "no")
    right = [
        grade(i.example, a.completion).outcome is Outcome.CORRECT for i, a in zip(pubmed.items, answers, strict=True)
    ]
    assert sum(right) == 169
