"""Benchmark questions among the training rows: found, judged, shown side by side.

A model that has trained on the questions it is then asked shows memory, not medicine. So every training question is
compared with every question of the benchmarks that the recipe uses. ``leaks.py`` holds the two steps, a search that
misses little and a judge who reads what was found; here they meet the data.

The index of the benchmarks' 13-grams is built once, travels to the workers and is searched by bisection for a whole
chunk at a time. Suspects are judged where they are found, in the workers; a tally holds a few numbers for each pair,
and at most ``MOST_A_ROW`` pairs of a row: the confirmed, then those with the most runs in common. How many pairs there
were is counted all the same.

Only questions are compared with questions. Reasoning that happens to state a fact which a benchmark asks for is what a
model should learn from; the question that asks for it is not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from medcot.data import leaks, words
from medcot.data.duplicates import number_rows
from medcot.data.findings import MOST_ROWS, Chunk, Evidence, Finding, Reader, Severity
from medcot.data.leaks import NGRAM, Hits, Judgement, RunIndex, Verdict
from medcot.data.words import Signs, Windows
from medcot.records import Example

MOST_A_ROW = 16  # pairs of one row that are judged and listed

_BATCH = 1_000  # examples that find_contaminated looks at together
_SHOWN_AROUND = 600  # characters before and behind a shared passage, in evidence

_HOW = {
    Verdict.WHOLE: "whole question",
    Verdict.OPTIONS: "question with its options",
    Verdict.PASSAGE: f"passage of {leaks.PASSAGE_CHARACTERS} characters or more",
    Verdict.LIKENESS: f"token-set ratio of {leaks.LIKENESS:.0f} or more",
}

Item = tuple[str, Example]  # a benchmark's name, and one of its questions


@dataclass(frozen=True, slots=True)
class Pair:
    """A training example and a benchmark item that share words.

    Attributes:
        place: of the example among those given, from 0.
        item: of the item among those given, from 0.
        judgement: what it came to.
    """

    place: int
    item: int
    judgement: Judgement
    shared: int = 0  # runs of words in common
    shift: int = 0  # words by which the item is displaced in the example's question

    @property
    def is_confirmed(self) -> bool:
        """Whether the example asks the item's question."""
        return self.judgement.verdict is not Verdict.SUSPECT


@dataclass(frozen=True, slots=True)
class Suspicions:
    """The tally of a chunk: an entry of each array for a pair; the counts are of all, listed or not.

    Attributes:
        numbers: row number in the source, from 1.
        items: place of the item.
        verdicts: a ``Verdict``.
        characters: of the longest common passage.
        likeness: token-set ratio.
        shifts: words by which the item is displaced.
        num_rows: readable rows looked at.
        num_pairs: pairs that share a run.
    """

    numbers: NDArray[np.int64]
    items: NDArray[np.int32]
    verdicts: NDArray[np.uint8]
    characters: NDArray[np.int32]
    likeness: NDArray[np.float32]
    shifts: NDArray[np.int64]
    num_rows: int
    num_pairs: int


