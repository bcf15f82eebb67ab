"""Duplicates: each degree finds what it promises and no more, whatever the chunks, at a bounded cost."""

import pickle
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot.data import sketches
from medcot.data.duplicates import (
    Degree,
    Duplicates,
    Shared,
    exact_duplicates,
    find_shared,
    number_rows,
)
from medcot.data.findings import Chunk, Finding, Severity
from medcot.data.words import Windows, hash_words
from medcot.records import Example, Quarantined


@dataclass
class Memory:
    """A reader that counts what it is asked for."""

    examples: dict[int, Example]
    asked: list[int] = field(default_factory=list)

    def fetch(self, numbers: Sequence[int]) -> dict[int, Example]:
        self.asked.append(len(numbers))
        return {number: self.examples[number] for number in numbers}


def _row(number: int, question: str, response: str = "Rest.", reasoning: str | None = "Thought.") -> Example:
    return Example(f"x:{number}", question, "x", reasoning, response)


def _chunks(rows: Sequence[Example], size: int) -> Iterable[Chunk]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield Chunk(start + 1, len(part), part)


def _check(rows: Sequence[Example], size: int = 7, check: Duplicates | None = None) -> dict[str, Finding]:
    check = check or Duplicates()
    tallies = (pickle.loads(pickle.dumps(check.map(chunk))) for chunk in _chunks(rows, size))
    findings = check.reduce(tallies, Memory(dict(enumerate(rows, 1))))
    assert len({finding.id for finding in findings}) == len(findings)
    return {finding.id: finding for finding in findings}


def _essay(seed: int, num_words: int = 150) -> list[str]:
    draw = random.Random(seed)
    return [f"{draw.choice('bcdfgklmnprst')}{draw.choice('aeiou')}{draw.randrange(40)}" for _ in range(num_words)]


def _replace_words(words: list[str], num: int, mark: str = "changed") -> list[str]:
    places = np.linspace(8, len(words) - 9, num).astype(int)
    return [f"{mark}{i}" if i in places else word for i, word in enumerate(words)]


def test_three_degrees_each_say_their_own() -> None:
    essay = _essay(0)
    rows = [
        _row(1, "What is the cause of gout?"),
        _row(2, " ".join(essay)),
        _row(3, "What is the cause of gout?"),  # exact, of 1
        _row(4, "What is the CAUSE of gout ?"),  # normalised, of 1
        _row(5, "What is the cause of gout?", reasoning="Another thought."),  # normalised, of 1
        _row(6, " ".join(_replace_words(essay, 2))),  # near, of 2
        _row(7, "What is the cause of gout?", response="Uric acid."),  # another answer
        _row(8, " ".join(_essay(1))),
    ]
    found = _check(rows)
    assert {name: finding.count for name, finding in found.items()} == {
        "duplicates_exact": 1,
        "duplicates_normalised": 2,
        "duplicates_near": 1,
        "duplicates": 4,
    }
    assert found["duplicates_exact"].rows == ("x:3",)
    assert found["duplicates_normalised"].rows == ("x:4", "x:5")
    assert found["duplicates_near"].rows == ("x:6",)
    assert [dict(evidence.parts).keys() for evidence in found["duplicates_normalised"].evidence] == [
        {"x:1", "x:4", "x:5"}
    ]
    assert found["duplicates"].figures["left"] == 4 and found["duplicates"].severity is Severity.INFO
    assert {f.severity for name, f in found.items() if name != "duplicates"} == {Severity.YELLOW}
    assert "1 of 8 rows are byte for byte" in found["duplicates_exact"].says


def test_signs_numbers_and_symbols_make_a_difference() -> None:
    rows = [_row(1, "HBsAg + ?"), _row(2, "HBsAg - ?"), _row(3, "pH 7.2?"), _row(4, "pH 7.4?")]
    rows += [_row(5, "🫀", ""), _row(6, "🫁", ""), _row(7, "", ""), _row(8, "1 < 2"), _row(9, "1 > 2")]
    assert _check(rows).keys() == {"duplicates"}


def test_missing_texts() -> None:
    blank = Example("x:1", "Q one two three", "x", None, None, gold="A")
    assert _check([blank, replace(blank, gold="B")]).keys() == {"duplicates_exact", "duplicates"}  # gold is no text
    assert _check([blank, replace(blank, reasoning="")]).keys() == {"duplicates_normalised", "duplicates"}
    moved = [replace(blank, reasoning="ab", response="c"), replace(blank, reasoning="a", response="bc")]
    assert _check(moved).keys() == {"duplicates"}  # the border between two texts counts
    assert _check([])["duplicates"].count == 0


