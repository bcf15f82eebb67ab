"""The account of a run's rows: what was read of each source, what was held out, set aside, left out and trained on.

Plain records that can say their own sums. ``rows.py`` makes them; run.json, the report and the model card carry them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from medcot.data.mixtures import Share
from medcot.records import Example, Quarantined, Row
from medcot.stages import Origin


@dataclass(frozen=True)
class SourceData:
    """One source as read, before a tokenizer is known.

    Attributes:
        origin: what the recipe says of it.
        sha256: of its rows or its file.
        revision: the Hub commit, where known.
        num_rows: raw rows it has.
        examples: those to train on.
        held_out: those whose loss is only watched.
        quarantined: those that could not be read.
        sentences: what each column became, and what was noticed.
        licence: what the source says of it, where it does.
    """

    origin: Origin
    sha256: str
    revision: str | None
    num_rows: int
    examples: list[Example]
    held_out: list[Example] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    licence: str | None = None

    @property
    def name(self) -> str:
        """The source as the recipe writes it."""
        return str(self.origin.source)

    def lineage(self) -> dict[str, Any]:
        """Where the rows come from, and what became of them before encoding, in plain JSON."""
        return {
            "source": self.name,
            "config": self.origin.config,
            "split": self.origin.split,
            "revision": self.revision,
            "sha256": self.sha256,
            "licence": self.licence,
            "raw_rows": self.num_rows,
            "unreadable": len(self.quarantined),
            "removed": self.num_rows - len(self.quarantined) - len(self.examples) - len(self.held_out),
            "held_out": len(self.held_out),
        }


@dataclass(frozen=True)
class RawData:
    """Examples of all sources as read, before a tokenizer is known.

    Attributes:
        parts: the training sources in the recipe's order.
        validation_part: the validation source, all of it held out; ``None`` where there is none.
    """

    parts: tuple[SourceData, ...]
    validation_part: SourceData | None = None

    @property
    def every_part(self) -> tuple[SourceData, ...]:
        """The training sources and that of validation."""
        return self.parts if self.validation_part is None else (*self.parts, self.validation_part)

    @property
    def examples(self) -> list[Example]:
        """What there is to train on, source after source."""
        return [example for part in self.parts for example in part.examples]

    @property
    def validation(self) -> list[Example]:
        """What is held out."""
        return [example for part in self.every_part for example in part.held_out]

    @property
    def source(self) -> str:
        """The training sources in words."""
        return " + ".join(part.name for part in self.parts)

    @property
    def revision(self) -> str | None:
        """The Hub commit of the source, where there is one source."""
        return self.parts[0].revision if len(self.parts) == 1 else None

    @property
    def sha256(self) -> str:
        """The source's checksum; of several sources that of the text ``sha256sum`` would print for them."""
        if len(self.every_part) == 1:
            return self.parts[0].sha256
        listing = "".join(f"{part.sha256}  {part.name}\n" for part in self.every_part)
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def quarantined(self) -> list[Quarantined]:
        """Rows that could not be read; of several sources each says which it was in."""
        return [item for part in self.every_part for item in self.placed(part, part.quarantined)]

    @property
    def sentences(self) -> list[str]:
        """What was noticed; of several sources each sentence says in which."""
        if len(self.every_part) == 1:
            return list(self.parts[0].sentences)
        return [f"{part.name}: {sentence}" for part in self.every_part for sentence in part.sentences]

    def revise(self, revise: Callable[[Example], Example | None]) -> RawData:
        """Return the data with each example, held out or not, replaced by what ``revise`` makes of it, if anything."""

        def apply(part: SourceData) -> SourceData:
            sides = (
                [new for old in side if (new := revise(old)) is not None] for side in (part.examples, part.held_out)
            )
            examples, held_out = sides
            return dataclasses.replace(part, examples=examples, held_out=held_out)

        held = self.validation_part
        return RawData(tuple(apply(part) for part in self.parts), None if held is None else apply(held))

    def placed(self, part: SourceData, items: Sequence[Quarantined]) -> list[Quarantined]:
        """Return rows set aside, each saying of which source it is where there are several."""
        if len(self.every_part) == 1:
            return list(items)
        return [dataclasses.replace(item, reason=f"{item.reason} (in {part.name})") for item in items]


@dataclass(frozen=True)
class TrainingData:
    """Rows of tokens, and the account of how they came to be.

    Attributes:
        raw: the examples.
        rows: the rows to train on, repeats included.
        quarantined: rows that could not be read or encoded, held-out ones too.
        sentences: what happened, for a person.
        validation: the rows whose loss is watched.
        shares: what the mixture takes of each source.
        held_out: how rows were held out, for run.json.
        num_over_length: examples that were over the limit, whatever became of them.
    """

    raw: RawData
    rows: list[Row]
    quarantined: list[Quarantined]
    sentences: list[str]
    validation: list[Row] = field(default_factory=list)
    shares: tuple[Share, ...] = ()
    held_out: dict[str, Any] = field(default_factory=dict)
    num_over_length: int = 0

    def facts(self) -> dict[str, Any]:
        """The ``data.train`` part of run.json."""
        facts = {
            "source": self.raw.source,
            "revision": self.raw.revision,
            **_count(self.rows),
            "sha256": self.raw.sha256,
            "rows_sha256": self.digest,
            "quarantined": len(self.quarantined),
        }
        return facts if len(self.raw.parts) == 1 else {**facts, "sources": self.lineage()}

    @functools.cached_property
    def digest(self) -> str:
        """A checksum of the rows that are trained on and watched, tokens and all: what several halves must share."""
        known = hashlib.sha256()
        for row in (*self.rows, *self.validation):
            known.update(f"{row.id}\n".encode())
            known.update(array("q", row.input_ids).tobytes())
            known.update(array("q", row.labels).tobytes())
        return known.hexdigest()

    def validation_facts(self) -> dict[str, Any] | None:
        """The ``data.validation`` part of run.json; ``None`` where nothing is held out."""
        held_out = {**self.held_out, "held_out": len(self.raw.validation)}
        return {**held_out, **_count(self.validation)} if self.validation else None

    def lineage(self) -> list[dict[str, Any]]:
        """Each training source's way from raw rows to the mixture, in plain JSON.

        ``raw_rows`` are ``unreadable``, ``removed`` (by ``revise``), ``held_out``, ``unfit`` (not encoded) or ``rows``;
        those are ``left_out`` or ``drawn``, and what is drawn again is a repeat.
        """
        return [
            {
                **part.lineage(),
                "unfit": len(part.examples) - share.num_rows,
                "rows": share.num_rows,
                "drawn": share.num_drawn,
                "left_out": share.num_left_out,
                "repeats": share.num_repeats,
            }
            for part, share in zip(self.raw.parts, self.shares, strict=True)
        ]


def _count(rows: Sequence[Row]) -> dict[str, int]:
    return {
        "rows": len(rows),
        "tokens": sum(row.num_tokens for row in rows),
        "trained_tokens": sum(row.num_trained_tokens for row in rows),
    }
