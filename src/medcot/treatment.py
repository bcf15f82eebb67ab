"""What a run has read and encoded before the data doctor's checks, and what is taken out of it.

``treat`` leaves out what must not be trained on (questions of the evaluation sets, exact copies, near copies if asked),
and masks identifiers if asked; every process of a job does it for itself and comes to the same rows. ``examine_texts``
says what was in all that was read, ``examine_rows`` puts every row of tokens before the gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcot.data.contamination import find_contaminated
from medcot.data.duplicates import Duplicates, exact_duplicates, find_shared
from medcot.data.findings import MOST_ROWS, Check, Chunk, Evidence, Finding, InMemory, Severity
from medcot.data.identifiers import mask_example
from medcot.diagnosis import Diagnosis, Tools, known_ids, load_items, sort_findings
from medcot.errors import DataError
from medcot.examination import pass_gate, weigh_lengths
from medcot.recipe import Recipe
from medcot.records import Example, Quarantined, Row
from medcot.rows import CLINIC, RawData, TrainingData, check_accepted, encode_whole
from medcot.stages import Duplicates as Copies
from medcot.stages import Identifiers as Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Treated:
    """What a run trains on, and what was done to come to it.

    Attributes:
        raw: what is left.
        counts: ``removed_contaminated``, ``removed_duplicates``, ``masked_rows``.
    """

    raw: RawData
    counts: dict[str, int]


def run_items(recipe: Recipe, problems: Sequence[Example]) -> tuple[tuple[str, Example], ...]:
    """The questions that training must not have seen: of ``data.against``, or those that the recipe evaluates with.

    The built-in problems are generated so that training and test share none, so they are not held against themselves.
    """
    if recipe.data.against is not None:
        return load_items(recipe.data.against)
    source = recipe.evaluate.source
    trains_on_clinic = any(str(origin.source).startswith(CLINIC) for origin in recipe.data.origins)
    if source is None or trains_on_clinic:
        return ()
    return tuple((source, problem) for problem in problems)


def treat(raw: RawData, recipe: Recipe, items: Sequence[tuple[str, Example]]) -> Treated:
    """Take out of what was read, or mask, what the recipe says.

    Raises:
        DataError: nothing is left.
    """
    examples = [*raw.examples, *raw.validation]
    gone = _find_removed(examples, recipe, items)
    removed = frozenset[str]().union(*gone.values())
    masked: set[str] = set()

    def revise(example: Example) -> Example | None:
        if example.id in removed:
            return None
        if recipe.data.identifiers is not Policy.MASK:
            return example
        new, hits = mask_example(example)
        masked.update([example.id] if hits else [])
        return new

    treated = raw.revise(revise)
    if not treated.examples:
        raise DataError(
            f"None of the {len(examples):,} examples is left to train on",
            "Copies and questions of the evaluation sets are left out",
            "Train on other rows, or set data.remove_contaminated=false and data.remove_duplicates=none",
        )
    counts = {f"removed_{what}": len(ids) for what, ids in gone.items()}
    return Treated(treated, {**counts, "masked_rows": len(masked)})


def examine_texts(raw: RawData, treated: Treated, recipe: Recipe, tools: Tools) -> Diagnosis:
    """Look at all that was read, and say of each finding what became of it.

    Raises:
        RecipeError: ``data.accept`` names no finding.
    """
    check_accepted(recipe.data.accept, known_ids())
    found = _run_checks(tools.text_checks(), [*raw.examples, *raw.validation], raw.quarantined)
    findings = [_after_treatment(finding, recipe, treated.counts) for finding in found] + tools.doubts()
    if raw.validation_part is not None:
        findings += _shared_with_validation(treated.raw)
    sources = [part.lineage() for part in treated.raw.every_part]
    counts = {
        "raw_rows": sum(part.num_rows for part in raw.every_part),
        "unreadable": len(raw.quarantined),
        **treated.counts,
        "held_out": len(treated.raw.validation),
    }
    return Diagnosis(sort_findings(findings), sources, raw.sentences, counts, recipe.data.accept)


def examine_rows(data: TrainingData, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Diagnosis:
    """Put every row that a run trains on or validates with before the gate, and count tokens."""
    examples = [*data.raw.examples, *data.raw.validation]
    rows = {row.id: row for row in (*data.rows, *data.validation)}
    pairs = [(example, rows[example.id]) for example in examples if example.id in rows]
    whole: Sequence[Row] = list(rows.values())
    if data.num_over_length:
        whole = encode_whole(examples, recipe, tokenizer).rows
    found = weigh_lengths(whole, recipe, tokenizer, len(whole)) + pass_gate(pairs, recipe, tokenizer, len(pairs))
    facts = data.facts()
    counts = {key: facts[key] for key in ("rows", "tokens", "trained_tokens")}
    counts["set_aside"] = len(data.quarantined)
    return Diagnosis(sort_findings(found), data.lineage(), data.sentences, counts, recipe.data.accept)


def _find_removed(
    examples: Sequence[Example], recipe: Recipe, items: Sequence[tuple[str, Example]]
) -> dict[str, frozenset[str]]:
    """Ids of the rows that are left out, by reason."""
    leaked: set[int] = set()
    if recipe.data.remove_contaminated and items:
        leaked = {pair.place for pair in find_contaminated(examples, items) if pair.is_confirmed}
    left = [(place, example) for place, example in enumerate(examples) if place not in leaked]
    repeats: set[int] = set()
    if recipe.data.remove_duplicates is not Copies.NONE:
        kept = [example for _, example in left]
        near = recipe.data.remove_duplicates is Copies.NEAR
        repeats = Duplicates().find_repeats(kept) if near else exact_duplicates(kept)
    copies = {left[place][1].id for place in repeats}
    return {"contaminated": frozenset(examples[place].id for place in leaked), "duplicates": frozenset(copies)}


def _after_treatment(finding: Finding, recipe: Recipe, counts: Mapping[str, Any]) -> Finding:
    """What a finding means once it has been dealt with."""
    if finding.id == "contamination_confirmed" and recipe.data.remove_contaminated:
        done = f" {counts['removed_contaminated']:,} rows were left out of training."
        return dataclasses.replace(finding, severity=Severity.YELLOW, says=finding.says + done, fix="")
    if finding.id == "identifiers" and recipe.data.identifiers is Policy.MASK:
        done = f" They were masked in {counts['masked_rows']:,} rows."
        return dataclasses.replace(finding, severity=Severity.YELLOW, says=finding.says + done, fix="")
    if finding.id == "identifiers" and recipe.data.identifiers is Policy.REFUSE:
        return dataclasses.replace(finding, severity=Severity.RED)
    if finding.id in ("duplicates_exact", "duplicates_near") and counts["removed_duplicates"]:
        done = f" {counts['removed_duplicates']:,} copies were left out of training."
        return dataclasses.replace(finding, says=finding.says + done)
    return finding


def _shared_with_validation(raw: RawData) -> list[Finding]:
    train, held = raw.examples, raw.validation
    shared = find_shared(train, held)
    if not shared:
        return []
    evidence = tuple(
        Evidence(held[pair.validation].id, {
            f"validation ({pair.degree})": held[pair.validation].question,
            f"training, {train[pair.train].id}": train[pair.train].question,
        })
        for pair in shared[:3]
    )  # fmt: skip
    return [
        Finding(
            "validation_shared",
            Severity.YELLOW,
            len(shared),
            tuple(held[pair.validation].id for pair in shared[:MOST_ROWS]),
            f"{len(shared):,} of {len(held):,} validation rows are also in training: their loss measures memory.",
            "Leave them out of one of the two, or hold out by content: data.validation=0.05",
            evidence,
        )
    ]


def _run_checks(
    found: Sequence[Check], examples: Sequence[Example], quarantined: Sequence[Quarantined]
) -> list[Finding]:
    """Look at examples in memory as one chunk: they come first, rows set aside behind them, which keep their names."""
    aside = [dataclasses.replace(item, row_number=number) for number, item in enumerate(quarantined, len(examples) + 1)]
    names = {f"row {new.row_number}": f"row {old.row_number}" for new, old in zip(aside, quarantined, strict=True)}
    chunk = Chunk(1, len(examples) + len(aside), examples, aside)
    findings = [finding for check in found for finding in check.reduce([check.map(chunk)], InMemory(examples))]
    return [
        dataclasses.replace(
            finding,
            rows=tuple(names.get(row, row) for row in finding.rows),
            evidence=tuple(dataclasses.replace(seen, row=names.get(seen.row, seen.row)) for seen in finding.evidence),
        )
        for finding in findings
    ]
