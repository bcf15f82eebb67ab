"""How a row of each known data set of questions is read: medical exams, and problems with a known answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from medcot.data.choices import (
    as_index,
    check_same,
    cut_listed,
    format_question,
    match_text,
    read_index,
    read_letter,
    read_options,
)
from medcot.data.formats import RawRow
from medcot.data.reading import (
    Change,
    Fields,
    Given,
    Part,
    UnusableRow,
    check_tags,
    check_text,
    read_columns,
    read_reasoning,
    read_text,
    read_topic,
)
from medcot.records import AnswerKind, Problem

_EVIDENCE = re.compile(r"<answer>(.*?)<context>", re.DOTALL)


def _choose(
    stem: str,
    options: dict[str, str],
    gold: str | None,
    changes: tuple[Change, ...] = (),
    topic: str | None = None,
) -> Fields:
    if gold is None:
        changes = (*changes, Change.LABEL_HIDDEN)
    kind = AnswerKind.LETTER if gold else None
    return Fields(format_question(stem, options), None, None, options, gold, kind, topic, changes=changes)


def read_medqa(row: RawRow, given: Given) -> Fields:
    """Read MedQA: options by letter, the right one's letter, its text."""
    stem = read_text(row, "question", "question")
    options, changes = read_options(row.get("options"), "options")
    column = "answer_idx" if "answer_idx" in row else "answer_letter"
    gold = read_letter(row.get(column), options, column)
    check_same(row.get("answer"), gold, options, "answer")
    return _choose(stem, options, gold, changes, read_topic(row, "meta_info"))


def read_medmcqa(row: RawRow, given: Given) -> Fields:
    """Read MedMCQA as the Hub has it, the right option counted from 0."""
    return _read_opa(row, lambda options: read_index(row.get("cop"), options, "cop", first=0))


def read_raw_medmcqa(row: RawRow, given: Given) -> Fields:
    """Read MedMCQA as its authors have it, the right option counted from 1."""
    return _read_opa(row, lambda options: read_index(row.get("cop"), options, "cop", first=1))


def read_medbullets(row: RawRow, given: Given) -> Fields:
    """Read Medbullets as its authors have it, an option a column."""
    fields = _read_opa(row, lambda options: read_letter(row.get("answer_idx"), options, "answer_idx"))
    check_same(row.get("answer"), fields.gold, fields.options or {}, "answer")
    return fields


def _read_opa(row: RawRow, find_gold: Callable[[Mapping[str, str]], str | None]) -> Fields:
    stem = read_text(row, "question", "question")
    texts = {letter: row[f"op{letter}"] for letter in "abcde" if f"op{letter}" in row}
    options, changes = read_options(texts, "opa, opb, …")
    return _choose(stem, options, find_gold(options), changes, read_topic(row, "subject_name"))


def counts_from_0(rows: Sequence[RawRow], given: Given) -> bool:
    """Whether the first rows can be counted from 0: no right option is number 4."""
    return all(as_index(row.get("cop")) != 4 for row in rows)


def counts_from_1(rows: Sequence[RawRow], given: Given) -> bool:
    """Whether the first rows can be counted from 1: no right option is number 0 or hidden."""
    return all(as_index(row.get("cop")) not in (-1, 0) for row in rows)


def read_pubmedqa(row: RawRow, given: Given) -> Fields:
    """Read PubMedQA: the abstract, its question, and yes, no or maybe."""
    stem, what = read_text(row, "question", "question"), Part("question", "the abstract ('context')")
    value = row.get("context")
    parts = value.get("contexts") if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    if not isinstance(parts, list):
        raise what.refuse("has no list 'contexts'", Problem.FORM)
    abstract = "\n".join(check_text(part, what) for part in parts)
    check_tags(abstract, what)
    options = {"A": "yes", "B": "no", "C": "maybe"}
    decision = row.get("final_decision")
    gold = match_text(decision, options) if isinstance(decision, str) else None
    if gold is None and decision not in (None, ""):
        raise UnusableRow("the answer ('final_decision') is none of yes, no and maybe", "gold", Problem.FORM)
    return _choose(f"{abstract}\n\n{stem}", options, gold)


def read_mmlu(row: RawRow, given: Given) -> Fields:
    """Read MMLU: a list of choices and the right one's number, or letter."""
    stem = read_text(row, "question", "question")
    options, changes = read_options(row.get("choices"), "choices")
    value = row.get("answer")
    number = as_index(value)
    gold = read_letter(value, options, "answer") if number is None else read_index(value, options, "answer", first=0)
    return _choose(stem, options, gold, changes, read_topic(row, "subject"))


def read_answered(row: RawRow, given: Given) -> Fields:
    """Read options and an answer that is a letter, or the text of one option; a number would be a guess."""
    stem = read_text(row, "question", "question")
    options, changes = read_options(row.get("options"), "options")
    answer = row.get("answer")
    gold = match_text(answer, options) if isinstance(answer, str) else None
    return _choose(stem, options, gold or read_letter(answer, options, "answer"), changes)


