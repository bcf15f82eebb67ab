"""A table of nasty answers, each with the only right verdict: false passes and false fails alike."""

import pytest

from medcot.errors import DataError
from medcot.evaluate.grading import grade, parse_final_answer
from medcot.evaluate.units import normalise_unit
from medcot.records import AnswerKind, Completion, Example, Finish, Outcome

LETTER, NUMBER, TEXT = AnswerKind.LETTER, AnswerKind.NUMBER, AnswerKind.TEXT
CORRECT, WRONG, UNPARSED = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSED


def make_example(kind: AnswerKind | None, gold: str | None) -> Example:
    return Example(id="q1", question="?", source="test", gold=gold, answer_kind=kind)


def make_completion(answer: str, *, closed: bool = True, finish: Finish = Finish.EOS) -> Completion:
    text = f"thinking</think>{answer}" if closed else answer
    return Completion(text, "thinking" if closed else answer, answer if closed else "", closed, finish, 10, 5, 5)


NASTY = [
    # --- letters: what is explicit passes
    (LETTER, "B", "Final answer: B", CORRECT),
    (LETTER, "B", "final ANSWER: b", CORRECT),
    (LETTER, "B", "Final answer: B.", CORRECT),
    (LETTER, "B", "Final answer: (B)", CORRECT),
    (LETTER, "B", "Final answer: B)", CORRECT),
    (LETTER, "B", "**Final answer: B**", CORRECT),
    (LETTER, "B", "**Final answer:** B", CORRECT),
    (LETTER, "B", "**Final answer**: **B**", CORRECT),
    (LETTER, "B", "  Final answer:B  \n\n \n", CORRECT),
    (LETTER, "B", "A is wrong because of the murmur. C is a trap.\nFinal answer: B", CORRECT),
    (LETTER, "B", "Final answer: B\nLet me check that again.\nFinal answer: B.", CORRECT),
    (LETTER, "B", "Some say final answer: A.\r\nFinal answer: B\r\n", CORRECT),
    # --- letters: wrong
    (LETTER, "B", "Final answer: A", WRONG),
    (LETTER, "B", "The answer is clearly B.\nFinal answer: C", WRONG),
    # --- letters: not in the documented form
    (LETTER, "B", "", UNPARSED),
    (LETTER, "B", "B", UNPARSED),
    (LETTER, "B", "The answer is B.", UNPARSED),
    (LETTER, "B", "Answer: B", UNPARSED),
    (LETTER, "B", "Final answer B", UNPARSED),
    (LETTER, "B", "Final answer is: B", UNPARSED),
    (LETTER, "B", "The final answer: B", UNPARSED),
    (LETTER, "B", "- Final answer: B", UNPARSED),
    (LETTER, "B", "### Final answer: B", UNPARSED),
    (LETTER, "B", "Final answer:\nB", UNPARSED),
    (LETTER, "B", "Final answer:", UNPARSED),
    (LETTER, "B", "Final answer: B\nI hope this helps!", UNPARSED),
    (LETTER, "B", "Final answer: A\nFinal answer: B", UNPARSED),
    (LETTER, "B", "Final answer: B\nNo, wait.\nFinal answer: A\nFinal answer: B", UNPARSED),
    (LETTER, "B", "Final answer: A Final answer: B", UNPARSED),
    (LETTER, "B", "Final answer: B or C", UNPARSED),
    (LETTER, "A", "Final answer: A patient with pneumonia", UNPARSED),
    (LETTER, "B", "Final answer: not B", UNPARSED),
    (LETTER, "B", "Final answer: B) Appendicitis", UNPARSED),
    (LETTER, "B", "Final answer: BB", UNPARSED),
    (LETTER, "B", r"Final answer: \boxed{B}", UNPARSED),
    (LETTER, "B", r"\boxed{B}", UNPARSED),
    (LETTER, "B", "Final answer: <letter>", UNPARSED),
    (LETTER, "B", "Final answer: В", UNPARSED),  # a Cyrillic Ve
    (LETTER, "B", "最终答案：B", UNPARSED),
    (LETTER, "B", "Final answer：B", UNPARSED),  # a full-width colon
    # --- numbers: the same value and unit, written otherwise
    (NUMBER, "85 mL/h", "Final answer: 85 mL/h", CORRECT),
    (NUMBER, "85 mL/h", "Final answer: 85.0 ml/hr.", CORRECT),
    (NUMBER, "85 mL/h", "Final answer: 85mL / hour", CORRECT),
    (NUMBER, "85 mL/h", "Final answer: 85 mL per hour", CORRECT),
    (NUMBER, "85 mL/h", "**Final answer: 85 mL/h**", CORRECT),
    (NUMBER, "1200 mL", "Final answer: 1,200 mL", CORRECT),
    (NUMBER, "1,200,000 units", "Final answer: 1200000 units", CORRECT),
    (NUMBER, "0.5 mg", "Final answer: .50 mg", CORRECT),
    (NUMBER, "-5 mmol/L", "Final answer: −5 mmol/L", CORRECT),
    (NUMBER, "12", "Final answer: +12", CORRECT),
    (NUMBER, "40 µg", "Final answer: 40 mcg", CORRECT),
    (NUMBER, "40 μg/kg/min", "Final answer: 40 micrograms/kg/minute", CORRECT),
    (NUMBER, "22.5 kg/m2", "Final answer: 22.5 kg/m²", CORRECT),
    (NUMBER, "22.5 kg/m2", "Final answer: 22.50 kg/m^2", CORRECT),
    (NUMBER, "96 mmHg", "Final answer: 96 mm Hg", CORRECT),
    (NUMBER, "2.5 %", "Final answer: 2.5%", CORRECT),
    (NUMBER, "3 points", "Final answer: 3 point", CORRECT),
    (NUMBER, "14 weeks 3 days", "Final answer: 14 weeks 3 days", CORRECT),
    (NUMBER, "0", "Final answer: -0.0", CORRECT),
    # --- numbers: readable, and wrong
    (NUMBER, "85 mL/h", "Final answer: 85", WRONG),
    (NUMBER, "85 mL/h", "Final answer: 85 mL", WRONG),
    (NUMBER, "85 mL/h", "Final answer: 85 mL/min", WRONG),
    (NUMBER, "85 mL/h", "Final answer: 85.1 mL/h", WRONG),
    (NUMBER, "85 mL/h", "Final answer: 850 mL/h", WRONG),
    (NUMBER, "85 mL/h", "Final answer: -85 mL/h", WRONG),
    (NUMBER, "85 mL/h", "Final answer: 85 mL/h or 90 mL/h", WRONG),
    (NUMBER, "85 mL/h", "Final answer: 85 mL/h (rounded)", WRONG),
    (NUMBER, "12", "Final answer: 12 mmol/L", WRONG),
    (NUMBER, "12", "Final answer: 12e3", WRONG),
    (NUMBER, "1 g", "Final answer: 1000 mg", WRONG),
    (NUMBER, "4 mEq/L", "Final answer: 4 mmol/L", WRONG),
    (NUMBER, "14 weeks 3 days", "Final answer: 14 weeks 4 days", WRONG),
    (NUMBER, "0.3", "Final answer: 0.30000000000000001", WRONG),  # equal as floats
    # --- numbers: not readable as one
    (NUMBER, "85 mL/h", "Final answer: about 85 mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: = 85 mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: 80-90 mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: 40 + 45 mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: ~85 mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: $85$ mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: eighty-five mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: mL/h", UNPARSED),
    (NUMBER, "85 mL/h", "Final answer: 85 mL/h\nFinal answer: 85.0 mL/h", UNPARSED),
    (NUMBER, "1.5 mg", "Final answer: 1,5 mg", UNPARSED),
    (NUMBER, "0.5 mg", "Final answer: 0,500 mg", UNPARSED),
    (NUMBER, "1200", "Final answer: 1 200", UNPARSED),
    (NUMBER, "1200", "Final answer: 12,00", UNPARSED),
    (NUMBER, "0.5", "Final answer: 1/2", UNPARSED),
    (NUMBER, "85", "Final answer: ٨٥", UNPARSED),  # Arabic-Indic digits
    (NUMBER, "85", "Final answer: <value unit>", UNPARSED),
    (NUMBER, "85", "Final answer: NaN", UNPARSED),
    # --- text
    (TEXT, "Metabolic acidosis", "Final answer: metabolic  ACIDOSIS.", CORRECT),
    (TEXT, "Metabolic acidosis", "**Final answer:** Metabolic acidosis", CORRECT),
    (TEXT, "2026-11-22", "Final answer: 2026-11-22", CORRECT),
    (TEXT, "yes", "No contraindication.\nFinal answer: Yes", CORRECT),
    (TEXT, "Metabolic acidosis", "Final answer: metabolic alkalosis", WRONG),
    (TEXT, "Metabolic acidosis", "Final answer: not metabolic acidosis", WRONG),
    (TEXT, "Metabolic acidosis", "Final answer: metabolic acidosis with respiratory compensation", WRONG),
    (TEXT, "yes", "Final answer: no", WRONG),
    (TEXT, "yes", "Yes", UNPARSED),
    (TEXT, "yes", "Final answer: .", UNPARSED),
    (TEXT, "yes", "Final answer: yes\nFinal answer: no", UNPARSED),
]


