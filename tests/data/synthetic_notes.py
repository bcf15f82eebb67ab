"""Clinical notes made from a seed, with identifiers whose places are known, or with none and full of look-alikes.

The forms are those that people write, not those that the rules know: some are meant to be missed (a bare name, a
telephone number with spaces and no label), so that a recall of one would be suspicious. Nobody here exists.
"""

from __future__ import annotations

import calendar
import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST = ("James", "Mary", "Robert", "Linda", "Aisha", "Wei", "José", "Priya", "Olga", "Kwame", "Siobhán", "Hiroshi")
LAST = ("Smith", "Garcia", "Okafor", "Nguyen", "O'Brien", "Müller", "Patel", "Kowalski", "Cohen", "Walsh-Hart", "Diaz")
STREETS = ("Maple", "Oak", "Washington", "Elm", "Cedar", "Lakeview", "Jefferson", "Birch", "Hillcrest", "Sunset")
TOWNS = [("Springfield", "IL"), ("Portland", "OR"), ("Ann Arbor", "MI"), ("Tulsa", "OK"), ("Dayton", "OH")]
STATES = {"IL": "Illinois", "OR": "Oregon", "MI": "Michigan", "OK": "Oklahoma", "OH": "Ohio"}
MONTHS = tuple(calendar.month_name)[1:]

# Ordinary sentences; what a careless rule would trip over is in most of them.
PLAIN = """
A {age}-year-old man presents with chest pain that began {n} hours ago, rated {m}/10 and radiating to the left arm.
Blood pressure is {sys}/{dia} mm Hg, pulse {pulse}/min, respirations 18/min, and SpO2 96% on room air.
Laboratory studies show hemoglobin 11.{n} g/dL, leukocytes 12,{m}00/mm3, platelets 250000/mm3 and sodium 13{n} mEq/L.
She takes metformin 1000 mg twice daily, lisinopril 20-40 mg, and insulin glargine 24 units at bedtime.
The ANA titer is 1:640, the INR 2.{n}, and the troponin I <0.04 ng/mL (normal 0.00-0.04).
Strength is 4/5 in the left leg, reflexes are 2+, and Babinski's sign is absent; the GCS is 15.
A grade 2/6 systolic murmur is heard; Murphy's sign and McBurney's point tenderness are negative.
ICD-10 codes I21.9, E11.65 and J45.909 were entered; the DRG weight is 1.2345.
On day 3 of admission he was given 0.9% saline 1500 mL over 24 h, 24/7 monitoring, and 2-4 L of oxygen.
CT of the abdomen (5-mm slices) shows a 3.5 x 2.1 x 4.0 cm mass in segment 4/5 of the liver.
The 2019 guideline and the 2021-2023 update (N Engl J Med 384:1412-1424) recommend a dose of 75-100 mg.
Apgar scores, after Dr. Apgar, were 7 and 9; the infant weighed 3250 g at 39 2/7 weeks.
Lactate dehydrogenase (EC 1.1.1.27) and lipase (EC 3.1.1.3) were raised at 450 U/L and 1200 U/L.
The variant c.1521_1523delCTT (rs113993960) in CFTR was found; HLA-DQ2.5 and HLA-B*27:05:02 were positive.
Between 2008 and 2014, 1,204 patients were enrolled in trial NCT01206062; the hazard ratio was 0.75 (0.64-0.89).
The patient may march up stairs, lives with his wife, and denies travel; an august physician, she said, saw him in 2017.
Cell counts of 500-1000 per field and a contact time of 200-3000 ms were noted; call it a day at 17:30.
Mr. Murphy's sign was how the student wrote it, and Dr. Virchow's triad came next.
A patient record number of falls, 4 in 2020, was discussed; the case is number 12 of our series.
He smoked 1 pack per day for 35 years and drinks 5-6 beers weekly; he quit at the age of 62.
Hydrocodone 5/325 was started; MS, MI and PE were ruled out, and the DO and the RN agreed.
Wash-out was 10-14 days; see section 3.1.4.2 and version 2.0.1 of the protocol, and https://www.cdc.gov/flu for more.
""".strip().splitlines()


