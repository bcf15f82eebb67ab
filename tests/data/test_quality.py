"""Quality: each fault by its own rule, none of them on good rows, and the same however the rows are cut into chunks."""

import json
import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot.data import flaws, quality
from medcot.data.columns import build_examples
from medcot.data.findings import Chunk, Finding, Severity
from medcot.data.flaws import find_flaws, find_loop, shorten
from medcot.data.languages import find_languages
from medcot.data.quality import LEAST_SHARED, RED_SHARE, Quality, compute_shared, find_missing, judge
from medcot.data.sources import Table, load_rows
from medcot.records import AnswerKind, Example, Quarantined

REAL = Path(__file__).parents[2] / "../shared/data/medical-o1-reasoning-SFT/train.jsonl"
READER = SimpleNamespace(fetch=lambda numbers: {})
GOOD = Example(
    "x:1",
    "A 61-year-old man has chest pain and ST elevation in leads II, III and aVF. Which artery is occluded?",
    "x",
    "ST elevation in II, III and aVF is inferior. That wall is fed by the posterior descending artery, which in most "
    "people comes off the right coronary artery. So the occluded vessel should be the right coronary artery.",
    "The right coronary artery is occluded: the leads show an inferior infarction.",
)


def faults_of(example: Example) -> set[str]:
    return {fault for fault, _ in judge(example)}


def flaws_of(text: str) -> set[str]:
    return {fault for fault, _ in find_flaws(text)}


def find(
    examples: Sequence[Example], quarantined: Sequence[Quarantined] = (), check: Quality | None = None
) -> dict[str, Finding]:
    """The findings by id, from one chunk; those from one chunk a row must be the same."""
    check = check or Quality()
    whole = check.map(Chunk(1, len(examples) + len(quarantined), examples, quarantined))
    pieces = [check.map(Chunk(n, 1, [example])) for n, example in enumerate(examples, start=1)]
    pieces += [check.map(Chunk(n, 1, [], [item])) for n, item in enumerate(quarantined, start=len(examples) + 1)]
    pieces = [pickle.loads(pickle.dumps(piece)) for piece in pieces]
    found = check.reduce([whole], READER)
    assert check.reduce(pieces, READER) == found
    return {finding.id: finding for finding in found}


@pytest.fixture(scope="module")
def real() -> list[Example]:
    if not REAL.exists():
        pytest.skip(f"the 198 real rows are not here ({REAL})")
    return build_examples(load_rows(str(REAL))).examples


def test_a_good_row_has_no_fault() -> None:
    assert faults_of(GOOD) == set() and find([GOOD]) == {}


def test_the_198_real_rows_are_clean(real: list[Example]) -> None:
    assert find(real) == {}


def test_answers_of_other_rows_are_noticed(real: list[Example]) -> None:
    shared = sorted(compute_shared(row.reasoning or "", row.response or "") for row in real)
    assert shared[0] > 1.3 * LEAST_SHARED
    moved = [replace(row, response=real[n - 1].response) for n, row in enumerate(real)]
    missed = find(moved)["reasoning_misses_answer"]
    assert missed.count >= 0.94 * len(real) and missed.severity is Severity.YELLOW
    assert set(missed.evidence[0].parts) == {"end of reasoning", "response"}


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("no_reasoning", {"reasoning": None}),
        ("no_reasoning", {"reasoning": " \n"}),
        ("no_reasoning", {"reasoning": f"  {GOOD.question.upper()}!"}),
        ("no_reasoning", {"reasoning": GOOD.response}),
        ("no_answer", {"response": None}),
        ("no_answer", {"response": "\t"}),
        ("reasoning_in_question", {"question": f"{GOOD.question}\n\nThoughts:\n{GOOD.reasoning}\n\nAnswer:"}),
        ("reasoning_in_question", {"question": f"“{str(GOOD.reasoning).upper()}” — right or wrong?"}),
        ("tiny_reasoning", {"reasoning": "It is the right coronary artery."}),
        ("tiny_reasoning", {"question": "哪条动脉？", "reasoning": "是右冠状动脉。", "response": "右冠状动脉"}),
        ("reasoning_misses_answer", {"response": "Metformin lowers hepatic gluconeogenesis."}),
        ("reasoning_misses_answer", {"response": "B"}),
        ("gold_missing", {"gold": "Left circumflex artery"}),
        ("gold_missing", {"gold": "B", "options": {"A": "Right coronary artery", "B": "Left main stem"}}),
        ("gold_missing", {"gold": "4.5 mg", "answer_kind": AnswerKind.NUMBER}),
        ("loops", {"reasoning": GOOD.reasoning + " Wait, let me check the leads once more, is it inferior?" * 9}),
        ("placeholder", {"response": "As an AI language model, I cannot provide the right coronary artery."}),
        ("broken_text", {"response": "The patientâ€™s right coronary artery is occluded."}),
        ("markup", {"response": "The <b>right coronary artery</b> is occluded."}),
        ("mangled_dates", {"options": {"A": "2-May", "B": "3-4"}}),
    ],
)
def test_each_fault_is_found_by_itself(fault: str, changes: dict) -> None:
    assert faults_of(replace(GOOD, **changes)) == {fault}


