"""Obstetrics: gestational age carried forward from a scan, and the due date by Naegele's rule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from medcot.clinic.family import Family, Params, Problem, pick
from medcot.records import AnswerKind

MONTHS: tuple[str, ...] = ("January", "February", "March", "April", "May", "June", "July")
MONTHS += ("August", "September", "October", "November", "December")


def compute_gestational_age(weeks: int, days: int, later_weeks: int, later_days: int) -> tuple[int, int]:
    """Return weeks and days of pregnancy some weeks and days after a dated scan.

    ACOG Committee Opinion 700: Methods for estimating the due date. Obstet Gynecol 2017;129:e150-e154 (age is counted
    in completed weeks and days, on from the dating scan).

    Args:
        weeks: completed weeks at the scan.
        days: at the scan, 0 to 6.
        later_weeks: full weeks since.
        later_days: 0 to 6 more.
    """
    carry, rest = divmod(days + later_days, 7)
    return weeks + later_weeks + carry, rest


def compute_due_date(year: int, month: int, day: int) -> tuple[int, int, int]:
    """Return the due date (year, month, day): 7 days after and 3 months before the last period, in the next year.

    Naegele's rule, as in Baskett TF, Nagele F. Naegele's rule: a reappraisal. BJOG 2000;107:1433-1435. The day is at
    most 21, so that adding 7 never leaves the month.
    """
    assert 1 <= day <= 21, day
    if month <= 3:
        return year, month + 9, day + 7
    return year + 1, month - 3, day + 7


def _write_weeks(weeks: int, days: int) -> str:
    return f"{weeks} weeks {days} day{'' if days == 1 else 's'}"


_AGE_WORDINGS = (
    "A scan gave {g}. {l} later, what is the gestational age in weeks and days?",
    "Pregnant {g} at the last visit, {l} ago. Gestational age now, in weeks and days?",
    "Gestation was {g}; {l} have passed. Give it now in weeks and days.",
    "She was {g} pregnant {l} ago. How many weeks and days is she now?",
)


def _list_age() -> Iterator[Params]:
    return product(range(6, 28), range(7), range(2, 13), range(1, 7))


def _write_age(params: Params, rng: Random) -> Problem:
    weeks, days, later_weeks, later_days = params
    sum_days, sum_weeks = days + later_days, weeks + later_weeks
    steps = f"Days: {days}+{later_days}={sum_days}"
    if sum_days >= 7:
        steps += f", {sum_days}-7={sum_days - 7}"
    steps += f". Weeks: {weeks}+{later_weeks}={sum_weeks}"
    if sum_days >= 7:
        steps += f", {sum_weeks}+1={sum_weeks + 1}"
    return Problem(
        pick(rng, _AGE_WORDINGS, g=_write_weeks(weeks, days), l=_write_weeks(later_weeks, later_days)),
        f"{steps}.",
        _write_weeks(*compute_gestational_age(*params)),
    )


GESTATIONAL_AGE = Family(
    name="gestational_age",
    field="obstetrics",
    title="Gestational age some time after a scan",
    source="ACOG Committee Opinion 700. Obstet Gynecol 2017;129:e150-e154",
    space=_list_age,
    write=_write_age,
    kind=AnswerKind.TEXT,
)

_DUE_WORDINGS = (
    "Last period began {d}. Due date by Naegele's rule, as day month year?",
    "By Naegele's rule, when is the baby due (day month year) if the last period began on {d}?",
    "LMP {d}. Give Naegele's due date as day month year.",
    "A woman's last period started on {d}. What due date (day month year) does Naegele's rule give?",
)


def _list_due() -> Iterator[Params]:
    return product(range(2024, 2029), range(1, 13), range(1, 22))


def _write_due(params: Params, rng: Random) -> Problem:
    year, month, day = params
    due_year, due_month, due_day = compute_due_date(year, month, day)
    name, due_name = MONTHS[month - 1], MONTHS[due_month - 1]
    shift = f"{month}+9={due_month}" if month <= 3 else f"{month}-3={due_month}"
    turn = f"Same year {due_year}." if due_year == year else f"Next year {due_year}."
    return Problem(
        pick(rng, _DUE_WORDINGS, d=f"{day} {name} {year}"),
        f"Day: {day}+7={due_day}. Month: {name} {month}, {shift}, {due_name}. {turn}",
        f"{due_day} {due_name} {due_year}",
    )


DUE_DATE = Family(
    name="due_date",
    field="obstetrics",
    title="Due date by Naegele's rule",
    source="Baskett TF, Nagele F. BJOG 2000;107:1433-1435",
    space=_list_due,
    write=_write_due,
    kind=AnswerKind.TEXT,
)
