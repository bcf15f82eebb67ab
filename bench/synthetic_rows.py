"""Rows that look like medical chain-of-thought data, about 1 kB of JSON each, with known faults planted among them.

Every row is a function of the seed and its number, so a copy can name any earlier row, however far back, without
anything being kept; two machines make the same file. Sentences are drawn from short frames and long word lists, so that
two rows which are no copies share next to no run of five words. None of it is medicine.

Planted: exact copies; copies with other case and punctuation; near copies, with a word of question or response replaced
and some of the reasoning; a name with telephone number, record number or e-mail address (all of reserved or impossible
kinds); and questions of a benchmark, made in the same way, with other numbers.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

PLANTED = {"exact": 0.01, "normalised": 0.005, "near": 0.01, "identifier": 0.005, "leaked": 0.002}  # shares of all rows
NUM_ITEMS = 1273  # questions of the benchmark, as many as MedQA's test set has

_PLACES = (
    *("abdomen", "ankle", "arm", "axilla", "back", "breast", "calf", "chest", "ear", "elbow", "eye", "face", "flank"),
    *("foot", "forearm", "forehead", "groin", "hand", "heel", "hip", "jaw", "knee", "loin", "mouth", "neck", "nose"),
    *("palm", "pelvis", "rib", "scalp", "shin", "shoulder", "sole", "spine", "temple", "thigh", "throat", "thumb"),
    *("toe", "tongue", "trunk", "wrist"),
)
_SIGNS = (
    *("ache", "atrophy", "bleeding", "blister", "bruising", "burning", "clubbing", "colic", "cough", "cramps"),
    *("cyanosis", "discharge", "dizziness", "dyspnoea", "erythema", "fatigue", "fever", "flushing", "haematoma"),
    *("headache", "hoarseness", "itching", "jaundice", "lesion", "murmur", "nausea", "nodule", "numbness", "oedema"),
    *("pallor", "palpitations", "paresthesia", "petechiae", "pruritus", "purpura", "rash", "rigidity", "rigors"),
    *("spasm", "stiffness", "stridor", "swelling", "syncope", "tenderness", "tinnitus", "tremor", "ulcer", "urticaria"),
    *("vertigo", "vomiting", "weakness", "wheeze"),
)
_DRUGS = (
    *("amlodipine", "atenolol", "azithromycin", "bisoprolol", "captopril", "carbamazepine", "ciprofloxacin"),
    *("clopidogrel", "colchicine", "dapsone", "digoxin", "diltiazem", "doxycycline", "enalapril", "fluconazole"),
    *("furosemide", "gabapentin", "gliclazide", "heparin", "hydralazine", "ibuprofen", "insulin", "isoniazid"),
    *("labetalol", "lamotrigine", "levodopa", "lisinopril", "lithium", "metformin", "methotrexate", "metoprolol"),
    *("naproxen", "nifedipine", "omeprazole", "phenytoin", "prednisolone", "propranolol", "ramipril", "rifampicin"),
    *("salbutamol", "sertraline", "simvastatin", "spironolactone", "tacrolimus", "tamoxifen", "theophylline"),
    *("thyroxine", "valproate", "verapamil", "warfarin"),
)
_ILLNESSES = (
    *("acromegaly", "amyloidosis", "anaemia", "appendicitis", "asthma", "botulism", "bronchiectasis", "brucellosis"),
    *("cellulitis", "cholangitis", "cirrhosis", "coeliac disease", "cystitis", "dermatomyositis", "diverticulitis"),
    *("eclampsia", "emphysema", "encephalitis", "endocarditis", "epilepsy", "gastritis", "glaucoma", "gout"),
    *("haemochromatosis", "hepatitis", "hyperthyroidism", "iritis", "leprosy", "leukaemia", "lupus", "lymphoma"),
    *("malaria", "mastoiditis", "measles", "melanoma", "meningitis", "migraine", "mumps", "myasthenia", "myeloma"),
    *("myocarditis", "nephritis", "osteomyelitis", "pancreatitis", "pemphigus", "pericarditis", "pleurisy"),
    *("pneumonia", "polymyositis", "porphyria", "psoriasis", "pyelonephritis", "rabies", "rickets", "sarcoidosis"),
    *("scleroderma", "scurvy", "sepsis", "silicosis", "sinusitis", "tetanus", "thyroiditis", "tuberculosis"),
    *("typhoid", "uveitis", "vasculitis"),
)
_TESTS = (
    *("albumin", "amylase", "bicarbonate", "bilirubin", "calcium", "chloride", "cholesterol", "cortisol", "creatinine"),
    *("ferritin", "fibrinogen", "folate", "glucose", "haemoglobin", "lactate", "lipase", "magnesium", "phosphate"),
    *("platelets", "potassium", "prolactin", "sodium", "thyrotropin", "transferrin", "triglycerides", "troponin"),
    *("urate", "urea"),
)
_HOW = (
    *("acutely", "barely", "briefly", "chronically", "clearly", "constantly", "daily", "dully", "faintly", "gradually"),
    *("hourly", "intermittently", "mildly", "moderately", "nightly", "often", "partly", "persistently", "rarely"),
    *("recently", "repeatedly", "severely", "sharply", "slightly", "slowly", "suddenly", "unusually", "weekly"),
)
_WORDS = {"p": _PLACES, "s": _SIGNS, "d": _DRUGS, "i": _ILLNESSES, "t": _TESTS, "h": _HOW}
# Words that begin with @ are drawn: @p a place, @s a sign, @d a drug, @i an illness, @t a test, @h how, @n a number; in
# capitals, what the row's answer is about, once for all of it.
_ASKED = (
    "A @n year old with @i has @s of the @p and @h growing @s .",
    "After @d for @i there is @h more @s in the @p , and @t of @n .",
    "On @d , @t was @n , then @n ; the @p shows @s .",
    "There is @h worse @s near the @p since @d was stopped .",
)
_QUESTIONS = ("Is it @i , @i or @i ?", "Which comes first , @d or @d ?", "Does @s with @t of @n mean @i ?")
_REASONED = (
    "So @s of the @p @h suggests @i .",
    "But @t of @n speaks against @i , unless @d explains it .",
    "With @s and @s , @i is @h considered before @i .",
    "Wait , @d can raise @t to @n and bring @s .",
    "In @i the @p is @h spared , while @s comes with @s .",
    "A @t below @n with @s makes @i less likely than @i .",
    "Then @d fits , for @i @h answers to it , unlike @d .",
    "Hmm , @s at @n weeks , and the @p too : @i ?",
)
_CONCLUDED = "Thus @I , for @S of the @P and such @T belong to it , and @D is due ."
_ANSWERED = (
    "It is @I , shown by @S of the @P and @t of @n .",
    "Give @D for @n days and check @t @h , since @s may follow @D .",
    "Against @i stand @s and a @T of @n .",
)
_PEOPLE = (
    "The patient, {first} {last}, can be reached at 555-01{n:02d}.",
    "Medical record number MRN {n:02d}47{n:02d}11.",
    "Please write to {first}.{last}@example.org.",
)
_FIRST = ("Alice", "Bernard", "Chiara", "Dmitri", "Elena", "Farid", "Greta", "Hiro")
_LAST = ("Abbott", "Bergmann", "Castellano", "Dvorak", "Eriksen", "Fontaine", "Gupta", "Haddad")


def make_row(number: int, seed: int = 0) -> tuple[dict[str, str], str | None]:
    """Return row ``number`` (from 1) and what was planted there, if anything."""
    rng = random.Random(f"{seed}:{number}")
    kind = _draw_kind(rng, number)
    if kind in ("exact", "normalised", "near"):
        row = _make_text(_find_original(rng.randrange(1, number), seed), seed)
    else:
        row = _make_text(number, seed)
    if kind == "normalised":
        row = {key: text.upper().replace(",", " ,").replace(".", " .") for key, text in row.items()}
    elif kind == "near":
        changed = rng.choice(("Question", "Response"))
        row = {**row, changed: _replace(row[changed], 1, rng), "Complex_CoT": _replace(row["Complex_CoT"], 5, rng)}
    elif kind == "leaked":
        question = make_question(rng.randrange(NUM_ITEMS), seed)
        row = {**row, "Question": re.sub(r"\d+", lambda _: str(rng.randrange(2, 90)), question)}
    elif kind == "identifier":
        person = rng.choice(_PEOPLE).format(first=rng.choice(_FIRST), last=rng.choice(_LAST), n=rng.randrange(10, 100))
        row = {**row, "Question": f"{row['Question']} {person}"}
    return row, kind


def make_question(number: int, seed: int = 0) -> str:
    """Return a question of the benchmark, of which there are ``NUM_ITEMS``, from 0."""
    return _make_text(-1 - number, seed)["Question"]


def write_rows(path: Path, num_rows: int, seed: int = 0) -> Counter[str]:
    """Write a JSON Lines file, and return how many rows of each kind were planted."""
    planted: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, num_rows + 1):
            row, kind = make_row(number, seed)
            planted.update([kind] if kind else [])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return planted


def _draw_kind(rng: random.Random, number: int) -> str | None:
    place = rng.random()
    for kind, share in PLANTED.items():
        place -= share
        if place < 0:
            return kind if number > 1 else None  # the first row has nothing to copy
    return None


def _find_original(number: int, seed: int) -> int:
    """Return the last row up to ``number`` that has a text of its own."""
    while _draw_kind(random.Random(f"{seed}:{number}"), number) is not None:
        number -= 1
    return number


def _make_text(number: int, seed: int) -> dict[str, str]:
    rng = random.Random(f"{seed}:{number}:text")
    answer = {f"@{key.upper()}": rng.choice(choices) for key, choices in _WORDS.items()}
    return {
        "Question": _write(rng, [*rng.sample(_ASKED, 2), rng.choice(_QUESTIONS)], answer),
        "Complex_CoT": _write(rng, [*rng.choices(_REASONED, k=9), _CONCLUDED], answer),
        "Response": _write(rng, rng.sample(_ANSWERED, 3), answer),
    }


def _write(rng: random.Random, frames: list[str], answer: dict[str, str]) -> str:
    return " ".join(_fill(rng, frame, answer) for frame in frames)


def _fill(rng: random.Random, frame: str, answer: dict[str, str]) -> str:
    words: list[str] = []
    for word in frame.split():
        if word == "@n":
            words.append(str(int(rng.random() * 88) + 2))  # an age of 90 would be an identifier
        elif word in answer:
            words.append(answer[word])
        elif word[0] == "@":
            choices = _WORDS[word[1]]
            words.append(choices[int(rng.random() * len(choices))])
        elif word in ",.?;:":
            words[-1] += word
        else:
            words.append(word)
    return " ".join(words)


def _replace(text: str, num_words: int, rng: random.Random) -> str:
    words = text.split()
    for _ in range(num_words):
        words[rng.randrange(len(words))] = rng.choice(_HOW)
    return " ".join(words)
