"""The layouts that data sets come in, as a table: how each is recognised, what its columns are, how a row is read.

A layout is recognised by the names of its columns and then by its values: at least one of the first rows must read as
the layout says. One name fits many contents (``answer`` is a letter here, a number there, a text elsewhere), and the
usual tools act on names alone. A new data set is a row of ``LAYOUTS`` and a function of a few lines.

The schemas are those of the Hugging Face Hub: FreedomIntelligence/medical-o1-verifiable-problem and
Medical-R1-Distill-Data, UCSC-VLAA/m23k-tokenized and MedReason, GBaker/MedQA-USMLE-4-options, openlifescienceai/
medmcqa, qiaojin/PubMedQA, cais/mmlu, TIGER-Lab/MMLU-Pro, TsinghuaC3I/MedXpertQA, Idavidrein/gpqa, alesi12/head_qa_v2,
kroshan/BioASQ, ncbi/MedCalc-Bench; TRL's and OpenAI's documentation for chats.

MedMCQA is there twice: the Hub counts the right option from 0, the authors' own files from 1, under the same names.
Only the values can tell; where they cannot, both fit, and that is a question for the user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from medcot.data import exams
from medcot.data.chats import (
    CHAT_COLUMNS,
    holds_messages,
    read_instruction,
    read_messages,
    read_prompt_and_completion,
)
from medcot.data.formats import RawRow
from medcot.data.reading import Fields, Given, UnusableRow, read_columns


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout.

    Attributes:
        title: its name for people.
        needs: columns that it must have, each with what it becomes.
        read: makes fields of a row, or raises ``UnusableRow``.
        takes: columns that it may have.
        fits: looks at the first rows beyond that one of them reads.
        reasons: whether its rows can have a reasoning.
        grading_only: whether it is too plain to be recognised but as an evaluation set.
    """

    title: str
    needs: Mapping[str, str]
    read: Callable[[RawRow, Given], Fields]
    takes: Mapping[str, str] = field(default_factory=dict)
    fits: Callable[[Sequence[RawRow], Given], bool] = lambda rows, given: True
    reasons: bool = False
    grading_only: bool = False


def _is_flat(rows: Sequence[RawRow], given: Given) -> bool:
    """Whether nothing in the rows can be options, which a plain question must not lose."""
    return not any("options" in row or any(isinstance(value, list | dict) for value in row.values()) for row in rows)


def _messages(column: str, keys: tuple[str, str], title: str) -> Layout:
    return Layout(
        title,
        {column: "a chat: the user's message is the question, the assistant's the reasoning and the answer"},
        read_messages,
        {"system": "the system message"},
        lambda rows, given: any(holds_messages(row.get(column), keys) for row in rows),
        reasons=True,
    )


_STEM, _BELOW = "the question", "the list of options, written under the question as lines 'A. …'"
_LETTER, _SAME = "the letter of the right option", "the right option's text, which must agree"
_OPA = {"question": _STEM, **{f"op{letter}": f"option {letter.upper()}" for letter in "abcd"}}
_MEDMCQA_TAKES = {"subject_name": "the topic"}