def read_mmlu_pro(row: RawRow, given: Given) -> Fields:
    """Read MMLU-Pro: letter and number of the right option must agree."""
    stem = read_text(row, "question", "question")
    options, changes = read_options(row.get("options"), "options")
    gold = read_letter(row.get("answer"), options, "answer")
    if gold != read_index(row.get("answer_index"), options, "answer_index", first=0):
        raise UnusableRow("the answer's letter ('answer') and number ('answer_index') differ", "gold", Problem.CONFLICT)
    return _choose(stem, options, gold, changes, read_topic(row, "category"))


def read_medxpertqa(row: RawRow, given: Given) -> Fields:
    """Read MedXpertQA, whose questions list the options once more."""
    options, changes = read_options(row.get("options"), "options")
    stem, cut = cut_listed(read_text(row, "question", "question"), options)
    gold = read_letter(row.get("label"), options, "label")
    return _choose(stem, options, gold, changes + cut, read_topic(row, "medical_task"))


def read_gpqa(row: RawRow, given: Given) -> Fields:
    """Read GPQA, putting the right option among the others."""
    stem = read_text(row, "Question", "question").strip()
    columns = ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
    texts = [read_text(row, column, "options", called="option").strip() for column in columns]
    # The right one always comes first; its place among the others must not tell, and must not change from run to run.
    order = sorted(texts, key=lambda text: hashlib.sha256(f"{stem}\n{text}".encode()).digest())
    options, changes = read_options(order, "Correct Answer, Incorrect Answer …")
    return _choose(stem, options, "ABCD"[order.index(texts[0])], changes, read_topic(row, "Subdomain"))


def read_head_qa(row: RawRow, given: Given) -> Fields:
    """Read HEAD-QA, whose options are numbered from 1; 0 is a question that was annulled."""
    stem = read_text(row, "qtext", "question")
    options, changes = read_options(row.get("answers"), "answers")
    gold = None if as_index(row.get("ra")) == 0 else read_index(row.get("ra"), options, "ra", first=1)
    return _choose(stem, options, gold, changes, read_topic(row, "category"))


def read_bioasq(row: RawRow, given: Given) -> Fields:
    """Read BioASQ's factoid questions."""
    question = read_text(row, "question", "question")
    found = _EVIDENCE.search(read_text(row, "text", "gold", called="answer with its context"))
    if found is None or not found[1].strip():
        raise UnusableRow("the text ('text') has no answer between <answer> and <context>", "gold", Problem.MISSING)
    return Fields(question, gold=found[1].strip(), answer_kind=AnswerKind.TEXT)


def read_verifiable(row: RawRow, given: Given) -> Fields:
    """Read medical-o1-verifiable-problem: an open question and its short answer."""
    question = read_text(row, "Open-ended Verifiable Question", "question")
    gold = read_text(row, "Ground-True Answer", "gold", called="gold answer")
    return Fields(question, gold=gold, answer_kind=AnswerKind.TEXT)


def read_plain(row: RawRow, given: Given) -> Fields:
    """Read a question, and its answer where there is one."""
    question = read_text(row, "question", "question")
    if "answer" not in row:
        return Fields(question)
    gold = read_text(row, "answer", "gold", called="gold answer")
    return Fields(question, gold=gold, answer_kind=AnswerKind.TEXT)


def read_medcalc(row: RawRow, given: Given) -> Fields:
    """Read MedCalc-Bench: a case, a question, a number with the way to it."""
    note = read_text(row, "Patient Note", "question", called="patient note")
    question = read_text(row, "Question", "question")
    value = row.get("Ground Truth Answer")
    gold = value if isinstance(value, str) else repr(value) if isinstance(value, (int, float)) else ""
    if not gold.strip() or isinstance(value, bool):
        raise UnusableRow("the gold answer ('Ground Truth Answer') is no text and no number", "gold", Problem.TYPE)
    thought = read_reasoning(row, "Ground Truth Explanation")
    is_number = re.fullmatch(r"-?[0-9.,]+(e-?[0-9]+)?", gold.strip()) is not None
    kind = AnswerKind.NUMBER if is_number else AnswerKind.TEXT
    topic = read_topic(row, "Calculator Name")
    text = f"{note}\n\n{question}"
    return Fields(text, thought.reasoning, gold, None, gold, kind, topic, thought.lacks, thought.changes)


def read_m23k(row: RawRow, given: Given) -> Fields:
    """Read m23k, whose prompts hold their options."""
    fields = read_columns(row, given)
    letter = row.get("answer_letter")
    if isinstance(letter, str) and re.fullmatch(r"[A-Z]", letter.strip()):
        return replace(fields, gold=letter.strip(), answer_kind=AnswerKind.LETTER, topic=read_topic(row, "source"))
    return replace(fields, topic=read_topic(row, "source"))


def read_medreason(row: RawRow, given: Given) -> Fields:
    """Read MedReason; the right option is known where the answer begins with its text."""
    fields = replace(read_columns(row, given), topic=read_topic(row, "dataset_name"))
    value = row.get("options")
    if value is None or (isinstance(value, str) and value.strip() in ("", "None", "{}", "[]")):
        return fields
    options, changes = read_options(value, "options")
    assert fields.response is not None, "read_columns refuses a row without"
    gold = match_text(fields.response.partition("Explanation:")[0], options)
    return replace(
        fields,
        question=format_question(fields.question, options),
        options=options,
        gold=gold,
        answer_kind=AnswerKind.LETTER if gold else None,
        changes=fields.changes + changes,
    )
