"""Rows that say the same as another row: byte for byte, but for typography, or nearly.

Repeated rows are learned by heart and count several times; repeated across the border of a validation split, they make
its loss a measure of memory. Three degrees, each containing the one before:

- *exact*: question, reasoning and response have the same bytes;
- *normalised*: question and response have the same words (``words.py``);
- *near*: the word 5-grams of question and response are alike at 0.8 or more (``sketches.py``).

Reasoning counts only for the first. Two different chains of thought to one question and one answer are a choice that
some data sets make on purpose; whoever made it can keep the yellow finding. Numbers count in all three: a question
asked again with other laboratory values is another question here (of leaked test questions, ``contamination.py`` thinks
otherwise). Where a response is missing, the gold answer stands for it.

The usual index in memory does not fit a million rows. Here a row is remembered by its hashes, 160 bytes; the 128 of its
sketch are written to scratch files, one for each band, and read back band by band. Each band's hashes are sorted, and
equal neighbours are candidates. Rows with the same words enter as one, and a bucket of m gives at most 2 (m - 1) pairs,
so neither a row repeated 100,000 times nor a template used as often is quadratic. Candidates are read again and
compared shingle by shingle, up to ``MOST_READ`` pairs; beyond that number only pairs whose sketches put them above 0.8
beyond doubt are joined, and the finding says so. Groups are connected: of a chain of small changes the ends may differ
by more.

What removal would take is every row of a group but its first.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, pairwise
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medcot.data import sketches, words
from medcot.data.findings import MOST_ROWS, Chunk, Evidence, Finding, InMemory, Reader, Severity
from medcot.data.sketches import NEAR, NUM_BANDS, SHINGLE_WORDS, Sketches
from medcot.data.words import Hashes, Offsets
from medcot.records import Example

MOST_READ = 50_000  # candidate pairs that are read again; some 10 s at 0.1 ms a row

_MARGIN = 0.11  # three standard deviations of an estimate: below NEAR by it no pair is read again
_PAIRS_AT_ONCE = 256  # read again together: bounds the memory, and gives the reader something to sort
_TRAIN_AT_ONCE = 512  # training rows that find_shared looks at together
_GROUPS_SHOWN = 5
_ROWS_SHOWN = 3  # of each group

_SAYS = {
    "exact": "are byte for byte the same as an earlier row",
    "normalised": "have the same question and response as an earlier row but for case, punctuation and reasoning",
    "near": f"are nearly the same as an earlier row ({SHINGLE_WORDS}-word shingles of question and response alike at"
    f" {NEAR:.0%} or more)",
}
_FIX = {
    "exact": "Nothing to do: medcot run leaves all but the first of each group out",
    "normalised": "Keep the first of each group, unless several chains of thought for one question are meant",
    "near": "Read the groups; keep the first of each unless the differences matter",
}


@dataclass(frozen=True, slots=True)
class Signatures:
    """What is remembered of a chunk's readable rows; the tally of ``Duplicates``.

    Attributes:
        numbers: (rows,) their numbers in the source, from 1.
        exact: (rows, 2) a 128-bit hash of the three texts.
        normalised: (rows,) a hash of the words of question and response.
        sketches: of the shingles of question and response.
    """

    numbers: NDArray[np.int64]
    exact: Hashes
    normalised: Hashes
    sketches: Sketches


def number_rows(chunk: Chunk) -> NDArray[np.int64]:
    """Return the number in the source of each of a chunk's examples: those that no quarantined row has, in order."""
    aside = {item.row_number for item in chunk.quarantined}
    numbers = [number for number in range(chunk.first, chunk.first + chunk.num_rows) if number not in aside]
    assert len(numbers) == len(chunk.examples), "a chunk's rows are its examples and those set aside"
    return np.array(numbers, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Finds rows that repeat others, inside one source."""

    most_read: int = MOST_READ

    @property
    def name(self) -> str:
        """Its key in the cache."""
        return "duplicates"

    @property
    def settings(self) -> str:
        """What changes its tallies; ``most_read`` only changes what is made of them."""
        return f"1 words {words.VERSION} sketches {sketches.VERSION}"

    def map(self, chunk: Chunk) -> Signatures:
        """Hash and sketch each row."""
        exact = b"".join(map(_digest, chunk.examples))
        hashed = words.Windows(words.hash_words([_comparable(example) for example in chunk.examples]))
        return Signatures(
            number_rows(chunk),
            np.frombuffer(exact, np.uint64).reshape(-1, 2),
            hashed.hash_texts(),
            sketches.compute_sketches(*hashed.hash_shingles(SHINGLE_WORDS)),
        )

    def reduce(self, tallies: Iterable[Signatures], reader: Reader) -> list[Finding]:
        """Group the rows in the three degrees."""
        return _report(*self._find_groups(tallies, reader))

    def find_repeats(self, examples: Sequence[Example]) -> set[int]:
        """Return the places, from 0, of examples that an earlier one is like, in any degree; for leaving them out."""
        tally = self.map(Chunk(1, len(examples), examples))
        groups, *_ = self._find_groups([tally], InMemory(examples))
        return {place for place, first in enumerate(groups["near"].tolist()) if first != place}

    def _find_groups(
        self, tallies: Iterable[Signatures], reader: Reader
    ) -> tuple[dict[str, Offsets], NDArray[np.int64], Reader, _Near]:
        with ExitStack() as scratch:
            stored = _Stored([scratch.enter_context(tempfile.TemporaryFile()) for _ in range(NUM_BANDS + 1)])
            numbers, exact, normalised = stored.take(tallies)
            groups = {"exact": _group(exact), "normalised": _group(normalised)}
            near = _Near(groups["normalised"], numbers, reader, self.most_read)
            groups["near"] = near.join(stored)
        return groups, numbers, reader, near


def exact_duplicates(examples: Iterable[Example]) -> set[int]:
    """Return the places, from 0, of examples whose three texts an earlier example has; for leaving them out."""
    seen: set[bytes] = set()
    repeated = set()
    for place, example in enumerate(examples):
        digest = _digest(example)
        if digest in seen:
            repeated.add(place)
        seen.add(digest)
    return repeated


class Degree(StrEnum):
    """In what a validation example is that of training, the strongest first."""

    EXACT = "exact"
    NORMALISED = "normalised"
    QUESTION = "question"  # the same words asked, and another response
    NEAR = "near"


_RANK = {degree: rank for rank, degree in enumerate(Degree)}


@dataclass(frozen=True, slots=True)
class Shared:
    """A validation example that training has seen; both by place, from 0."""

    train: int
    validation: int
    degree: Degree
    likeness: float


def find_shared(train: Iterable[Example], validation: Sequence[Example]) -> list[Shared]:
    """Return for each validation example that training shares the strongest such pair, the first in training of those.

    Training rows stream by; memory grows with the validation set only (about 3 kB a row). A question that training has
    with another response counts too: its answer is no longer a test. A split by content hash keeps these together.
    """
    search = _SharedSearch(validation)
    stream = iter(train)
    before = 0
    while batch := list(islice(stream, _TRAIN_AT_ONCE)):
        search.look(before, batch)
        before += len(batch)
    return [search.found[place] for place in sorted(search.found)]


class _SharedSearch:
    """The validation set, and what of it has been seen in training so far."""

    def __init__(self, validation: Sequence[Example]) -> None:
        self.found: dict[int, Shared] = {}
        self._seen = np.zeros(len(validation), bool)
        self._places: dict[tuple[Degree, Any], list[int]] = {}
        hashed, self._sketches, self._sets = _look_closely(validation)
        for place, keys in enumerate(_list_keys(validation, hashed)):
            for degree, key in keys.items():
                self._places.setdefault((degree, key), []).append(place)
        self._orders = [np.argsort(band, kind="stable") for band in self._sketches.bands.T]

    def look(self, before: int, batch: Sequence[Example]) -> None:
        """Compare a batch of training examples with all validation examples."""
        hashed, sketched, sets = _look_closely(batch)
        for place, keys in enumerate(_list_keys(batch, hashed)):
            for degree, key in keys.items():
                for other in self._places.get((degree, key), ()):
                    self._keep(Shared(before + place, other, degree, 1.0))
        pairs = [np.zeros(0, np.int64)]  # as place * validation rows + other, so that each is compared once
        for band, order in enumerate(self._orders):
            left, right = _pair_across(sketched.bands[:, band], self._sketches.bands[:, band], order)
            pairs.append((left * len(order) + right)[~self._seen[right]])
        left, right = np.divmod(np.unique(np.concatenate(pairs)), max(1, len(self._seen)))
        likely = sketches.estimate_likeness(sketched.nibbles, self._sketches.nibbles, left, right) >= NEAR - _MARGIN
        for place, other in zip(left[likely].tolist(), right[likely].tolist(), strict=True):
            if not self._seen[other]:
                likeness = sketches.compute_likeness(sets[place], self._sets[other])
                if likeness >= NEAR:
                    self._keep(Shared(before + place, other, Degree.NEAR, likeness))

    def _keep(self, new: Shared) -> None:
        old = self.found.get(new.validation)
        if old is None or _RANK[new.degree] < _RANK[old.degree]:
            self.found[new.validation] = new
            self._seen[new.validation] = True


def _pair_across(left: NDArray[np.uint32], right: NDArray[np.uint32], order: Offsets) -> tuple[Offsets, Offsets]:
    """Return all pairs of places with equal values; ``order`` sorts the right."""
    in_order = right[order]
    first = np.searchsorted(in_order, left, "left")
    counts = np.searchsorted(in_order, left, "right") - first
    places = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return np.repeat(np.arange(len(left)), counts), order[places]


def _look_closely(examples: Sequence[Example]) -> tuple[Hashes, Sketches, list[Hashes]]:
    """Return what question and response come to: a hash, a sketch and the set of shingles of each example."""
    windows = words.Windows(words.hash_words([_comparable(example) for example in examples]))
    shingles, bounds = windows.hash_shingles(SHINGLE_WORDS)
    return windows.hash_texts(), sketches.compute_sketches(shingles, bounds), _split_sets(shingles, bounds)


def _list_keys(examples: Sequence[Example], hashed: Hashes) -> Iterator[dict[Degree, Any]]:
    for example, both in zip(examples, hashed.tolist(), strict=True):
        question = words.normalise(example.question) or example.question
        yield {Degree.EXACT: _digest(example), Degree.NORMALISED: both, Degree.QUESTION: question}


def _digest(example: Example) -> bytes:
    """Return 128 bits of the three texts; a missing one differs from an empty one, and no border can move."""
    digest = hashlib.blake2b(digest_size=16)
    for text in (example.question, example.reasoning, example.response):
        data = None if text is None else text.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<q", -1 if data is None else len(data)))
        digest.update(data or b"")
    return digest.digest()


def _comparable(example: Example) -> str:
    """Return the words of question and response; a word that stands for the bytes where there are none (emoji)."""
    text = f"{example.question}\n{example.gold if example.response is None else example.response}"
    return words.normalise(text) or hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _split_sets(shingles: Hashes, bounds: Offsets) -> list[Hashes]:
    """Return the shingles of each text, sorted and without repeats."""
    return [np.unique(shingles[start:stop]) for start, stop in pairwise(bounds.tolist())]


# Groups --------------------------------------------------------------------------------------------------------------


def _group(keys: Hashes) -> Offsets:
    """Return for each row the place of the first row that has the same key; keys are (rows,) or (rows, 2)."""
    columns = keys.T if keys.ndim == 2 else keys[None]
    order = np.lexsort(columns)  # stable, so the first row of a run is the first of its group
    new = np.ones(len(keys), bool)
    new[1:] = (columns[:, order[1:]] != columns[:, order[:-1]]).any(axis=0)
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


class _Stored:
    """Sketches in scratch files: one for each band, and one for the nibbles."""

    def __init__(self, files: Sequence[IO[bytes]]) -> None:
        self._bands, self._nibbles = files[:-1], files[-1]

    def take(self, tallies: Iterable[Signatures]) -> tuple[NDArray[np.int64], Hashes, Hashes]:
        """Store the sketches of all tallies; return their numbers, exact and normalised hashes."""
        numbers, exact, normalised = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint64)]
        for tally in tallies:
            numbers.append(tally.numbers)
            exact.append(tally.exact)
            normalised.append(tally.normalised)
            for band, file in enumerate(self._bands):
                file.write(tally.sketches.bands[:, band].tobytes())
            self._nibbles.write(tally.sketches.nibbles.tobytes())
        return np.concatenate(numbers), np.concatenate(exact), np.concatenate(normalised)

    def read_band(self, band: int) -> NDArray[np.uint32]:
        """Return one band of all rows."""
        self._bands[band].seek(0)
        return np.frombuffer(self._bands[band].read(), np.uint32)

    def map_nibbles(self) -> NDArray[np.uint8]:
        """Return all nibbles as an array that stays on disk."""
        self._nibbles.flush()
        width = sketches.NUM_BANDS * sketches.ROWS_PER_BAND // 2
        if self._nibbles.seek(0, 2) == 0:
            return np.zeros((0, width), np.uint8)  # nothing can be mapped of an empty file
        return np.memmap(self._nibbles, np.uint8, "r").reshape(-1, width)


class _Near:
    """Joins groups of rows with the same words where their shingles are alike."""

    def __init__(self, first: Offsets, numbers: NDArray[np.int64], reader: Reader, most_read: int) -> None:
        self._parents = first.copy()  # of each row; a root is its own, and the first row of its group
        self._rows = np.flatnonzero(first == np.arange(len(first)))  # one for each text
        self._numbers, self._reader, self._most_read = numbers, reader, most_read
        self._unlike = np.zeros(0, np.int64)  # pairs read again in vain, as left * rows + right, sorted
        self.num_read = self.num_estimated = 0

    def join(self, stored: _Stored) -> Offsets:
        """Return for each row the first row of its group."""
        nibbles = stored.map_nibbles()
        for band in range(NUM_BANDS):
            values = stored.read_band(band)[self._rows]
            for left, right in sketches.pair_equals(values):
                self._try(self._rows[left], self._rows[right], nibbles)
        return self._find_roots()

    @property
    def note(self) -> str:
        """What to say of pairs beyond the budget; empty where it sufficed."""
        if not self.num_estimated:
            return ""
        return (
            f"; {self.num_read:,} pairs were compared word by word, {self.num_estimated:,} more by their sketches and"
            f" joined from an estimated {NEAR + _MARGIN:.0%} on, so that some were missed"
        )

    def _find_roots(self) -> Offsets:
        while not np.array_equal(upper := self._parents[self._parents], self._parents):
            self._parents = upper
        return self._parents

    def _try(self, left: Offsets, right: Offsets, nibbles: NDArray[np.uint8]) -> None:
        """Join those pairs (left before right) that are not yet in one group and are alike."""
        roots = self._find_roots()
        new = roots[left] != roots[right]
        new &= ~np.isin(left * len(roots) + right, self._unlike)
        left, right = left[new], right[new]
        estimates = sketches.estimate_likeness(nibbles, nibbles, left, right)
        likely = estimates >= NEAR - _MARGIN
        self._decide(left[likely], right[likely], estimates[likely])

    def _decide(self, left: Offsets, right: Offsets, estimates: NDArray[np.float32]) -> None:
        """Read pairs again as long as the budget lasts, and go by the estimate thereafter."""
        read = max(0, min(len(left), self._most_read - self.num_read))
        alike = estimates >= NEAR + _MARGIN
        for start in range(0, read, _PAIRS_AT_ONCE):
            part = slice(start, min(start + _PAIRS_AT_ONCE, read))
            alike[part] = self._read_again(left[part], right[part])
        self.num_read += read
        self.num_estimated += len(left) - read
        unlike = (left * len(self._parents) + right)[:read][~alike[:read]]
        self._unlike = np.union1d(self._unlike, unlike)
        for one, other in zip(left[alike].tolist(), right[alike].tolist(), strict=True):
            self._unite(one, other)

    def _read_again(self, left: Offsets, right: Offsets) -> list[bool]:
        rows = np.unique(np.concatenate([left, right]))
        numbers = self._numbers[rows].tolist()
        examples = self._reader.fetch(numbers)
        windows = words.Windows(words.hash_words([_comparable(examples[number]) for number in numbers]))
        sets = dict(zip(rows.tolist(), _split_sets(*windows.hash_shingles(SHINGLE_WORDS)), strict=True))
        pairs = zip(left.tolist(), right.tolist(), strict=True)
        return [sketches.compute_likeness(sets[one], sets[other]) >= NEAR for one, other in pairs]

    def _unite(self, one: int, other: int) -> None:
        one, other = self._climb(one), self._climb(other)
        self._parents[max(one, other)] = min(one, other)

    def _climb(self, row: int) -> int:
        while (parent := int(self._parents[row])) != row:
            self._parents[row] = row = int(self._parents[parent])
        return row


# What is said --------------------------------------------------------------------------------------------------------


def _report(groups: dict[str, Offsets], numbers: NDArray[np.int64], reader: Reader, near: _Near) -> list[Finding]:
    """Say what each degree adds to the stricter ones, and the sum."""
    own = np.arange(len(numbers))
    removed = np.zeros(len(numbers), bool)  # by a stricter degree
    findings = []
    for degree, first in groups.items():
        repeated = np.flatnonzero((first != own) & ~removed)
        removed |= first != own
        if len(repeated):
            findings.append(_describe(degree, first, repeated, numbers, reader, near))
    left = len(numbers) - int(removed.sum())
    figures = {"rows": len(numbers), "left": left, "pairs_read": near.num_read, "pairs_estimated": near.num_estimated}
    says = f"{left:,} of {len(numbers):,} rows are left when each group of duplicates, near ones included, keeps one"
    says += near.note
    return [*findings, Finding("duplicates", Severity.INFO, len(numbers) - left, (), says, "", figures=figures)]


def _describe(
    degree: str, first: Offsets, repeated: Offsets, numbers: NDArray[np.int64], reader: Reader, near: _Near
) -> Finding:
    roots, sizes = np.unique(first[repeated], return_counts=True)
    members = {int(root): repeated[first[repeated] == root][: _ROWS_SHOWN - 1] for root in roots[:_GROUPS_SHOWN]}
    listed = repeated[:MOST_ROWS]
    wanted = np.unique(np.concatenate([listed, *([root, *rows] for root, rows in members.items())]))
    examples = reader.fetch(numbers[wanted].tolist())
    by_row = {int(row): examples[int(numbers[row])] for row in wanted}
    evidence = tuple(_show([by_row[root], *(by_row[int(row)] for row in rows)]) for root, rows in members.items())
    says = f"{len(repeated):,} of {len(first):,} rows {_SAYS[degree]}, in {len(roots):,} group{'s' * (len(roots) != 1)}"
    says += near.note if degree == "near" else ""
    figures: dict[str, Any] = {"groups": len(roots), "largest": int(sizes.max()) + 1}
    return Finding(
        f"duplicates_{degree}",
        Severity.YELLOW,
        len(repeated),
        tuple(by_row[int(row)].id for row in listed),
        says,
        _FIX[degree],
        evidence,
        figures,
    )


def _show(group: Sequence[Example]) -> Evidence:
    """Put a group's first rows side by side; equal ids, as of two sources with one name, are told apart."""
    parts: dict[str, str] = {}
    for example in group:
        label = example.id if example.id not in parts else f"{example.id} ({len(parts) + 1})"
        answer = example.gold if example.response is None else example.response
        parts[label] = words.excerpt(f"{example.question}\n\n{answer or ''}".rstrip())
    return Evidence(group[0].id, parts)
