"""Identifiers of people in the data: found, counted by kind, masked; never shown.

A model can repeat what it was trained on, so a telephone number in a clinical note may come out of it again. This is a
net of rules (``rules.py``) for the kinds that the HIPAA Safe Harbor lists (``kinds.py``). Rules and not a recogniser of
named entities: they are exact about what they claim, search some 25 MB a second on one core, and a hospital can read
them. The price is plain, and the finding says it: **names are found only where a title, a label or a degree gives them
away**; a bare "John Smith" passes, as do nicknames, employers, and anything that an unusual story tells. A clean bill
from here is not de-identification; 164.514(b) asks for that either all eighteen kinds removed and no knowledge to the
contrary, or an expert's word.

Masking puts ``[kind]`` in place of each identifier, again until nothing is found, so that masking twice is masking
once. What the finding shows of an identifier is its shape, with every letter and digit hidden.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from medcot.data.findings import MOST_ROWS, Chunk, Evidence, Finding, Reader, Severity
from medcot.data.identifiers.gates import find_density, make_small_and_shape
from medcot.data.identifiers.kinds import KINDS, NOT_IN_TEXT
from medcot.data.identifiers.labelled import find_labelled, find_phones
from medcot.data.identifiers.rules import FOLDED, HINTS, RULES_BEHIND
from medcot.data.quality import named_texts
from medcot.records import Example

__all__ = ["KINDS", "NOT_IN_TEXT", "Hit", "Identifiers", "find_identifiers", "mask_example", "mask_identifiers"]

_VERSION = 2  # raise it when a rule changes: cached tallies name it
_MOST_SHOWN = 10  # identifiers shown of one row


@dataclass(frozen=True, slots=True)
class Hit:
    """An identifier: ``text[start:stop]``."""

    kind: str
    start: int
    stop: int


@dataclass(slots=True)
class IdentifierTally:
    """What one chunk holds."""

    num_rows: int = 0
    hits: Counter[str] = field(default_factory=Counter)  # kind → identifiers
    rows: Counter[str] = field(default_factory=Counter)  # kind → rows with one
    num_with_direct: int = 0
    num_with_any: int = 0
    direct: list[Evidence] = field(default_factory=list)  # the first MOST_ROWS rows with a direct identifier
    other: list[Evidence] = field(default_factory=list)  # and with others only


@dataclass(frozen=True, slots=True)
class Identifiers:
    """The check for identifiers; one finding, red where a direct kind is among them."""

    @property
    def name(self) -> str:
        """Key of the cache."""
        return "identifiers"

    @property
    def settings(self) -> str:
        """The version of the rules."""
        return str(_VERSION)

    def map(self, chunk: Chunk) -> IdentifierTally:
        """Search every text of every row."""
        tally = IdentifierTally(chunk.num_rows)
        for example in chunk.examples:
            texts = named_texts(example)
            hits = find_in_row([text for _, text in texts])
            if any(hits):
                _count(tally, example, [(*named, found) for named, found in zip(texts, hits, strict=True) if found])
        return tally

    def reduce(self, tallies: Iterable[IdentifierTally], reader: Reader) -> list[Finding]:
        """Return the finding, or none where nothing was found."""
        total = IdentifierTally()
        for tally in tallies:
            total.num_rows += tally.num_rows
            total.hits += tally.hits
            total.rows += tally.rows
            total.num_with_direct += tally.num_with_direct
            total.num_with_any += tally.num_with_any
            total.direct.extend(tally.direct[: MOST_ROWS - len(total.direct)])
            total.other.extend(tally.other[: MOST_ROWS - len(total.other)])
        return [_describe(total)] if total.num_with_any else []


def find_identifiers(text: str, kinds: Collection[str] | None = None) -> list[Hit]:
    """Return the identifiers of a text in order, none overlapping another.

    Args:
        text: any text.
        kinds: those to look for, of ``KINDS``; ``None`` for all.
    """
    return find_in_row([text], kinds)[0]


def find_in_row(texts: Sequence[str], kinds: Collection[str] | None = None) -> list[list[Hit]]:
    """Return the identifiers of each of several texts, for little more than those of one cost."""
    texts = [_fold(text) for text in texts]
    places = HINTS.find_open("\n".join(texts))
    return [_find(text, places, kinds) if places else [] for text in texts]


def mask_identifiers(text: str, kinds: Collection[str] | None = None) -> tuple[str, Counter[str]]:
    """Return a text with ``[kind]`` for each identifier of the kinds (``None``: all), and how many of each there were.

    No identifier of these kinds is found in what comes back.
    """
    counts: Counter[str] = Counter()
    while hits := find_identifiers(text, kinds):
        pieces: list[str] = []
        last = 0
        for hit in hits:
            pieces += (text[last : hit.start], f"[{hit.kind}]")
            last = hit.stop
            counts[hit.kind] += 1
        text = "".join(pieces) + text[last:]
    return text, counts


def mask_example(example: Example, kinds: Collection[str] | None = None) -> tuple[Example, Counter[str]]:
    """Return an example with all of its texts masked, the same object where nothing was found, and the counts."""
    counts: Counter[str] = Counter()

    def mask(text: str) -> str:
        masked, found = mask_identifiers(text, kinds)
        counts.update(found)
        return masked

    changed = dataclasses.replace(
        example,
        question=mask(example.question),
        reasoning=None if example.reasoning is None else mask(example.reasoning),
        response=None if example.response is None else mask(example.response),
        options=example.options and {letter: mask(option) for letter, option in example.options.items()},
        gold=None if example.gold is None else mask(example.gold),
    )
    return (changed if counts else example), counts


def _fold(text: str) -> str:
    if not text.isascii():
        for char, plain in FOLDED.items():
            text = text.replace(char, plain)
    return text


def _find(text: str, places: list[int], kinds: Collection[str] | None) -> list[Hit]:
    """Return the identifiers of a text that may lie behind the gates at these places of ``RULES_BEHIND``."""
    small, shape = make_small_and_shape(text)
    density = find_density(shape) if places[0] == 0 else 0
    hits: list[tuple[int, int, int, str]] = []
    if density:
        hits += [(start, -1, stop, kind) for start, stop, kind in find_labelled(text) if not kinds or kind in kinds]
    if density == 7:
        hits += [(start, -1, stop, kind) for start, stop, kind in find_phones(text) if not kinds or kind in kinds]
    for place in places:
        gate, rules = RULES_BEHIND[place]
        if gate.dense <= density and gate.admits(text, small, shape):
            for rank, rule in rules:
                if kinds is None or rule.kind in kinds:
                    hits += [(start, rank, stop, rule.kind) for start, stop in rule.find(text)]
    return _resolve(hits) if hits else []


def _resolve(hits: list[tuple[int, int, int, str]]) -> list[Hit]:
    """Return (start, rank, stop, kind) in order: of two that overlap the one that begins first, then of lower rank."""
    kept: list[Hit] = []
    for start, _, stop, kind in sorted(hits):
        if not kept or start >= kept[-1].stop:
            kept.append(Hit(kind, start, stop))
    return kept


def _count(tally: IdentifierTally, example: Example, found: list[tuple[str, str, list[Hit]]]) -> None:
    """Enter what one row holds, masked."""
    kinds = Counter(hit.kind for _, _, hits in found for hit in hits)
    tally.hits += kinds
    tally.rows.update(kinds.keys())
    tally.num_with_any += 1
    has_direct = any(KINDS[kind].direct for kind in kinds)
    tally.num_with_direct += has_direct
    seen = tally.direct if has_direct else tally.other
    if len(seen) < MOST_ROWS:
        shown = [
            (f"{name}, character {hit.start + 1:,}", f"[{hit.kind}: {_hide(text[hit.start : hit.stop])}]")
            for name, text, hits in found
            for hit in hits
        ]
        shown.sort(key=lambda part: not KINDS[part[1][1:].split(":")[0]].direct)
        seen.append(Evidence(example.id, dict(shown[:_MOST_SHOWN])))


def _hide(text: str) -> str:
    """Return the shape of an identifier: ``#`` for each digit, ``*`` for each letter, at most 24 characters."""
    shape = "".join("#" if char.isdigit() else char if char in " .,:;@/()+-_" else "*" for char in text[:24])
    return shape + "…" if len(text) > 24 else shape


