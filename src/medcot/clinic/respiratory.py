"""Respiratory medicine: pack-years of smoking and the CURB-65 score of pneumonia."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick, write_stepwise, write_tally


def compute_pack_years(first_daily: int, first_years: int, then_daily: int, then_years: int) -> int:
    """Return pack-years of two periods of smoking: packs of 20 a day × years, added up.

    NCI Dictionary of Cancer Terms, "pack year". The cigarette-years are a multiple of 20 in each period.
    """
    first, then = first_daily * first_years, then_daily * then_years
    assert first % 20 == 0 and then % 20 == 0, (first, then)
    return (first + then) // 20


def list_curb65(
    confusion: int, urea: int, respiratory_rate: int, systolic: int, diastolic: int, age: int
) -> list[tuple[str, int]]:
    """Return the five items of CURB-65, each with the value compared, and their points.

    Lim WS et al. Defining community acquired pneumonia severity on presentation to hospital. Thorax 2003;58:377-382.
    One point each: new confusion, urea above 7 mmol/L, respiratory rate 30 or more, systolic below 90 or diastolic 60
    or less, age 65 or more.

    Args:
        confusion: 1 where present, else 0.
        urea: in mmol/L.
        respiratory_rate: breaths a minute.
        systolic: in mmHg.
        diastolic: in mmHg.
        age: in years.
    """
    low = systolic < 90 or diastolic <= 60
    return [
        ("Confused" if confusion else "Alert", confusion),
        (f"Urea {urea}{'>' if urea > 7 else '<='}7:", int(urea > 7)),
        (f"Rate {respiratory_rate}{'>=' if respiratory_rate >= 30 else '<'}30:", int(respiratory_rate >= 30)),
        (f"BP {systolic}/{diastolic} {'low' if low else 'not low'}:", int(low)),
        (f"Age {age}{'>=' if age >= 65 else '<'}65:", int(age >= 65)),
    ]


_PACK_WORDINGS = (
    "Smoked {a} cigarettes a day for {x} years, then {b} a day for {y} years. Pack-years?",
    "A man smoked {a} a day for {x} years and {b} a day for {y} years. How many pack-years?",
    "Smoking history: {a} cigarettes daily for {x} years, later {b} daily for {y} years. Give the pack-years.",
    "How many pack-years are {a} cigarettes a day over {x} years plus {b} a day over {y} years?",
)
_DAILY = (10, 20, 40)  # half a pack, one pack and two packs


def _list_packs() -> Iterator[Params]:
    values = product(_DAILY, range(2, 21), _DAILY, range(2, 21))
    return ((a, x, b, y) for a, x, b, y in values if a != b and a * x % 20 == 0 and b * y % 20 == 0)


def _write_period(daily: int, years: int) -> str:
    """Turn one period into pack-years: half the years at 10 a day, the years at 20, twice the years at 40."""
    step = f"{years}/2" if daily == 10 else f"{years}×{daily // 20}"
    return f"{daily} a day: {step}={daily * years // 20}."


def _write_packs(params: Params, rng: Random) -> Problem:
    first_daily, first_years, then_daily, then_years = params
    first, then = first_daily * first_years // 20, then_daily * then_years // 20
    total = first + then
    steps = f"{_write_period(first_daily, first_years)} {_write_period(then_daily, then_years)}"
    return Problem(
        pick(rng, _PACK_WORDINGS, a=first_daily, x=first_years, b=then_daily, y=then_years),
        f"{steps} {write_stepwise(first, '+', then)}",
        f"{total} pack-years",
    )


PACK_YEARS = Family(
    name="pack_years",
    field="respiratory",
    title="Pack-years of two periods of smoking",
    source="NCI Dictionary of Cancer Terms: pack year",
    space=_list_packs,
    write=_write_packs,
)

_CURB_WORDINGS = (
    "Pneumonia: {c}, urea {u} mmol/L, breathing {r}/min, BP {s}/{d}, age {a}. CURB-65?",
    "CURB-65 score: {c}, urea {u} mmol/L, rate {r}, BP {s}/{d}, age {a}?",
    "A patient is {c}; urea {u} mmol/L, rate {r}/min, BP {s}/{d}, age {a}. Give CURB-65.",
    "Find CURB-65: {c}, urea {u} mmol/L, {r} breaths/min, BP {s}/{d}, {a} years old.",
)
# A few values on both sides of each threshold, those at the threshold itself among them.
_UREA = (4, 5, 7, 8, 9, 12)
_RATES = (16, 22, 28, 30, 34, 38)
_PRESSURES = ((84, 64), (88, 72), (105, 60), (112, 54), (90, 65), (118, 76), (134, 82), (150, 90))
_AGES = (34, 41, 52, 58, 63, 65, 69, 74, 78, 86)


def _list_curb() -> Iterator[Params]:
    values = product(range(2), _UREA, _RATES, _PRESSURES, _AGES)
    return ((c, u, r, s, d, a) for c, u, r, (s, d), a in values)


def _write_curb(params: Params, rng: Random) -> Problem:
    confusion, urea, rate, systolic, diastolic, age = params
    items = list_curb65(*params)
    words = {"c": "confused" if confusion else "alert", "u": urea, "r": rate, "s": systolic, "d": diastolic, "a": age}
    return Problem(pick(rng, _CURB_WORDINGS, **words), write_tally(items), str(sum(points for _, points in items)))


CURB65 = Family(
    name="curb65",
    field="respiratory",
    title="CURB-65 score of pneumonia",
    source="Lim WS et al. Thorax 2003;58:377-382",
    space=_list_curb,
    write=_write_curb,
)