class ItemIndex:
    """The questions of the benchmarks, to be found in texts."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        kept = [words.normalise(item.question, Signs.DROP) for _, item in items]
        self._words = [text.split() for text in kept]
        by_text = Windows(words.hash_words(kept)).hash_texts()
        self._whole: dict[int, list[int]] = {}  # the question's words as a hash → items
        for place, (text, key) in enumerate(zip(kept, by_text.tolist(), strict=True)):
            if text:
                self._whole.setdefault(key, []).append(place)
        self._whole_keys = np.array(list(self._whole), np.uint64)
        _, identities = np.unique(by_text, return_inverse=True)
        _, benchmarks = np.unique(np.array([name for name, _ in items]), return_inverse=True)
        folded = words.hash_words([words.fold_numbers(text) for text in kept])
        hashed = words.hash_words(kept)
        lengths = range(leaks.FEWEST_CONTAINED, NGRAM)
        self._long = RunIndex(folded, NGRAM, identities, benchmarks)
        self._short = [RunIndex(hashed, n, identities, benchmarks) for n in lengths if (hashed.lengths == n).any()]

    def find(self, examples: Sequence[Example]) -> tuple[list[Pair], int]:
        """Return the pairs of some examples, judged, at most ``MOST_A_ROW`` a kind and row; and how many there were."""
        texts = [words.normalise(example.question, Signs.DROP) for example in examples]
        kept = Windows(words.hash_words(texts))
        found = {(pair.place, pair.item): pair for pair in self._find_equal(kept)}
        num_pairs = len(found)
        for index in self._short:
            hits = index.find(kept)
            num_pairs += sum(1 for _ in _each(hits, found))
            for place, item, shared, shift, telling in _each(_take_most(hits), found):
                around = _join_options(texts[place], examples[place])
                judgement = leaks.judge_short(texts[place], around, self._words[item], self._options(item), telling)
                found[place, item] = Pair(place, item, judgement, shared, shift)
        hits = self._long.find(Windows(words.hash_words([words.fold_numbers(text) for text in texts])))
        num_pairs += sum(1 for _ in _each(hits, found))
        for place, item, shared, shift, telling in _each(_take_most(hits), found):
            judgement = self._judge(texts[place], item, shared, shift, telling)
            found[place, item] = Pair(place, item, judgement, shared, shift)
        return sorted(found.values(), key=lambda pair: (pair.place, pair.item)), num_pairs

    def _find_equal(self, kept: Windows) -> Iterator[Pair]:
        """Yield the pairs of equal questions, however short."""
        keys = kept.hash_texts()
        for place in np.flatnonzero(np.isin(keys, self._whole_keys)).tolist():
            for item in self._whole[int(keys[place])][:MOST_A_ROW]:
                own = self._words[item]
                yield Pair(place, item, Judgement(Verdict.WHOLE, len(" ".join(own)), 100.0), 1, 0)

    def _options(self, item: int) -> set[str]:
        options = (self._items[item][1].options or {}).values()
        return {words.normalise(option, Signs.DROP) for option in options} - {""}

    def _judge(self, text: str, item: int, shared: int, shift: int, telling: bool) -> Judgement:
        """Read a pair word by word, unless stock phrases are all that it shares, and those are not most of the item."""
        own = self._words[item]
        if not telling and 2 * shared < len(own) - NGRAM + 1:
            return Judgement(Verdict.SUSPECT)
        return leaks.judge_long(text.split(), own, shift, telling, self._long)


def _join_options(text: str, example: Example) -> str:
    """Return the words of a training question and of the options beside it."""
    return " ".join([text, *(words.normalise(option, Signs.DROP) for option in (example.options or {}).values())])


def _each(hits: Hits, found: dict[tuple[int, int], Pair]) -> Iterator[tuple[int, int, int, int, bool]]:
    """Yield the pairs that have not been found yet."""
    columns = (hits.texts, hits.items, hits.shared, hits.shifts, hits.telling)
    for place, item, shared, shift, telling in zip(*(column.tolist() for column in columns), strict=True):
        if (place, item) not in found:
            yield place, item, shared, shift, telling


def _take_most(hits: Hits) -> Hits:
    """Return of each text the pairs with the most runs in common, telling ones first; ``MOST_A_ROW`` at most."""
    order = np.lexsort((hits.items, -hits.shared, ~hits.telling, hits.texts))
    texts = hits.texts[order]
    rank = np.arange(len(texts)) - np.searchsorted(texts, texts)
    order = order[rank < MOST_A_ROW]
    return Hits(hits.texts[order], hits.items[order], hits.shared[order], hits.shifts[order], hits.telling[order])


def find_contaminated(examples: Iterable[Example], items: Sequence[Item]) -> list[Pair]:
    """Return all pairs of examples and benchmark items that share words, judged, in order.

    Args:
        examples: the training rows; they may stream by.
        items: a benchmark's name with each of its questions.

    The places of the rows to leave out are ``{pair.place for pair in … if pair.is_confirmed}``.
    """
    index = ItemIndex(items)
    pairs = []
    stream = iter(examples)
    before = 0
    while batch := list(islice(stream, _BATCH)):
        for pair in index.find(batch)[0]:
            pairs.append(Pair(before + pair.place, pair.item, pair.judgement, pair.shared, pair.shift))
        before += len(batch)
    return pairs


@dataclass(frozen=True, slots=True)
class Contamination:
    """Looks for the questions of benchmarks among the training questions."""

    items: tuple[Item, ...]
    _index: ItemIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Build the index; it travels with the check."""
        object.__setattr__(self, "_index", ItemIndex(self.items))

    @property
    def name(self) -> str:
        """Its key in the cache."""
        return "contamination"

    @property
    def settings(self) -> str:
        """The items, since any other would give other tallies."""
        texts = [[name, item.id, item.question, item.options] for name, item in self.items]
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        return f"1 words {words.VERSION} items {digest}"

    def map(self, chunk: Chunk) -> Suspicions:
        """Find and judge the pairs of a chunk."""
        pairs, num_pairs = self._index.find(chunk.examples)
        places = [pair.place for pair in pairs]
        return Suspicions(
            number_rows(chunk)[places],
            np.array([pair.item for pair in pairs], np.int32),
            np.array([pair.judgement.verdict for pair in pairs], np.uint8),
            np.array([pair.judgement.characters for pair in pairs], np.int32),
            np.array([pair.judgement.likeness for pair in pairs], np.float32),
            np.array([pair.shift for pair in pairs], np.int64),
            len(chunk.examples),
            num_pairs,
        )

    def reduce(self, tallies: Iterable[Suspicions], reader: Reader) -> list[Finding]:
        """Say which rows ask a benchmark's question, and which only share its words."""
        return _Summary(self.items, tallies).report(reader)


