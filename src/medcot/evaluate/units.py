"""Units of bedside arithmetic: one spelling each, and nothing converted.

A grader that converts units has to know which conversions are medicine (mEq of which ion?) and would pass an answer in
grams where milligrams were asked for, the very mistake that harms patients. So only spellings of the same unit are
made one; mg and g, mEq and mmol, percent and a fraction stay different.
"""

from __future__ import annotations

import re
import unicodedata

UNIT_ALIASES: dict[str, str] = {
    **dict.fromkeys(["mcg", "μg", "ug", "microgram", "micrograms"], "μg"),
    **dict.fromkeys(["mg", "mgs", "milligram", "milligrams"], "mg"),
    **dict.fromkeys(["g", "gm", "gms", "gram", "grams"], "g"),
    **dict.fromkeys(["kg", "kgs", "kilogram", "kilograms"], "kg"),
    **dict.fromkeys(["ml", "mls", "milliliter", "milliliters", "millilitre", "millilitres"], "ml"),
    **dict.fromkeys(["dl", "deciliter", "deciliters", "decilitre", "decilitres"], "dl"),
    **dict.fromkeys(["l", "liter", "liters", "litre", "litres"], "l"),
    **dict.fromkeys(["s", "sec", "secs", "second", "seconds"], "s"),
    **dict.fromkeys(["min", "mins", "minute", "minutes"], "min"),
    **dict.fromkeys(["h", "hr", "hrs", "hour", "hours"], "h"),
    **dict.fromkeys(["d", "day", "days"], "day"),
    **dict.fromkeys(["wk", "wks", "week", "weeks"], "week"),
    **dict.fromkeys(["mo", "month", "months"], "month"),
    **dict.fromkeys(["y", "yr", "yrs", "year", "years"], "year"),
    **dict.fromkeys(["unit", "units"], "unit"),
    **dict.fromkeys(["point", "points"], "point"),
    **dict.fromkeys(["drop", "drops", "gtt", "gtts"], "drop"),
    **dict.fromkeys(["tablet", "tablets"], "tablet"),
    **dict.fromkeys(["breath", "breaths"], "breath"),
    **dict.fromkeys(["beat", "beats"], "beat"),
    **dict.fromkeys(["%", "percent"], "%"),
}


def normalise_unit(unit: str) -> str:
    """Return one spelling of a unit: ``"mL / hr"``, ``"ml/h"`` and ``"mL per hour"`` are all ``"ml/h"``.

    Case and white space are set aside, ``m²`` and ``m^2`` are ``m2``, the micro sign is the Greek letter, "per" is "/",
    and each word goes through ``UNIT_ALIASES``. Case may go because no two units of the table differ by it alone.
    """
    plain = unicodedata.normalize("NFKC", unit).casefold().replace("^", "").replace("×", "x")
    plain = re.sub(r"\bper\b", "/", plain)
    parts = ["".join(UNIT_ALIASES.get(word, word) for word in part.split()) for part in plain.split("/")]
    return "/".join(parts).removesuffix(".")
