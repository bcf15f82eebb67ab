"""Fluids: the 4-2-1 maintenance rate, and the fluid balance of a day."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick, write_stepwise


def compute_maintenance_ml_h(weight_kg: int) -> int:
    """Return the hourly maintenance fluid: 4 mL/kg for the first 10 kg, 2 for the next 10, 1 for each kg after.

    Holliday MA, Segar WE. The maintenance need for water in parenteral fluid therapy. Pediatrics 1957;19:823-832, in
    its usual hourly form (100/50/20 mL/kg a day, divided by 24 and rounded to 4/2/1).
    """
    return 4 * min(weight_kg, 10) + 2 * min(max(weight_kg - 10, 0), 10) + max(weight_kg - 20, 0)


def compute_fluid_balance_ml(oral: int, intravenous: int, urine: int) -> int:
    """Return what went in minus what came out, in mL, insensible losses left out.

    Shepherd A. Measuring and managing fluid balance. Nursing Times 2011;107(28):12-16.
    """
    return oral + intravenous - urine


_MAINTENANCE_WORDINGS = (
    "A patient of {w} kg gets {d} mL/h with drugs. By the 4-2-1 rule, how many mL/h of fluid remain?",
    "Weight {w} kg, drug infusions {d} mL/h. Rest of the 4-2-1 maintenance fluid in mL/h?",
    "Plan 4-2-1 maintenance fluid for {w} kg, less {d} mL/h from infusions. How many mL/h?",
    "Infusions give {d} mL/h to someone of {w} kg. What 4-2-1 maintenance is left, in mL/h?",
    "Before surgery, {w} kg, drugs in {d} mL/h. Remaining 4-2-1 maintenance in mL/h?",
)


def _list_maintenance() -> Iterator[Params]:
    return product(range(12, 86), range(2, 10))


def _write_maintenance(params: Params, rng: Random) -> Problem:
    weight, drugs = params
    total = compute_maintenance_ml_h(weight)
    if weight <= 20:
        rest = weight - 10
        steps = f"10 kg: 40. {weight}-10={rest}, {rest}×2={2 * rest}, 40+{2 * rest}={total}."
    else:
        rest = weight - 20
        steps = f"20 kg: 60. {weight}-20={rest}, 60+{rest}={total}."
    return Problem(
        pick(rng, _MAINTENANCE_WORDINGS, w=weight, d=drugs),
        f"{steps} {write_stepwise(total, '-', drugs)}",
        f"{total - drugs} mL/h",
    )


MAINTENANCE_FLUIDS = Family(
    name="maintenance_fluids",
    field="fluids",
    title="Maintenance fluid by the 4-2-1 rule, less drug infusions",
    source="Holliday MA, Segar WE. Pediatrics 1957;19:823-832",
    space=_list_maintenance,
    write=_write_maintenance,
)

_BALANCE_WORDINGS = (
    "In 24 h: drank {o} mL, IV {i} mL, urine {u} mL. Fluid balance in mL?",
    "A patient drank {o} mL, got {i} mL IV and passed {u} mL of urine. What is the fluid balance in mL?",
    "Today's chart: oral {o} mL, infusions {i} mL, urine {u} mL. Give the balance in mL.",
    "Oral intake {o} mL, IV intake {i} mL, urine output {u} mL. Net balance in mL?",
    "After surgery: {o} mL oral and {i} mL IV in, {u} mL urine out. By how many mL is the balance positive?",
)


def _list_balance() -> Iterator[Params]:
    amounts = product(range(200, 1000, 100), range(500, 2000, 100), range(400, 1900, 100))
    return (params for params in amounts if compute_fluid_balance_ml(*params) > 0)


def _write_balance(params: Params, rng: Random) -> Problem:
    oral, intravenous, urine = params
    balance = compute_fluid_balance_ml(oral, intravenous, urine)
    drunk, infused, passed = oral // 100, intravenous // 100, urine // 100  # all are full hundreds
    steps = f"Hundreds: {drunk}+{infused}={drunk + infused}. {write_stepwise(drunk + infused, '-', passed)}"
    return Problem(
        pick(rng, _BALANCE_WORDINGS, o=oral, i=intravenous, u=urine),
        f"{steps} {balance // 100}×100={balance}.",
        f"{balance} mL",
    )


FLUID_BALANCE = Family(
    name="fluid_balance",
    field="fluids",
    title="Fluid balance of a day",
    source="Shepherd A. Nursing Times 2011;107(28):12-16",
    space=_list_balance,
    write=_write_balance,
)
