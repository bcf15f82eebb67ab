"""What a family of clinical problems is, and how one parameter set of it becomes an example.

A family is one clinical rule (a formula or a score), the finite *space* of integer parameter sets it is asked about,
and a writer that words one of them. Spaces are enumerated rather than sampled: a list can be counted, split and
exhausted, so "at least 500 problems", "train and test share none" and "no problem twice" are facts, not hopes.
Splitting hashes the parameters before anything is worded; the usual way, splitting finished texts, lets the same
problem sit on both sides in two wordings. BLAKE2b, because Python's ``hash`` changes from process to process.

The reasoning a writer gives is canonical: the same steps in the same order whatever the wording, one operation at a
time, written without spaces (``40+20=60``). A small model then has one procedure to learn instead of many styles, and
tokenizers that read digit by digit (SmolLM2) spend no tokens on blanks before numbers. Each step is a copy or a small
judgement: a finding is repeated right before its points, a value right before its threshold, and numbers of two digits
are added or taken away tens first. A model of 135M parameters learns these from some hundred problems, but not the
same rule written as one leap (``E3 V1 M4.``, ``92-59=33``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from medcot.records import AnswerKind, Example

Params = tuple[int, ...]
Split = Literal["train", "test"]

TEST_PERCENT = 18
SOURCE = "builtin:clinic"


class Problem(NamedTuple):
    """One worded problem: ``answer`` is the value with its unit, as it follows ``Final answer:``."""

    question: str
    reasoning: str
    answer: str


@dataclass(frozen=True, slots=True)
class Family:
    """One clinical rule and everything needed to ask about it."""

    name: str  # identifier and topic, e.g. "anion_gap"
    field: str  # of medicine, e.g. "acid-base"
    title: str  # for people
    source: str  # the publication the rule comes from
    space: Callable[[], Iterable[Params]]  # every parameter set once, in a fixed order
    write: Callable[[Params, Random], Problem]  # the generator chooses the wording only, never the numbers
    kind: AnswerKind = AnswerKind.NUMBER


def hash_params(name: str, params: Params) -> str:
    """Return 16 hexadecimal digits that name a parameter set, the same on every Python and machine."""
    text = f"{name}:{','.join(str(value) for value in params)}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def split_of(name: str, params: Params) -> Split:
    """Return the split that a parameter set belongs to; about ``TEST_PERCENT`` in a hundred are test."""
    return "test" if int(hash_params(name, params), 16) % 100 < TEST_PERCENT else "train"


def list_params(family: Family, split: Split) -> list[Params]:
    """Return every parameter set of a family's split, in the order of its space."""
    return [params for params in family.space() if split_of(family.name, params) == split]


def build_example(family: Family, params: Params, rng: Random, *, suffix: str = "") -> Example:
    """Word one parameter set; ``suffix`` tells a second wording of the same problem from the first in its id."""
    problem = family.write(params, rng)
    return Example(
        id=f"{family.name}-{hash_params(family.name, params)}{suffix}",
        question=problem.question,
        source=SOURCE,
        reasoning=problem.reasoning,
        response=f"Final answer: {problem.answer}",
        gold=problem.answer,
        answer_kind=family.kind,
        topic=family.name,
    )


def pick(rng: Random, wordings: Sequence[str], **values: object) -> str:
    """Return one of the wordings with its ``{placeholders}`` filled."""
    return rng.choice(wordings).format(**values)


def write_product(number: int, digit: int) -> str:
    """Write out a product as on paper, tens first.

    37 and 5 give ``37×5: 30×5=150, 7×5=35, 150+35=185.``

    Args:
        number: 1 to 99.
        digit: 1 to 9.
    """
    assert 1 <= number <= 99 and 1 <= digit <= 9, (number, digit)
    tens, ones = number // 10 * 10, number % 10
    if not tens or not ones:
        return f"{number}×{digit}={number * digit}."
    left, right = tens * digit, ones * digit
    return f"{number}×{digit}: {tens}×{digit}={left}, {ones}×{digit}={right}, {left}+{right}={left + right}."


def write_stepwise(number: int, sign: Literal["+", "-"], amount: int) -> str:
    """Write out a sum or a difference tens first, so that each step changes tens or ones only.

    92, "-" and 59 give ``92-50=42, 42-9=33.``; an amount of full tens or of one digit needs one step, and so does
    adding to a number of one digit.

    Args:
        number: 0 or more.
        sign: what to do with the amount.
        amount: 1 or more, and not above ``number`` where it is taken away.
    """
    assert amount >= 1 and (sign == "+" or amount <= number), (number, sign, amount)
    steps = []
    for part in (amount,) if sign == "+" and number < 10 else (amount // 10 * 10, amount % 10):
        if part:
            result = number + part if sign == "+" else number - part
            steps.append(f"{number}{sign}{part}={result}")
            number = result
    return f"{', '.join(steps)}."


def write_tally(items: Sequence[tuple[str, int]]) -> str:
    """Write a score as a running total, one item after the other.

    The first item is stated, each later one is added: ``Fever 1. Nodes +1=2. Age 50: -1=1.``
    """
    total, parts = 0, []
    for position, (name, points) in enumerate(items):
        total += points
        parts.append(f"{name} {points}." if position == 0 else f"{name} {points:+d}={total}.")
    return " ".join(parts)
