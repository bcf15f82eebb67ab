"""Infection: the McIsaac (age-modified Centor) score of a sore throat."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick, write_tally


def list_mcisaac(age: int, fever: int, no_cough: int, nodes: int, exudate: int) -> list[tuple[str, int]]:
    """Return the items of the McIsaac score that apply, with their points; age always stands last.

    McIsaac WJ et al. A clinical score to reduce unnecessary antibiotic use in patients with sore throat. CMAJ
    1998;158:75-83. Temperature above 38 °C, no cough, tender anterior neck nodes, tonsillar swelling or exudate 1 point
    each; age 3-14 1, 15-44 0, 45 or more -1.

    Args:
        age: in years, 3 or more.
        fever: 1 or 0, as all that follow.
        no_cough: 1 where there is no cough.
        nodes: tender anterior cervical lymph nodes.
        exudate: on the tonsils, or swollen tonsils.
    """
    items = (("Fever", fever), ("No cough", no_cough), ("Nodes", nodes), ("Exudate", exudate))
    by_age = 1 if age < 15 else 0 if age < 45 else -1
    return [item for item in items if item[1]] + [(f"Age {age}:", by_age)]


_WORDINGS = (
    "Sore throat, age {a}: {has}. McIsaac score?",
    "What is the McIsaac score at age {a} with sore throat, {has}?",
    "A patient of {a} years has a sore throat with {has}. Give the McIsaac score.",
    "Find the McIsaac score: {a} years old, sore throat, {has}.",
)
# What is said when an item applies and when it does not, in the order of the score's items.
_FINDINGS = (
    ("fever", "no fever"),
    ("no cough", "cough"),
    ("tender neck nodes", "normal nodes"),
    ("tonsil exudate", "clear tonsils"),
)


def _list_patients() -> Iterator[Params]:
    values = product(range(3, 71), *[range(2)] * 4)
    return (params for params in values if sum(points for _, points in list_mcisaac(*params)) >= 0)


def _write(params: Params, rng: Random) -> Problem:
    age, *findings = params
    items = list_mcisaac(*params)
    said = [pair[0] if applies else pair[1] for pair, applies in zip(_FINDINGS, findings, strict=True)]
    # Findings without points are repeated too: going down the list is easier to learn than leaving some out.
    told = [(finding.capitalize(), applies) for finding, applies in zip(said, findings, strict=True)]
    return Problem(
        pick(rng, _WORDINGS, a=age, has=", ".join(said)),
        write_tally([*told, items[-1]]),
        str(sum(points for _, points in items)),
    )


MCISAAC = Family(
    name="mcisaac",
    field="infection",
    title="McIsaac score of a sore throat",
    source="McIsaac WJ et al. CMAJ 1998;158:75-83",
    space=_list_patients,
    write=_write,
)