class _Summary:
    """What all tallies come to."""

    def __init__(self, items: Sequence[Item], tallies: Iterable[Suspicions]) -> None:
        self._items = items
        self._confirmed, self._suspected = _Listed(), _Listed()
        self._items_by_benchmark: dict[str, set[int]] = {}
        self._verdicts: Counter[Verdict] = Counter()
        self._num_rows = self._num_pairs = 0
        for tally in tallies:
            self._num_rows += tally.num_rows
            self._num_pairs += tally.num_pairs
            confirmed = tally.verdicts != Verdict.SUSPECT
            self._confirmed.add(tally, confirmed)
            self._suspected.add(tally, ~confirmed & ~np.isin(tally.numbers, tally.numbers[confirmed]))
            self._verdicts.update(Verdict(verdict) for verdict in tally.verdicts[confirmed].tolist())
            for item in np.unique(tally.items[confirmed]).tolist():
                self._items_by_benchmark.setdefault(items[item][0], set()).add(item)

    def report(self, reader: Reader) -> list[Finding]:
        """Return the findings, the worst first."""
        findings = []
        if self._confirmed.num_rows:
            findings.append(self._report_confirmed(reader))
        if self._suspected.num_rows:
            findings.append(self._report_suspects(reader))
        by_benchmark = Counter(name for name, _ in self._items)
        names = ", ".join(f"{num:,} of {name}" for name, num in by_benchmark.items())
        says = f"{self._num_rows:,} training questions were compared with the benchmarks' ({names or 'none'})"
        figures = {"rows": self._num_rows, "pairs": self._num_pairs, "items": dict(by_benchmark)}
        return [*findings, Finding("contamination", Severity.INFO, self._num_rows, (), says, "", figures=figures)]

    def _report_confirmed(self, reader: Reader) -> Finding:
        leaked = {name: len(self._items_by_benchmark[name]) for name in sorted(self._items_by_benchmark)}
        how = {_HOW[verdict]: num for verdict, num in sorted(self._verdicts.items())}
        held = ", ".join(f"{num:,} of {name}" for name, num in leaked.items())
        says = (
            f"{self._confirmed.num_rows:,} of {self._num_rows:,} rows ask a benchmark's question: {held}"
            f" (found by {', '.join(f'{name} {num:,}' for name, num in how.items())})"
        )
        fix = "Leave these rows out; medcot run does, unless told otherwise"
        rows, evidence = self._confirmed.show(self._items, reader)
        figures = {"leaked": leaked, "found_by": how}
        num_rows = self._confirmed.num_rows
        return Finding("contamination_confirmed", Severity.RED, num_rows, rows, says, fix, evidence, figures)

    def _report_suspects(self, reader: Reader) -> Finding:
        says = (
            f"{self._suspected.num_rows:,} of {self._num_rows:,} rows share {NGRAM} words in a row, numbers aside, or a"
            " whole short question with a benchmark's questions, and were not confirmed to ask them"
            f" ({self._num_pairs:,} pairs in all)"
        )
        fix = "Read the pairs below: most are stock phrases of clinical vignettes; leave out any that is not"
        rows, evidence = self._suspected.show(self._items, reader)
        num_rows, figures = self._suspected.num_rows, {"pairs": self._num_pairs}
        return Finding("contamination_suspects", Severity.YELLOW, num_rows, rows, says, fix, evidence, figures)


