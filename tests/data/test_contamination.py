"""Contamination: planted leaks are convicted, boilerplate is not, and the real rows are read as people read them."""

import json
import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot.data.contamination import Contamination, Item, Pair, find_contaminated, mark_shared
from medcot.data.findings import Chunk, Finding, Severity
from medcot.data.leaks import Verdict
from medcot.records import Example

SHARED = Path(__file__).parents[2] / "../shared/data"
MEDQA = SHARED / "MedQA-USMLE-4-options/test.jsonl"
REAL = SHARED / "medical-o1-reasoning-SFT/train.jsonl"

# Written for these tests.
VIGNETTE = (
    "A 52-year-old bus driver comes to the clinic because his left knee has been swollen and warm since Sunday, when he"
    " came home from a wedding. He takes hydrochlorothiazide 25 mg for hypertension and drinks four beers a day. His"
    " temperature is 37.9°C, pulse is 88/min, and blood pressure is 142/86 mm Hg. The joint fluid holds needle-shaped"
    " crystals that are negatively birefringent. Which of the following is the most appropriate next step in the"
    " management of this patient?"
)
OPTIONS = {"A": "Colchicine by mouth", "B": "Allopurinol", "C": "Joint replacement", "D": "Ceftriaxone"}
STOCK_ITEMS = [
    f"A {age}-year-old {who}. Her temperature is 37.0°C (98.6°F), pulse is 80/min, respirations are 14/min, and blood"
    f" pressure is 120/80 mm Hg. Oxygen saturation is 98% on room air. {rest} Which of the following is the most likely"
    " cause of this patient's condition?"
    for age, who, rest in [
        (23, "student has lost the feeling in two fingers after a long flight", "Her grip is weak."),
        (61, "farmer noticed a black spot on his heel during the harvest", "Borders are irregular."),
        (35, "teacher wakes at night with burning behind the breastbone", "Endoscopy is planned."),
    ]
]
SHORT = "Which nerve is most often injured in fractures of the fibular neck?"
DENSE = (
    "A {}-year-old glazier fell {} m onto his back. His temperature is {}°C, pulse is {}/min and weak, respirations are"
    " {}/min, and blood pressure is {}/{} mm Hg. He moves {} of 4 limbs. After {} mL of saline his skin is still warm"
    " and his pulse only {}/min. Which kind of shock does he have?"
)
GIVEN, CHANGED = (
    DENSE.format(41, 6, 36.2, 48, 22, 78, 40, 2, 1500, 52),
    DENSE.format(29, 9, 35, 44, 24, 70, 38, 1, 900, 50),
)
ITEMS: list[Item] = [
    ("Made", Example("1", VIGNETTE, "made", options=OPTIONS)),
    *(("Made", Example(str(2 + i), text, "made")) for i, text in enumerate(STOCK_ITEMS)),
    (
        "Short",
        Example("1", SHORT, "made", options={"A": "Deep peroneal nerve", "B": "Tibial nerve", "C": "Sural nerve"}),
    ),
    (
        "Short",
        Example("2", "Drug of choice in absence seizures?", "made", options={"A": "Ethosuximide", "B": "Phenytoin"}),
    ),
    ("Short", Example("3", "Koplik spots?", "made")),
    ("Made", Example("5", GIVEN, "made")),
]
LONG = "Consider what follows and answer with care. " * 40
# As VIGNETTE in stock phrases only.
OTHER = (
    "A 30-year-old cook has had a cough with blood since Tuesday. His temperature is 37.9°C, pulse is 88/min, and blood"
    " pressure is 142/86 mm Hg. Which of the following is the most appropriate next step in the management of this"
    " patient?"
)


def _row(question: str, **more: object) -> Example:
    return replace(Example("x:1", question, "x", "Thought.", "Answer."), **more)


def _find(*rows: str | Example) -> list[Pair]:
    return find_contaminated([_row(row) if isinstance(row, str) else row for row in rows], ITEMS)


