"""What can be wrong with a row of a batch, in words, and the count of what was.

``survival.py`` finds the faults. Each is a red finding of its own, because each has a fix of its own. A tally is small,
picklable and adds up, so rows may be judged in any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from medcot.data.findings import MOST_ROWS, Evidence, Finding, Severity

MOST_SHOWN = 3  # rows shown for each fault

# id → what is said of the rows, and the fix.
FAULTS: dict[str, tuple[str, str]] = {
    "nothing_trained": (
        "carry no loss at all",
        "Give reasoning, </think>, answer and EOS their own ids as labels; -100 belongs on the prompt and on padding.",
    ),
    "question_trained": (
        "train on the question, which was not asked for",
        "Mask the labels up to the opened <think> with -100, or set train.train_on_prompt=true.",
    ),
    "question_untrained": (
        "do not train on the question, although train.train_on_prompt=true",
        "Leave the prompt's labels in place, or set train.train_on_prompt=false.",
    ),
    "question_cut": (
        "do not hold the whole question",
        "Cut no row at its start: set data.over_length to drop or truncate_think, or raise model.max_seq_length.",
    ),
    "reasoning_lost": (
        "lose reasoning: it is missing, changed, or carries no loss",
        "Do not render the answer through a chat template that removes or moves <think>; encode with medcot.prompt.",
    ),
    "think_close_lost": (
        "do not learn to close their thinking: </think> is missing or carries no loss",
        "Keep </think> in the row and in the labels; set data.over_length to drop or truncate_think.",
    ),
    "answer_cut": (
        "hold only a part of the answer",
        "Cut no row at its end: set data.over_length to drop or truncate_think, or raise model.max_seq_length.",
    ),
    "answer_lost": (
        "lose the answer: it is missing, changed, or carries no loss",
        "Keep the answer between </think> and EOS, and in the labels.",
    ),
    "eos_lost": (
        "do not learn to stop: EOS is missing or carries no loss",
        "End each row with EOS and mask padding by position, not by token: pad and EOS are often the same token.",
    ),
    "labels_differ": (
        "have labels that are not the tokens they stand at",
        "Labels equal the input ids where trained and are -100 elsewhere; the model itself shifts them by one.",
    ),
    "prompt_not_prefix": (
        "do not begin with the tokens that the question will be asked with",
        "Build rows on prompt.encode_prompt's ids, in the same prompt.style that will be used to ask.",
    ),
    "bos_doubled": (
        "begin with more than the model's own BOS",
        "Tokenise a rendered template with add_special_tokens=False: the template has BOS already.",
    ),
    "bos_missing": (
        "lack the model's own BOS",
        "Tokenise with the model's own special tokens, or let its template write BOS.",
    ),
    "rows_touch": (
        "are not kept apart from their neighbours in the batch",
        "Say where each row begins (lengths, cu_seqlens, or position_ids that start again at 0), and mask the label of "
        "each row's first token.",
    ),
    "padding_trained": (
        "train on padding",
        "Give padding the label -100, by position.",
    ),
    "think_tags": (
        "do not open and close thinking exactly once",
        "Leave <think> and </think> to the prompt's frame: take them out of the texts, and do not let the template add "
        "a second pair.",
    ),
}


@dataclass(slots=True)
class Tally:
    """What was seen in some rows; ``merge`` adds another's up.

    Attributes:
        num_rows: rows expected.
        num_failed: of those, with at least one fault.
        num_shortened: rows whose reasoning had its middle taken out, marked as ``truncate_think`` marks it.
        num_tokens: of all rows judged.
        num_trained_tokens: of those, carrying loss.
        counts: fault → rows.
        rows: fault → ids of the first.
        evidence: fault → the first few rows shown.
        first: fault → what is wrong with the first of them.
    """

    num_rows: int = 0
    num_failed: int = 0
    num_shortened: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    evidence: dict[str, list[Evidence]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, row_id: str, faults: dict[str, str], show: Callable[[], dict[str, str]]) -> None:
        """Count a row's faults; it is shown where few were shown before."""
        self.num_failed += bool(faults)
        for fault, detail in faults.items():
            self.counts[fault] = self.counts.get(fault, 0) + 1
            self.first.setdefault(fault, f"{row_id}: {detail}")
            rows, evidence = self.rows.setdefault(fault, []), self.evidence.setdefault(fault, [])
            if len(rows) < MOST_ROWS:
                rows.append(row_id)
            if len(evidence) < MOST_SHOWN:
                evidence.append(Evidence(row_id, {"what is wrong": detail, **show()}))

    def merge(self, other: Tally) -> None:
        """Add another tally, of later rows, to this one."""
        self.num_rows += other.num_rows
        self.num_failed += other.num_failed
        self.num_shortened += other.num_shortened
        self.num_tokens += other.num_tokens
        self.num_trained_tokens += other.num_trained_tokens
        for fault, count in other.counts.items():
            self.counts[fault] = self.counts.get(fault, 0) + count
            self.first.setdefault(fault, other.first[fault])
            self.rows[fault] = [*self.rows.get(fault, []), *other.rows[fault]][:MOST_ROWS]
            self.evidence[fault] = [*self.evidence.get(fault, []), *other.evidence[fault]][:MOST_SHOWN]


def report(tally: Tally) -> list[Finding]:
    """Say what a tally comes to: a red finding for each fault, and one for the record."""
    findings = [
        Finding(
            id=fault,
            severity=Severity.RED,
            count=tally.counts[fault],
            rows=tuple(tally.rows[fault]),
            says=f"{tally.counts[fault]:,} of {tally.num_rows:,} rows {says}. First: {tally.first[fault]}.",
            fix=fix,
            evidence=tuple(tally.evidence[fault]),
        )
        for fault, (says, fix) in FAULTS.items()
        if fault in tally.counts
    ]
    num_whole = tally.num_rows - tally.num_failed
    says = f"{num_whole:,} of {tally.num_rows:,} rows reach the model whole"
    if tally.num_shortened:
        says += f"; {tally.num_shortened:,} of all had the middle of their reasoning taken out"
    figures = {
        "rows": tally.num_rows,
        "whole": num_whole,
        "shortened": tally.num_shortened,
        "tokens": tally.num_tokens,
        "trained_tokens": tally.num_trained_tokens,
    }
    return [*findings, Finding("survival", Severity.INFO, num_whole, (), f"{says}.", "", figures=figures)]
