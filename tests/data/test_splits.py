"""A question stays on its side, whatever comes with it, before it or after it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcot.data.splits import Side, Split, check_sides, find_place
from medcot.errors import DataError
from medcot.records import Example

SEED = 3407


def make(number: int, question: str | None = None, reasoning: str = "So.") -> Example:
    return Example(f"rows:{number}", question or f"What ails patient {number}?", "rows.jsonl", reasoning, "This.")


def held_out(examples: list[Example], fraction: float, seed: int = SEED) -> set[str]:
    return {e.question for side, e in Split(fraction, seed).assign(examples) if side is Side.VALIDATION}


def test_sides_do_not_depend_on_order_file_or_neighbours():
    rows = [make(number) for number in range(300)]
    wanted = held_out(rows, 0.2)
    assert held_out(rows[::-1], 0.2) == wanted
    assert held_out(rows[:150], 0.2) | held_out(rows[150:], 0.2) == wanted
    more = held_out([*(make(number) for number in range(1000, 1300)), *rows], 0.2)
    assert more & {row.question for row in rows} == wanted


def test_reasoning_answer_and_dress_do_not_count_and_the_words_do():
    split = Split(0.5, SEED)
    for number in range(60):
        question = f"What ails the patient with {number} teeth?"
        variants = [question.upper(), f"  {question}\n", question.replace("?", " ?"), question.replace(" ", "\u00a0")]
        assert {split.side(variant) for variant in variants} == {split.side(question)}
    assert len({split.side(f"A dose of {number} mg?") for number in range(20)}) == 2


def test_sides_are_the_same_in_every_process_and_version():
    """Figures that must never change: rows would change sides between two runs of a user."""
    places = [find_place(question, SEED) for question in ("What is anaemia?", "什么是贫血？", "???")]
    assert [f"{place:016x}" for place in places] == ["1f56dde8b51b8a27", "eb77a6f0dde0056a", "375163b96230913c"]


def test_the_share_is_met_in_expectation():
    rows = [make(number) for number in range(10_000)]
    for fraction in (0.01, 0.05, 0.5):
        deviation = (10_000 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(held_out(rows, fraction)) - 10_000 * fraction) < 4 * deviation


def test_none_at_0_and_all_at_1_exactly():
    rows = [make(number) for number in range(500)]
    assert held_out(rows, 0) == set() and len(held_out(rows, 1)) == 500
    assert Split(1, 0).side("x") is Side.VALIDATION


def test_a_larger_share_holds_out_more_of_the_same_and_a_seed_others():
    rows = [make(number) for number in range(500)]
    assert held_out(rows, 0.1) < held_out(rows, 0.2) < held_out(rows, 0.7)
    assert held_out(rows, 0.2, seed=1) != held_out(rows, 0.2, seed=2)


@given(st.text(), st.integers(), st.floats(0, 1))
def test_any_text_has_a_side(question, seed, fraction):
    assert Split(fraction, seed).side(question) is Split(fraction, seed).side(question)


def test_half_a_character_has_a_side():
    assert Split(0.5, SEED).side("\ud83d") in Side


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_is_one(fraction):
    with pytest.raises(DataError, match="Choose one from 0 to 1"):
        Split(fraction, SEED)


def test_rows_stream():
    endless = (make(number) for number in iter(int, 1))
    side, example = next(Split(0.5, SEED).assign(endless))
    assert side in Side and example.id == "rows:0"


# Empty sides ----------------------------------------------------------------------------------------------------------


def sides(rows: list[Example], split: Split) -> tuple[list[Example], list[Example]]:
    found: dict[Side, list[Example]] = {Side.TRAIN: [], Side.VALIDATION: []}
    for side, example in split.assign(rows):
        found[side].append(example)
    return found[Side.TRAIN], found[Side.VALIDATION]


def test_both_sides_filled_are_no_matter():
    rows = [make(number) for number in range(100)]
    check_sides(Split(0.5, SEED), *sides(rows, Split(0.5, SEED)))


def test_an_empty_validation_names_a_share_that_fills_it():
    rows = [make(number) for number in range(5)]
    split = Split(0.0001, SEED)
    with pytest.raises(DataError, match=r"holds out none.*data\.seed") as caught:
        check_sides(split, *sides(rows, split))
    enough = float(caught.value.remedy.split("=")[1].split()[0])
    assert 0 < len(held_out(rows, enough)) < 5


def test_an_empty_training_side_names_a_share_that_fills_it():
    rows = [make(number) for number in range(5)]
    split = Split(0.9999, SEED)
    with pytest.raises(DataError, match="leaves none to train on") as caught:
        check_sides(split, *sides(rows, split))
    enough = float(caught.value.remedy.split("=")[1].split()[0])
    assert 0 < len(held_out(rows, enough)) < 5


def test_one_question_for_all_rows_cannot_be_split():
    rows = [make(number, "Answer the question.") for number in range(50)]
    with pytest.raises(DataError, match=r"1 different questions.*column of the question"):
        check_sides(Split(0.5, SEED), *sides(rows, Split(0.5, SEED)))
