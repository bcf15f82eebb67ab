"""The kinds of identifier that the HIPAA Safe Harbor names, and what of each a text can show.

45 CFR 164.514(b)(2)(i) lists eighteen, (A) to (R), to be removed before health information counts as de-identified.
Sixteen of them must also go from a limited data set (164.514(e)(2)); those are *direct* here. Dates, ages over 89,
towns, states and ZIP codes may stay in a limited data set, and "any other unique number" (R) is not on its list.
The rule concerns identifiers of the individual and of relatives, employers and household members. Whose a name or a
date is, a pattern cannot tell; so every one counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of identifier.

    Attributes:
        letter: its paragraph in 164.514(b)(2)(i).
        says: what is searched, for a person.
        direct: whether a limited data set must not hold it either.
    """

    letter: str
    says: str
    direct: bool


KINDS = {
    "name": Kind("A", "names behind a title (Mr., Dr.) or a label (Patient name:), or before a degree", True),
    "address": Kind("B", "street addresses and post boxes", True),
    "place": Kind("B", "a town with its state, a county", False),
    "zip": Kind("B", "ZIP codes behind a state, postal codes behind a label", False),
    "date": Kind("C", "dates with a day or a month, as numbers or words", False),
    "age": Kind("C", "ages over 89", False),
    "phone": Kind("D", "telephone numbers: North American, international with +, others behind a label", True),
    "fax": Kind("E", "the same behind the word fax", True),
    "e-mail": Kind("F", "e-mail addresses", True),
    "ssn": Kind("G", "US social security numbers; Chinese identity numbers by their check digit", True),
    "record number": Kind("H", "medical record, patient, hospital, NHS numbers behind a label", True),
    "plan number": Kind("I", "member, policy, Medicare numbers behind a label; Medicare's by its pattern", True),
    "account number": Kind(
        "J", "account, claim, card numbers behind a label; cards and IBANs by their check digits", True
    ),
    "licence number": Kind("K", "licence, certificate, DEA, NPI, passport numbers behind a label", True),
    "vehicle": Kind("L", "vehicle numbers by their check digit; VINs and plates behind a label", True),
    "device": Kind("M", "serial and device numbers behind a label; unique device identifiers by their form", True),
    "url": Kind("N", "web addresses, but for those of agencies, journals and encyclopaedias", True),
    "ip address": Kind("O", "IPv4 and IPv6 addresses", True),
    "other number": Kind("R", "UUIDs; subject and participant numbers behind a label", False),
}

NOT_IN_TEXT = {
    "biometric": Kind("P", "finger and voice prints: no text shows them", True),
    "photograph": Kind("Q", "full-face photographs: no text shows them", True),
}
