"""Numbers that count only behind a label: "MRN 123456", "policy no. X-99812", "serial number 4471-A".

Record, plan, account, licence and device numbers have no form of their own: six digits are a white-cell count as often
as a record number. So what looks like a number of some length is found first, which is rare in clinical text, and only
then the few words before it are read. The other way round, every "patient" and "record" would be looked behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_NO = r"(?: ?(?:number|num|no|nr|id|identifier)\b\.?| ?#| ?:)"  # what makes a word a label
LINK = r"(?: {0,2}(?:\b(?:number|num|no|nr|id|is|was|of)\b\.?|[:#=.(]|-(?=\s))){0,4}\s{0,2}"  # from label to value
_LABELS = {
    "device": rf"serial{_NO}|s/n\b|sn ?[:#]|udi\b|device{_NO}|implant{_NO}|generator{_NO}",
    "record number": (
        rf"m\.?r\.?n\b|(?:medical|health|hospital|clinical|patient) records?(?:{_NO})?|patient{_NO}|chart{_NO}"
        rf"|unit (?:number|no\b\.?)|hospital{_NO}|record{_NO}|case{_NO}|(?:nhs|chi)(?:{_NO}| )"
    ),
    "plan number": (
        "(?:member|subscriber|beneficiary|policy|insurance|health plan|group|payer|medicare|medicaid)"
        rf"(?: policy| plan)?{_NO}|hicn?\b|mbi\b"
    ),
    "licence number": (
        rf"driver'?s?'? licen[sc]e(?:{_NO})?|licen[sc]e{_NO}|certificate{_NO}|passport(?:{_NO})?|dea(?:{_NO}| )|npi\b"
        rf"|gmc(?:{_NO}| )|registration{_NO}"
    ),
    "account number": (
        "(?:account|acct|bank|billing|invoice|claim|encounter|visit|(?:credit |debit )?card|routing|iban)"
        rf"\.?{_NO}|acct\b\.?|a/c\b"
    ),
    "other number": r"(?:subject|participant|study|enrol?lment|specimen|donor) (?:id|number|no|#)\b\.?",
}
_KINDS = tuple(_LABELS)
_BEFORE = re.compile(
    rf"(?:(?<!\w)(?i:{'|'.join(f'({labels})' for labels in _LABELS.values())})|病历号|住院号|门诊号)"
    rf"{LINK}(?P<letters>(?:[A-Z]{{1,4}}[- ]?)?)\Z"
)
_VALUE = re.compile(r"\d[A-Za-z\d-]{2,24}(?: \d{3,4}(?![\w.,/-]|\s?%)){0,4}")
_MAY_END_LABEL = re.compile(r"[A-Za-z]{1,12}|[#:/]|[\u4e00-\u9fff]{3}")
_END_LABELS = frozenset(  # one of these stands just before the number, or there is no label
    re.findall(
        r"\S+",
        "number num no nr id identifier is was of # : / mrn n record records nhs chi udi hic hicn mbi acct dea npi gmc "
        "license licence passport 病历号 住院号 门诊号",
    )
)
_GOES_ON = re.compile(r"[\w%]|[.,/]\d")
_A_YEAR = re.compile(r"(?:19|20)\d\d(?:-(?:(?:19|20)?\d\d)?)?")
_MOST_BEFORE = 64  # characters read before a number
_PHONE = re.compile(  # a form less clear than elsewhere will do; the last two are local numbers
    r"(?:\+?\d{0,3}[-. ]?\(?\d{3}\)?[-. ]?\d{3}[-. ]?\d{4}|0\d(?:[ .]\d\d){4}|\(?0\d{2,4}\)?[ -]?\d{3,4}[ -]?\d{3,4}"
    r"|\+\d{1,3}(?:[-. ]?\d{2,4}){2,5}|[2-9]\d{2}[-. ]\d{4}|[2-9]\d{3} \d{4})(?![\w-]|[.,/]\d)"
)
_PHONE_LINK = (
    r"(?: {0,2}(?:\b(?:number|num|no|is|was|at|on|to|home|work|cell|mobile|me|him|her|them)\b\.?|[:#=.,()-])){0,5}"
    r"\s{0,2}"
)
_MAY_BE_PHONE = re.compile(r"[+(\d][\d() .-]{5,24}\d")
_PHONE_LABEL = re.compile(
    r"(?:(?<!\w)(?i:(?P<fax>fax\w{0,4})|(?:tele)?phone|tel\b|mobile|cell ?phone|cell (?:number|no)|pager|beeper|hotline"
    r"|whatsapp|dial|contact (?:number|no)|(?:call|reach|contact|text|page)(?:ed|ing|able)?"
    r"(?: (?:us|me|him|her|them|back|home|the \w{1,12}))?(?: at| on))|电话|手机)"
    rf"{_PHONE_LINK}\Z"
)
_FEWEST_DIGITS = {"record number": 4, "device": 4, "other number": 4}  # of the others: five


def find_labelled(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, stop and kind of each number behind a label."""
    for match in _VALUE.finditer(text):
        value = match[0].rstrip("-")
        digits = sum(map(str.isdigit, value))
        if digits < 4 or _A_YEAR.fullmatch(value) or _GOES_ON.match(text, match.start() + len(value)):
            continue
        before = text[max(0, match.start() - _MOST_BEFORE) : match.start()]
        ending = before.rstrip()[-1:]
        if not (ending.isalpha() or ending in ":#=.(-"):  # most often another number
            continue
        if _END_LABELS.isdisjoint(_MAY_END_LABEL.findall(before[-24:].lower())):
            continue
        label = _BEFORE.search(before)
        if label is None:
            continue
        kind = next((kind for kind, found in zip(_KINDS, label.groups(), strict=False) if found), "record number")
        if digits >= _FEWEST_DIGITS.get(kind, 5):
            yield match.start() - len(label["letters"]), match.start() + len(value), kind


def find_phones(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, stop and kind of each telephone and fax number behind a label."""
    for run in _MAY_BE_PHONE.finditer(text):
        number = _PHONE.match(text, run.start())
        if number is None:
            continue
        label = _PHONE_LABEL.search(text[max(0, run.start() - _MOST_BEFORE) : run.start()])
        if label is not None:
            yield number.start(), number.end(), "fax" if label["fax"] else "phone"
