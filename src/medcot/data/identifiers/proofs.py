"""What a pattern cannot say: check digits, days that exist, and the words around a match that acquit it.

Each function takes a match and says whether it is an identifier. Where it looks at the surroundings, it looks at a few
characters only.

Sources: 49 CFR 565.15 (VIN check digit); ISO 13616 (IBAN); ISO/IEC 7812 (Luhn); GB 11643 (Chinese identity numbers);
IUBMB enzyme nomenclature, whose EC numbers look like IP addresses.
"""

from __future__ import annotations

import ipaddress
import re

# Pages about medicine, not about a person. An address with a query may hold anything, and counts all the same.
_PUBLIC_HOST = re.compile(
    r"(?:^|\.)(?:gov|int|mil|nhs\.uk|gov\.uk|nice\.org\.uk|doi\.org|wikipedia\.org|nejm\.org|thelancet\.com|bmj\.com"
    r"|jamanetwork\.com|nature\.com|science\.org|sciencedirect\.com|springer\.com|wiley\.com|oup\.com|lww\.com|cell\.com"
    r"|plos\.org|biomedcentral\.com|frontiersin\.org|mdpi\.com|cochranelibrary\.com|cochrane\.org|uptodate\.com"
    r"|medscape\.com|mayoclinic\.org|msdmanuals\.com|merckmanuals\.com|heart\.org|cancer\.org|acog\.org|aap\.org"
    r"|idsociety\.org|diabetes\.org|radiopaedia\.org|statpearls\.com|orpha\.net|omim\.org|europepmc\.org|arxiv\.org"
    r"|medrxiv\.org|drugbank\.com|drugs\.com)$",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(?:\be\.?c\.?|section|version|chapter|table|figure|release|\bv|\bver\.?)\W{0,3}\Z")
_LIMIT = re.compile(  # before an age: "over 90 years old" is nobody's
    r"(?:over|above|than|under|below|least|most|until|beyond|to|or|and|[<>≥≤~-])\W{0,2}(?:age\w*\W)?(?:of\W)?\Z", re.I
)
_COUNTED = re.compile(r" (?:patients?|subjects?|cases|of|mg|m?[lL]|percent|people|men|women|days?|weeks?|months?)\b")
_FINDING = re.compile(  # behind a name: it is on a sign, a score or an operation
    r"(?:'s?)? (?:sign|syndrome|disease|test|triad|law|point|phenomenon|score|criteria|man(?:eu|oeu)ver|method|palsy"
    r"|classification|principle|technique|procedure|operation|reflex|position|stain|tetrad|rule|murmur|node)s?\b",
    re.IGNORECASE,
)
_NOBODY = frozenset(  # behind a title: names of things, famous or invented doctors, roles
    re.findall(
        r"\w+",
        """
        Addison Alzheimer Apgar Babinski Barrett Bell Charcot Chvostek Crohn Cushing Down Ebstein Fallot Fanconi Fontan
        Freud Galen Gram Hashimoto Hippocrates Hirschsprung Hodgkin Horner Huntington Kaposi Kawasaki Koch Kocher Lister
        Marfan McBurney Osler Parkinson Pasteur Pepper Phil Raynaud Rinne Romberg Roentgen Salk Semmelweis Sjogren
        Sjögren Tourette Trendelenburg Virchow Weber Wernicke Google House Who Watson Livingstone Strangelove
        Practitioner Practitioners Anesthetist Anesthetists Manager Managers Staff Emeritus Station Specialist We You
        """,
    )
)
STATE_NAMES = (
    "Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|Illinois"
    "|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri"
    "|Montana|Nebraska|Nevada|New (?:Hampshire|Jersey|Mexico|York)|North (?:Carolina|Dakota)|Ohio|Oklahoma|Oregon"
    "|Pennsylvania|Rhode Island|South (?:Carolina|Dakota)|Tennessee|Texas|Utah|Vermont|Virginia|Washington"
    "|West Virginia|Wisconsin|Wyoming"
)
_STATE = re.compile(STATE_NAMES)
_HOME = re.compile(  # before a town
    r"\b(?:lives?|living|lived|resid(?:es?|ed|ing)|resident|born|raised|moved|hometown|grew up|travell?ed|native"
    r"|address)\W{1,2}(?:(?:in|to|from|of|is|near|at)\W){0,2}\Z",
    re.IGNORECASE,
)
_DATED = re.compile(  # before a day and a month
    r"\b(?:admit\w{0,6}|discharg\w{1,3}|dated|seen|born|dob|d\.o\.b\.|date|visit\w{0,3}|died|surgery)"
    r"[ :]{1,2}(?:of \w{5,9} ?: ?)?(?:on )?\Z",
    re.IGNORECASE,
)
_NAMED = re.compile(  # before the colon before a name
    r"(?:\b(?:patient|pt|client|mother|father|spouse|wife|husband|guardian|parent|full|first|last|sur|maiden|family|given"
    r"|insured|subscriber|guarantor|physician|doctor|provider|nurse|surgeon)(?:'s)? ?name|\bnext of kin"
    r"|\bemergency contact|\battending(?: physician)?|\breferring (?:physician|provider)"
    r"|\b(?:dictated|signed|transcribed|seen|reported) by|(?:\A|[\n.;|,]) {0,3}name) {0,2}\Z",
    re.IGNORECASE,
)
_NORTH_AMERICAN = re.compile(r"(?:\+?1[-. ]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}")
_ELEVEN_DIGITS = "10X98765432"
_VIN_VALUES = dict(zip("0123456789ABCDEFGHJKLMNPRSTUVWXYZ", map(int, "012345678912345678123457923456789"), strict=True))
_VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)


