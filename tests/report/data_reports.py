"""A data report made by the checks themselves from a few rows that have something wrong with them."""

from __future__ import annotations

import json
from typing import Any

from medcot.data.contamination import Contamination
from medcot.data.duplicates import Duplicates
from medcot.data.faults import Tally, report
from medcot.data.findings import Chunk, Evidence, Finding, InMemory, Severity
from medcot.data.identifiers import Identifiers
from medcot.data.lengths import Lengths, describe_lengths
from medcot.data.quality import Quality
from medcot.diagnosis import Diagnosis, sort_findings
from medcot.records import Example, Row

SHARED = (
    "A 54-year-old gardener comes to the clinic with a swollen ankle that began overnight after a large meal with wine"
)
BENCHMARK = (("medqa", Example("medqa:7", f"{SHARED}. Which crystal is found in the joint?", "medqa", gold="Urate")),)
PHONE, MAIL, RECORD = "(212) 555-0187", "jane.roe@example.org", "MRN: 00482913"
RLO, ESC = "\u202e", "\x1b[31m"
_THOUGHT = " ".join(f"Thought {number} weighs finding {number * 7} against the answer about" for number in range(9))


def _example(number: int, question: str, **changes: Any) -> Example:
    texts = {"reasoning": f"{_THOUGHT} remedy{number}.", "response": f"It is the remedy{number}, because of reasons."}
    return Example(f"rows:{number}", question, "rows", **(texts | changes))


ROWS = [
    _example(1, f"{SHARED}. What is it?"),
    _example(2, "Which drug is given first in anaphylaxis?", reasoning=""),
    _example(3, f"Call {PHONE} or {MAIL} about {RECORD}: which dose?", response=f"<p>{RLO}evil {ESC}red</p> {PHONE}"),
    _example(4, "Is saline hypotonic?", reasoning="Short."),
    _example(5, "What keeps a heart in rhythm when the sinus node rests for a while at night?"),
    _example(6, "What keeps a heart in rhythm when the sinus node rests for a while at night?"),
]
SPANS = {
    "what is wrong": "EOS carries no loss",
    "1 prompt, no loss": "Below is an instruction. " * 20 + "\n### Question:\n",
    "2 question, no loss": "Is saline hypotonic? Ring (212) 555",
    "3 question, loss": "-0187.",
    "4 prompt, no loss": "\n<think>\n",
    "5 think, loss": "Weighing it.\n</think>",
    "6 answer, loss": "No.",
    "7 eos, no loss": "<|im_end|>",
}


def make_diagnosis(**changes: Any) -> Diagnosis:
    """Look at the rows with every check, and put a row before the gate that never learns to stop."""
    chunk = Chunk(1, len(ROWS), ROWS)
    checks = [Quality(), Identifiers(), Duplicates(), Contamination(BENCHMARK)]
    findings = [f for check in checks for f in check.reduce([check.map(chunk)], InMemory(ROWS))]  # type: ignore[attr-defined]
    lengths = Lengths(2048, 8)
    for number in range(40):
        tokens = 400 + 50 * number
        spans = ((5, 40), (50, tokens - 90), (tokens - 90, tokens - 1), (tokens - 1, tokens))
        lengths.add(Row(f"rows:{number}", [0] * tokens, [0] * tokens, *spans))
    findings += describe_lengths(lengths, over_length="drop", batch_size=8)
    tally = Tally(num_rows=6)
    tally.add("rows:4", {"eos_lost": "EOS carries no loss"}, lambda: SPANS)
    findings += report(tally)
    forged = {"markers": {"<think>": 1}}
    evidence = (Evidence("rows:9", {"question": "ignore <think> this"}),)
    findings.append(Finding("forged_tags", Severity.RED, 1, ("rows:9",), "1 row.", "Remove it.", evidence, forged))
    source = {
        "source": "/srv/someone/rows.jsonl",
        "split": "train",
        "revision": None,
        "sha256": "ab" * 32,
        "raw_rows": 9,
        "unreadable": 1,
    }
    removed = {"removed_contaminated": 0, "removed_exact": 1, "removed_near": 0, "masked_rows": 0}
    counts = {"raw_rows": 9, "unreadable": 1, **removed, "held_out": 1, "rows": 4, "tokens": 4321}
    given: dict[str, Any] = {
        "sources": [source],
        "sentences": ["Column 'q' is the question (a name medcot knows)."],
        "counts": counts,
        "accepted": ("forged_tags",),
    }
    return Diagnosis(sort_findings(findings), **(given | changes))


def make_report(**changes: Any) -> dict[str, Any]:
    """Return the diagnosis as data/report.json holds it."""
    report: dict[str, Any] = json.loads(json.dumps(make_diagnosis(**changes).report("0.0.test")))
    return report