@dataclass(frozen=True)
class Note:
    """A note and its identifiers as (kind, start, stop)."""

    text: str
    spans: tuple[tuple[str, int, int], ...]


def make_notes(count: int, seed: int, identifiers: int) -> list[Note]:
    """Make notes of some sentences each, with so many identifying ones among them."""
    rng = random.Random(seed)
    kinds = sorted(MAKERS)
    notes = []
    for number in range(count):
        sentences: list[tuple[str, str, str]] = [(_fill(line, rng), "", "") for line in rng.sample(PLAIN, 5)]
        for each in range(identifiers):
            kind = kinds[(number * identifiers + each) % len(kinds)]
            sentence, value = MAKERS[kind](rng)
            sentences.insert(rng.randrange(len(sentences) + 1), (sentence, kind, value))
        notes.append(_join(sentences, rng))
    return notes


def _fill(line: str, rng: random.Random) -> str:
    numbers = {
        "age": rng.randint(18, 89),
        "n": rng.randint(2, 8),
        "m": rng.randint(3, 9),
        "pulse": rng.randint(50, 130),
    }
    return line.format(**numbers, sys=rng.randint(90, 200), dia=rng.randint(50, 110))


def _join(sentences: list[tuple[str, str, str]], rng: random.Random) -> Note:
    text, spans = "", []
    for sentence, kind, value in sentences:
        if kind:
            start = len(text) + sentence.index(value)
            if kind == "zip" and "Dayton" in sentence:
                town = len(text) + sentence.index("Dayton")
                spans.append(("place", town, start - 1))
            spans.append((kind, start, start + len(value)))
        text += sentence + rng.choice([" ", "\n", "  "])
    return Note(text, tuple(spans))


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(count - 1))


def _say(rng: random.Random, value: str, *templates: str) -> tuple[str, str]:
    return rng.choice(templates).replace("{}", value), value


def _name(rng: random.Random) -> tuple[str, str]:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    full = f"{first} {last}"
    form = rng.randrange(10)
    if form < 3:
        return _say(rng, last, "Mr. {} was seen today.", "Mrs. {} denies fever.", "I spoke to Dr. {} about it.")
    if form < 6:
        return _say(rng, full, "Patient name: {}", "Mr. {} came alone.", "Emergency contact: {}.", "Next of kin: {}")
    if form < 7:
        return _say(rng, f"{last}, {first}", "Patient Name: {}", "Name: {}")
    if form < 8:
        return _say(
            rng, full, "Electronically signed by: {}, MD", "Attending physician: Dr. {}.", "Reviewed with {}, MD."
        )
    return _say(rng, full, "{} returned to clinic.", "Her daughter {} brought her in.")  # missed: nothing gives it away


def _address(rng: random.Random) -> tuple[str, str]:
    street = rng.choice(STREETS)
    number = _digits(rng, rng.randint(1, 4))
    forms = [f"{number} {street} Street", f"{number} N. {street} Ave", f"{number} {street} Rd, Apt 4B"]
    forms += [
        f"{number} West {street} Drive",
        f"{number} 5th Avenue",
        f"P.O. Box {number}",
        f"{number} {street.lower()} st",
    ]
    return _say(rng, rng.choice(forms), "Lives at {}.", "Address: {}", "He was found at {} by police.")


def _place(rng: random.Random) -> tuple[str, str]:
    town, state = rng.choice(TOWNS)
    if rng.random() < 0.5:
        return _say(rng, f"{town}, {STATES[state]}", "He is from {}.", "She moved here from {} last year.")
    return _say(rng, f"{town}, {state}", "She lives in {}.", "A resident of {}, he works outdoors.")


def _zip(rng: random.Random) -> tuple[str, str]:
    _, state = rng.choice(TOWNS)
    code = _digits(rng, 5) + rng.choice(["", "-" + _digits(rng, 4)])
    return _say(rng, code, f"Mail goes to Dayton, {state} {{}}.", "ZIP code: {}", "zip {}", "Postal code {}")