@pytest.mark.parametrize(
    "changes",
    [
        {"gold": "right coronary artery"},
        {"gold": "Coronary artery, right"},
        {"gold": "A", "options": {"A": "Right coronary artery", "B": "Left main stem"}},
        {"gold": "B", "options": {"B": "Left main"}, "response": "The answer is B: the right coronary artery."},
        {"gold": "B", "answer_kind": AnswerKind.LETTER, "response": "**B**. The right coronary artery."},
        {"gold": "1,500 mL", "answer_kind": AnswerKind.NUMBER, "response": "Coronary artery: 1500.0 mL."},
    ],
)
def test_a_known_answer_that_is_there(changes: dict) -> None:
    assert faults_of(replace(GOOD, **changes)) == set()


def test_an_article_is_no_answer() -> None:
    row = replace(GOOD, gold="A", answer_kind=AnswerKind.LETTER, response="A right coronary artery occlusion.")
    assert faults_of(row) == {"gold_missing"}


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        (
            "placeholder",
            ["I'm sorry, but I can’t help with that.", "TODO: write", "Lorem ipsum dolor", "[insert name]"],
        ),
        ("placeholder", ["N/A", " null ", "{{response}}", "I am unable to provide advice", "作为一个人工智能，我不能"]),
        (
            "broken_text",
            ["donâ€™t", "37Â°C", "cafÃ©", "5 Î¼g", "\ufffd", "a\x00b", "\x1b[0m", "ï¿½", "\x92", "Ã¢â‚¬â„¢", "â‰¥ 5"],
        ),
        ("markup", ["a<br>b", "</p>", '<a href="x">y</a>', "&nbsp;", "&#39;", "&lt;5", "H<sub>2</sub>O", "<!-- x -->"]),
        ("mangled_dates", ["take 2-May tablets", "gene Mar-03 is", "Sep-02", "1-Dec", "2021-05-02 00:00:00"]),
    ],
)
def test_flaws(fault: str, texts: list[str]) -> None:
    for text in texts:
        assert flaws_of(text) == {fault}, text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Give <5 mg if p < 0.05 and a<b and c>d.",
            "R&D; AT&T",
            "x <y> z",
            "He said: “étonné »”. Âge, Île, Ñandú, Ça va ?",
        ),
        *("37 °C, 5 µg, α-blocker, Sjögren, “quotes”, naïve, β2", "tabs\tand\nlines\r\n", "Na", "None", "none", "A"),
        *(
            "2-May-2021",
            "on 2 May",
            "12-Mar-2020",
            "mid-May",
            "May 2003",
            "COVID-19",
            "Mar-2020",
            "1-2-3",
            "IL-10 and CD-34",
        ),
        *("The patient cannot provide a history; I can help with the pain.", "see [1] and [2, 3]", "a to-do list"),
    ],
)
def test_what_is_no_flaw(text: str) -> None:
    assert flaws_of(text) == set()