def is_long_code(match: re.Match[str]) -> bool:
    """At least five digits."""
    return sum(map(str.isdigit, match[1])) >= 5


def is_plate(match: re.Match[str]) -> bool:
    """Four characters, a digit among them."""
    return len(match[1]) >= 4 and any(map(str.isdigit, match[1]))


def is_international(match: re.Match[str]) -> bool:
    """As many digits as country code and number have (ITU-T E.164: 15 at most)."""
    return 9 <= sum(map(str.isdigit, match[0])) <= 15


def is_north_american(match: re.Match[str]) -> bool:
    """Area code and exchange as the numbering plan has them."""
    return _NORTH_AMERICAN.fullmatch(match[0]) is not None


def passes_luhn(match: re.Match[str]) -> bool:
    """Every second digit from the right doubled, the digits add up to tens."""
    digits = [int(char) for char in match[0] if char.isdigit()]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + doubled) % 10 == 0


def is_iban(match: re.Match[str]) -> bool:
    """With country and check digits moved to the end, and letters counted from 10, it is 1 modulo 97."""
    plain = match[0].replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


def is_vin(match: re.Match[str]) -> bool:
    """The ninth character is the weighted sum of all, modulo 11, with X for 10 (North America; others have none)."""
    vin = match[0]
    if not vin.isascii():  # digits of another script
        return False
    total = sum(_VIN_VALUES[char] * weight for char, weight in zip(vin, _VIN_WEIGHTS, strict=True))
    return len(set(vin)) > 4 and vin[8] == "0123456789X"[total % 11]


def is_chinese_id(match: re.Match[str]) -> bool:
    """A birthday within, and a last character that is a checksum of the seventeen before it."""
    number = match[0]
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return _is_day(int(number[10:12]), int(number[12:14])) and number[17] == _ELEVEN_DIGITS[total % 11]


def is_date(match: re.Match[str]) -> bool:
    """Month and day in either order; a year of two digits with slashes only, since "1.2.10" numbers a section."""
    first, second = int(match["first"]), int(match["second"])
    whole_year = len(match["year"]) == 4
    return (whole_year or match["mark"] == "/") and (_is_day(first, second) or _is_day(second, first))


def is_iso_date(match: re.Match[str]) -> bool:
    """A month and a day that exist."""
    return _is_day(int(match["month"]), int(match["day"]))