def _date(rng: random.Random) -> tuple[str, str]:
    year, month, day = rng.randint(1931, 2024), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    forms = [f"{month:02}/{day:02}/{year}", f"{month}/{day}/{year % 100:02}", f"{year}-{month:02}-{day:02}"]
    forms += [f"{name} {day}, {year}", f"{day} {name} {year}", f"{name[:3]} {day}", f"{name} {day}th", f"{name} {year}"]
    forms += [f"{day:02}-{name[:3]}-{year}", f"{day}.{month}.{year}", f"the {day}th of {name}"[4:]]
    return _say(
        rng, rng.choice(forms), "DOB: {}.", "Admitted on {} with pain.", "Surgery was done on {}.", "Seen {}, stable."
    )


def _age(rng: random.Random) -> tuple[str, str]:
    age = str(rng.randint(90, 106))
    return _say(
        rng, age, "A {}-year-old woman fell.", "He is {} years old.", "Pt is a {} y/o male.", "Age: {}", "{}yo F"
    )


def _phone(rng: random.Random) -> tuple[str, str]:
    area, exchange, line = (
        f"{rng.randint(2, 9)}{rng.randint(0, 8)}{rng.randint(2, 9)}",
        _digits(rng, 3),
        _digits(rng, 4),
    )
    exchange = str(rng.randint(2, 9)) + exchange[1:]
    if rng.random() < 0.5:
        forms = [f"({area}) {exchange}-{line}", f"{area}-{exchange}-{line}", f"{area}.{exchange}.{line}"]
        forms += [
            f"+1 {area} {exchange} {line}",
            f"+44 20 7946 0{line[1:]}",
            f"+49 (0)30 901{line}",
            f"1-{area}-{exchange}-{line}",
        ]
        return _say(rng, rng.choice(forms), "Reach her at {}.", "His son ({}) will come.", "{} is the best number.")
    forms = [f"{area} {exchange} {line}", f"{area}{exchange}{line}", f"{exchange}-{line}", "020 7946 0" + line[1:]]
    return _say(rng, rng.choice(forms), "Phone: {}", "Tel. {}", "Please call him at {}.", "Her number, {}, is new.")


def _fax(rng: random.Random) -> tuple[str, str]:
    number = f"{rng.randint(201, 989)}-{rng.randint(200, 999)}-{_digits(rng, 4)}"
    return _say(rng, number, "Fax: {}", "Send results by fax to {}.", "Fax number {}", "It was faxed to {}.")


def _email(rng: random.Random) -> tuple[str, str]:
    first, last = rng.choice(FIRST[:5]).lower(), "smith"
    forms = [
        f"{first}.{last}@example.com",
        f"{first}_{_digits(rng, 2)}@mail.example.org",
        f"{first} (at) example (dot) com",
    ]
    return _say(rng, rng.choice(forms), "Write to {}.", "E-mail: {}", "<{}>")


def _ssn(rng: random.Random) -> tuple[str, str]:
    area = rng.choice([rng.randint(1, 665), rng.randint(667, 899)])
    number = f"{area:03}-{rng.randint(1, 99):02}-{rng.randint(1, 9999):04}"
    if rng.random() < 0.3:
        return _say(rng, number.replace("-", ""), "SSN: {}", "Social security number {}")
    return _say(rng, number, "SSN {}", "Her number is {}.", "Social Security: {}")


def _record(rng: random.Random) -> tuple[str, str]:
    forms = [
        _digits(rng, 7),
        _digits(rng, 8),
        f"{_digits(rng, 3)}-{_digits(rng, 4)}",
        f"H{_digits(rng, 6)}",
        _digits(rng, 5),
    ]
    return _say(
        rng,
        rng.choice(forms),
        *(
            "MRN: {}",
            "MRN {}",
            "Medical record number {}.",
            "Patient ID: {}",
            "Chart # {}",
            "(hospital no. {})",
            "unit no {}",
        ),
    )