LEAKS = {
    "exact": (VIGNETTE, 0, Verdict.WHOLE),
    "retyped": (VIGNETTE.upper().replace(",", " ,").replace("-", "‑"), 0, Verdict.WHOLE),
    "options appended": (f"{VIGNETTE}\nA. Colchicine by mouth\nB. Allopurinol\nC. Ceftriaxone", 0, Verdict.WHOLE),
    "inside a longer text": (f"{LONG}{VIGNETTE} {LONG}", 0, Verdict.WHOLE),
    "a part of it": (f"Read this. {VIGNETTE[:300]} What would you tell him?", 0, Verdict.PASSAGE),
    "other numbers": (CHANGED, 7, Verdict.LIKENESS),
    "other numbers, inside": (f"{LONG}{CHANGED} {LONG}", 7, Verdict.LIKENESS),
    "some other words": (
        CHANGED.replace("glazier", "roofer").replace("fell", "dropped").replace("After", "With"),
        7,
        Verdict.LIKENESS,
    ),
    "stock item, exact": (STOCK_ITEMS[1], 2, Verdict.WHOLE),
    "short": (SHORT.lower(), 4, Verdict.WHOLE),
    "short, prefixed": (f"Answer this question: {SHORT}", 4, Verdict.WHOLE),
    "short with options": (
        "Pharmacology quiz for the second year, part three. Drug of choice in absence seizures? (A) Phenytoin (B)"
        " ethosuximide (C) another one of the above",
        5,
        Verdict.OPTIONS,
    ),
    "two words": ("Koplik spots", 6, Verdict.WHOLE),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_leaks_are_convicted(leak: str) -> None:
    text, item, verdict = LEAKS[leak]
    (pair,) = [pair for pair in _find(text) if pair.is_confirmed]
    assert (pair.item, pair.judgement.verdict) == (item, verdict)


INNOCENT = {
    "boilerplate": (OTHER, 1),
    "boilerplate of a hundred characters": (
        "A nurse feels dizzy. Her temperature is 37.0°C (98.6°F), pulse is 80/min, respirations are 14/min, and blood"
        " pressure is 120/80 mm Hg. Oxygen saturation is 98% on room air. What is wrong?",
        3,
    ),
    "the stock sentence alone": (
        "Which of the following is the most appropriate next step in the management of this patient?",
        1,
    ),
    "stock sentence, another matter": (
        "Which of the following is the most likely cause of this patient's condition, asthma or bronchitis?",
        3,
    ),
    "a short question in another": (
        "A man was given valproate, which is not the drug of choice in absence seizures; what should his doctor have"
        " asked for first, and why is that?",
        1,
    ),
    "a short question with one of its options": (
        "Is phenytoin the drug of choice in absence seizures and in seizures of any kind, or only in those?",
        1,
    ),
    "numbers only": ("0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", 0),
    "nothing": ("", 0),
    "two words in more": ("Why do Koplik spots come first?", 0),
}


@pytest.mark.parametrize("text", INNOCENT)
def test_the_innocent_are_not_convicted(text: str) -> None:
    question, num_pairs = INNOCENT[text]
    pairs = _find(question)
    assert [pair.judgement.verdict for pair in pairs] == [Verdict.SUSPECT] * num_pairs


def test_token_set_ratio_alone_would_have_convicted() -> None:
    """Subsets have a ratio of 100: a short item whose words all stand in a long row, and the reverse."""
    item = "Which of the following is the most appropriate next step in the management of this patient with asthma?"
    row = item.replace("asthma", "pneumonia") + " He had asthma as a child."
    (pair,) = find_contaminated([_row(row)], [("B", Example("1", item, "b"))])
    assert pair.judgement.likeness >= 90 and not pair.is_confirmed
    row = "Which of the following is the most likely cause of this patient's condition?"
    (pair,) = find_contaminated([_row(row)], [ITEMS[1]])
    assert pair.judgement.likeness >= 90 and not pair.is_confirmed


def test_the_same_question_in_two_benchmarks_is_not_stock() -> None:
    items = [(name, Example("1", GIVEN + end, "x")) for name in "abcd" for end in ("", " Explain.")]
    pairs = find_contaminated([_row(CHANGED)], items)
    assert [pair.judgement.verdict for pair in pairs] == [Verdict.LIKENESS] * len(items)


def test_one_template_with_many_numbers_convicts_only_with_its_own() -> None:
    """As benchmarks of calculators have it; another set of numbers is another question there."""
    plain = (
        " Using the formula that your department prefers, and without rounding before the last step, compute how many"
        " millilitres of plasma the kidneys clear of creatinine in a minute, and say what you would do next."
    )
    for template in (DENSE, DENSE + plain):
        filled = [template.format(*range(first, first + 10)) for first in (10, 30, 50, 70)]
        items = [("Calc", Example(str(number), text, "x")) for number, text in enumerate(filled)]
        pairs = find_contaminated([_row(template.format(*range(81, 91)))], items)
        assert [pair.is_confirmed for pair in pairs] == [False] * 4
        pairs = find_contaminated([_row(f"Please: {filled[2]}")], items)
        assert [pair.item for pair in pairs if pair.is_confirmed] == [2]


def test_tables_of_numbers_are_no_evidence() -> None:
    item = "The counts on fourteen days were 3 5 8 9 12 14 9 7 5 4 3 2 2 1 per field; which phase came last?"
    row = "Add 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 and divide the sum by two."
    assert find_contaminated([_row(row)], [("B", Example("1", item, "x"))]) == []


def test_a_confirmed_row_is_not_a_suspect_too() -> None:
    pairs = _find(STOCK_ITEMS[1])
    assert sorted(pair.is_confirmed for pair in pairs) == [False, False, True]
    assert _check([_row(STOCK_ITEMS[1])]).keys() == {"contamination_confirmed", "contamination"}


def test_options_beside_the_question_count() -> None:
    question = "We are in the clinic of a neurologist, on a Monday: drug of choice in absence seizures?"
    assert not [pair for pair in _find(question) if pair.is_confirmed]
    beside = _row(question, options={"A": "phenytoin", "B": "Ethosuximide.", "C": "Aspirin"})
    assert [pair.judgement.verdict for pair in _find(beside)] == [Verdict.OPTIONS]


def test_chinese_questions() -> None:
    item = "患者，男性，四十五岁，因反复上腹部疼痛伴黑便三天入院，既往有长期服用阿司匹林史，最可能的诊断是什么？"
    row = "请回答：" + item.replace("三天", "五天") + "谢谢。"
    (pair,) = find_contaminated([_row(row)], [("中", Example("1", item, "x"))])
    assert pair.is_confirmed
    assert find_contaminated([_row("患者，女性，二十岁，咳嗽两周。")], [("中", Example("1", item, "x"))]) == []


class Memory:
    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows

    def fetch(self, numbers: Sequence[int]) -> dict[int, Example]:
        return {number: self.rows[number - 1] for number in numbers}


def _check(rows: Sequence[Example], items: Sequence[Item] = ITEMS, size: int = 5) -> dict[str, Finding]:
    check = pickle.loads(pickle.dumps(Contamination(tuple(items))))
    parts = [(start, rows[start : start + size]) for start in range(0, len(rows), size)]
    chunks = (Chunk(start + 1, len(part), part) for start, part in parts)
    tallies = (pickle.loads(pickle.dumps(check.map(chunk))) for chunk in chunks)
    return {finding.id: finding for finding in check.reduce(tallies, Memory(rows))}


def test_findings_show_both_sides() -> None:
    texts = [VIGNETTE, "What is gout?", OTHER, CHANGED, "Koplik spots"]
    rows = [_row(text, id=f"x:{number}") for number, text in enumerate(texts, 1)]
    found = _check(rows, size=2)
    confirmed, suspects = found["contamination_confirmed"], found["contamination_suspects"]
    assert (confirmed.severity, confirmed.count, confirmed.rows) == (Severity.RED, 3, ("x:1", "x:4", "x:5"))
    assert confirmed.figures["leaked"] == {"Made": 2, "Short": 1}
    assert (suspects.severity, suspects.count, suspects.rows) == (Severity.YELLOW, 1, ("x:3",))
    (shown,) = suspects.evidence
    assert list(shown.parts) == ["training question", "Made 1", "in common"]
    passage = "⟦His temperature is 37.9°C, pulse is 88/min, and blood pressure is 142/86 mm Hg.⟧"
    assert passage in shown.parts["training question"] and passage in shown.parts["Made 1"]
    assert found["contamination"].figures == {"rows": 5, "pairs": 4, "items": {"Made": 5, "Short": 3}}
    assert _check(rows[1:2]).keys() == {"contamination"}
    assert _check([], [])["contamination"].says.endswith("(none).")


def test_a_shared_passage_is_marked_in_the_original_text() -> None:
    own, other = mark_shared("Well. The Left  KNEE, (swollen) hurts", "his left knee swollen", 0)
    assert (own, other) == ("Well. The ⟦Left  KNEE, (swollen)⟧ hurts", "his ⟦left knee swollen⟧")
    own, _ = mark_shared("z " * 5_000 + "left knee swollen", "left knee swollen", 5_000)
    assert own.startswith("(9,400 characters) …") and own.endswith("⟦left knee swollen⟧")


WORD = st.sampled_from([*VIGNETTE.split()[:20], *SHORT.split(), "心", "١", "+", "\x00", "\ud800", "-5", ""])
TEXT = st.one_of(
    st.text(max_size=30),
    st.lists(WORD, max_size=40).map(" ".join),
    st.sampled_from([text for text, _, _ in LEAKS.values()] + [text for text, _ in INNOCENT.values()]),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXT, max_size=8), st.lists(st.tuples(st.sampled_from("ab"), TEXT), max_size=4), st.integers(1, 4))
