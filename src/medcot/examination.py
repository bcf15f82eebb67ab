"""A source of any size before the data doctor's checks, by itself: what ``medcot data doctor`` does.

Texts are looked at in one pass, every row of them, by worker processes (``data/scan.py``). What needs a tokenizer costs
five times as much as all the rest together, 2 ms a row each for encoding and for the gate. So ``Tokens`` looks at up to
``SAMPLE`` rows, drawn by their content, and at the longest; a run's gate looks at every row that it will train on.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcot import prompt
from medcot.data import columns
from medcot.data.checks import TOO_LARGE
from medcot.data.contamination import Contamination
from medcot.data.duplicates import number_rows
from medcot.data.findings import MOST_ROWS, Chunk, Finding, Reader, Severity
from medcot.data.lengths import Lengths, describe_lengths
from medcot.data.licences import find_licence
from medcot.data.pieces import SourcePieces
from medcot.data.plans import Purpose
from medcot.data.scan import Progress, scan
from medcot.data.sources import stream_rows
from medcot.data.splits import find_place
from medcot.data.survival import check_rows
from medcot.diagnosis import Diagnosis, Tools, apply_policy, sort_findings
from medcot.recipe import Recipe
from medcot.records import Example, Quarantined, Row
from medcot.rows import encode_whole, shorten_all
from medcot.secrets import SecretName, find_secret
from medcot.stages import OverLength

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 10_000  # rows of a source that are encoded and put before the gate
LONGEST = 50  # and as many of the longest
SAMPLE_SEED = 3407
_TOO_LONG = re.compile(r"[\d,]+ tokens; limit")


@dataclass(frozen=True)
class Drawn:
    """The tally of ``Tokens``: of a chunk's rows that can be encoded, number, place by content, and characters."""

    numbers: np.ndarray[Any, np.dtype[np.int64]]
    places: np.ndarray[Any, np.dtype[np.uint64]]
    characters: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Tokens:
    """The checks that need tokens, on rows drawn by their content and on the longest.

    Attributes:
        recipe: says how rows are encoded and what is done with long ones.
        tokenizer: the model's; only ``reduce`` needs it, so it does not travel to the workers.
        size: rows drawn.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None
    size: int = SAMPLE
    name: str = "tokens"
    settings: str = "1"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tokenizer behind."""
        return {**self.__dict__, "tokenizer": None}

    def map(self, chunk: Chunk) -> Drawn:
        """Note where each row stands."""
        numbered = [
            (number, example)
            for number, example in zip(number_rows(chunk).tolist(), chunk.examples, strict=True)
            if example.reasoning and example.response
        ]
        examples = [example for _, example in numbered]
        return Drawn(
            np.array([number for number, _ in numbered], dtype=np.int64),
            np.array([find_place(example.question, SAMPLE_SEED) for example in examples], dtype=np.uint64),
            np.array([len(e.question) + len(e.reasoning or "") + len(e.response or "") for e in examples], np.int64),
        )

    def reduce(self, tallies: Iterable[Drawn], reader: Reader) -> list[Finding]:
        """Encode the rows that are drawn, and look at them."""
        parts = [(tally.numbers, tally.places, tally.characters) for tally in tallies]
        if not parts or self.tokenizer is None:
            return []
        numbers, places, characters = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        chosen = np.argsort(places, kind="stable")[: self.size]
        if len(numbers) > self.size:
            chosen = np.union1d(chosen, np.argsort(characters, kind="stable")[-LONGEST:])
        wanted = np.sort(numbers[chosen]).tolist()
        fetched = reader.fetch(wanted)
        return judge_tokens([fetched[n] for n in wanted], self.recipe, self.tokenizer, num_rows=len(numbers))


def judge_tokens(
    examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, num_rows: int
) -> list[Finding]:
    """Encode examples as training would, put them before the gate, and count their tokens.

    Args:
        examples: all with reasoning and response.
        recipe: says how.
        tokenizer: the model's.
        num_rows: rows of the source, of which these are all or a sample.
    """
    if not examples:
        return []
    whole = encode_whole(examples, recipe, tokenizer)
    findings = weigh_lengths(whole.rows, recipe, tokenizer, num_rows) if whole.rows else []
    findings += describe_refused(whole.quarantined, len(examples))
    by_id = {example.id: example for example in examples}
    limit = recipe.model.max_seq_length
    rows = [row for row in whole.rows if row.num_tokens <= limit]
    long = [by_id[row.id] for row in whole.rows if row.num_tokens > limit]
    if long and recipe.data.over_length is OverLength.TRUNCATE_THINK:
        rows += shorten_all(long, recipe, tokenizer)
    pairs = [(by_id[row.id], row) for row in rows]
    return findings + pass_gate(pairs, recipe, tokenizer, drawn_from=num_rows if len(examples) < num_rows else None)


