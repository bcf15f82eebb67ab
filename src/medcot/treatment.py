"""What a run has read and encoded before the data doctor's checks, and what is taken out of it.

``treat`` leaves out what must not be trained on (questions of the evaluation sets, exact copies, near copies if asked),
and masks identifiers if asked; every process of a job does it for itself and comes to the same rows. ``examine_texts``
says what was in all that was read, ``examine_rows`` puts every row of tokens before the gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot.data.contamination import Contamination, find_contaminated
from medcot.data.duplicates import Duplicates, exact_duplicates, find_shared
from medcot.data.findings import MOST_ROWS, Check, Chunk, Evidence, Finding, InMemory, Severity
from medcot.data.identifiers import mask_example
from medcot.diagnosis import Diagnosis, Tools, apply_policy, known_ids, load_items, sort_findings
from medcot.errors import UnfitDataError
from medcot.examination import describe_refused, pass_gate, weigh_lengths
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
        counts: ``removed_contaminated``, ``removed_exact``, ``removed_near``, ``masked_rows``.
    """

    raw: RawData
    counts: dict[str, int]


def run_items(recipe: Recipe, problems: Sequence[tuple[str, Example]]) -> tuple[tuple[str, Example], ...]:
    """The questions that training must not have seen: of ``data.against``, or those that the recipe evaluates with."""
    return tuple(problems) if recipe.data.against is None else load_items(recipe.data.against)


def _exposed(examples: Sequence[Example]) -> list[Example]:
    """Examples that benchmarks' questions are looked for in.

    The built-in problems are generated so that training and test share none, only their wording; they are held against
    nothing.
    """
    return [example for example in examples if not example.source.startswith(CLINIC)]


def treat(raw: RawData, recipe: Recipe, items: Sequence[tuple[str, Example]]) -> Treated:
    """Take out of what was read, or mask, what the recipe says; ``check_left`` says whether enough is left."""
    counts = {"removed_contaminated": 0, "removed_exact": 0, "removed_near": 0, "masked_rows": 0}
    examples = [*raw.examples, *raw.validation]
    if recipe.data.remove_contaminated and items:
        asked = _exposed(examples)
        leaked = {asked[pair.place].id for pair in find_contaminated(asked, items) if pair.is_confirmed}
        raw, counts["removed_contaminated"] = _without(raw, leaked), len(leaked)
    if recipe.data.identifiers is Policy.MASK:  # before copies are looked for: masking makes new ones
        masked = {example.id: mask_example(example) for example in (*raw.examples, *raw.validation)}
        counts["masked_rows"] = sum(bool(hits) for _, hits in masked.values())
        raw = raw.revise(lambda example: masked[example.id][0])
    for policy, wanted in ((Copies.EXACT, recipe.data.remove_duplicates is not Copies.NONE),
                           (Copies.NEAR, recipe.data.remove_duplicates is Copies.NEAR)):  # fmt: skip
        if wanted:
            left = [*raw.examples, *raw.validation]
            places = exact_duplicates(left) if policy is Copies.EXACT else Duplicates().find_repeats(left)
            raw, counts[f"removed_{policy.value}"] = _without(raw, {left[place].id for place in places}), len(places)
    return Treated(raw, counts)


def _without(raw: RawData, ids: Collection[str]) -> RawData:
    return raw.revise(lambda example: None if example.id in ids else example)


def check_left(before: RawData, treated: Treated) -> None:
    """Refuse to go on where nothing is left of a source, or of the rows that were to be held out.

    Raises:
        UnfitDataError: so it is.
    """
    emptied = [
        f"{side} of {old.name}"
        for old, new in zip(before.every_part, treated.raw.every_part, strict=True)
        for side, had, has in (
            ("the training rows", old.examples, new.examples),
            ("the validation rows", old.held_out, new.held_out),
        )
        if had and not has
    ]
    if emptied:
        raise UnfitDataError(
            f"none is left of {' and of '.join(emptied)}",
            "Copies and questions of the evaluation sets are left out of what is trained on and of what is held out",
            "Use other rows, or set data.remove_contaminated=false and data.remove_duplicates=none",
        )


def examine_texts(raw: RawData, treated: Treated, recipe: Recipe, tools: Tools) -> Diagnosis:
    """Look at all that was read, and say of each finding what became of it.

    Raises:
        RecipeError: ``data.accept`` names no finding.
    """
    check_accepted(recipe.data.accept, known_ids())
    examples = [*raw.examples, *raw.validation]
    found = _run_checks(tools.text_checks(), examples, raw.quarantined)
    if tools.items:
        found += _run_checks([Contamination(tools.items)], _exposed(examples), ())
    findings = [apply_policy(finding, recipe, treated.counts) for finding in found] + tools.doubts()
    findings += _shared_with_validation(raw)
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
    refused = data.quarantined[len(data.raw.quarantined) :]
    whole: Sequence[Row] = list(rows.values())
    if data.num_over_length:  # what was too long belongs to the lengths, whole
        aside = {item.row.get("id") for item in refused}
        whole = encode_whole([e for e in examples if e.id in rows or e.id in aside], recipe, tokenizer).rows
    found = weigh_lengths(whole, recipe, tokenizer, len(whole)) if whole else []
    found += describe_refused(refused, len(examples)) + pass_gate(pairs, recipe, tokenizer)
    facts = data.facts()
    counts = {key: facts[key] for key in ("rows", "tokens", "trained_tokens")}
    counts["set_aside"] = len(data.quarantined)
    held = data.raw.validation_part
    lineage = data.lineage() + ([] if held is None else [held.lineage()])
    return Diagnosis(sort_findings(found), lineage, data.sentences, counts, recipe.data.accept)


def _shared_with_validation(raw: RawData) -> list[Finding]:
    train, held = raw.examples, raw.validation
    shared = find_shared(train, held) if held else []
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
            "Leave them out of one of the two; exact copies are, unless data.remove_duplicates=none",
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