def test_no_quick_question_hides_a_flaw() -> None:
    for key, phrases in flaws._PHRASES.items():
        for phrase in phrases:
            for text in (f"{key} And {phrase}", f"{key.upper()} Café: {phrase.title()}".replace("'", "’")):
                assert "placeholder" in flaws_of(text), text
    for code in range(0x10000):
        if flaws._CONTROLS.match(chr(code)):
            assert "broken_text" in flaws_of(f"Fine {chr(code)} 好"), code
    for lead in "ÂÃ":
        assert "broken_text" in flaws_of(f"Fine {lead}© 好")
    assert all("broken_text" in flaws_of(f"Fine {text}") for text in ("Î±", "Ï€", "â€™", "ï»¿", "ðŸ˜"))


def test_what_the_very_end_shares_settles_it(real: list[Example]) -> None:
    pairs = [(row.reasoning or "", row.response or "") for row in real]
    moved = [(reasoning, response) for (reasoning, _), (_, response) in pairwise(pairs)]
    for reasoning, response in [*pairs, *moved]:
        assert quality._misses(reasoning, response) == (compute_shared(reasoning, response) < LEAST_SHARED)


def test_loops_are_found_wherever_they_are() -> None:
    body = " ".join(f"word{n} and finding number {n} of the series" for n in range(300))
    assert find_loop(body) is None and find_loop("-" * 5_000) is None and find_loop("| --- | --- |\n" * 90) is None
    for loop in ("so the answer is B. " * 150, "血压升高，心率加快。" * 300):
        for text in (loop, loop + body, body + loop, body[:6_000] + loop + body[6_000:]):
            assert find_loop(text) is not None
    assert find_loop(body + " the final answer is the same as it was before" * 2) is None


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        (GOOD.question + " " + (GOOD.reasoning or ""), ("en",)),
        ("Un hombre de 61 años con dolor en el pecho que se irradia a la espalda y no cede con el reposo", ("es",)),
        ("Un homme de 61 ans avec une douleur dans la poitrine qui irradie et ne cède pas au repos est vu", ("fr",)),
        ("Der Patient ist 61 Jahre alt und klagt über Schmerzen in der Brust, die nicht mit der Atmung", ("de",)),
        ("Um homem de 61 anos com dor no peito que não cede com o repouso e que irradia para as costas", ("pt",)),
        ("患者男性，61岁，胸痛三小时，心电图示下壁导联抬高。", ("zh",)),
        ("患者は61歳の男性で、胸痛を訴えています。", ("ja",)),
        ("환자는 61세 남성으로 흉통을 호소하였다.", ("ko",)),
        ("Пациент жалуется на боль в груди", ("Cyrillic script",)),
        ("يعاني المريض من ألم في الصدر", ("Arabic script",)),
        ("Pt c/o CP x2d, SOB, EF 35%, s/p CABG", ()),
        ("TNF-α and β-blockers, 5 µg, γδ T cells", ()),
        ("", ()),
    ],
)
def test_languages(text: str, languages: tuple[str, ...]) -> None:
    assert find_languages([text]) == languages


def test_another_language_is_counted_against_the_most_spoken_or_the_one_named() -> None:
    chinese = replace(GOOD, id="x:2", reasoning="胸痛患者，心电图示下壁导联ST段抬高。" * 5)
    rows = [GOOD, replace(GOOD, id="x:3"), chinese]
    mixed = find(rows)["language_mixed"]
    assert (mixed.count, mixed.rows, mixed.severity) == (1, ("x:2",), Severity.YELLOW)
    assert mixed.figures["languages"] == {"en": 2, "en+zh": 1} and "'en'" in mixed.says
    assert "胸痛" in mixed.evidence[0].parts["reasoning"]
    assert find(rows, check=Quality(language="zh"))["language_mixed"].count == 3
    assert Quality().settings == Quality(language="zh").settings  # tallies serve both


def test_red_above_five_per_cent_yellow_below() -> None:
    assert RED_SHARE == 0.05
    shown = replace(GOOD, question=f"{GOOD.reasoning} So which artery?")
    bad_rows = {
        "no_reasoning": replace(GOOD, reasoning=""),
        "no_answer": replace(GOOD, response=None),
        "reasoning_in_question": shown,
    }
    for fault, bad in bad_rows.items():
        findings = [find([GOOD] * (100 - n) + [bad] * n)[fault] for n in (5, 6)]
        assert [finding.severity for finding in findings] == [Severity.YELLOW, Severity.RED]
        assert (
            findings[1].count == 6
            and findings[1].figures["rate"] == 0.06
            and "6 of 100 rows (6.0%)" in findings[1].says
        )
    others = find([replace(GOOD, response="<b>x</b> coronary artery inferior infarction")] * 9)
    assert others["markup"].severity is Severity.YELLOW and others["markup"].count == 9


