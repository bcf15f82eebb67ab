"""Grading by the table of nasty answers, and what must hold of any text at all."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_answers import EXPLICIT, NASTY
from nasty_rows import DRUGS, Nasty

from medcot.data.choices import format_question
from medcot.errors import DataError
from medcot.evaluate.answers import WORDS
from medcot.evaluate.grade_file import Thinking, split_output
from medcot.evaluate.grading import grade, instruction, parse_final_answer
from medcot.evaluate.lenient import lenient
from medcot.evaluate.phrases import is_same_phrase
from medcot.evaluate.units import normalise_unit
from medcot.records import Allowance, AnswerKind, Completion, Example, Finish, Outcome

LETTER, YESNO, NUMBER, TEXT = AnswerKind
CORRECT, WRONG, UNPARSED = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSED
# One item a kind, for properties that hold of all of them.
ITEMS = [
    Example("q1", "?", "test", gold="B", answer_kind=LETTER, options=DRUGS),
    Example("q1", "?", "test", gold="yes", answer_kind=YESNO),
    Example("q1", "?", "test", gold="85 mL/h", answer_kind=NUMBER),
    Example("q1", "?", "test", gold="85", answer_kind=NUMBER, allowance=Allowance(("80", "90"), any_unit=True)),
    Example("q1", "?", "test", gold="β-blocker", answer_kind=TEXT, allowance=Allowance(aliases=("propranolol",))),
]
# Texts of pieces that mean something to a grader, which random characters alone would never hit.
PIECES = st.sampled_from(
    [
        *(
            "Final answer: ",
            "final answer:",
            "answer is ",
            "\\boxed{",
            "}",
            "\\text{",
            "**",
            "$",
            "|",
            "'",
            "%",
            "-",
            ".",
            ",",
        ),
        *(
            "B",
            "b.",
            "(C)",
            "A ",
            "E",
            "yes",
            "No",
            "maybe",
            "85",
            "mL/h",
            "1e5",
            "10^3",
            "×",
            "β",
            "metformin",
            "Lisinopril",
        ),
        *(
            "not ",
            "the ",
            "\n",
            "\r\n",
            "\u2028",
            "\u200b",
            "\u202e",
            "：",
            "答案",
            "Ｂ",
            "😀",
            "</think>",
            "<think>",
            " ",
        ),
    ]
)
ANSWERS = ["B", "b.", "E", "B. Metformin", "B. Lisinopril", "yes", "no", "85 mL/h", "84", "β blocker", "x", ""]
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=25).map("".join)


def make_example(kind: AnswerKind | None, gold: str | None) -> Example:
    return Example(id="q1", question="?", source="test", gold=gold, answer_kind=kind)


def complete(output: str, *, cut: bool = False) -> Completion:
    return split_output(output, Thinking.TAGGED, Finish.LENGTH if cut else Finish.EOS)


def name_row(row: Nasty) -> str:
    return f"{row.kind}-{row.output[-40:]!a}"


def test_the_table_is_long_enough_and_has_no_row_twice() -> None:
    seen = {(row.kind, row.gold, row.output, row.cut, str(row.options), str(row.allowance)) for row in NASTY}
    assert len(seen) == len(NASTY) >= 300
    counts = {kind: sum(row.kind is kind for row in NASTY) for kind in AnswerKind}
    assert min(counts.values()) >= 25
    # Both ways to err: what looks right and must not pass, what looks wrong and must not fail.
    assert sum(row.strict is not CORRECT and row.lenient is CORRECT for row in NASTY) >= 50
    assert sum(row.strict is CORRECT for row in NASTY) >= 80


@pytest.mark.parametrize("row", NASTY, ids=name_row)
def test_nasty_answers(row: Nasty) -> None:
    completion = complete(row.output, cut=row.cut)
    strict, guessed = grade(row.example, completion), lenient(row.example, completion)
    assert (strict.outcome, strict.parsed) == (row.strict, row.parsed)
    assert guessed.outcome is row.lenient
    assert (guessed.parsed is None) == (guessed.outcome not in (CORRECT, WRONG))


@pytest.mark.parametrize("row", EXPLICIT, ids=name_row)
def test_no_other_gold_passes_where_the_letter_is_explicit(row: Nasty) -> None:
    passed = [
        letter for letter in DRUGS if grade(replace(row.example, gold=letter), complete(row.output)).outcome is CORRECT
    ]
    assert passed == ([row.parsed] if row.parsed in DRUGS else [])


def test_a_final_answer_inside_the_thinking_does_not_count() -> None:
    completion = Completion("Final answer: B</think>I am not sure.", "", "I am not sure.", True, Finish.EOS, 1, 4, 4)
    assert grade(make_example(LETTER, "B"), completion).outcome is UNPARSED


def test_no_completion_at_all_is_failed() -> None:
    for verdict in (grade, lenient):
        assert verdict(make_example(LETTER, "B"), None).outcome is Outcome.FAILED


@pytest.mark.parametrize(
    ("kind", "gold"),
    [(None, "B"), (LETTER, None), (LETTER, "BC"), (NUMBER, "about 3"), (YESNO, "perhaps"), (TEXT, " . ")],
)
def test_an_example_that_cannot_be_graded_is_an_error(kind: AnswerKind | None, gold: str | None) -> None:
    for verdict in (grade, lenient):
        with pytest.raises(DataError, match="q1"):
            verdict(make_example(kind, gold), complete("Final answer: B"))


def test_gold_must_be_an_option_and_lie_within_its_limits() -> None:
    with pytest.raises(DataError, match="one of A, B, C, D"):
        grade(replace(make_example(LETTER, "E"), options=DRUGS), None)
    for limits in (("4", "5"), ("5", "3"), ("x", "9"), ("1 mL", "9 mL")):
        with pytest.raises(DataError, match="Limits are two numbers with gold between them"):
            grade(replace(make_example(NUMBER, "3"), allowance=Allowance(limits)), None)


def test_parse_returns_the_answer_as_written() -> None:
    assert parse_final_answer("Work.\n**Final answer:** 85.0 ml/hr.") == "85.0 ml/hr."
    assert parse_final_answer("Final answer: 85\nThanks") is None


@pytest.mark.parametrize(
    ("left", "right"), [("mg", "g"), ("mL/h", "mL/min"), ("mEq", "mmol"), ("g/dL", "g/L"), ("", "%")]
)
def test_different_units_stay_different(left: str, right: str) -> None:
    assert normalise_unit(left) != normalise_unit(right)


def test_an_empty_text_is_the_same_as_none() -> None:
    assert not is_same_phrase("", [""]) and not is_same_phrase(".", ["the"]) and is_same_phrase("The.", ["the"])


@pytest.mark.parametrize(
    ("kind", "options", "wanted"),
    [
        (LETTER, DRUGS, "the letter of the right option (A, B, C or D)."),
        (LETTER, None, "the letter of the right option."),
        (YESNO, None, "yes, no or maybe."),
        (YESNO, ("yes", "no"), "yes or no."),
        (NUMBER, None, "a number with its unit, if it has one."),
        (TEXT, None, "a short phrase."),
    ],
)
def test_the_instruction_is_one_sentence(kind: AnswerKind, options: dict[str, str] | None, wanted: str) -> None:
    assert instruction(kind, options) == f"On the last line write Final answer: X, where X is {wanted}"


# What holds of any text -----------------------------------------------------------------------------------------------


@given(TEXTS, st.booleans())
@settings(max_examples=400, deadline=None)
def test_grading_never_raises_and_lenient_is_never_below_strict(text: str, cut: bool) -> None:
    for example in ITEMS:
        strict, guessed = grade(example, complete(text, cut=cut)), lenient(example, complete(text, cut=cut))
        assert (strict.parsed is None) == (strict.outcome not in (CORRECT, WRONG))
        assert strict.outcome is not CORRECT or guessed == strict
        assert guessed.outcome in (CORRECT, WRONG, strict.outcome)


@given(TEXTS, st.sampled_from(ANSWERS))
@settings(max_examples=300, deadline=None)
def test_prose_before_the_last_line_changes_nothing(prose: str, answer: str) -> None:
    prose = re.sub(r"final[ \t]+answer|</?think>", "", prose, flags=re.IGNORECASE)
    plain, line = re.sub(r"\s", " ", prose), f"Final answer: {answer}"
    for example in ITEMS:
        alone = grade(example, complete(line))
        for before in (prose, plain, f"The final answer: A, or {plain}"):
            assert grade(example, complete(f"{before}\n{line}")) == alone


SAYINGS = (
    *("Final answer: {0}", "**Final answer:** ({0}).", "Final answer: {0}. {2}", "Final answer: {0}) {3}"),
    *("Final answer: {0} or {1}", "{1} is wrong.\nFinal answer: {0}", "Final answer: {0}\nFinal answer: {1}", "{0}"),
    *(
        "The answer is {0}.",
        "\\boxed{{{0}}}",
        "Final answer: {2}",
        "{1} is wrong, so it is {0}",
        "The answer is not {0}",
    ),
)


@given(st.permutations("ABCD"), st.permutations("ABCD"), st.sampled_from("ABCD"), st.sampled_from(SAYINGS))
@settings(max_examples=400, deadline=None)
def test_renaming_the_letters_permutes_the_verdict(order: list[str], said: list[str], gold: str, saying: str) -> None:
    rename = dict(zip("ABCD", order, strict=True))
    first, second = said[:2]
    texts = (DRUGS[first], DRUGS[second])
    example = replace(ITEMS[0], gold=gold)
    other = replace(example, gold=rename[gold], options={rename[letter]: text for letter, text in DRUGS.items()})
    for verdict in (grade, lenient):
        before = verdict(example, complete(saying.format(first, second, *texts)))
        after = verdict(other, complete(saying.format(rename[first], rename[second], *texts)))
        assert after.outcome is before.outcome
        assert after.parsed == (before.parsed and rename[before.parsed])


@pytest.mark.parametrize(
    "text",
    [
        *("answer " * 9000, "1" * 60_000, "1," * 30_000, "(" * 60_000, "\\boxed{" * 9000, "A is B " * 9000),
        *(
            "Final answer: 25 " + "a/ " * 20_000 + "!",
            "Final answer: 1" + " " * 60_000 + "x10",
            "Final answer:\n" * 5000,
        ),
        *("Final answer: " + "9" * 60_000 + " mL/h", "   \t" * 20_000 + "x", "Final answer: 1 " + "a^" * 30_000 + "!"),
    ],
    ids=lambda text: text[:24],
)
def test_no_text_makes_grading_slow(text: str) -> None:
    start = time.perf_counter()
    for example in ITEMS:
        grade(example, complete(text))
        lenient(example, complete(text))
    assert time.perf_counter() - start < 5  # quadratic patterns took minutes


def test_the_prompt_and_the_grader_agree() -> None:
    """An answer that does exactly what the instruction says is read, for every kind and number of options."""
    rng = random.Random(5)
    for size in range(2, 11):
        options = {letter: f"drug {letter}" for letter in "ABCDEFGHIJ"[:size]}
        gold = rng.choice(list(options))
        example = Example(
            "q1", format_question("Which?", options), "test", options=options, gold=gold, answer_kind=LETTER
        )
        outcomes = {letter: grade(example, complete(f"Hm.\nFinal answer: {letter}")).outcome for letter in options}
        assert outcomes == {letter: CORRECT if letter == gold else WRONG for letter in options}
    for word in WORDS:
        assert grade(make_example(YESNO, word), complete(f"Final answer: {word}")).outcome is CORRECT