class _Listed:
    """Counts rows, and remembers the first pairs to show."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._rows: list[int] = []  # the first so many different ones
        self._pairs: list[tuple[int, int, int, int, float]] = []  # number, item, shift, characters, likeness

    def add(self, tally: Suspicions, chosen: NDArray[np.bool_]) -> None:
        numbers = np.unique(tally.numbers[chosen])
        self.num_rows += len(numbers)
        self._rows += numbers[: MOST_ROWS - len(self._rows)].tolist()
        columns = (tally.numbers, tally.items, tally.shifts, tally.characters, tally.likeness)
        first = np.flatnonzero(chosen)[: MOST_ROWS - len(self._pairs)]
        self._pairs += zip(*(column[first].tolist() for column in columns), strict=True)

    def show(self, items: Sequence[Item], reader: Reader) -> tuple[tuple[str, ...], tuple[Evidence, ...]]:
        """Return the ids of the first rows, and the first pairs side by side."""
        examples = reader.fetch(sorted({*self._rows, *(pair[0] for pair in self._pairs)}))
        evidence = []
        for number, item, shift, characters, likeness in self._pairs:
            name, theirs = items[item]
            own, other = mark_shared(examples[number].question, theirs.question, shift)
            seen = (
                f"longest passage {characters} characters, token-set ratio {likeness:.0f}"
                if characters
                else "a stock phrase"
            )
            parts = {"training question": own, f"{name} {theirs.id}": other, "in common": seen}
            evidence.append(Evidence(examples[number].id, parts))
        return tuple(examples[number].id for number in self._rows), tuple(evidence)


def mark_shared(text: str, question: str, shift: int) -> tuple[str, str]:
    """Return a training question and an item's with the longest run that they share, numbers aside, in ⟦ ⟧.

    Args:
        text: the training question.
        question: the item's.
        shift: by how many words the item is displaced in the text, from where the two are compared.
    """
    right = _cut_words(question, 0, None)
    slack = len(right) + NGRAM
    left = _cut_words(text, max(0, shift - slack), max(0, shift) + len(right) + slack)
    common = leaks.find_common([word for word, _, _ in left], [word for word, _, _ in right])
    return _mark(text, left[common.a : common.a + common.size]), _mark(
        question, right[common.b : common.b + common.size]
    )


def _cut_words(text: str, start: int, stop: int | None) -> list[tuple[str, int, int]]:
    """Return some of a text's words, numbers folded, with the place of the stretch that each is in."""
    stretches = words.cut_stretches(text, Signs.DROP)
    cut = ((words.fold_numbers(word), part.start, part.stop) for part in stretches for word in part.words)
    return list(islice(cut, start, stop))


def _mark(text: str, run: Sequence[tuple[str, int, int]]) -> str:
    """Return the run of a text in brackets with what surrounds it."""
    if not run:
        return words.excerpt(text)
    start, stop = run[0][1], run[-1][2]
    before, behind = text[:start], text[stop:]
    if len(before) > _SHOWN_AROUND:
        before = f"({start - _SHOWN_AROUND:,} characters) …{before[-_SHOWN_AROUND:]}"
    return f"{before}⟦{words.excerpt(text[start:stop])}⟧{words.excerpt(behind, _SHOWN_AROUND)}"
