import pytest

from medcot.errors import DataError
from medcot.evaluate.run import compare, summarise
from medcot.evaluate.stats import wilson
from medcot.records import AnswerKind, Completion, Example, Finish, Grade, Outcome


def make_set():
    outcomes = [Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSED, Outcome.UNFINISHED, Outcome.FAILED, Outcome.CORRECT]
    topics = ["renal", "renal", "acid_base", "acid_base", "renal", None]
    examples = [
        Example(f"q{i}", "?", "test", gold="B", answer_kind=AnswerKind.LETTER, topic=topic)
        for i, topic in enumerate(topics)
    ]
    completions = [
        None if outcome is Outcome.FAILED else Completion("", "", "", True, Finish.EOS, 10, 20 * i, 4)
        for i, outcome in enumerate(outcomes)
    ]
    return examples, completions, [Grade(outcome) for outcome in outcomes]


def test_every_question_stays_in_the_denominator_and_every_outcome_is_counted():
    summary = summarise(*make_set())
    assert summary == {
        "n": 6,
        "correct": 2,
        "accuracy": 2 / 6,
        "ci95": list(wilson(2, 6)),
        "unparsed": 1,
        "unfinished": 1,
        "failed": 1,
        "mean_think_tokens": (0 + 20 + 40 + 60 + 100) / 5,
        "mean_answer_tokens": 4.0,
        "topics": {
            "renal": {"n": 3, "correct": 1},
            "acid_base": {"n": 2, "correct": 0},
            "no topic": {"n": 1, "correct": 1},
        },
    }


def test_topics_are_empty_where_no_example_has_one():
    examples, completions, grades = make_set()
    assert summarise(examples[5:], completions[5:], grades[5:])["topics"] == {}


def test_an_evaluation_that_failed_throughout_has_no_lengths():
    examples, _, _ = make_set()
    summary = summarise(examples, [None] * 6, [Grade(Outcome.FAILED)] * 6)
    assert (summary["accuracy"], summary["failed"], summary["mean_think_tokens"]) == (0.0, 6, None)


def test_lists_of_different_length_are_an_error():
    examples, completions, grades = make_set()
    with pytest.raises(DataError, match="6 examples, 5 completions and 6 grades"):
        summarise(examples, completions[:-1], grades)
    with pytest.raises(DataError):
        summarise([], [], [])


def test_compare_counts_flips_each_way():
    before = [Grade(Outcome.UNFINISHED)] * 9 + [Grade(Outcome.CORRECT)] + [Grade(Outcome.CORRECT)] * 10
    after = [Grade(Outcome.CORRECT)] * 9 + [Grade(Outcome.WRONG)] + [Grade(Outcome.CORRECT)] * 10
    change = compare(before, after)
    assert (change["gained"], change["lost"]) == (9, 1)
    assert change["delta"] == pytest.approx(0.4)
    assert change["p_value"] == pytest.approx(22 / 1024)
    with pytest.raises(DataError):
        compare([], [])
