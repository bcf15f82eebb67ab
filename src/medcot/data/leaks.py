"""Whether a training question is a question of a benchmark: an index that finds suspects, and a judge who reads them.

*Suspects.* A training question that shares a run of 13 words with a benchmark's question, case, punctuation and numbers
aside (GPT-3's filter, with digits folded), is a suspect. It is the question's text alone that is indexed: options that
a row carries along stand outside the shared run and do no harm, and as evidence they say little ("Observation", "MRI of
the head"). A benchmark question shorter than 13 words is a suspect where it stands whole in the training question,
numbers included; below four words it must be all of it.

*Stock phrases.* Clinical vignettes are built of phrases that every author uses. "Which of the following is the most
likely cause of this patient's" is a 13-gram of 40 of MedQA's 1,273 test questions, "temperature is 0 F (0 C), blood
pressure is 0/0 mmHg, pulse" of 113. A run that stands in three or more different questions of one benchmark cannot tell
which of them leaked, so it makes a suspect but is no proof. Counted within each benchmark: the same question in two of
them is not stock. The questions of a calculator's benchmark, one template with many numbers, are stock throughout, and
there other numbers rightly are another question: only the very same ones convict.

*Verdicts.* A suspect is confirmed, in this order, by

- ``WHOLE``: the training question is the benchmark's, word for word with its numbers; or contains all of it, if that is
  not stock throughout; a question of fewer than 13 words must then have eight and be half of the training question;
- ``OPTIONS``: a short question stands in it together with at least half of its options, two or more;
- ``PASSAGE``: 100 characters or more of consecutive words, numbers included, of which at least half is not stock, and
  which are a third of the benchmark's question or 200 characters (an opening such as "A 77-year-old woman is brought to
  the emergency department by her husband because of increasing confusion" has a hundred);
- ``LIKENESS``: rapidfuzz's token-set ratio of the benchmark's question and the words beside it in the training question
  is 90 or more, numbers aside: a leak with changed numbers or a few changed words.

The token-set ratio alone is a trap: it is 100 wherever the words of one text are a subset of the other's, so that "What
is the most likely diagnosis in this patient?" equals every vignette that ends so. Three rules close it. The question is
compared not with the whole training text but with as many words of it, at the place where the shared run lines the two
up. At least one shared run must not be stock. And the longest common run is taken out of both, and what is left must be
alike as well (token-sort ratio 75 or more, which knows no subsets): where only the stock sentence agreed, "with asthma"
and "with pneumonia" are left.

How often that convicts the innocent: MedQA's 1,273 test questions, each held against all others, share a run in 14,631
pairs. 11 of these have a telling passage of 100 characters; four remain confirmed, and in these four an author did use
his own text again (tests/data/test_contamination.py).

Consecutive words are found by difflib, bounded by the length of the benchmark's question and not of the row, so that a
leak inside a text of 10 MB costs no more than one alone. Characters are counted with the spaces between words; a
Chinese character is a word, so there 50 make 100.

Sources: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C; HuatuoGPT-o1's filter of 64
characters, which convicts "oxygen saturation is 98% on room air"; https://rapidfuzz.github.io/RapidFuzz/Usage/fuzz.html.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz

from medcot.data.words import HashedWords, Hashes, Offsets, Windows, fold_numbers, hash_words

NGRAM = 13
STOCK = 3  # different questions of one benchmark in which a run is a stock phrase
PASSAGE_CHARACTERS = 100
LONG_PASSAGE_CHARACTERS = 200  # from which it need not be a third of the question
LIKENESS = 90.0  # token-set ratio
LIKENESS_ELSEWHERE = 75.0  # token-sort ratio of what the longest common run leaves
FEWEST_CONTAINED = 4  # words of a short question that may stand inside another text
FEWEST_ALONE = 8  # words of a short question that convict without its options, where they are half of the row


class Verdict(IntEnum):
    """What a pair turned out to be."""

    SUSPECT = 0
    WHOLE = 1
    OPTIONS = 2
    PASSAGE = 3
    LIKENESS = 4


@dataclass(frozen=True, slots=True)
class Hits:
    """Pairs of texts and items that share a run, sorted by text and item; arrays of one length.

    Attributes:
        texts: place of the text.
        items: place of the item.
        shared: runs in common.
        shifts: by how many words the item is displaced in the text (its median over the runs).
        telling: whether a run is not stock.
    """

    texts: Offsets
    items: Offsets
    shared: Offsets
    shifts: Offsets
    telling: NDArray[np.bool_]


class RunIndex:
    """Which items hold a run of ``n`` words, and where; sorted arrays, a few bytes a run."""

    def __init__(self, hashed: HashedWords, n: int, identities: Offsets, benchmarks: Offsets) -> None:
        """Index the runs of all items of ``n`` words or more where ``n`` is ``NGRAM``, else the items of ``n`` words.

        Args:
            hashed: the items' questions; all of them, since a short one may be a stock phrase of the long.
            n: words of a run.
            identities: equal for items with the same question.
            benchmarks: equal for items of one benchmark.
        """
        self.n = n
        runs, starts = Windows(hashed).hash_ngrams(n)
        items = find_texts(hashed.offsets, starts)
        order = np.argsort(runs, kind="stable")
        runs, starts, items = runs[order], starts[order], items[order]
        stock = _count_items(runs, identities[items], benchmarks[items]) >= STOCK
        held = runs != _hash_zeros(n)
        if n < NGRAM:
            held &= hashed.lengths[items] == n
        runs, starts, items, stock = runs[held], starts[held], items[held], stock[held]
        self._runs, first = np.unique(runs, return_index=True)
        self._bounds = np.append(first, len(runs))
        self._items, self._places = items, starts - hashed.offsets[items]
        self._stock = stock[first]

    def is_stock(self, runs: Hashes) -> NDArray[np.bool_]:
        """Whether each run is a stock phrase; one that no item holds is not."""
        places, known = self._find(runs)
        stock = np.zeros(len(runs), bool)
        stock[known] = self._stock[places[known]]
        return stock

    def find(self, windows: Windows) -> Hits:
        """Find all pairs of the windows' texts and the items that share a run."""
        runs, starts = windows.hash_ngrams(self.n)
        places, known = self._find(runs)
        places, starts = places[known], starts[known]
        texts = find_texts(windows.hashed.offsets, starts)
        within = starts - windows.hashed.offsets[texts]
        counts = self._bounds[places + 1] - self._bounds[places]
        entries = np.repeat(self._bounds[places] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        shifts = np.repeat(within, counts) - self._places[entries]
        telling = ~np.repeat(self._stock[places], counts)
        return _join_hits(np.repeat(texts, counts), self._items[entries], shifts, telling)

    def _find(self, runs: Hashes) -> tuple[Offsets, NDArray[np.bool_]]:
        if not len(self._runs):
            return np.zeros(len(runs), np.int64), np.zeros(len(runs), bool)
        places = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
        return places, self._runs[places] == runs


def find_texts(offsets: Offsets, places: Offsets) -> Offsets:
    """Return in which text each word lies."""
    return np.searchsorted(offsets, places, side="right") - 1


def _hash_zeros(n: int) -> Hashes:
    """Return the hash of a run of numbers only, such as a table gives; it is neither searched nor found."""
    return Windows(hash_words([" ".join(["0"] * n)])).hash_texts()


def _count_items(runs: Hashes, identities: Offsets, benchmarks: Offsets) -> Offsets:
    """Return for each of the sorted runs the most different questions of one benchmark that hold it."""
    if not len(runs):
        return np.zeros(0, np.int64)
    different, numbers = np.unique(runs, return_inverse=True)
    order = np.lexsort((identities, benchmarks, numbers))
    triples = np.stack([numbers[order], benchmarks[order], identities[order]])
    changes = triples[:, 1:] != triples[:, :-1]
    held = np.flatnonzero(np.append(True, changes.any(axis=0)))  # once for each question that holds the run
    groups = np.append(True, changes[:2].any(axis=0))  # a run within one benchmark
    counts = np.bincount((np.cumsum(groups) - 1)[held])
    most = np.zeros(len(different), np.int64)
    np.maximum.at(most, triples[0, groups], counts)
    return most[numbers]


def _join_hits(texts: Offsets, items: Offsets, shifts: Offsets, telling: NDArray[np.bool_]) -> Hits:
    """Make one pair of all hits of the same text and item."""
    order = np.lexsort((shifts, items, texts))
    texts, items, shifts, telling = texts[order], items[order], shifts[order], telling[order]
    new = np.ones(len(texts), bool)
    new[1:] = (texts[1:] != texts[:-1]) | (items[1:] != items[:-1])
    first = np.flatnonzero(new)
    counts = np.diff(np.append(first, len(texts)))
    any_telling = np.logical_or.reduceat(telling, first) if len(first) else np.zeros(0, bool)
    return Hits(texts[first], items[first], counts, shifts[first + counts // 2], any_telling)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge saw of a pair.

    Attributes:
        verdict: confirmed, and how; or still a suspect.
        characters: of the longest common passage, numbers included.
        likeness: token-set ratio of the item and the words beside it, numbers aside.
    """

    verdict: Verdict
    characters: int = 0
    likeness: float = 0.0


def judge_long(words: Sequence[str], item: Sequence[str], shift: int, telling: bool, index: RunIndex) -> Judgement:
    """Judge a training question and an item's question of 13 words or more that share a run.

    Args:
        words: the training question's, with numbers and without signs.
        item: the benchmark question's.
        shift: by how many words the latter is displaced in the former.
        telling: whether a run that they share is not stock.
        index: of the 13-grams, to know a stock passage.
    """
    slack = max(NGRAM, len(item) // 4)
    start, stop = max(0, shift), max(0, shift + len(item))
    near = words[max(0, start - slack) : stop + slack]
    common = find_common(near, item)
    passage = near[common.a : common.a + common.size]
    characters = len(" ".join(passage))
    beside, folded = (fold_numbers(" ".join(part)) for part in (words[start:stop], item))
    likeness = fuzz.token_set_ratio(beside, folded)
    if common.size == len(item) and (telling or 2 * len(item) >= len(words)):
        verdict = Verdict.WHOLE
    elif _is_long(characters, item) and _is_telling(passage, index):
        verdict = Verdict.PASSAGE
    elif telling and likeness >= LIKENESS and _are_alike_elsewhere(beside.split(), folded.split()):
        verdict = Verdict.LIKENESS
    else:
        verdict = Verdict.SUSPECT
    return Judgement(verdict, characters, likeness)


def judge_short(text: str, around: str, item: Sequence[str], options: Collection[str], telling: bool) -> Judgement:
    """Judge a training question in which an item's question of fewer than 13 words stands whole.

    Args:
        text: the training question, normalised without signs.
        around: the same with the options that the row has beside it.
        item: the words of the benchmark's question.
        options: its options, normalised.
        telling: whether it is not a stock phrase.
    """
    num_found = sum(f" {option} " in f" {around} " for option in options)
    beside_options = num_found >= 2 and 2 * num_found >= len(options)
    alone = telling and len(item) >= FEWEST_ALONE and 2 * len(item) >= text.count(" ") + 1
    verdict = Verdict.OPTIONS if beside_options else Verdict.WHOLE if alone else Verdict.SUSPECT
    return Judgement(verdict, len(" ".join(item)), 100.0)


def find_common(left: Sequence[str], right: Sequence[str]) -> difflib.Match:
    """Return the longest run of words that two texts share, and where it begins in both."""
    return difflib.SequenceMatcher(None, left, right, autojunk=False).find_longest_match()


def _is_long(characters: int, item: Sequence[str]) -> bool:
    fewest = min(LONG_PASSAGE_CHARACTERS, len(" ".join(item)) / 3)
    return characters >= max(PASSAGE_CHARACTERS, fewest)


def _is_telling(passage: Sequence[str], index: RunIndex) -> bool:
    """Whether at least half of a passage's runs are not stock; one of few and long words always tells."""
    runs, _ = Windows(hash_words([fold_numbers(" ".join(passage))])).hash_ngrams(index.n)
    return 2 * int(np.count_nonzero(index.is_stock(runs))) <= len(runs)


def _are_alike_elsewhere(left: list[str], right: list[str]) -> bool:
    """Whether two texts are alike without their longest common run."""
    common = find_common(left, right)
    left_rest = left[: common.a] + left[common.a + common.size :]
    right_rest = right[: common.b] + right[common.b + common.size :]
    if not left_rest or not right_rest:
        return not right_rest  # the item is all there; or something of it is missing altogether
    return fuzz.token_sort_ratio(" ".join(left_rest), " ".join(right_rest)) >= LIKENESS_ELSEWHERE
