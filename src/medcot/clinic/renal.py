"""Renal medicine: calculated serum osmolality in SI units."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick


def compute_osmolality(sodium: int, glucose: int, urea: int) -> int:
    """Return serum osmolality in mOsm/kg, 2 × sodium + glucose + urea, all in mmol/L.

    Smithline N, Gardner KD. Gaps - anionic and osmolal. JAMA 1976;236:1594-1597; there with glucose / 18 and urea
    nitrogen / 2.8, which turn mg/dL into the mmol/L used here.
    """
    return 2 * sodium + glucose + urea


_WORDINGS = (
    "Sodium {na}, glucose {g}, urea {u} mmol/L. Calculated serum osmolality in mOsm/kg?",
    "Find the serum osmolality in mOsm/kg: sodium {na}, glucose {g}, urea {u} mmol/L.",
    "A drowsy patient has sodium {na}, glucose {g} and urea {u} mmol/L. What is the osmolality in mOsm/kg?",
    "Estimate osmolality in mOsm/kg from sodium {na}, glucose {g} and urea {u} mmol/L.",
)


def _list_values() -> Iterator[Params]:
    # Glucose is either near normal or as high as in hyperosmolar states, there in full tens; urea has one digit.
    return product(range(128, 153), (*range(4, 10), 10, 20, 30, 40), range(3, 10))


def _write(params: Params, rng: Random) -> Problem:
    sodium, glucose, urea = params
    double, total = 2 * sodium, compute_osmolality(sodium, glucose, urea)
    return Problem(
        pick(rng, _WORDINGS, na=sodium, g=glucose, u=urea),
        f"2×{sodium}={double}. {double}+{glucose}={double + glucose}, {double + glucose}+{urea}={total}.",
        f"{total} mOsm/kg",
    )


SERUM_OSMOLALITY = Family(
    name="serum_osmolality",
    field="renal",
    title="Calculated serum osmolality",
    source="Smithline N, Gardner KD. JAMA 1976;236:1594-1597",
    space=_list_values,
    write=_write,
)