def _describe(total: IdentifierTally) -> Finding:
    """Return the finding with its counts by kind, the commonest first."""
    direct = bool(total.num_with_direct)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in total.hits.most_common())
    rows = f"{total.num_with_any:,} of {total.num_rows:,} rows"
    what = (
        f"{total.num_with_direct:,} of them with a direct one"
        if direct
        else "none of them direct (dates, places, ages over 89 or study numbers only)"
    )
    seen = [*total.direct, *total.other][:MOST_ROWS]
    return Finding(
        id="identifiers",
        severity=Severity.RED if direct else Severity.YELLOW,
        count=total.num_with_any,
        rows=tuple(evidence.row for evidence in seen),
        says=f"{rows} hold identifiers of the HIPAA Safe Harbor's kinds, {what}: {listed}. "
        "Names are found only behind a title or a label, so there may be more.",
        fix="Mask them with data.identifiers=mask, or de-identify the source; "
        "if they belong to nobody (invented cases), say data.accept=[identifiers].",
        evidence=tuple(seen),
        figures={
            "hits": dict(total.hits),
            "rows": dict(total.rows),
            "rows_with_direct": total.num_with_direct,
            "num_rows": total.num_rows,
            "letters": {kind: KINDS[kind].letter for kind in total.hits},
            "not_in_text": {kind: entry.says for kind, entry in NOT_IN_TEXT.items()},
        },
    )
