"""Clinical problems that our own code makes: 20 families in 12 fields of medicine, each with worked reasoning.

They are the default training data because they need no download, no licence and no annotator, their answers are
certain, and there are enough of them to hold some back. Nothing here is advice for a patient: the rules are real, the
patients are not, and doses are exercises in arithmetic.

``FAMILIES`` is the table of contents; one file per field holds formula, parameter space and wording of its families.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import get_args

from medcot.clinic.acid_base import ANION_GAP, WINTERS_GAP
from medcot.clinic.cardiology import CHA2DS2_VASC, MEAN_ARTERIAL_PRESSURE, QTC_HODGES
from medcot.clinic.dosing import INSULIN_BOLUS, WEIGHT_DOSE
from medcot.clinic.family import Family, Params, Problem, Split, build_example, list_params, split_of
from medcot.clinic.fluids import FLUID_BALANCE, MAINTENANCE_FLUIDS
from medcot.clinic.infection import MCISAAC
from medcot.clinic.neurology import GLASGOW_FALL
from medcot.clinic.nutrition import SUPPLEMENT_ENERGY
from medcot.clinic.obstetrics import DUE_DATE, GESTATIONAL_AGE
from medcot.clinic.paediatrics import CORRECTED_AGE, DEHYDRATION_DEFICIT
from medcot.clinic.renal import SERUM_OSMOLALITY
from medcot.clinic.respiratory import CURB65, PACK_YEARS
from medcot.clinic.units import UNIT_THOUSAND
from medcot.errors import DataError, did_you_mean
from medcot.records import Example

__all__ = ["FAMILIES", "Family", "Params", "Problem", "generate", "list_params", "split_of"]

FAMILIES: dict[str, Family] = {
    "maintenance_fluids": MAINTENANCE_FLUIDS,
    "fluid_balance": FLUID_BALANCE,
    "anion_gap": ANION_GAP,
    "winters_gap": WINTERS_GAP,
    "serum_osmolality": SERUM_OSMOLALITY,
    "mean_arterial_pressure": MEAN_ARTERIAL_PRESSURE,
    "cha2ds2_vasc": CHA2DS2_VASC,
    "qtc_hodges": QTC_HODGES,
    "glasgow_fall": GLASGOW_FALL,
    "weight_dose": WEIGHT_DOSE,
    "insulin_bolus": INSULIN_BOLUS,
    "dehydration_deficit": DEHYDRATION_DEFICIT,
    "corrected_age": CORRECTED_AGE,
    "gestational_age": GESTATIONAL_AGE,
    "due_date": DUE_DATE,
    "pack_years": PACK_YEARS,
    "curb65": CURB65,
    "supplement_energy": SUPPLEMENT_ENERGY,
    "mcisaac": MCISAAC,
    "unit_thousand": UNIT_THOUSAND,
}


def generate(count: int, *, split: Split, seed: int, families: Sequence[str] | None = None) -> list[Example]:
    """Return ``count`` problems, one family after the other in turn, so that 100 of 20 families are 5 of each.

    The order within a family is a seeded shuffle of all its parameter sets in the split. None comes twice before all
    have come once; from then on a problem returns in another wording, with ``-2``, ``-3`` … at the end of its id.
    The first n problems of a longer request are the same as those of a request for n.

    Args:
        count: how many problems.
        split: "train" or "test"; the two never share a parameter set.
        seed: decides order and wording, the same in every process.
        families: names from ``FAMILIES``; all of them when absent.

    Raises:
        DataError: an unknown family or split, no family at all, or a negative count.
    """
    chosen = _find_families(families)
    if split not in get_args(Split):
        raise DataError(f"clinic split {split!r}", "There are the splits train and test", "Ask for one of the two")
    if count < 0:
        raise DataError(f"{count} clinical problems", "A count is 0 or more", "Ask for a positive number of problems")
    num_each = -(-count // len(chosen))
    columns = [_generate_family(family, num_each, split, seed) for family in chosen]
    return [columns[i % len(chosen)][i // len(chosen)] for i in range(count)]


def _find_families(names: Sequence[str] | None) -> list[Family]:
    """Look the names up in ``FAMILIES``; all families when there are none to look up."""
    if names is None:
        return list(FAMILIES.values())
    if not names:
        raise DataError(
            "an empty list of clinic families", "At least one is needed", "Name one, or leave it out for all"
        )
    for name in names:
        if name not in FAMILIES:
            raise DataError(f"clinic family {name!r}", "There is none of that name", did_you_mean(name, FAMILIES))
    return [FAMILIES[name] for name in names]


def _generate_family(family: Family, count: int, split: Split, seed: int) -> list[Example]:
    """Return ``count`` examples of one family, going through its parameter sets as often as needed."""
    pool = list_params(family, split)
    examples: list[Example] = []
    for start in range(0, count, len(pool)):
        lap = start // len(pool) + 1
        # A text seed goes through SHA-512, so it does not depend on the process as hash() does.
        rng = Random(f"{seed}:{family.name}:{split}:{lap}")
        order = rng.sample(pool, len(pool))
        suffix = "" if lap == 1 else f"-{lap}"
        examples += [build_example(family, params, rng, suffix=suffix) for params in order[: count - start]]
    return examples