def test_the_table_is_long_enough_and_has_no_line_twice():
    assert len(NASTY) >= 100
    assert len({case[:3] for case in NASTY}) == len(NASTY)


@pytest.mark.parametrize(("kind", "gold", "answer", "outcome"), NASTY)
def test_nasty_answers(kind, gold, answer, outcome):
    verdict = grade(make_example(kind, gold), make_completion(answer))
    assert verdict.outcome is outcome
    assert (verdict.parsed is None) == (outcome is UNPARSED)


def test_thinking_that_never_closes_is_unfinished_whatever_it_says():
    completion = make_completion("Final answer: B", closed=False)
    assert grade(make_example(LETTER, "B"), completion).outcome is Outcome.UNFINISHED


def test_final_answer_inside_the_thinking_does_not_count():
    completion = Completion("Final answer: B</think>I am not sure.", "", "I am not sure.", True, Finish.EOS, 1, 4, 4)
    assert grade(make_example(LETTER, "B"), completion).outcome is UNPARSED


def test_no_completion_at_all_is_failed():
    assert grade(make_example(LETTER, "B"), None).outcome is Outcome.FAILED


@pytest.mark.parametrize(("answer", "outcome"), [("Final answer: 12", UNPARSED), ("Final answer: 12\n", CORRECT)])
def test_an_answer_cut_off_at_the_length_limit_is_not_believed(answer, outcome):
    completion = make_completion(answer, finish=Finish.LENGTH)
    assert grade(make_example(NUMBER, "12"), completion).outcome is outcome


@pytest.mark.parametrize(("kind", "gold"), [(None, "B"), (LETTER, None), (LETTER, "BC"), (NUMBER, "about 3")])
def test_an_example_that_cannot_be_graded_is_an_error(kind, gold):
    with pytest.raises(DataError, match="q1"):
        grade(make_example(kind, gold), make_completion("Final answer: B"))


def test_parse_returns_the_answer_as_written():
    assert parse_final_answer("Work.\n**Final answer:** 85.0 ml/hr.") == "85.0 ml/hr."
    assert parse_final_answer("Final answer: 85\nThanks") is None


@pytest.mark.parametrize(
    ("left", "right"), [("mg", "g"), ("mL/h", "mL/min"), ("mEq", "mmol"), ("g/dL", "g/L"), ("", "%")]
)
def test_different_units_stay_different(left, right):
    assert normalise_unit(left) != normalise_unit(right)