def _plan(rng: random.Random) -> tuple[str, str]:
    forms = [f"XYZ{_digits(rng, 9)}", _digits(rng, 9), f"W{_digits(rng, 4)}-{_digits(rng, 4)}"]
    if rng.random() < 0.2:
        return _say(rng, f"1EG4-TE5-MK{_digits(rng, 2)}", "Medicare: {}", "She gave {} at the desk.")
    return _say(rng, rng.choice(forms), "Member ID: {}", "Policy number {}.", "insurance ID {}", "Medicaid no. {}")


def _account(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.3:
        body = "4" + _digits(rng, 14)
        doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in body[::-2])
        check = -(doubled + sum(map(int, body[-2::-2]))) % 10
        card = f"{body}{check}"
        return _say(rng, " ".join(card[at : at + 4] for at in range(0, 16, 4)), "Paid with {}.", "Visa {}")
    if rng.random() < 0.2:
        return "Refund to GB29 NWBK 6016 1331 9268 19.", "GB29 NWBK 6016 1331 9268 19"
    return _say(rng, _digits(rng, rng.randint(6, 10)), "Account number: {}", "Acct # {}", "claim no. {}", "account {}")


def _licence(rng: random.Random) -> tuple[str, str]:
    forms = [f"D{_digits(rng, 7)}", _digits(rng, 8), f"AB{_digits(rng, 7)}"]
    return _say(
        rng, rng.choice(forms), "Driver's license {}", "License number: {}", "DEA # {}", "NPI: {}", "passport no. {}"
    )


def _vehicle(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.4:
        return _say(
            rng, f"{_digits(rng, 1)}ABC{_digits(rng, 3)}", "License plate {}.", "plate number: {}", "His car, tag {}."
        )
    vin = rng.choice(["1M8GDM9AXKP042788", "1HGCM82633A004352", "5GZCZ43D13S812715"])  # valid ones, from manuals
    return _say(rng, vin, "VIN {}", "He drove {} into a wall.")


def _device(rng: random.Random) -> tuple[str, str]:
    forms = [f"PJN{_digits(rng, 6)}", _digits(rng, 8), f"{_digits(rng, 4)}-A{_digits(rng, 2)}"]
    if rng.random() < 0.2:
        return _say(rng, f"(01)0{_digits(rng, 13)}(21){_digits(rng, 6)}", "UDI {}", "Label {} scanned.")
    return _say(
        rng, rng.choice(forms), "Pacemaker serial number {}.", "S/N: {}", "Serial # {}", "Device ID {}", "pump SN {}"
    )


def _url(rng: random.Random) -> tuple[str, str]:
    forms = [
        "https://photos.example.net/u/{}",
        "www.{}-family.example.com",
        "facebook.com/{}.smith",
        "http://blog.{}.name/me",
    ]
    return _say(
        rng, rng.choice(forms).replace("{}", rng.choice(FIRST[:5]).lower()), "See {} for more.", "Posted at {}."
    )


def _ip(rng: random.Random) -> tuple[str, str]:
    forms = [
        ".".join(str(rng.randint(10, 250)) for _ in range(4)),
        f"2001:db8::{_digits(rng, 3)}:7334",
        "fe80::1ff:fe23:4567:890a",
    ]
    return _say(rng, rng.choice(forms), "Portal login from {}.", "IP address {}", "client={}")


def _other(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        code = "".join(rng.choice("0123456789abcdef") for _ in range(32))
        return _say(rng, "-".join([code[:8], code[8:12], code[12:16], code[16:20], code[20:]]), "Session {}.", "id={}")
    return _say(rng, _digits(rng, 6), "Subject ID {}", "participant number: {}", "Study ID: {}", "screening code {}")


MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    **{"name": _name, "address": _address, "place": _place, "zip": _zip, "date": _date, "age": _age, "phone": _phone},
    **{"fax": _fax, "e-mail": _email, "ssn": _ssn, "record number": _record, "plan number": _plan},
    **{"account number": _account, "licence number": _licence, "vehicle": _vehicle, "device": _device, "url": _url},
    **{"ip address": _ip, "other number": _other},
}