LAYOUTS: dict[str, Layout] = {
    "medqa": Layout(
        "MedQA",
        {"question": _STEM, "options": _BELOW, "answer_idx": _LETTER},
        exams.read_medqa,
        {"answer": _SAME, "meta_info": "the topic"},
    ),
    "medbullets": Layout(
        "Medbullets",
        {"question": _STEM, "options": _BELOW, "answer_letter": _LETTER},
        exams.read_medqa,
        {"answer": _SAME},
    ),
    "medbullets-raw": Layout(
        "raw Medbullets",
        {**_OPA, "answer_idx": _LETTER},
        exams.read_medbullets,
        {"ope": "option E", "answer": _SAME},
    ),
    "medmcqa": Layout(
        "MedMCQA",
        {**_OPA, "cop": "the right option, counted from 0"},
        exams.read_medmcqa,
        _MEDMCQA_TAKES,
        exams.counts_from_0,
    ),
    "medmcqa-raw": Layout(
        "raw MedMCQA",
        {**_OPA, "cop": "the right option, counted from 1"},
        exams.read_raw_medmcqa,
        _MEDMCQA_TAKES,
        exams.counts_from_1,
    ),
    "pubmedqa": Layout(
        "PubMedQA",
        {
            "question": "the question, below the abstract and above the options yes, no and maybe",
            "context": "the abstract",
            "final_decision": "the right option",
        },
        exams.read_pubmedqa,
    ),
    "mmlu": Layout(
        "MMLU",
        {"question": _STEM, "choices": _BELOW, "answer": "the right option, counted from 0"},
        exams.read_mmlu,
        {"subject": "the topic"},
    ),
    "options-answer": Layout(
        "options and answer",
        {"question": _STEM, "options": _BELOW, "answer": "the right option, by letter or text"},
        exams.read_answered,
    ),
    "mmlu-pro": Layout(
        "MMLU-Pro",
        {"question": _STEM, "options": _BELOW, "answer": _LETTER, "answer_index": "its number, which must agree"},
        exams.read_mmlu_pro,
        {"category": "the topic"},
    ),
    "medxpertqa": Layout(
        "MedXpertQA",
        {"question": _STEM, "options": _BELOW, "label": _LETTER},
        exams.read_medxpertqa,
        {"medical_task": "the topic"},
    ),
    "gpqa": Layout(
        "GPQA",
        {
            "Question": _STEM,
            "Correct Answer": "the right option; the options stand in a fixed random order",
            **{f"Incorrect Answer {number}": "another option" for number in (1, 2, 3)},
        },
        exams.read_gpqa,
        {"Subdomain": "the topic"},
    ),
    "head-qa": Layout(
        "HEAD-QA",
        {"qtext": _STEM, "answers": _BELOW, "ra": "the right option, counted from 1"},
        exams.read_head_qa,
        {"category": "the topic"},
    ),
    "bioasq": Layout("BioASQ", {"question": _STEM, "text": "the gold answer, up to <context>"}, exams.read_bioasq),
    "medcalc-bench": Layout(
        "MedCalc-Bench",
        {
            "Patient Note": "the case, above the question",
            "Question": _STEM,
            "Ground Truth Answer": "the response and the gold answer",
            "Ground Truth Explanation": "the reasoning",
        },
        exams.read_medcalc,
        {"Calculator Name": "the topic"},
        reasons=True,
    ),
    "verifiable": Layout(
        "medical-o1-verifiable-problem",
        {"Open-ended Verifiable Question": _STEM, "Ground-True Answer": "the gold answer"},
        exams.read_verifiable,
    ),
    "m23k": Layout(
        "m23k",
        {"prompt": _STEM, "reasoning": "the reasoning", "distilled_answer_string": "the response"},
        exams.read_m23k,
        {"answer_letter": _LETTER, "source": "the topic"},
        reasons=True,
    ),
    "medreason": Layout(
        "MedReason",
        {
            "question": "the question",
            "reasoning": "the reasoning",
            "answer": "the response",
            "options": _BELOW,
            "dataset_name": "the topic",
        },
        exams.read_medreason,
        reasons=True,
    ),
    "r1-distill": Layout(
        "Medical-R1-Distill-Data",
        {
            "question": "the question",
            "reasoning (reasoning_content)": "the reasoning",
            "response (content)": "the response",
        },
        read_columns,
        reasons=True,
    ),
    "alpaca": Layout(
        "Alpaca",
        {"instruction": _STEM, "output": "the response, with the reasoning up to </think>"},
        read_instruction,
        {"input": "the rest of the question, below it", "system": "the system message"},
        reasons=True,
    ),
    **{f"sharegpt-{name}": _messages(name, ("from", "value"), "ShareGPT") for name in CHAT_COLUMNS},
    **{f"openai-{name}": _messages(name, ("role", "content"), "OpenAI messages") for name in CHAT_COLUMNS},
    "prompt-completion": Layout(
        "prompt and completion",
        {"prompt": _STEM, "completion": "the response, with the reasoning up to </think>"},
        read_prompt_and_completion,
        {"system": "the system message"},
        reasons=True,
    ),
    "question-answer": Layout(
        "question and answer",
        {"question": _STEM, "answer": "the gold answer"},
        exams.read_plain,
        fits=_is_flat,
        grading_only=True,
    ),
    "question": Layout("questions only", {"question": _STEM}, exams.read_plain, fits=_is_flat, grading_only=True),
}

# Where a layout leaves to ``read_columns`` or ``read_messages`` which column is which.
COLUMNS: dict[str, dict[str, str]] = {
    "m23k": {"question": "prompt", "reasoning": "reasoning", "response": "distilled_answer_string"},
    "medreason": {"question": "question", "reasoning": "reasoning", "response": "answer"},
    "r1-distill": {
        "question": "question",
        "reasoning": "reasoning (reasoning_content)",
        "response": "response (content)",
    },
    **{f"{kind}-{name}": {"chat": name} for kind in ("sharegpt", "openai") for name in CHAT_COLUMNS},
}


def list_named(columns: Sequence[str]) -> list[str]:
    """Return the layouts whose columns are all there, whatever their values, those that need the most first."""
    named = [
        name for name, layout in LAYOUTS.items() if layout.needs.keys() <= set(columns) and not layout.grading_only
    ]
    return sorted(named, key=lambda name: -len(LAYOUTS[name].needs))


def find_layouts(columns: Sequence[str], rows: Sequence[RawRow], *, grading: bool) -> list[str]:
    """Return the layouts that names and first rows fit; one that uses all of another's columns and more hides it."""
    plain = [name for name, layout in LAYOUTS.items() if layout.grading_only and layout.needs.keys() <= set(columns)]
    named = [name for name in list_named(columns) + (plain if grading else []) if fits(name, rows)]
    used = {name: set(columns) & {*LAYOUTS[name].needs, *LAYOUTS[name].takes} for name in named}
    return [name for name in named if not any(used[other] > used[name] for other in named)]


def fits(name: str, rows: Sequence[RawRow]) -> bool:
    """Whether the first rows have the values that a layout wants, and one of them at least can be read by it."""
    layout, given = LAYOUTS[name], Given(COLUMNS.get(name, {}))
    return layout.fits(rows, given) and any(why_unusable(name, row, given) is None for row in rows)


def why_unusable(name: str, row: RawRow, given: Given) -> str | None:
    """Return the reason why a layout cannot read a row, or ``None`` where it can."""
    try:
        LAYOUTS[name].read(row, given)
    except UnusableRow as unusable:
        return str(unusable)
    return None