def is_worded_date(match: re.Match[str]) -> bool:
    """A day that exists, and no count: in "by May 10 patients had died" there is none."""
    before = _before(match, 1)
    if before.isalnum() or (before and before in "_/.,-" and match[0][0].isdigit()):
        return False
    parts = match.groupdict()
    if parts.get("year") is None and _COUNTED.match(match.string, match.end()):
        return False
    return parts.get("day") is None or 1 <= int(parts["day"]) <= 31


def is_short_date(match: re.Match[str]) -> bool:
    """A month and a day, behind a word that dates something: elsewhere 3/14 is a fraction."""
    return _is_day(int(match["month"]), int(match["day"])) and _DATED.search(_before(match, 40)) is not None


def is_age(match: re.Match[str]) -> bool:
    """The age of somebody, neither a limit nor the end of a range or of a longer number."""
    before = match.string[max(0, match.start(1) - 16) : match.start(1)]
    return not before[-1:].isalnum() and before[-1:] not in {".", ",", "/"} and not _LIMIT.search(before)


def is_ipv4(match: re.Match[str]) -> bool:
    """Four octets that number no enzyme (EC 3.4.21.5), section or version."""
    octets = match[0].split(".")
    before = _before(match, 16).lower()
    if octets[0] == "0" or any(int(octet) > 255 or (octet[0] == "0" and octet != "0") for octet in octets):
        return False
    if re.search(r"\bip\b|\bipv4\b", before):
        return True
    return not _NUMBERED.search(before) and (int(octets[0]) > 7 or len(match[0]) > 9)


def is_ipv6(match: re.Match[str]) -> bool:
    """An address by the book, with three groups at least."""
    if sum(map(bool, match[0].split(":"))) < 3:
        return False
    try:
        ipaddress.IPv6Address(match[0])
    except ValueError:
        return False
    return True


def is_private_url(match: re.Match[str]) -> bool:
    """The address of a page that may be somebody's."""
    rest = match[0].partition("://")[2] or match[0]
    host = re.split(r"[/:?#]", rest, maxsplit=1)[0]
    return "." in host and ("?" in rest or "@" in rest or not _PUBLIC_HOST.search(host))


def is_person(match: re.Match[str]) -> bool:
    """Behind a title: no placeholder ("Mr. X"), no eponym ("Dr. Apgar"), no sign ("Mr. Murphy's sign")."""
    words = [word.removesuffix("'s").strip(".") for word in match[1].split()]
    if len(words) == 1 and (len(words[0]) < 2 or words[0] in _NOBODY):
        return False
    possessive = 2 if match[1].endswith("'s") else 0
    return not _FINDING.match(match.string, match.end() - possessive)


def is_degreed(match: re.Match[str]) -> bool:
    """Before a degree: a person, not a town in Maryland."""
    before = _before(match, 8)
    behind = match.string[match.end() : match.end() + 7].strip(" ,.")
    return not re.search(r"\b(?:in|at|from|near|of|to)\s\Z", before) and not behind[:1].isdigit()


def is_named(match: re.Match[str]) -> bool:
    """Behind a label of a form."""
    return _NAMED.search(_before(match, 40)) is not None


def is_home(match: re.Match[str]) -> bool:
    """A town and two letters, behind a word for living there: "stroke, MI" is no place."""
    return _HOME.search(_before(match, 40)) is not None


def is_town(match: re.Match[str]) -> bool:
    """A town before its state, not a list of states."""
    return _STATE.match(match[0]) is None


def is_county(match: re.Match[str]) -> bool:
    """A place to live, not an institution."""
    return re.match(r" (?:Hosp|Gener|Medic|Jail|Study|Health)", match.string[match.end() : match.end() + 7]) is None


def _before(match: re.Match[str], most: int) -> str:
    return match.string[max(0, match.start() - most) : match.start()]


def _is_day(month: int, day: int) -> bool:
    return 1 <= month <= 12 and 1 <= day <= 31
