"""What holds for every family: size, split, reproducibility, wording, and arithmetic that is true step by step."""

from __future__ import annotations

import operator
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from medcot.clinic import FAMILIES, Family, generate, list_params, split_of
from medcot.clinic.family import hash_params, write_product, write_stepwise, write_tally
from medcot.errors import DataError
from medcot.records import AnswerKind, Example

NAMES = sorted(FAMILIES)
_NUMBER = r"\d+(?:\.\d+)?"
_STEP = re.compile(rf"({_NUMBER})([-+×/])({_NUMBER})=({_NUMBER})")
_COMPARISON = re.compile(rf"({_NUMBER})(<=|>=|<|>)({_NUMBER})")
_TALLY = re.compile(r" ([-+]\d)=(-?\d+)\.")


@pytest.fixture(scope="module")
def train() -> list[Example]:
    return generate(3000, split="train", seed=0)


@pytest.fixture(scope="module")
def test() -> list[Example]:
    return generate(1000, split="test", seed=0)


def _of(examples: list[Example], name: str) -> list[Example]:
    return [example for example in examples if example.topic == name]


def test_there_are_twenty_families_in_eight_fields_or_more() -> None:
    assert len(FAMILIES) == 20
    assert len({family.field for family in FAMILIES.values()}) >= 8
    assert all(name == family.name and family.source and family.title for name, family in FAMILIES.items())


@pytest.mark.parametrize("name", NAMES)
def test_space_holds_500_distinct_parameter_sets_and_a_sixth_is_test(name: str) -> None:
    space = list(FAMILIES[name].space())
    assert len(space) == len(set(space)) >= 500
    held_out = sum(split_of(name, params) == "test" for params in space) / len(space)
    assert 0.14 <= held_out <= 0.23


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_parameters_and_make_up_the_space(name: str) -> None:
    family = FAMILIES[name]
    train_set, test_set = set(list_params(family, "train")), set(list_params(family, "test"))
    assert not train_set & test_set
    assert train_set | test_set == set(family.space())


def test_no_question_or_id_of_test_is_in_train(train: list[Example], test: list[Example]) -> None:
    assert not {e.question for e in train} & {e.question for e in test}
    assert not {e.id for e in train} & {e.id for e in test}


def test_hash_is_the_same_on_every_python() -> None:
    assert hash_params("anion_gap", (140, 104, 24)) == "aeabf96c92ff8182"


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_can_be_guessed(name: str) -> None:
    family = FAMILIES[name]
    for split in ("train", "test"):
        answers = Counter(family.write(params, Random(0)).answer for params in list_params(family, split))
        assert answers.most_common(1)[0][1] <= 0.35 * answers.total()


def test_generate_goes_round_the_families(test: list[Example]) -> None:
    first = generate(100, split="test", seed=0)
    assert first == test[:100]
    assert Counter(example.topic for example in first) == dict.fromkeys(FAMILIES, 5)
    assert [example.topic for example in first[:20]] == list(FAMILIES)


def test_generate_is_the_same_in_another_process() -> None:
    code = (
        "from medcot.clinic import generate; import hashlib;"
        "print(hashlib.sha256(repr(generate(200, split='train', seed=7)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True
        ).stdout
        for s in ("1", "2")
    }
    assert len(digests) == 1
    assert generate(200, split="train", seed=7) != generate(200, split="train", seed=8)


def test_no_problem_comes_twice_before_all_have_come_once() -> None:
    pool = list_params(FAMILIES["winters_gap"], "test")
    examples = generate(len(pool) + 5, split="test", seed=3, families=["winters_gap"])
    hashes = [example.id.split("-")[1] for example in examples]
    assert len(set(hashes[: len(pool)])) == len(pool)
    assert all(example.id.endswith("-2") for example in examples[len(pool) :])
    assert len({example.id for example in examples}) == len(examples)


def test_generate_names_what_is_wrong() -> None:
    with pytest.raises(DataError, match="Did you mean 'anion_gap'"):
        generate(1, split="train", seed=0, families=["aniongap"])
    with pytest.raises(DataError, match="train and test"):
        generate(1, split="valid", seed=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="0 or more"):
        generate(-1, split="train", seed=0)
    with pytest.raises(DataError, match="At least one"):
        generate(1, split="train", seed=0, families=[])
    assert generate(0, split="train", seed=0) == []


@pytest.mark.parametrize("name", NAMES)
def test_response_is_the_gold_answer_and_the_reasoning_reaches_it(name: str, train: list[Example]) -> None:
    for example in _of(train, name):
        assert example.response == f"Final answer: {example.gold}"
        assert example.answer_kind is FAMILIES[name].kind
        assert example.source == "builtin:clinic"
        assert example.gold is not None and example.reasoning is not None
        if example.answer_kind is AnswerKind.NUMBER:
            assert re.fullmatch(r"\d+( [A-Za-z/-]+)?", example.gold)
            assert example.reasoning.endswith(f"={example.gold.split()[0]}.") or name in {"mcisaac", "curb65"}


@pytest.mark.parametrize("name", NAMES)
def test_question_states_the_unit_of_the_answer(name: str, train: list[Example]) -> None:
    for example in _of(train, name):
        assert example.gold is not None
        unit = example.gold.partition(" ")[2]
        words = {"gestational_age": "weeks and days", "due_date": "day month year"}.get(name, unit)
        assert words.lower() in example.question.lower()


