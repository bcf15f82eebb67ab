"""Paediatrics: the fluid deficit of dehydration, and the corrected age of a preterm infant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick, write_product, write_stepwise


def compute_deficit_ml(weight_kg: int, percent: int) -> int:
    """Return the fluid deficit in mL: weight × percent dehydration × 10, since 1 % of 1 kg is 10 mL of water.

    Steiner MJ, DeWalt DA, Byerley JS. Is this child dehydrated? JAMA 2004;291:2746-2754 (dehydration as a percentage of
    body weight lost).
    """
    return weight_kg * percent * 10


def compute_corrected_age_weeks(birth_week: int, age_weeks: int) -> int:
    """Return the age since the due date, in weeks: chronological age less the weeks born before week 40.

    Engle WA, Committee on Fetus and Newborn. Age terminology during the perinatal period. Pediatrics
    2004;114:1362-1364.
    """
    return age_weeks - (40 - birth_week)


_DEFICIT_WORDINGS = (
    "A child of {w} kg is {p}% dehydrated. Fluid deficit in mL?",
    "Find the fluid deficit in mL: a child of {w} kg, {p}% dehydrated.",
    "Gastroenteritis, {w} kg, {p}% dehydrated. How many mL is the deficit?",
    "What deficit in mL does {p}% dehydration mean at {w} kg?",
    "A boy of {w} kg has lost {p}% of his weight as water. Give the deficit in mL.",
)


def _list_deficit() -> Iterator[Params]:
    return product(range(5, 71), range(2, 10))


def _write_deficit(params: Params, rng: Random) -> Problem:
    weight, percent = params
    deficit = compute_deficit_ml(weight, percent)
    return Problem(
        pick(rng, _DEFICIT_WORDINGS, w=weight, p=percent),
        f"{write_product(weight, percent)} {deficit // 10}×10={deficit}.",
        f"{deficit} mL",
    )


DEHYDRATION_DEFICIT = Family(
    name="dehydration_deficit",
    field="paediatrics",
    title="Fluid deficit of a dehydrated child",
    source="Steiner MJ, DeWalt DA, Byerley JS. JAMA 2004;291:2746-2754",
    space=_list_deficit,
    write=_write_deficit,
)

_CORRECTED_WORDINGS = (
    "Born at {b} weeks, now {a} weeks old. Corrected age in weeks?",
    "A preterm girl of {b} weeks gestation is {a} weeks old. What is her corrected age in weeks?",
    "An infant is {a} weeks old and was born in week {b}. Give the corrected age in weeks.",
    "Age {a} weeks, birth at {b} weeks of pregnancy. How many weeks is the corrected age?",
)


def _list_corrected() -> Iterator[Params]:
    values = product(range(24, 37), range(8, 61))
    return (params for params in values if compute_corrected_age_weeks(*params) >= 2)


def _write_corrected(params: Params, rng: Random) -> Problem:
    birth, age = params
    early, corrected = 40 - birth, compute_corrected_age_weeks(birth, age)
    return Problem(
        pick(rng, _CORRECTED_WORDINGS, b=birth, a=age),
        f"Early by 40-{birth}={early}. {write_stepwise(age, '-', early)}",
        f"{corrected} weeks",
    )


CORRECTED_AGE = Family(
    name="corrected_age",
    field="paediatrics",
    title="Corrected age of a preterm infant",
    source="Engle WA. Pediatrics 2004;114:1362-1364",
    space=_list_corrected,
    write=_write_corrected,
)
