"""Cardiology: mean arterial pressure, the CHA2DS2-VASc score and the QT interval corrected after Hodges."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick, write_stepwise, write_tally


def compute_mean_arterial_pressure(systolic: int, diastolic: int) -> int:
    """Return diastolic pressure plus a third of the pulse pressure, in mmHg; the pulse pressure is a multiple of 3.

    Sesso HD et al. Systolic and diastolic blood pressure, pulse pressure, and mean arterial pressure as predictors of
    cardiovascular disease risk in men. Hypertension 2000;36:801-807.
    """
    assert (systolic - diastolic) % 3 == 0, (systolic, diastolic)
    return diastolic + (systolic - diastolic) // 3


def compute_qtc_hodges(qt_ms: int, heart_rate: int) -> int:
    """Return QT + 1.75 × (heart rate - 60) in ms; the heart rate lies a multiple of 4 beats from 60.

    Hodges M, Salerno D, Erlien D. Bazett's QT correction reviewed: evidence that a linear QT correction for heart
    rate is better. J Am Coll Cardiol 1983;1:694.
    """
    assert heart_rate % 4 == 0, heart_rate
    return qt_ms + (heart_rate - 60) // 4 * 7


def list_cha2ds2_vasc(
    age: int, female: int, failure: int, hypertension: int, diabetes: int, stroke: int, vascular: int
) -> list[tuple[str, int]]:
    """Return the items of CHA2DS2-VASc that apply, with their points; age and sex always stand first.

    Lip GYH et al. Refining clinical risk stratification for predicting stroke and thromboembolism in atrial
    fibrillation: the Euro Heart Survey. Chest 2010;137:263-272. Heart failure, hypertension, diabetes, vascular disease
    and female sex 1 point each, stroke 2, age 65-74 1 and 75 or more 2.

    Args:
        age: in years.
        female: 1 or 0, as all that follow.
        failure: heart failure.
        hypertension: treated or not.
        diabetes: of either type.
        stroke: a past stroke, transient ischaemic attack or thromboembolism.
        vascular: past infarction, peripheral artery disease or aortic plaque.
    """
    items = [(f"Age {age}:", 2 if age >= 75 else 1 if age >= 65 else 0), ("Woman", 1) if female else ("Man", 0)]
    rest = (
        ("Failure", failure, 1),
        ("Hypertension", hypertension, 1),
        ("Diabetes", diabetes, 1),
        ("Stroke", stroke, 2),
        ("Vascular", vascular, 1),
    )
    return items + [(name, points) for name, applies, points in rest if applies]


_MAP_WORDINGS = (
    "Blood pressure is {s}/{d} mmHg. What is the mean arterial pressure in mmHg?",
    "Find the mean arterial pressure in mmHg for a blood pressure of {s}/{d}.",
    "Systolic {s}, diastolic {d} mmHg. Give the mean arterial pressure in mmHg.",
    "The monitor of a septic patient shows {s}/{d}. Mean arterial pressure in mmHg?",
    "A nurse measures {s}/{d} mmHg. How many mmHg is the mean arterial pressure?",
)


def _list_map() -> Iterator[Params]:
    values = product(range(85, 181), range(45, 106))
    return ((s, d) for s, d in values if 24 <= s - d <= 90 and (s - d) % 3 == 0)


def _write_map(params: Params, rng: Random) -> Problem:
    systolic, diastolic = params
    pulse, mean = systolic - diastolic, compute_mean_arterial_pressure(systolic, diastolic)
    third = pulse // 3
    return Problem(
        pick(rng, _MAP_WORDINGS, s=systolic, d=diastolic),
        f"{write_stepwise(systolic, '-', diastolic)} {pulse}/3={third}. {write_stepwise(diastolic, '+', third)}",
        f"{mean} mmHg",
    )


MEAN_ARTERIAL_PRESSURE = Family(
    name="mean_arterial_pressure",
    field="cardiology",
    title="Mean arterial pressure",
    source="Sesso HD et al. Hypertension 2000;36:801-807",
    space=_list_map,
    write=_write_map,
)

_QTC_WORDINGS = (
    "QT {q} ms at {h} beats/min. QTc by Hodges in ms?",
    "An ECG shows a QT of {q} ms and a heart rate of {h}. What is the Hodges QTc in ms?",
    "Correct a QT of {q} ms at heart rate {h} with the Hodges formula. Answer in ms.",
    "Heart rate {h}, QT {q} ms. Give QTc after Hodges in ms.",
)


def _list_qtc() -> Iterator[Params]:
    return product(range(300, 461, 5), range(64, 125, 4))


def _write_qtc(params: Params, rng: Random) -> Problem:
    qt, rate = params
    above, quarter = rate - 60, (rate - 60) // 4
    extra, corrected = quarter * 7, compute_qtc_hodges(qt, rate)
    return Problem(
        pick(rng, _QTC_WORDINGS, q=qt, h=rate),
        f"{rate}-60={above}. {above}/4={quarter}, {quarter}×7={extra}. {write_stepwise(qt, '+', extra)}",
        f"{corrected} ms",
    )


QTC_HODGES = Family(
    name="qtc_hodges",
    field="cardiology",
    title="Corrected QT interval after Hodges",
    source="Hodges M, Salerno D, Erlien D. J Am Coll Cardiol 1983;1:694",
    space=_list_qtc,
    write=_write_qtc,
)

_CHADS_WORDINGS = (
    "CHA2DS2-VASc score of a {sex} aged {age} with {has}?",
    "A {sex}, {age}, with atrial fibrillation has {has}. What is the CHA2DS2-VASc score?",
    "Atrial fibrillation in a {sex} of {age} with {has}. Give the CHA2DS2-VASc score.",
    "Find the CHA2DS2-VASc score: {sex} of {age} years, {has}.",
)
_CHADS_HISTORY = ("heart failure", "hypertension", "diabetes", "a past stroke", "vascular disease")


def _list_chads() -> Iterator[Params]:
    return product(range(50, 95), *[range(2)] * 6)


def _write_chads(params: Params, rng: Random) -> Problem:
    age, female, *history = params
    items = list_cha2ds2_vasc(*params)
    has = ", ".join(name for name, applies in zip(_CHADS_HISTORY, history, strict=True) if applies)
    return Problem(
        pick(rng, _CHADS_WORDINGS, age=age, sex="woman" if female else "man", has=has or "no other illness"),
        write_tally(items),
        str(sum(points for _, points in items)),
    )


CHA2DS2_VASC = Family(
    name="cha2ds2_vasc",
    field="cardiology",
    title="CHA2DS2-VASc stroke risk score",
    source="Lip GYH et al. Chest 2010;137:263-272",
    space=_list_chads,
    write=_write_chads,
)