def test_a_question_may_quote_a_thought_or_be_the_whole_of_it() -> None:
    reasoning = str(GOOD.reasoning)
    assert faults_of(replace(GOOD, question=f"{GOOD.question} {reasoning[: len(reasoning) // 2]}")) == set()
    few = " ".join(reasoning.split()[:19])  # too few words to prove anything
    assert "reasoning_in_question" not in faults_of(replace(GOOD, question=f"{few}?", reasoning=few))
    assert faults_of(replace(GOOD, question=reasoning)) == {"no_reasoning"}  # a copy is that and no more
    # Words, not letters: "…arteryless" does not hold "…artery".
    assert faults_of(replace(GOOD, question=f"{reasoning.rstrip('.')}less")) == set()


def test_rows_set_aside_count_as_rows_without() -> None:
    good = {"Question": "Why?", "Complex_CoT": "Because of it.", "Response": "So."}
    rows = [good, {**good, "Complex_CoT": ""}, {**good, "Response": None}, {**good, "Complex_CoT": "<think> </think>"}]
    rows += [{"Question": "Why?", "Response": "So."}, {**good, "Question": ""}, {**good, "Response": "a </think> b"}]
    columns = ["Question", "Complex_CoT", "Response"]
    built = build_examples(Table([dict(row) for row in rows], columns, "x.jsonl", "0", None, (), ()))
    assert [find_missing(item) for item in built.quarantined] == [
        *("no_reasoning", "no_answer", "no_reasoning", "no_reasoning", None, None)
    ]
    assert [(item.field, item.problem) for item in built.quarantined] == [
        ("reasoning", "empty"),
        ("response", "null"),
        ("reasoning", "empty"),
        ("reasoning", "missing"),
        ("question", "empty"),
        ("response", "tags"),
    ]
    found = find(built.examples, built.quarantined)
    assert (found["no_reasoning"].count, found["no_reasoning"].rows) == (3, ("row 2", "row 4", "row 5"))
    assert found["no_answer"].count == 1 and found["no_answer"].figures["num_rows"] == 7
    assert found["no_reasoning"].severity is Severity.RED


def test_the_tally_stays_small_and_lists_the_first_rows() -> None:
    bad = [replace(GOOD, id=f"x:{n}", reasoning="", response="<b>" + "x" * 3_000) for n in range(200)]
    tally = Quality().map(Chunk(1, 200, bad))
    assert len(pickle.dumps(tally)) < 20_000
    finding = find(bad)["markup"]
    assert finding.count == 200 and finding.rows == tuple(f"x:{n}" for n in range(20)) and len(finding.evidence) == 5


@settings(max_examples=150, deadline=None)
@given(st.text(), st.text(), st.text(), st.one_of(st.none(), st.text()))
def test_any_text_is_judged(question: str, reasoning: str, response: str, gold: str | None) -> None:
    example = Example("x:1", question, "x", reasoning, response, None, gold, AnswerKind.NUMBER if gold else None)
    for finding in Quality().reduce([Quality().map(Chunk(1, 1, [example]))], READER):
        for evidence in finding.evidence:
            json.dumps(dict(evidence.parts)).encode()
            assert all(part.isprintable() and len(part) < 400 for part in evidence.parts.values())


def test_shorten_shows_one_line_of_visible_characters() -> None:
    assert shorten("a\nb\x00c\ud800") == "a b\\u0000c\\ud800"
    assert shorten("x" * 500).endswith("x…") and shorten("x" * 500, -1).startswith("…x")


@pytest.mark.parametrize(
    "unit", ["a", "a ", "<", "<a ", "<b x=", "&", "-May", "1-", "ab ab ", "Ã", "[", "的", "\x00", "no way out "]
)
def test_time_grows_with_length_only(unit: str) -> None:
    text = unit * (300_000 // len(unit))
    start = time.process_time()
    list(judge(Example("x:1", text, "x", text[1:] + "b", text[2:] + "c", None, text[:9])))
    find_languages([text])
    assert time.process_time() - start < 3
