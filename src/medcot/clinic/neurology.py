"""Neurology: the Glasgow Coma Scale, worked out from findings and compared with an earlier score."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick

# Findings in the order of their points, 1 first: the scale's own words, one short phrase each, all of them different.
EYES = ("eyes closed", "eyes open to pain", "eyes open to voice", "eyes open spontaneously")
VERBAL = ("no speech", "sounds only", "words only", "confused speech", "oriented speech")
MOTOR = ("no movement", "extension", "abnormal flexion", "withdrawal", "localises pain", "obeys commands")


def compute_glasgow_fall(earlier: int, eyes: int, verbal: int, motor: int) -> int:
    """Return by how many points the Glasgow Coma Scale (eyes 1-4, verbal 1-5, motor 1-6) is below an earlier total.

    Teasdale G, Jennett B. Assessment of coma and impaired consciousness. Lancet 1974;2:81-84; a fall of 2 or more
    points is commonly taken as deterioration.
    """
    return earlier - (eyes + verbal + motor)


_WORDINGS = (
    "Earlier GCS {g}. Now {e}, {v}, {m}. By how many points has GCS fallen?",
    "GCS was {g}; now {e}, {v}, {m}. How many points lower is it?",
    "A patient with GCS {g} at noon now shows: {e}, {v}, {m}. Fall of GCS in points?",
    "GCS was {g}. On examination: {e}, {v}, {m}. Give the drop in GCS points.",
)


def _list_findings() -> Iterator[Params]:
    # Earlier scores are those of mild and moderate injury, of which there is something to lose.
    values = product(range(9, 16), range(1, 5), range(1, 6), range(1, 7))
    return (params for params in values if compute_glasgow_fall(*params) > 0)


def _write(params: Params, rng: Random) -> Problem:
    earlier, eyes, verbal, motor = params
    both, now = eyes + verbal, eyes + verbal + motor
    fall = compute_glasgow_fall(earlier, eyes, verbal, motor)
    findings = {"e": EYES[eyes - 1], "v": VERBAL[verbal - 1], "m": MOTOR[motor - 1]}
    return Problem(
        pick(rng, _WORDINGS, g=earlier, **findings),
        f"{findings['e'].capitalize()} {eyes}. {findings['v'].capitalize()} {verbal}, {eyes}+{verbal}={both}. "
        f"{findings['m'].capitalize()} {motor}, {both}+{motor}={now}. {earlier}-{now}={fall}.",
        str(fall),
    )


GLASGOW_FALL = Family(
    name="glasgow_fall",
    field="neurology",
    title="Fall of the Glasgow Coma Scale",
    source="Teasdale G, Jennett B. Lancet 1974;2:81-84",
    space=_list_findings,
    write=_write,
)