@pytest.mark.parametrize("name", NAMES)
def test_wording_varies_but_the_way_of_reasoning_does_not(name: str) -> None:
    family = FAMILIES[name]
    params = next(iter(family.space()))
    problems = [family.write(params, Random(seed)) for seed in range(60)]
    assert len({problem.question for problem in problems}) >= 4
    assert len({(problem.reasoning, problem.answer) for problem in problems}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_different_parameters_never_give_the_same_text(name: str) -> None:
    family = FAMILIES[name]
    spoken = Counter(family.write(params, Random(0)).question for params in _some(family, 1500))
    assert spoken.most_common(1)[0][1] == 1


def _some(family: Family, count: int) -> list[tuple[int, ...]]:
    space = list(family.space())
    return space if len(space) <= count else Random(0).sample(space, count)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_short(name: str, train: list[Example]) -> None:
    examples = _of(train, name)
    assert sum(len(e.question.split()) for e in examples) / len(examples) <= 24
    assert sum(len(str(e.reasoning).split()) for e in examples) / len(examples) <= 16
    assert not any(re.search(r"\b[Aa] (8|11\b|18\b)", e.question) for e in examples)  # "a 80 kg adult"
    assert all("\n" not in e.question + str(e.reasoning) + str(e.response) for e in examples)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_the_reasoning_is_true(name: str) -> None:
    family = FAMILIES[name]
    for params in _some(family, 600):
        reasoning = family.write(params, Random(0)).reasoning
        steps = _STEP.findall(reasoning)
        assert steps or _TALLY.search(reasoning) or re.search(r" -?\d\.", reasoning), reasoning
        for left, sign, right, result in steps:
            a, b = Fraction(left), Fraction(right)
            true = {"+": a + b, "-": a - b, "×": a * b, "/": a / b if b else None}[sign]
            assert true == Fraction(result), reasoning
        _check_comparisons(reasoning)
        _check_tally(reasoning)


def _check_comparisons(reasoning: str) -> None:
    """Check every ``4<=7``: the sign between two numbers holds."""
    signs = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
    for left, sign, right in _COMPARISON.findall(reasoning):
        assert signs[sign](Fraction(left), Fraction(right)), reasoning


@pytest.mark.parametrize("text", ["Urea 8<=7: +0=0.", "Rate 30<30: +0=0.", "Age 64>=65: +1=1."])
def test_a_false_comparison_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError):
        _check_comparisons(text)


def test_curb65_points_follow_the_comparison_next_to_them() -> None:
    scoring = {"Urea": (">", "7"), "Rate": (">=", "30"), "Age": (">=", "65")}
    for params in _some(FAMILIES["curb65"], 600):
        reasoning = FAMILIES["curb65"].write(params, Random(0)).reasoning
        items = re.findall(r"(Urea|Rate|Age) \d+(<=|>=|<|>)(\d+): \+([01])=", reasoning)
        assert [name for name, *_ in items] == list(scoring)
        for name, sign, threshold, points in items:
            assert threshold == scoring[name][1]
            assert points == ("1" if sign == scoring[name][0] else "0")
        systolic, diastolic, low, points = re.findall(r"BP (\d+)/(\d+) (low|not low): \+([01])=", reasoning)[0]
        assert (low == "low") == (points == "1") == (int(systolic) < 90 or int(diastolic) <= 60)


@pytest.mark.parametrize("name", ["glasgow_fall", "mcisaac"])
def test_findings_are_repeated_from_the_question_before_their_points(name: str) -> None:
    for params in _some(FAMILIES[name], 300):
        problem = FAMILIES[name].write(params, Random(0))
        findings = re.findall(r"([A-Z][a-z ]+) \+?\d[.,=]", problem.reasoning)
        assert len(findings) == {"glasgow_fall": 3, "mcisaac": 4}[name]
        positions = [problem.question.index(finding.lower()) for finding in findings]
        assert positions == sorted(positions)


def test_pack_years_turn_cigarettes_a_day_the_same_way_always() -> None:
    steps = {"10": "/2", "20": "×1", "40": "×2"}
    for params in _some(FAMILIES["pack_years"], 600):
        reasoning = FAMILIES["pack_years"].write(params, Random(0)).reasoning
        periods = re.findall(r"(\d+) a day: \d+(/2|×1|×2)=", reasoning)
        assert len(periods) == 2 and all(steps[daily] == step for daily, step in periods)


def _check_tally(reasoning: str) -> None:
    """Follow a running total, whose first item is stated and whose later ones are added."""
    additions = _TALLY.findall(reasoning)
    if not additions:
        return
    total = int(re.findall(r" (\d)\.", reasoning)[0])
    for points, result in additions:
        total += int(points)
        assert total == int(result), reasoning


def test_products_sums_and_tallies_are_written_step_by_step() -> None:
    assert write_product(37, 5) == "37×5: 30×5=150, 7×5=35, 150+35=185."
    assert write_product(40, 5) == "40×5=200."
    assert write_product(7, 5) == "7×5=35."
    assert write_stepwise(92, "-", 59) == "92-50=42, 42-9=33."
    assert write_stepwise(137, "-", 109) == "137-100=37, 37-9=28."
    assert write_stepwise(45, "-", 20) == "45-20=25."
    assert write_stepwise(388, "+", 112) == "388+110=498, 498+2=500."
    assert write_stepwise(2, "+", 16) == "2+16=18."
    assert write_tally([("Fever", 1), ("Age 50:", -1)]) == "Fever 1. Age 50: -1=0."