def weigh_lengths(
    rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> list[Finding]:
    """Count the tokens of rows of any length, of ``num_rows`` that the source has."""
    style = prompt.Style(recipe.prompt.style)
    lengths = Lengths(recipe.model.max_seq_length, prompt.count_shortest_think(style, tokenizer))
    for row in rows:
        lengths.add(row)
    return describe_lengths(
        lengths, over_length=recipe.data.over_length.value, batch_size=recipe.train.batch_size, num_rows=num_rows
    )


def pass_gate(
    pairs: Sequence[tuple[Example, Row]],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    drawn_from: int | None = None,
) -> list[Finding]:
    """Put examples and their rows before the gate; ``drawn_from`` so many, where they are a sample."""
    if not pairs:
        return []
    style = prompt.Style(recipe.prompt.style)
    found = check_rows(pairs, tokenizer, style, train_on_prompt=recipe.train.train_on_prompt)
    if drawn_from is None:
        return found
    note = f" They were drawn from {drawn_from:,} by their content; a run looks at all that it trains on."
    return [dataclasses.replace(f, says=f.says + note) if f.id == "survival" else f for f in found]


def describe_refused(quarantined: Sequence[Quarantined], num_examples: int) -> list[Finding]:
    """Say which rows could not become tokens; those that were merely too long are ``lengths.py``'s."""
    giants = [item for item in quarantined if item.reason.endswith(TOO_LARGE)]
    others = [item for item in quarantined if not item.reason.endswith(TOO_LARGE) and not _TOO_LONG.match(item.reason)]
    found = [_too_large(giants, num_examples)] if giants else []
    return found + ([_refused(others, num_examples)] if others else [])


def _too_large(giants: Sequence[Quarantined], num_examples: int) -> Finding:
    return Finding(
        "giant_rows",
        Severity.YELLOW,
        len(giants),
        tuple(str(item.row["id"]) for item in giants[:MOST_ROWS]),
        f"{len(giants):,} of {num_examples:,} rows looked at are so large that they were not tokenised; the first has"
        f" {giants[0].reason}.",
        "They are set aside in a run; cut them into rows of their own, or leave them out",
    )


def _refused(quarantined: Sequence[Quarantined], num_examples: int) -> Finding:
    first = quarantined[0]
    return Finding(
        "rows_refused",
        Severity.YELLOW,
        len(quarantined),
        tuple(str(item.row.get("id", f"row {item.row_number}")) for item in quarantined[:MOST_ROWS]),
        f"{len(quarantined):,} of {num_examples:,} rows looked at cannot be encoded safely; row {first.row_number}:"
        f" {first.reason}",
        "They are set aside in a run and listed in quarantine.jsonl; mend them, or leave them out",
    )


def examine_source(
    recipe: Recipe,
    tools: Tools,
    *,
    workers: int = 2,
    cache: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Diagnosis:
    """Look at the recipe's first source by itself, streaming.

    Raises:
        DataError: it cannot be read, or its layout is not clear.
        NetworkError: a Hub data set, and no network.
    """
    origin = recipe.data.origins[0]
    source = str(origin.source)
    secret = find_secret(SecretName.HUGGING_FACE)
    where: dict[str, Any] = {"config": origin.config, "split": origin.split, "revision": origin.revision}
    where["token"] = secret.value if secret else None
    head = [row for row, _ in itertools.islice(stream_rows(source, **where), columns.FIRST_ROWS)]
    names = list(dict.fromkeys(key for row in head for key in row))
    stream = stream_rows(source, **where)
    named = {str(name): column for name, column in origin.columns.items()}
    plan = columns.choose_layout(names, head, named, source=stream.source, purpose=Purpose.INSPECT)
    found = [*tools.text_checks(), Tokens(recipe, tools.tokenizer if tools.is_encodable else None)]
    if tools.items:
        found.append(Contamination(tools.items))
    with tempfile.TemporaryDirectory(prefix="medcot-doctor-") as scratch:
        pieces = SourcePieces(stream, Path(scratch))
        scanned = scan(
            pieces, plan, found, workers=workers, cache=cache, on_progress=on_progress, total_bytes=pieces.total_bytes
        )
    figures = scanned.figures
    if not figures.num_examples:
        raise columns.refuse_all(source, figures.num_rows, next(iter(figures.counts.reasons), "it is empty"))
    lineage = {**{k: v for k, v in where.items() if k != "token"}, "source": source, "sha256": pieces.figures.sha256}
    lineage["licence"] = find_licence(stream.source, revision=stream.revision, token=where["token"])
    lineage |= {"raw_rows": figures.num_rows, "unreadable": figures.num_rows - figures.num_examples}
    sentences = [f"{note}." for note in pieces.figures.notes] + plan.say(figures.counts)
    counts = {"raw_rows": figures.num_rows, "unreadable": lineage["unreadable"], "examples": figures.num_examples}
    findings = [apply_policy(finding, recipe) for finding in scanned.findings] + tools.doubts()
    return Diagnosis(sort_findings(findings), [lineage], sentences, counts, recipe.data.accept)
