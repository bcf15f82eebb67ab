"""Dosing: a dose by body weight, and a mealtime insulin bolus."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick, write_product

# mg/kg -> drugs given at that dose, each from its US label.
WEIGHT_DOSES = {
    2: ("sugammadex",),
    3: ("infliximab",),
    4: ("sugammadex", "daptomycin"),
    5: ("infliximab", "gentamicin"),
    6: ("daptomycin",),
    7: ("gentamicin",),
    8: ("tocilizumab",),
}


def compute_weight_dose_mg(mg_per_kg: int, weight_kg: int) -> int:
    """Return the dose in mg, mg/kg × kg.

    Doses per kg are those of the drugs' US labels (DailyMed); gentamicin 7 mg/kg is once-daily dosing after Nicolau DP
    et al. Experience with a once-daily aminoglycoside program administered to 2,184 adult patients. Antimicrob Agents
    Chemother 1995;39:650-655.
    """
    return mg_per_kg * weight_kg


def compute_insulin_bolus(carbs_g: int, glucose: int, target: int, factor: int) -> int:
    """Return the units of rapid insulin for a meal: carbohydrate / 10 + (glucose - target) / factor.

    Davidson PC et al. Analysis of guidelines for basal-bolus insulin dosing: basal insulin, correction factor, and
    carbohydrate-to-insulin ratio. Endocr Pract 2008;14:1095-1101.

    Args:
        carbs_g: a multiple of 10 g; 1 unit covers 10 g.
        glucose: before the meal, in mmol/L, above the target by a multiple of ``factor``.
        target: in mmol/L.
        factor: the fall in mmol/L that 1 unit brings about.
    """
    assert carbs_g % 10 == 0 and (glucose - target) % factor == 0, (carbs_g, glucose, target, factor)
    return carbs_g // 10 + (glucose - target) // factor


_DOSE_WORDINGS = (
    "{drug} {k} mg/kg is ordered for a patient of {w} kg. How many mg?",
    "Order: {drug} {k} mg/kg. Weight {w} kg. Dose in mg?",
    "A patient weighs {w} kg. What is the dose of {drug} at {k} mg/kg, in mg?",
    "How many mg of {drug} does an adult of {w} kg need at {k} mg/kg?",
    "Weight {w} kg, {drug} at {k} mg/kg. Give the dose in mg.",
)


def _list_dose() -> Iterator[Params]:
    return product(WEIGHT_DOSES, range(21, 100))


def _write_dose(params: Params, rng: Random) -> Problem:
    mg_per_kg, weight = params
    drug = rng.choice(WEIGHT_DOSES[mg_per_kg])
    question = pick(rng, _DOSE_WORDINGS, drug=drug, k=mg_per_kg, w=weight)
    return Problem(
        question[0].upper() + question[1:],
        write_product(weight, mg_per_kg),
        f"{compute_weight_dose_mg(mg_per_kg, weight)} mg",
    )


WEIGHT_DOSE = Family(
    name="weight_dose",
    field="dosing",
    title="Dose by body weight",
    source="US labels (DailyMed); Nicolau DP et al. Antimicrob Agents Chemother 1995;39:650-655",
    space=_list_dose,
    write=_write_dose,
)

_BOLUS_WORDINGS = (
    "Meal {c} g, glucose {g}, target {t}. 1 unit per 10 g and per {f} mmol/L. Insulin in units?",
    "Glucose {g} mmol/L, target {t}, meal {c} g. One unit per 10 g and per {f} mmol/L above. How many units?",
    "A diabetic eats {c} g carbs at glucose {g}, target {t}; 1 unit per 10 g and per {f} mmol/L. Give the units.",
    "Insulin units for {c} g (1 per 10 g) and glucose {g}, target {t} (1 per {f} mmol/L)?",
)


def _list_bolus() -> Iterator[Params]:
    values = product(range(20, 121, 10), range(8, 21), (5, 6, 7), (1, 2, 3))
    return ((c, g, t, f) for c, g, t, f in values if (g - t) % f == 0)


def _write_bolus(params: Params, rng: Random) -> Problem:
    carbs, glucose, target, factor = params
    meal, above = carbs // 10, glucose - target
    correction, bolus = above // factor, compute_insulin_bolus(carbs, glucose, target, factor)
    return Problem(
        pick(rng, _BOLUS_WORDINGS, c=carbs, g=glucose, t=target, f=factor),
        f"Meal: {carbs}/10={meal}. Above: {glucose}-{target}={above}, {above}/{factor}={correction}. "
        f"{meal}+{correction}={bolus}.",
        f"{bolus} units",
    )


INSULIN_BOLUS = Family(
    name="insulin_bolus",
    field="dosing",
    title="Mealtime insulin with correction",
    source="Davidson PC et al. Endocr Pract 2008;14:1095-1101",
    space=_list_bolus,
    write=_write_bolus,
)
