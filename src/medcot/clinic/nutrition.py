"""Nutrition: the energy of a supplement from its protein, carbohydrate and fat."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick


def compute_energy_kcal(protein_g: int, carbohydrate_g: int, fat_g: int) -> int:
    """Return kcal by the general Atwater factors: protein 4, carbohydrate 4 and fat 9 kcal/g.

    FAO. Food energy - methods of analysis and conversion factors. Food and Nutrition Paper 77, Rome 2003, table 3.1.
    """
    return 4 * protein_g + 4 * carbohydrate_g + 9 * fat_g


_WORDINGS = (
    "A supplement holds {p} g protein, {c} g carbohydrate, {f} g fat. Energy in kcal?",
    "How many kcal are in {p} g protein, {c} g carbohydrate and {f} g fat?",
    "Drink: protein {p} g, carbohydrate {c} g, fat {f} g. Give the energy in kcal.",
    "A patient ate {p} g protein, {c} g carbohydrate and {f} g fat. What energy is that, in kcal?",
)


def _list_supplements() -> Iterator[Params]:
    return product(range(10, 41, 10), range(20, 91, 10), range(2, 21))


def _write(params: Params, rng: Random) -> Problem:
    protein, carbs, fat = params
    both, by_fat = protein + carbs, 9 * fat  # protein and carbohydrate share their factor
    return Problem(
        pick(rng, _WORDINGS, p=protein, c=carbs, f=fat),
        f"{protein}+{carbs}={both}, {both}×4={4 * both}. {fat}×9={by_fat}. {4 * both}+{by_fat}={4 * both + by_fat}.",
        f"{compute_energy_kcal(protein, carbs, fat)} kcal",
    )


SUPPLEMENT_ENERGY = Family(
    name="supplement_energy",
    field="nutrition",
    title="Energy of a supplement by Atwater factors",
    source="FAO Food and Nutrition Paper 77, 2003",
    space=_list_supplements,
    write=_write,
)