def test_any_text_and_any_chunks_give_the_same(texts: list[str], more: list[tuple[str, str]], size: int) -> None:
    items = [*ITEMS[:3], *((name, Example("9", text, "x", options={"A": text, "B": ""})) for name, text in more)]
    rows = [_row(text, id=f"x:{number}") for number, text in enumerate(texts)]
    found = _check(rows, items, size)
    assert found == _check(rows, items, 100)
    places = {pair.place for pair in find_contaminated(rows, items) if pair.is_confirmed}
    assert len(places) == (found["contamination_confirmed"].count if "contamination_confirmed" in found else 0)


def test_a_long_row_costs_no_more_than_its_length() -> None:
    rows = [_row("fever and chills " * 350_000 + VIGNETTE + " fever and chills" * 100_000)]
    started = time.process_time()
    (pair,) = [pair for pair in find_contaminated(rows, ITEMS) if pair.is_confirmed]
    assert pair.item == 0 and time.process_time() - started < 15


def test_settings_name_the_items() -> None:
    one, other = Contamination(tuple(ITEMS)), Contamination(tuple(ITEMS[:-1]))
    assert one.settings == Contamination(tuple(ITEMS)).settings != other.settings


@cache
def _medqa() -> list[Item]:
    for path in (MEDQA, REAL):
        if not path.exists():
            pytest.skip(f"the real questions are not here ({path})")
    raw = [json.loads(line) for line in MEDQA.read_text(encoding="utf-8").split("\n") if line]
    return [
        ("MedQA", Example(str(i), row["question"], "medqa", options=row["options"])) for i, row in enumerate(raw, 1)
    ]


