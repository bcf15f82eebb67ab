"""Acid-base: the anion gap, and how far a PaCO2 lies from what Winters' formula expects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick, write_stepwise


def compute_anion_gap(sodium: int, chloride: int, bicarbonate: int) -> int:
    """Return sodium less chloride less bicarbonate, all in mmol/L, potassium left out.

    Emmett M, Narins RG. Clinical use of the anion gap. Medicine (Baltimore) 1977;56:38-54.
    """
    return sodium - chloride - bicarbonate


def compute_expected_paco2(bicarbonate: int) -> int:
    """Return the PaCO2 (mmHg) expected in metabolic acidosis: 1.5 × bicarbonate (mmol/L, even here) + 8.

    Albert MS, Dell RB, Winters RW. Quantitative displacement of acid-base equilibrium in metabolic acidosis.
    Ann Intern Med 1967;66:312-322.
    """
    assert bicarbonate % 2 == 0, bicarbonate
    return bicarbonate + bicarbonate // 2 + 8


_GAP_WORDINGS = (
    "Sodium {na}, chloride {cl}, bicarbonate {b} mmol/L. What is the anion gap in mmol/L?",
    "Find the anion gap in mmol/L: sodium {na}, chloride {cl}, bicarbonate {b}.",
    "A drowsy patient has sodium {na}, chloride {cl} and bicarbonate {b} mmol/L. Anion gap in mmol/L?",
    "Blood shows sodium {na}, chloride {cl}, bicarbonate {b} mmol/L. Give the anion gap in mmol/L.",
    "How large is the anion gap, in mmol/L, with sodium {na}, chloride {cl} and bicarbonate {b}?",
)


def _list_gap() -> Iterator[Params]:
    # Chloride from 100 to 109 covers most of the reference range and a mild rise, and takes away a round 100 first.
    values = product(range(130, 151), range(100, 110), range(8, 29))
    return (params for params in values if 4 <= compute_anion_gap(*params) <= 30)


def _write_gap(params: Params, rng: Random) -> Problem:
    sodium, chloride, bicarbonate = params
    gap = compute_anion_gap(sodium, chloride, bicarbonate)
    return Problem(
        pick(rng, _GAP_WORDINGS, na=sodium, cl=chloride, b=bicarbonate),
        f"{write_stepwise(sodium, '-', chloride)} {write_stepwise(sodium - chloride, '-', bicarbonate)}",
        f"{gap} mmol/L",
    )


ANION_GAP = Family(
    name="anion_gap",
    field="acid-base",
    title="Anion gap",
    source="Emmett M, Narins RG. Medicine (Baltimore) 1977;56:38-54",
    space=_list_gap,
    write=_write_gap,
)

_WINTERS_WORDINGS = (
    "Metabolic acidosis: bicarbonate {b} mmol/L, PaCO2 {p} mmHg. How many mmHg is PaCO2 from Winters' value?",
    "By Winters' formula, how far in mmHg is a PaCO2 of {p} from that expected at bicarbonate {b}?",
    "Bicarbonate {b} mmol/L, PaCO2 {p} mmHg. Difference from Winters' expected PaCO2, in mmHg?",
    "A diabetic with acidosis has bicarbonate {b} and PaCO2 {p}. Give the distance from Winters' PaCO2 in mmHg.",
)


def _list_winters() -> Iterator[Params]:
    values = product(range(6, 23, 2), range(10, 76))
    return (params for params in values if compute_expected_paco2(params[0]) != params[1])


def _write_winters(params: Params, rng: Random) -> Problem:
    bicarbonate, measured = params
    half, expected = bicarbonate // 2, compute_expected_paco2(bicarbonate)
    high, low = max(measured, expected), min(measured, expected)
    sum_ = bicarbonate + half
    steps = f"{bicarbonate}/2={half}, {bicarbonate}+{half}={sum_}, {sum_}+8={expected}."
    return Problem(
        pick(rng, _WINTERS_WORDINGS, b=bicarbonate, p=measured),
        f"{steps} {write_stepwise(high, '-', low)}",
        f"{high - low} mmHg",
    )


WINTERS_GAP = Family(
    name="winters_gap",
    field="acid-base",
    title="Measured PaCO2 against Winters' expected PaCO2",
    source="Albert MS, Dell RB, Winters RW. Ann Intern Med 1967;66:312-322",
    space=_list_winters,
    write=_write_winters,
)