@pytest.mark.parametrize("script", ["latin", "chinese"])
def test_near_means_a_likeness_of_80_percent(script: str) -> None:
    """One word in 45 replaced is the border; far on either side of it the finding is sure."""
    if script == "chinese":
        draw = random.Random(5)
        words = [chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(225)]
        near, far = words.copy(), words.copy()
        near[50] = near[150] = "龙"
        for place in range(10, 225, 20):
            far[place] = "龙"
        texts = ["".join(part) for part in (words, near, far)]
    else:
        words = _essay(3, 225)
        texts = [" ".join(part) for part in (words, _replace_words(words, 2), _replace_words(words, 12))]
    assert _check([_row(i, text) for i, text in enumerate(texts, 1)])["duplicates_near"].rows == ("x:2",)


def test_candidates_come_as_the_curve_says() -> None:
    """Planted pairs of known likeness: the share found, and that nothing below 0.8 is called near."""
    for num_changed, floor in ((1, 0.99), (3, 0.9)):
        rows = []
        for seed in range(60):
            words = _essay(100 + seed)
            rows += [_row(0, " ".join(words)), _row(0, " ".join(_replace_words(words, num_changed)))]
        likeness = (142 + 5 - 5 * num_changed) / (142 + 5 + 5 * num_changed)
        expected = 1 - (1 - likeness**8) ** 16
        assert expected > floor
        assert _check(rows, 50)["duplicates_near"].count >= 60 * floor - 3
    rows = [_row(0, " ".join(_replace_words(_essay(1), 5, f"v{i}w"))) for i in range(60)]
    assert "duplicates_near" not in _check(rows)  # 0.5 alike, any two


def test_estimates_are_as_good_as_they_say() -> None:
    draw = np.random.default_rng(3)
    errors = []
    for _ in range(200):
        common, own = draw.integers(0, 2**63, 160, np.uint64), draw.integers(0, 2**63, 40, np.uint64)
        left, right = np.append(common, own[:20]), np.append(common, own[20:])
        made = sketches.compute_sketches(np.append(left, right), np.array([0, 180, 360]))
        estimate = sketches.estimate_likeness(made.nibbles[:1], made.nibbles[1:], np.array([0]), np.array([0]))
        errors.append(float(estimate[0]) - sketches.compute_likeness(np.unique(left), np.unique(right)))
    assert abs(np.mean(errors)) < 0.012 and np.std(errors) < 0.05


def test_a_chain_is_one_group_and_keeps_its_first() -> None:
    words = _essay(9)
    chain = [words]
    for step in range(1, 4):
        words = words.copy()
        words[step * 35] = f"step{step}"
        chain.append(words)
    found = _check([_row(i, " ".join(words)) for i, words in enumerate(chain, 1)])["duplicates_near"]
    assert found.count == 3 and found.figures == {"groups": 1, "largest": 4}
    assert len(found.evidence[0].parts) == 3


def test_a_row_repeated_often_is_not_quadratic() -> None:
    text = " ".join(_essay(0))
    rows = [_row(i, text) for i in range(1, 20_001)]
    check = Duplicates()
    tallies = [check.map(chunk) for chunk in _chunks(rows[:100], 100)]
    number = tallies[0].numbers
    many = [replace(tallies[0], numbers=number + 100 * i) for i in range(1_000)]
    reader = Memory(dict.fromkeys(range(1, 100_001), rows[0]))
    started = time.process_time()
    found = check.reduce(many, reader)
    assert time.process_time() - started < 5
    assert found[0].count == 99_999 and sum(reader.asked) < 100


def test_beyond_the_budget_sketches_decide_and_it_is_said() -> None:
    words = _essay(0)
    rows = [_row(i, " ".join(_replace_words(words, 1, f"v{i}w"))) for i in range(40)]
    reader = Memory(dict(enumerate(rows, 1)))
    check = Duplicates(most_read=10)
    found = check.reduce([check.map(chunk) for chunk in _chunks(rows, 9)], reader)[0]
    assert found.id == "duplicates_near" and found.count >= 35
    assert "10 pairs were compared word by word" in found.says and "by their sketches" in found.says
    assert "sketches" not in _check(rows)["duplicates_near"].says


