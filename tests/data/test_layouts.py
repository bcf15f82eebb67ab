"""Layouts: each is recognised by names and values, says what its columns became, and loses nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot.data.chats import CHAT_COLUMNS
from medcot.data.choices import find_stem, format_question, read_options
from medcot.data.columns import BuiltRows, Plan, Purpose, choose_layout
from medcot.data.layouts import LAYOUTS
from medcot.data.reading import Change, UnusableRow
from medcot.errors import DataError
from medcot.records import AnswerKind, Example

FOUR = {"A": "one", "B": "two", "C": "three", "D": "four"}
ASKED = "Which?\n\nA. one\nB. two\nC. three\nD. four"
OPA = {"question": "Which?", "opa": "one", "opb": "two", "opc": "three", "opd": "four"}
THOUGHT = "<think>\nHm.\n</think>\n\nSo."
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": THOUGHT}]
OLD_CHAT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": THOUGHT}]
REASONED = ("Why?", "Hm.", "So.")
# name → rows, and what the first becomes: question, reasoning, response; or question, gold
CASES: dict[str, tuple[list[dict[str, Any]], tuple[str | None, ...]]] = {
    "medqa": ([{"question": "Which?", "options": FOUR, "answer_idx": "B", "answer": "two"}], (ASKED, "B")),
    "medbullets": ([{"question": "Which?", "options": {**FOUR, "E": None}, "answer_letter": "C"}], (ASKED, "C")),
    "medbullets-raw": ([{**OPA, "ope": "", "answer_idx": "D", "answer": "four"}], (ASKED, "D")),
    "medmcqa": ([{**OPA, "cop": 2}, {**OPA, "cop": 0}, {**OPA, "cop": -1}], (ASKED, "C")),
    "medmcqa-raw": ([{**OPA, "cop": 2}, {**OPA, "cop": 4}], (ASKED, "B")),
    "pubmedqa": (
        [{"question": "Is it?", "context": {"contexts": ["P.", "Q."]}, "final_decision": "maybe"}],
        ("P.\nQ.\n\nIs it?\n\nA. yes\nB. no\nC. maybe", "C"),
    ),
    "mmlu": ([{"question": "Which?", "choices": list(FOUR.values()), "answer": 3}], (ASKED, "D")),
    "options-answer": ([{"question": "Which?", "options": list(FOUR.values()), "answer": "Two."}], (ASKED, "B")),
    "mmlu-pro": (
        [
            {
                "question": "Which?",
                "options": list(FOUR.values()),
                "answer": "B",
                "answer_index": 1,
                "category": "health",
            }
        ],
        (ASKED, "B"),
    ),
    "medxpertqa": (
        [
            {
                "question": "Which?\nAnswer Choices: (A) one (B) two (C) three (D) four",
                "options": [{"letter": key, "content": text} for key, text in FOUR.items()],
                "label": ["A"],
            }
        ],
        (ASKED, "A"),
    ),
    "head-qa": (
        [{"qtext": "Which?", "answers": [{"aid": n + 1, "atext": t} for n, t in enumerate(FOUR.values())], "ra": 4}],
        (ASKED, "D"),
    ),
    "bioasq": ([{"question": "Why?", "text": "<answer> because <context> long"}], ("Why?", "because")),
    "medcalc-bench": (
        [
            {
                "Patient Note": "Sick.",
                "Question": "How much?",
                "Ground Truth Answer": "7.5",
                "Ground Truth Explanation": "3 + 4.5",
            }
        ],
        ("Sick.\n\nHow much?", "3 + 4.5", "7.5"),
    ),
    "verifiable": ([{"Open-ended Verifiable Question": "Why?", "Ground-True Answer": "So"}], ("Why?", "So")),
    "m23k": (
        [{"prompt": "Why?", "reasoning": "Hm.", "distilled_answer_string": "So.", "answer_letter": "A"}],
        REASONED,
    ),
    "medreason": (
        [
            {
                "dataset_name": "medqa",
                "question": "Which?",
                "options": "Answer Choices:\nA. one\nB. two\nC. three\nD. four",
                "reasoning": "Hm.",
                "answer": "Two. Explanation: it is.",
            }
        ],
        (ASKED, "Hm.", "Two. Explanation: it is."),
    ),
    "r1-distill": (
        [{"question": "Why?", "reasoning (reasoning_content)": "Hm.", "response (content)": "So."}],
        REASONED,
    ),
    "alpaca": ([{"instruction": "Why?", "input": "", "output": THOUGHT}], REASONED),
    **{f"sharegpt-{name}": ([{name: OLD_CHAT}], REASONED) for name in CHAT_COLUMNS},
    **{f"openai-{name}": ([{name: CHAT}], REASONED) for name in CHAT_COLUMNS},
    "prompt-completion": ([{"prompt": "Why?", "completion": "Hm.</think>So."}], REASONED),
    "question-answer": ([{"question": "Why?", "answer": "So"}], ("Why?", "So")),
    "question": ([{"question": "Why?"}], ("Why?", None)),
}


def _plan(*rows: dict[str, Any], purpose: Purpose = Purpose.INSPECT, named: dict[str, str] | None = None) -> Plan:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return choose_layout(columns, rows, named, source="x.jsonl", purpose=purpose)


def _build(*rows: dict[str, Any], purpose: Purpose = Purpose.INSPECT) -> BuiltRows:
    return _plan(*rows, purpose=purpose).build(rows)


def _reason(*rows: dict[str, Any], purpose: Purpose = Purpose.INSPECT) -> str:
    """The reason why the last row was set aside."""
    return _build(*rows, purpose=purpose).quarantined[-1].reason


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_recognised_and_read(name: str) -> None:
    if name == "gpqa":
        return  # below: its order of options is of its own
    rows, expected = CASES[name]
    purpose = Purpose.EVALUATE if LAYOUTS[name].grading_only else Purpose.INSPECT
    plan = _plan(*rows, purpose=purpose)
    assert plan.layout == name
    built = plan.build(rows)
    assert len(built.examples) == len(rows)
    first = built.examples[0]
    if LAYOUTS[name].reasons:
        assert (first.question, first.reasoning, first.response) == expected
        assert len(plan_for_training(rows).build(rows).examples) == len(rows)
    else:
        assert (first.question, first.gold, first.reasoning, first.response) == (*expected, None, None)
    if first.options:
        assert first.options == FOUR or list(first.options.values()) == ["yes", "no", "maybe"]
        assert first.answer_kind is AnswerKind.LETTER and find_stem(first) == first.question.partition("\n\nA. ")[0]
    said = "\n".join(plan.sentences)
    assert all(f"Column '{column}' is {fate}" in said for column, fate in LAYOUTS[name].needs.items())


def plan_for_training(rows: list[dict[str, Any]]) -> Plan:
    return _plan(*rows, purpose=Purpose.TRAIN)


def test_gpqa_hides_the_right_option_the_same_way_each_time() -> None:
    rows = [
        {
            "Question": f"Which {number}?",
            "Correct Answer": "right",
            **{f"Incorrect Answer {wrong}": f"wrong {wrong}" for wrong in (1, 2, 3)},
        }
        for number in range(40)
    ]
    examples = _build(*rows).examples
    assert {example.gold for example in examples} == set("ABCD")
    assert all(example.options and example.options[str(example.gold)] == "right" for example in examples)
    assert _build(*rows).examples == examples


def test_medmcqa_that_may_count_from_0_or_from_1_is_a_question() -> None:
    rows = [{**OPA, "cop": 1}, {**OPA, "cop": 3}]
    with pytest.raises(DataError, match="may be MedMCQA and raw MedMCQA"):
        _plan(*rows)
    plan = choose_layout(list(rows[0]), rows, source="x", purpose=Purpose.EVALUATE, layout="medmcqa")
    assert [example.gold for example in plan.build(rows).examples] == ["B", "D"]
    with pytest.raises(DataError, match="rows do not read so"):
        choose_layout([*OPA, "cop"], [{**OPA, "cop": 4}], source="x", layout="medmcqa")


def test_hidden_labels_are_counted_and_wrong_ones_set_aside() -> None:
    built = _build({**OPA, "cop": -1}, {**OPA, "cop": 0}, {**OPA, "cop": 9})
    assert [example.gold for example in built.examples] == [None, "A"]
    assert built.counts.changes[Change.LABEL_HIDDEN] == 1
    assert built.quarantined[0].reason == "the answer ('cop') is no number from 0 to 3"
    row = {"question": "Which?", "options": FOUR, "answer_idx": "B", "answer": "two"}
    assert "is not the answer" in _reason(row, {**row, "answer": "three"})
    assert "names none of the options" in _reason(row, {**row, "answer_idx": "E"})
    assert "without a gap" in _reason(row, {**row, "options": {"A": "x", "C": "y"}})
    assert "fewer than two" in _reason(row, {**row, "options": {"A": "x"}})
    assert "stray <think>" in _reason(row, {**row, "options": {**FOUR, "A": "<think>"}})


@pytest.mark.parametrize(
    "value",
    [
        FOUR,
        list(FOUR.values()),
        [{"key": key, "value": text} for key, text in FOUR.items()],
        json.dumps(FOUR),
        json.dumps(list(FOUR.values())),
        "A. one\nB. two\nC. three\nD. four",
        "(A) one\n(B) two\n(C) three\n(D) four",
        {"D": "four", "a": "one", "B)": "two", "C": "three", "E": " "},
    ],
)
def test_options_in_every_form_are_the_same(value: object) -> None:
    assert read_options(value, "options")[0] == FOUR


@pytest.mark.parametrize(
    "value", [None, 7, [], ["x"], "one, two", '{"A": ', {"A": "x", "B": 2}, [{"q": 1}], ["x"] * 27]
)
def test_what_is_no_options_is_refused(value: object) -> None:
    with pytest.raises(UnusableRow):
        read_options(value, "options")


def test_a_stem_is_found_again() -> None:
    example = Example("x", format_question("Which?\n", FOUR), "x", options=FOUR)
    assert example.question == ASKED and find_stem(example) == "Which?"
    assert find_stem(Example("x", "Why?", "x")) == "Why?"


def test_only_a_tail_that_lists_the_same_options_is_cut() -> None:
    row = CASES["medxpertqa"][0][0]
    bare, other = {**row, "question": "Which?"}, {**row, "question": "Which?\nAnswer Choices: (A) one (B) five"}
    built = _build(row, bare, other)
    assert [example.question for example in built.examples[:2]] == [ASKED, ASKED]
    assert find_stem(built.examples[2]) == other["question"] and built.counts.changes[Change.STEM_CUT] == 1


# Chats ---------------------------------------------------------------------------------------------------------------


def _chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


GOOD = _chat(("user", "Why?"), ("assistant", THOUGHT))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (_chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", THOUGHT)), "a chat of several turns"),
        (_chat(("user", "a")), "the last message in 'messages' is the user's"),
        (_chat(("assistant", "a")), "not one of the user and then one of the assistant"),
        (_chat(("user", "a"), ("user", "b"), ("assistant", "c")), "not one of the user"),
        (_chat(("system", "a")), "nobody but the system speaks"),
        (_chat(("user", "a"), ("assistant", "b"), ("system", "c")), "follows the answer"),
        (_chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "is by 'tool'"),
        (_chat(("user", [{"type": "image"}]), ("assistant", "c")), "a part that is no text"),
        (_chat(("user", " "), ("assistant", THOUGHT)), "the user's message in 'messages' is empty"),
        (_chat(("user", "a <think>"), ("assistant", THOUGHT)), "stray <think>"),
        (_chat(("user", "a"), ("assistant", "x</think>y</think>z")), "stray </think>"),
        (_chat(("user", "a"), ("assistant", "<think>x")), "stray <think>"),
        (_chat(("user", "a"), ("assistant", "<think>x<think>y</think>z")), "stray <think>"),
        (_chat(("user", "a"), ("assistant", "<think>x</think> ")), "is empty behind </think>"),
        ({"messages": "hello"}, "is no list of messages but str"),
        ({"messages": None}, "is no list of messages but NoneType"),
        ({"messages": []}, "empty list"),
        ({"messages": ["a"]}, "is no object but str"),
    ],
)
def test_chats_that_are_no_question_and_answer_say_why(row: dict[str, Any], reason: str) -> None:
    assert reason in _reason(GOOD, row)


def test_reasoning_beside_the_content() -> None:
    row = _chat(("user", [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]))
    row["messages"].append({"role": "assistant", "reasoning_content": "<think>Hm.</think>", "content": "So."})
    example = _build(row).examples[0]
    assert (example.question, example.reasoning, example.response) == REASONED
    row["messages"][-1]["content"] = THOUGHT
    assert "another in its content" in _reason(GOOD, row)
    row["messages"][-1].update(content="So.", thinking="x")
    assert "another in 'thinking'" in _reason(GOOD, row)


def test_trl_message_lists_and_csv_cells() -> None:
    assert _build({"prompt": CHAT[:1], "completion": CHAT[1:]}).examples[0].reasoning == "Hm."
    assert _build({"conversations": json.dumps(OLD_CHAT)}).examples[0].reasoning == "Hm."


def test_a_shared_system_message_is_left_out_and_others_are_kept() -> None:
    rows = [_chat(("system", "Be brief."), ("user", "Why?"), ("assistant", THOUGHT)) for _ in range(3)]
    plan = _plan(*rows)
    late = _chat(("system", "You are in Kenya."), ("user", "Why?"), ("assistant", THOUGHT))
    built = plan.build([*rows, late])
    assert [example.question for example in built.examples] == ["Why?"] * 3 + ["You are in Kenya.\n\nWhy?"]
    said = plan.say(built.counts)
    assert "3 rows had the system message that all rows share; it was left out." in said
    assert "1 row had a system message of their own; it was put before the question." in said
    assert _build(rows[0], late).examples[0].question == "Be brief.\n\nWhy?"
    column = [{"instruction": "Why?", "output": THOUGHT, "system": "Be brief."}] * 2
    assert _build(*column).examples[0].question == "Why?"


def test_rows_without_reasoning_are_examples_but_not_for_training() -> None:
    rows = [{"instruction": "Why?", "input": "Tell.", "output": "So."}, {"instruction": "Why?", "output": THOUGHT}]
    built = _build(*rows)
    assert (built.examples[0].question, built.examples[0].reasoning) == ("Why?\n\nTell.", None)
    assert built.counts.changes == {Change.NO_REASONING: 1, Change.SPLIT: 1}
    trained = _build(*rows, purpose=Purpose.TRAIN)
    assert len(trained.examples) == 1
    assert trained.quarantined[0].reason == "the answer ('output') holds no </think>, so no reasoning"
    assert _reason(*CASES["medqa"][0], purpose=Purpose.TRAIN) == "it has no reasoning"


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"instruction": None, "output": THOUGHT}, "question", "missing"),
        ({"instruction": "Why </think>?", "output": THOUGHT}, "question", "tags"),
        ({"instruction": "Why?", "input": 3, "output": THOUGHT}, "question", "type"),
        ({"instruction": "Why?", "output": "So."}, "reasoning", "missing"),
        ({"instruction": "Why?", "output": "<think> </think>So."}, "reasoning", "empty"),
        ({"instruction": "Why?", "output": "Hm.</think> "}, "response", "empty"),
        ({"instruction": "Why?", "output": " "}, "response", "empty"),
        ({"instruction": "Why?", "output": 5}, "response", "type"),
        ({"messages": CHAT[:-1]}, "response", "missing"),
        ({"messages": [*CHAT, *CHAT]}, "chat", "form"),
        ({"messages": "Why?"}, "chat", "type"),
        ({"messages": []}, "chat", "empty"),
        ({**OPA, "cop": 9}, "gold", "form"),
        ({**OPA, "opb": None, "opc": None, "opd": None, "cop": 0}, "options", "missing"),
        ({**OPA, "cop": 0}, "reasoning", "missing"),
        ([1, 2], None, "type"),
    ],
)
def test_why_a_row_was_set_aside_is_there_for_programs_too(row: Any, field: str | None, problem: str) -> None:
    name = "medmcqa" if "cop" in row else "openai-messages" if "messages" in row else "alpaca"
    good = CASES[name][0]
    plan = choose_layout(list(good[0]), good, source="x", purpose=Purpose.TRAIN, layout=name)
    item = plan.build([row]).quarantined[0]
    assert (item.field, item.problem) == (field, problem)


# Doubt ---------------------------------------------------------------------------------------------------------------


def test_two_layouts_are_a_question() -> None:
    with pytest.raises(DataError, match="may be Alpaca and OpenAI messages"):
        _plan({"messages": CHAT, "instruction": "Why?", "output": "So."})


def test_a_column_that_may_be_the_reasoning_is_a_question_with_the_guess() -> None:
    row = {"instruction": "Why?", "output": "So.", "rationale": "Hm."}
    with pytest.raises(DataError) as caught:
        _plan(row)
    remedy = "data.columns.question=instruction data.columns.reasoning=rationale data.columns.response=output"
    assert "Alpaca" in str(caught.value) and remedy in str(caught.value)
    named = {"question": "instruction", "reasoning": "rationale", "response": "output"}
    assert _plan(row, named=named).build([row]).examples[0].reasoning == "Hm."


def test_names_alone_are_not_enough() -> None:
    with pytest.raises(DataError, match=r"has the columns of MedQA, but .* the first: the options .* no list but int"):
        _plan({"question": "Which?", "options": 4, "answer_idx": "B"})
    with pytest.raises(DataError, match="no column for the reasoning"):
        _plan({"question": "Why?", "answer": "So"})  # too plain to be anything but an evaluation set
    for row in ({"question": "Why?", "answer": "B", "options": [1, 2]}, {"question": "Why?", "answer": 3, "x": ["a"]}):
        with pytest.raises(DataError):
            _plan(row, purpose=Purpose.EVALUATE)


def test_a_plan_builds_chunk_by_chunk_as_at_once() -> None:
    rows = [*CASES["medmcqa"][0] * 3, {**OPA, "cop": "x"}]
    plan = _plan(*rows)
    whole, first, rest = plan.build(rows), plan.build(rows[:4]), plan.build(rows[4:], 5)
    assert whole.examples == first.examples + rest.examples
    assert whole.quarantined == first.quarantined + rest.quarantined and whole.quarantined[0].row_number == 10
    assert whole.counts == first.counts + rest.counts


# Anything ------------------------------------------------------------------------------------------------------------

BITS = st.sampled_from(["<think>", "</think>", "a", " ", "\ud83d", "\0", "[{", "{", "A. x\nB. y", "-1", "尿", "\n"])
TEXT = st.lists(BITS, max_size=5).map("".join) | st.text(max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | TEXT | st.sampled_from("ABCD"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*"ABCD", "role", "content", "from", "value", "key", "aid", "atext"]), inner)
        | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=10,
)
SEEDS = [row for rows, _ in CASES.values() for row in rows]


@st.composite
def any_row(draw: st.DrawFn) -> object:
    """A row of a known layout with something in it replaced, or any JSON value."""
    if draw(st.integers(0, 4)) == 0:
        return draw(VALUE)
    row = dict(draw(st.sampled_from(SEEDS)))
    for column in draw(st.lists(st.sampled_from(list(row)), max_size=2)):
        row[column] = draw(VALUE)
    return row


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(any_row(), max_size=4), name=st.sampled_from(list(CASES)), purpose=st.sampled_from(Purpose))
def test_no_row_is_ever_lost(rows: list[object], name: str, purpose: Purpose) -> None:
    good = CASES[name][0]
    plan = choose_layout(list(good[0]), good, source="x", purpose=purpose, layout=name)
    built = plan.build([*good, *rows])
    assert len(built.examples) + len(built.quarantined) == built.counts.num_rows == len(good) + len(rows)
    assert sum(built.counts.reasons.values()) == len(built.quarantined)
    assert all(item.reason and item.problem for item in built.quarantined)
    for example in built.examples:
        texts = [example.question, example.reasoning, example.response]
        assert not any("<think>" in text or "</think>" in text for text in texts if text)
        assert example.question.strip() and (example.options is None or example.gold in {None, *example.options})
        assert purpose is not Purpose.TRAIN or (example.reasoning and example.response)
        "".join(text for text in texts if text).encode()


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(any_row().filter(lambda row: isinstance(row, dict)), min_size=1, max_size=4))
def test_any_first_rows_make_a_plan_or_one_error(rows: list[dict[str, Any]]) -> None:
    try:
        built = _build(*rows)
    except DataError as error:
        assert error.remedy
    else:
        assert len(built.examples) + len(built.quarantined) == len(rows)
