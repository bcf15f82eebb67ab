"""Units: the step of a thousand between g, mg and mcg, and between L and mL."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick

STEPS = (("g", "mg"), ("mg", "mcg"), ("L", "mL"))


def convert_tenths_to_thousandths(tenths: int) -> int:
    """Return an amount given in tenths of the large unit as a number of the small unit, 1000 to the large one.

    BIPM. The International System of Units (SI), 9th edition, 2019, table 7 (prefixes); written mcg, not µg, after the
    ISMP list of error-prone abbreviations.
    """
    return tenths * 100


_WORDINGS = (
    "Convert {v} {a} to {b}.",
    "How many {b} are {v} {a}?",
    "The chart says {v} {a}. What is that in {b}?",
    "A patient gets {v} {a} a day. Give the amount in {b}.",
    "Write {v} {a} in {b}.",
)


def _list_amounts() -> Iterator[Params]:
    return product(range(len(STEPS)), range(1, 200))


def _write(params: Params, rng: Random) -> Problem:
    step, tenths = params
    large, small = STEPS[step]
    value = f"{tenths / 10:g}"
    amount = convert_tenths_to_thousandths(tenths)
    return Problem(
        pick(rng, _WORDINGS, v=value, a=large, b=small),
        f"1 {large} is 1000 {small}. {value}×1000={amount}.",
        f"{amount} {small}",
    )


UNIT_THOUSAND = Family(
    name="unit_thousand",
    field="units",
    title="Conversion by a factor of 1000",
    source="BIPM, SI brochure, 9th edition 2019",
    space=_list_amounts,
    write=_write,
)