WORD = st.sampled_from(["a", "b", "ab", "fever", "心", "١", "+", "\x00", "\ud800", "\u200d", "🫀", "-5"])
TEXT = st.one_of(st.text(max_size=20), st.lists(WORD, max_size=12).map(" ".join))
ROWS = st.lists(st.builds(Example, st.just("x:1"), TEXT, st.just("x"), TEXT | st.none(), TEXT | st.none()), max_size=12)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(1, 5))
def test_any_text_and_any_chunks_give_the_same(rows: list[Example], size: int) -> None:
    found = _check(rows, size)
    assert found == _check(rows, 100)
    assert found.get("duplicates_exact", Finding("", Severity.INFO, 0, (), "", "")).count == len(exact_duplicates(rows))
    assert len(rows) - found["duplicates"].count == found["duplicates"].figures["left"]


def test_rows_set_aside_keep_their_numbers() -> None:
    rows = [_row(2, "same"), _row(4, "same")]
    chunk = Chunk(11, 4, rows, [Quarantined(11, "broken"), Quarantined(13, "broken")])
    assert number_rows(chunk).tolist() == [12, 14]
    check = Duplicates()
    assert check.reduce([check.map(chunk)], Memory({12: rows[0], 14: rows[1]}))[0].rows == ("x:4",)


def test_a_tally_is_160_bytes_a_row() -> None:
    rows = [_row(i, " ".join(_essay(i))) for i in range(200)]
    tally = Duplicates().map(Chunk(1, 200, rows))
    assert len(pickle.dumps(tally, 5)) < 200 * 161 + 2_000


def test_exact_duplicates_keep_the_first() -> None:
    rows = [_row(1, "a"), _row(2, "b"), _row(3, "a"), _row(4, "A"), _row(5, "a"), _row(6, "a", reasoning=None)]
    assert exact_duplicates(iter(rows)) == {2, 4}


def test_what_validation_shares_with_training() -> None:
    essays = [_essay(i) for i in range(3)]
    train = [_row(i, f"Question {i} of the others?") for i in range(600)]
    train[5] = _row(0, "What is the cause of gout?")
    train[7] = _row(0, "WHAT is the cause of gout?")
    train[550] = _row(0, " ".join(essays[0]))
    validation = [
        _row(0, "What is the cause of gout?"),
        _row(0, "what is THE cause of gout?"),
        _row(0, "What is the cause of gout?", "Uric acid"),
        _row(0, " ".join(_replace_words(essays[0], 2))),
        _row(0, " ".join(essays[1])),
        _row(0, "🫀"),
    ]
    found = find_shared(iter(train), validation)
    assert found[:3] == [
        Shared(5, 0, Degree.EXACT, 1.0),
        Shared(5, 1, Degree.NORMALISED, 1.0),
        Shared(5, 2, Degree.QUESTION, 1.0),
    ]
    near = found[3]
    assert (near.train, near.validation, near.degree) == (550, 3, Degree.NEAR) and 0.8 <= near.likeness < 1
    assert len(found) == 4
    assert find_shared([], validation) == find_shared(train, []) == []


@settings(deadline=None, max_examples=40)
@given(ROWS, ROWS)
def test_sharing_goes_through_with_any_text(train: list[Example], validation: list[Example]) -> None:
    found = {pair.validation: pair for pair in find_shared(train, validation)}
    digests = {(row.question, row.reasoning, row.response) for row in train}
    for place, row in enumerate(validation):
        same = (row.question, row.reasoning, row.response) in digests
        assert same == (place in found and found[place].degree is Degree.EXACT)


def test_pairing_of_equals() -> None:
    values = np.array([3, 1, 3, 2, 1, 3], np.uint32)
    (first, others), (before, same) = sketches.pair_equals(values)
    assert sorted(zip(first.tolist(), others.tolist(), strict=True)) == [(0, 2), (0, 5), (1, 4)]
    assert sorted(zip(before.tolist(), same.tolist(), strict=True)) == [(0, 2), (1, 4), (2, 5)]


def test_settings_name_what_tallies_depend_on() -> None:
    assert Duplicates().settings == Duplicates(most_read=1).settings
    assert sketches.VERSION in Duplicates().settings
    made = sketches.compute_sketches(*Windows(hash_words(["fever and chills for three days"])).hash_shingles(5))
    # As rensa 0.5.0 computes it. Where another release differs, its ALGORITHM_VERSION must too.
    assert made.bands[0, 0] == 4015759579
