r"""How each kind of identifier is recognised: a gate, a pattern, and where a pattern is not enough, a proof.

A gate (``gates.py``) is what a text must hold for the pattern to be worth running, and most rows pass none. Patterns
begin with a class of characters where they can, which CPython skips to; what must not stand before is a lookbehind over
that first character, ``\d(?<!\w.)``. Every repetition is bounded, so that no text, however long or hostile, takes more
than linear time. Numbers that count only behind a label are in ``labelled.py``.

Sources: North American Numbering Plan (area codes and exchanges begin with 2-9); Social Security Administration (no
area 000, 666 or 9xx); CMS, "Understanding the Medicare Beneficiary Identifier (MBI) Format"; GS1 (UDI).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from medcot.data.identifiers import proofs
from medcot.data.identifiers.gates import Gate, Hints, in_marks, in_small, in_text
from medcot.data.identifiers.labelled import LINK

# What becomes of a text before it is searched, one character for one, so that places stay the same.
_OTHER = {"\u2018": "'", "\u2019": "'", "\u212a": "K"} | dict(zip("：＠．（）＋／", ":@.()+/", strict=True))
FOLDED = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\uff0d", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000", " "),
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    **_OTHER,
}
_STATES = (
    "A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|P[AR]|RI|S[CD]|T[NX]|UT|V[AT]"
    "|W[AIVY]"
)
_TOWN = r"[A-Z](?<!\w.)[a-z']{1,20}\.?(?: [A-Z][a-z']{1,20}){0,2}"
_MONTH = (
    "(?:January|February|March|April|May|June|July|August|September|October|November|December"
    "|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)"
)
_YEAR = r"(?P<year>(?:19|20)\d\d)"
_STREET = (
    "(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Way|Terrace|Ter|Circle|Cir"
    "|Parkway|Pkwy|Highway|Hwy|Square|Sq|Trail|Alley|Close|Crescent)"
)
_NO_NAME = (  # what follows a name in a form, or stands in its place
    r"(?!(?:DOB|MRN|SSN|ID|Age|Sex|Date|Phone|Male|Female|Gender|Address|Tel|Fax|E-?mail|Medical|Account|Room|Unit"
    r"|Unknown|None|Not|Redacted|Withheld|Anonymous|Deceased|The|And|A|An|I|He|She|They|It|His|Her|Is|Was|Has|MD|DO|RN"
    r"|NP|PA-C|PhD)\b)"
)
_NAME_WORD = rf"{_NO_NAME}[A-ZÀ-ÖØ-Þ][\w'-]{{0,30}}"
_PARTICLES = "(?:(?:de|da|del|der|den|van|von|bin|al|la|le|dos) ){0,2}"
_NAME = rf"({_NAME_WORD}\.?(?:,? {_PARTICLES}{_NAME_WORD}\.?){{0,3}}(?<![.]))"
_MBI = r"[AC-HJKMNP-RT-Y]"  # Medicare's letters: those that no digit resembles


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which a kind of identifier shows.

    Attributes:
        kind: key of ``KINDS``.
        gate: what a text must hold besides.
        pattern: the identifier is its only group; all of the match where there is none, or they have names.
        proof: whether a match is one.
    """

    kind: str
    gate: Gate
    pattern: re.Pattern[str]
    proof: Callable[[re.Match[str]], bool] | None = None

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where the identifiers begin and end."""
        inner = int(self.pattern.groups == 1 and not self.pattern.groupindex)
        for match in self.pattern.finditer(text):
            if self.proof is None or self.proof(match):
                yield match.span(inner)


def _rule(kind: str, gate: Gate, pattern: str, proof: Callable[[re.Match[str]], bool] | None = None) -> Rule:
    return Rule(kind, gate, re.compile(pattern), proof)


_URL_REST = r"[^\s<>\"\[\]|]{1,2000}(?<![.,;:!?)'])"
_DEGREE = r"(?:M\.?D|D\.?O|R\.?N|N\.?P|PA-C|Ph\.?D|DDS|FACS|MBBS|FRCS)\b"
_ZIP = Gate(shapes=("AA 00000", "AA  00000", "AA, 00000"))
_DATED = Gate(shapes=("/0/", "/00/", "-0-", "-00-", ".0.", ".00."))
_TITLE = r"(?:(?:Mr|Mrs|Ms|Dr|Prof)\b\.? )?"

# In the order in which they win where two begin at one place.
RULES = (
    _rule("e-mail", Gate(("@",)), r"(?<![\w.+%-])[\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,6}[A-Za-z]{2,24}(?![\w@])"),
    _rule(
        "e-mail",
        Gate(("(at)", "[at]"), hints=in_text(r"\([aA][tT]\)", r"\[[aA][tT]\]")),
        r"(?i)(?<![\w.+-])[\w.+-]{1,64} ?[\[(]at[\])] ?(?:[\w-]{1,63} ?(?:\.|[\[(]dot[\])]) ?){1,4}[a-z]{2,24}(?!\w)",
    ),
    _rule(
        "url",
        Gate(("://", "www."), hints=(*in_marks("://"), *in_small(r"www\."))),
        rf"[hHfFwW](?<!\w.)(?i:ttps?://|tp://|ww\.){_URL_REST}",
        proofs.is_private_url,
    ),
    _rule(
        "url",
        Gate(sniff=re.compile(r"\.(?:com|org|net|edu|io|me|cn)/"), hints=in_marks(r"\./")),
        rf"(?i)(?<![\w.@/-])(?:[\w-]{{1,63}}\.){{1,4}}(?:com|org|net|edu|io|me|cn)/{_URL_REST}",
        proofs.is_private_url,
    ),
    _rule(
        "ip address",
        Gate(shapes=(".0.", ".00.", ".000.")),
        r"\d(?<![\w.].)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\d)",
        proofs.is_ipv4,
    ),
    _rule(
        "ip address",
        Gate(sniff=re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]"), hints=in_marks(":[0A]{0,4}:")),
        r"[0-9A-Fa-f:](?<![\w:.].)[0-9A-Fa-f:]{5,38}(?![\w:])",
        proofs.is_ipv6,
    ),
    _rule("device", Gate(shapes=("(00)0", "(00) 0")), r"\(01\) ?\d{14}(?: ?\(\d{2}\) ?[\w/-]{1,20}){0,5}"),
    _rule(
        "vehicle",
        Gate(shapes=("0000A", "00000")),
        r"[A-HJ-NPR-Z\d](?<!\w.)[A-HJ-NPR-Z\d]{16}(?!\w)",
        proofs.is_vin,
    ),
    _rule(
        "vehicle",
        Gate(exact=("VIN", "Vin", "ehicle id", "ehicle ID"), dense=4),
        r"[Vv](?<!\w.)(?i:in\b|ehicle id\w{0,14}(?: number)?)[ :#.]{0,4}(?:is )?([A-HJ-NPR-Z\d]{11,17})(?!\w)",
        proofs.is_long_code,
    ),
    _rule(
        "vehicle",
        Gate(("plate ", "plates ", "plate:", "plate#", " tag"), hints=in_small("plates?[ :#]", "g(?<= tag)")),
        r"\b(?i:(?:licen[sc]e|number|registration) (?:plate|tag)s?|plate (?:number|no)|plate ?#|tag number)"
        r"(?: (?:number|no)\b\.?)?[ :#.]{0,4}(?:is )?([A-Z\d]{1,4}[ -]?[A-Z\d]{1,5})(?!\w)",
        proofs.is_plate,
    ),
    _rule(
        "ssn",
        Gate(shapes=("000-00-0000",)),
        r"[0-8](?<![\w-].)\d\d(?<!000)(?<!666)-(?!00)\d\d-(?!0000)\d{4}(?![\w-]|[./]\d)",
    ),
    _rule(
        "ssn",
        Gate(("ssn", "ss#", "ss #", "social sec"), dense=4),
        rf"\b(?i:ssn|ss ?#|social security){LINK}"
        r"((?!000|666|9)\d{3}[- ]?(?!00)\d\d[- ]?(?!0000)\d{4})(?![\w-])",
    ),
    _rule(
        "ssn",
        Gate(shapes=("00000000000000000",)),
        r"[1-9](?<!\w.)\d{5}(?:19|20)\d{9}[\dX](?!\w)",
        proofs.is_chinese_id,
    ),
    _rule(
        "plan number",
        Gate(shapes=("0-AA00",)),
        rf"[1-9](?<![\w-].){_MBI}[\dAC-HJKMNP-RT-Y]\d-{_MBI}[\dAC-HJKMNP-RT-Y]\d-{_MBI}{{2}}\d\d(?![\w-])",
    ),
    _rule(
        "account number",
        Gate(shapes=("0000-0000-0000", "0000 0000 0000", "0000000000000")),
        r"\d(?<![\w.-].)\d{3}[- ]?(?:\d{4}[- ]?){2}\d{1,7}(?![\w-]|\.\d)",
        proofs.passes_luhn,
    ),
    _rule(
        "account number",
        Gate(shapes=("AA00 0000", "AA00 AAAA", "AA000000", "AA00AAAA")),
        r"[A-Z](?<!\w.)[A-Z]\d\d(?: ?[A-Z\d]{4}){2,7}(?: ?[A-Z\d]{1,3})?(?!\w)",
        proofs.is_iban,
    ),
    _rule(
        "phone",
        Gate(shapes=("000-0000", "000.0000")),
        r"[+(\d](?<![\w.+-].)[\d. ()-]{7,16}(?<=[-.]\d{4})(?![\w-]|\.\d)",
        proofs.is_north_american,
    ),
    _rule(
        "phone",
        Gate(shapes=(") 000 0000", ")000 0000")),
        r"\((?<![\w.+-].)[2-9]\d\d\) ?[2-9]\d\d \d{4}(?![\w-]|\.\d)",
    ),
    _rule(
        "phone",
        Gate(shapes=("+0",), dense=4),
        r"\+(?<![\w+].)[1-9]\d{0,2}[-. ]?(?:\(\d{1,4}\)[-. ]?)?\d{1,4}(?:[-. ]?\d{2,4}){1,5}(?![\w-]|[.,]\d)",
        proofs.is_international,
    ),
    _rule("phone", Gate(shapes=("00000000000",)), r"1(?<![\w.].)[3-9]\d{9}(?<!0000)(?![\w.])"),
    _rule(
        "address",
        Gate(shapes=("0 A", "0a A", "0A A", "0aa A"), sniff=re.compile(rf" {_STREET}\b")),
        r"\d(?<![\w.,/-].)\d{0,5}[A-Za-z]? (?:[NSEW]{1,2}\.? |(?:North|South|East|West) )?"
        rf"(?:(?:[A-Z][a-z'.]{{1,20}}|\d{{1,3}}(?:st|nd|rd|th)) ){{1,3}}?{_STREET}\b\.?"
        r"(?:,? (?:Apt|Apartment|Unit|Suite|Ste|#)\.? ?[\w-]{1,6}(?!\w))?",
    ),
    _rule(
        "address",
        Gate(
            ("address", "lives at", "living at", "resides at", "residing at"),
            hints=in_small("address", "v(?:es|ing) at", "resid"),
        ),
        r"[AaLlRr](?<!\w.)(?i:ddress|iv(?:es?|ing) at|esid(?:es?|ing) at) ?:? {0,2}"
        rf"(\d{{1,6}}[A-Za-z]? (?:[\w.']{{1,20}} ){{1,3}}?(?i:{_STREET})\b\.?)",
    ),
    _rule(
        "address",
        Gate((" box ", "pobox", "p.o.box"), hints=in_small("box")),
        r"(?i)\bp\.? ?o\.? box (?:no\.? |# ?)?\d{1,8}\b",
    ),
    _rule(
        "zip",
        _ZIP,
        rf"[A-Z][a-z]{{1,20}}\.?,? (?:{_STATES})\.?,? {{1,2}}(\d{{5}}(?:-\d{{4}})?)(?![\w-]|[.,]\d| ?[mµu]?[gLU]\b)",
    ),
    _rule(
        "zip",
        Gate(("zip", "postal c", "post c", "postc"), hints=in_small("zip", "post(?:al c|c| c)")),
        r"\b(?i:zip(?: ?code)?|postal code|post ?code)s?(?: is|[:#]){0,2} {0,2}"
        r"(\d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|[A-Z]\d[A-Z] ?\d[A-Z]\d|\d{6})(?![\w-])",
    ),
    _rule(
        "place",
        Gate(shapes=("a, AA", "a,AA")),
        rf"{_TOWN}, ?(?:{_STATES})\b",
        proofs.is_home,
    ),
    _rule("place", _ZIP, rf"[A-Z](?<!\w.)[a-z']{{1,20}},? (?:{_STATES})(?=,? {{1,2}}\d{{5}}\b)"),
    _rule(
        "place",
        Gate(shapes=("a, Aa",), sniff=re.compile(rf", (?:{proofs.STATE_NAMES})\b")),
        rf"{_TOWN}, (?:{proofs.STATE_NAMES})\b(?! [A-Z])",
        proofs.is_town,
    ),
    _rule(
        "place",
        Gate(exact=(" County",), hints=in_text("C(?:ounty)")),
        r"[A-Z](?<!\w.)[a-z']{2,20}(?: [A-Z][a-z']{2,20})? County\b",
        proofs.is_county,
    ),
    _rule(
        "date",
        _DATED,
        r"(?P<first>\d(?<![\w/.-].)\d?)(?P<mark>[/.-])(?P<second>\d{1,2})(?P=mark)(?P<year>(?:19|20)\d\d|\d\d)"
        r"(?![\w/-]|\.\d)",
        proofs.is_date,
    ),
    _rule(
        "date",
        _DATED,
        r"[12](?<![\w/.-].)[09]\d\d(?P<mark>[/.-])(?P<month>\d{1,2})(?P=mark)(?P<day>\d{1,2})(?![\d/-]|\.\d)",
        proofs.is_iso_date,
    ),
    _rule("date", Gate(exact=("月",), hints=in_text("月")), r"\d{1,2} ?月 ?\d{1,2} ?[日号]"),
    _rule(
        "date",
        Gate(hints=in_marks(r"A\.?,? {1,2}[0?]")),  # ? may be a digit of another script
        rf"{_MONTH}\.?,? (?:of )?(?:(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:,? {_YEAR})?|(?P<whole>(?:19|20)\d\d))"
        r"(?![\w%/-]|[.,]\d|:\d)",
        proofs.is_worded_date,
    ),
    _rule(
        "date",
        Gate(
            shapes=("0 A", "0-A", "0aa A", "0aa aa A", "0 aa A", "0A", "aa aaa aa A"),
            hints=in_marks("0 ?[- ] {0,2}A", r"\? ?[- ] {0,2}A"),
        ),
        rf"(?P<day>\d{{1,2}})(?:st|nd|rd|th)? ?[- ](?:day )?(?:of )?{_MONTH}\.?"
        rf"(?:,?[- ]{_YEAR}|-(?P<short>\d\d))?(?!\w)",
        proofs.is_worded_date,
    ),
    _rule(
        "date",
        Gate(shapes=("a 0/0", "a 00/0", ": 0/0", ": 00/0"), hints=in_marks("/(?<= 0/)0", "/(?<= 00/)0")),
        r"(?P<month>\d(?<![\w/.-].)\d?)/(?P<day>\d{1,2})(?![\w/%]|\.\d)",
        proofs.is_short_date,
    ),
    _rule(
        "age",
        Gate(
            sniff=re.compile(r"(?:9|1[0-2])\d[- ]?y"),
            hints=in_text(r"9\d[- ]?y", r"1[0-2]\d[- ]?y"),
        ),
        r"((?:9|1[0-2])\d)(?=[- ]?(?:years?|yrs?\.?)[- ](?:old|of[- ]age)\b|[- ]?y\.?/?o\b)",
        proofs.is_age,
    ),
    _rule(
        "age",
        Gate(
            sniff=re.compile(r"(?:ge|GE)(?:d|D|:| of| is| was)? ?[:=]? {0,2}(?:9|1[0-2])\d"),
            hints=in_text(r"9(?<=[dDeEfs:= ]9)\d", r"1(?<=[dDeEfs:= ]1)[0-2]\d"),
        ),
        r"\b(?i:aged?|age of|age is|age was) ?[:=]? {0,2}((?:9|1[0-2])\d)"
        r"(?![\w%/-]|[.,]\d| ?(?:m|w|d|h|to\b|and\b|or\b))",
        proofs.is_age,
    ),
    _rule(
        "age",
        Gate(("ninety",)),
        r"(?i)\b(ninety(?:[- ](?:one|two|three|four|five|six|seven|eight|nine))?)(?=[- ]years?[- ](?:old|of age)\b)",
        proofs.is_age,
    ),
    _rule(
        "other number",
        Gate(sniff=re.compile(r"-[\da-fA-F]{4}-[\da-fA-F]{4}-"), hints=in_marks("-[0A]{0,4}-[0A]{0,4}-")),
        r"[\da-fA-F](?<![\w-].)[\da-fA-F]{7}(?:-[\da-fA-F]{4}){3}-[\da-fA-F]{12}(?![\w-])",
    ),
    _rule(
        "name",
        Gate(
            ("name:", "name :", "name=", "kin:", "contact:", "attending:", "physician:", "provider:", " by:"),
            hints=in_marks(":[^0]{0,2}[A?]", "=[^0]{0,2}[A?]"),
        ),
        rf"[:=]\s{{0,2}}{_TITLE}{_NAME}",
        proofs.is_named,
    ),
    _rule("name", Gate(exact=("姓名",), hints=in_text("姓名")), r"姓名 ?: ?([\u4e00-\u9fff]{2,4})"),
    _rule("name", Gate(("my name is",)), rf"\b(?i:my name is) {_NAME}"),
    _rule(
        "name",
        Gate(exact=("Mr", "Ms", "Miss ", "Mx", "MR"), hints=in_text("M(?:[rsxR]|iss )")),
        rf"M(?<!\w.)(?:rs?|s|iss|x|RS?)(?:\. ?| ){_NAME}",
        proofs.is_person,
    ),
    _rule(
        "name",
        Gate(
            exact=("Dr", "Prof", "Doctor ", "Nurse "),
            hints=in_text("D(?:r|octor )", "Prof", "Nurse "),
        ),
        rf"[DPN](?<!\w.)(?:r|rof|octor|rofessor|urse)(?:\. ?| ){_NAME}",
        proofs.is_person,
    ),
    _rule(
        "name",
        Gate(sniff=re.compile(rf" {_DEGREE}"), hints=in_marks(r"A[A'-]{0,20},? A[A.]")),
        rf"([A-Z](?<![\w-].)[a-z'-]{{1,20}} (?:[A-Z]\. )?[A-Z][A-Za-z'-]{{1,20}}),? {_DEGREE}",
        proofs.is_degreed,
    ),
)

_behind: dict[Gate, list[tuple[int, Rule]]] = {Gate(dense=4): []}  # first the gate of all in ``labelled.py``
for _rank, _each in enumerate(RULES):
    _behind.setdefault(_each.gate, []).append((_rank, _each))
RULES_BEHIND = tuple(_behind.items())  # gates, each with its rules, and those with their rank in RULES
HINTS = Hints(tuple(_behind))