def test_the_real_rows_against_medqa() -> None:
    """Eleven pairs in four rows share 13 words; read one by one, none is the same question."""
    items = _medqa()
    raw = [json.loads(line) for line in REAL.read_text(encoding="utf-8").split("\n") if line]
    rows = [_row(row["Question"], id=f"x:{number}") for number, row in enumerate(raw, 1)]
    found = _check(rows, items, 50)
    assert found.keys() == {"contamination_suspects", "contamination"}
    assert found["contamination_suspects"].rows == ("x:1", "x:108", "x:127", "x:161")
    assert found["contamination"].figures["pairs"] == len(found["contamination_suspects"].evidence) == 11
    for evidence in found["contamination_suspects"].evidence:
        assert all("⟦" in text for label, text in evidence.parts.items() if label != "in common")


def test_medqa_against_itself() -> None:
    """Every question is found; of all other pairs only those whose author used a text again."""
    items = _medqa()
    pairs = [pair for pair in find_contaminated([item for _, item in items], items) if pair.is_confirmed]
    assert sum(pair.place == pair.item for pair in pairs) == 1273
    others = {(pair.place + 1, pair.item + 1) for pair in pairs if pair.place < pair.item}
    assert others == {(254, 667), (317, 383), (353, 1115), (536, 1130)}
