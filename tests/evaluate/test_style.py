import pytest

from medcot.evaluate.style import (
    count_foreign,
    has_foreign_run,
    has_list,
    is_one_paragraph,
    measure_style,
    repeated_ngram_share,
)
from medcot.records import Completion, Finish


def make_completion(think, answer, *, closed=True):
    text = f"{think}</think>{answer}" if closed else think
    return Completion(text, think, answer, closed, Finish.EOS, 5, len(think.split()), len(answer.split()))


@pytest.mark.parametrize(
    ("answer", "one"),
    [
        ("One sentence. Another.\nStill the same paragraph.", True),
        ("One paragraph.\n\nFinal answer: 5 mL", True),
        ("One paragraph.\n\n**Final answer:** 5 mL\n", True),
        ("One.\n\nTwo.", False),
        ("One.\n \t\nTwo.\n\nFinal answer: 5", False),
        ("Findings:\n- fever\n- cough", False),
        ("1. First", False),
    ],
)
def test_one_paragraph(answer, one):
    assert is_one_paragraph(answer) is one


@pytest.mark.parametrize("line", ["- a", "* a", "+ a", "• a", "  - a", "1. a", "12) a", "text\n- a", "– a"])
def test_list_lines(line):
    assert has_list(line)


@pytest.mark.parametrize("line", ["a - b", "-5 mmol/L", "**bold** start", "1.5 mL", "2026-11-22", "3 drops", "- "])
def test_lines_that_only_look_like_lists(line):
    assert not has_list(line)


def test_repeated_ngrams():
    assert repeated_ngram_share("a b c") is None
    assert repeated_ngram_share("a b c d e f") == 0.0
    # "a b c d" twice: 5 four-grams, the last repeats the first
    assert repeated_ngram_share("a b c d A, b c. d") == pytest.approx(1 / 5)
    assert repeated_ngram_share("the patient has pain. " * 50) > 0.95
    assert repeated_ngram_share("患者有疼痛") == 0.0  # five words, two four-grams


def test_foreign_letters():
    assert count_foreign("β-blocker 40 µg, Sjögren, x², ﬁbrosis 5") == (0, 8 + 2 + 7 + 1 + 8)
    assert count_foreign("да no") == (2, 4)
    assert count_foreign("123 ...") == (0, 0)
    assert has_foreign_run("the 患者 has")
    assert has_foreign_run("ارتفاع")
    assert not has_foreign_run("a β and a Ж alone, α-β, naïve")


def test_measure_style_over_a_set():
    style = measure_style(
        [
            make_completion("one two three four five", "All well.\n\nFinal answer: B"),
            make_completion("one two three", "- a\n- b"),
            make_completion("患者 患者 患者", "", closed=False),
        ]
    )
    assert (style["completions"], style["answers"]) == (3, 2)
    assert style["think_tokens_median"] == 3
    assert style["think_tokens_mean"] == pytest.approx(11 / 3)
    assert style["answer_tokens_mean"] == pytest.approx((5 + 4) / 2)
    assert style["one_paragraph_share"] == 0.5
    assert style["list_share"] == 0.5
    assert style["foreign_run_share"] == pytest.approx(1 / 3)
    assert 0 < style["foreign_letter_share"] < 1


def test_measures_over_nothing_are_none():
    style = measure_style([])
    assert style.pop("completions") == style.pop("answers") == 0
    assert set(style.values()) == {None}
