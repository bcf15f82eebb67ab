"""Runs the data doctor's checks over a source of any size: chunk by chunk, in several processes, never twice.

A million rows do not fit into memory as Python objects, and looking at them takes minutes that nobody wants to spend
again because of a Ctrl-C or one mended row. So the parent only cuts the source into pieces (``pieces.py``); workers
(``children.py``) read a piece, build its examples, and let each check map them to a tally, which goes to a file named
by all that it depends on (``tallies.py``). What is there already is not done again: a scan that was killed goes on,
a second one reads files. Then each check reduces its tallies, read from disk one by one in the order of the chunks, so
findings do not depend on the number of workers, nor on what came from the cache.

The usual ways load everything (pandas), or keep what they computed under a hash of the pickled function, which changes
with every import order and never tells (``datasets.map``).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import tempfile
import time
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medcot.data.children import map_in_children
from medcot.data.files import Places
from medcot.data.findings import Check, Chunk, Finding
from medcot.data.pieces import Piece
from medcot.data.plans import BuiltRows, Counts
from medcot.data.tallies import TallyStore, UntrustedTallyError
from medcot.records import Example

_MOST_FETCHED = 4096  # examples that a reader remembers
_MOST_REASONS = 100  # kinds of reasons that are told apart; the rest is counted together
_OTHER = "other reasons"


class Builder(Protocol):
    """How raw rows become examples, as ``plans.Plan`` does it; picklable."""

    @property
    def settings(self) -> str:
        """Whatever changes the examples, as text: the columns, the name of the source."""

    def build(self, rows: Sequence[object], first_number: int, places: Places) -> BuiltRows:
        """Turn rows that follow one another, from ``first_number`` on, into examples and rows set aside."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a scan is.

    Attributes:
        num_rows: rows done, those from the cache among them.
        num_kept: rows of which every tally came from the cache.
        num_bytes: bytes done.
        total_bytes: bytes in all, where known.
        seconds: since the start.
    """

    num_rows: int
    num_kept: int
    num_bytes: int
    total_bytes: int | None
    seconds: float

    @property
    def rows_per_s(self) -> float:
        """Rows looked at a second, without those from the cache; 0 at the start."""
        return (self.num_rows - self.num_kept) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What a scan came to, for the lineage.

    Attributes:
        num_rows: raw rows.
        num_examples: examples made of them; the others were set aside.
        counts: what was done to the rows, and why others were set aside, for ``Plan.say``.
        num_chunks: chunks that the rows came in.
        num_tallies: tallies that the findings were made from, one a chunk and check, and one a chunk for the counts.
        num_mapped: of those, made in this scan; the rest came from the cache.
        num_distrusted: files of the cache that were not what they should be, and were left out.
        map_s: seconds until every tally was there.
        reduce_s: seconds from then to the findings, check by check.
    """

    num_rows: int
    num_examples: int
    counts: Counts
    num_chunks: int
    num_tallies: int
    num_mapped: int
    num_distrusted: int
    map_s: float
    reduce_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a scan found, in the order of the checks."""

    findings: list[Finding]
    figures: Figures


@dataclass(frozen=True, slots=True)
class Task:
    """A piece, its number among all, and which of its tallies are wanted: 0 are the counts, then check by check."""

    number: int
    piece: Piece
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A task's tallies, pickled one by one, in the order in which they were wanted."""

    number: int
    wanted: tuple[int, ...]
    tallies: list[bytes]


@dataclass(frozen=True, slots=True)
class Mapper:
    """The map half of all checks: what a worker does."""

    builder: Builder
    checks: Sequence[Check]

    @property
    def num_tallies(self) -> int:
        """Tallies of each piece."""
        return 1 + len(self.checks)

    def __call__(self, task: Task) -> Done:
        """Read the piece, build its examples and let the checks look at them."""
        piece = task.piece
        built = self.builder.build(piece.read(), piece.first, piece.places)
        chunk = Chunk(piece.first, piece.num_rows, built.examples, built.quarantined)
        tallies = (self._tally(position, chunk, built) for position in task.wanted)
        return Done(task.number, task.wanted, [pickle.dumps(tally, protocol=5) for tally in tallies])

    def describe(self, position: int) -> tuple[str, str]:
        """Return what a tally depends on, besides the rows: name and settings of its check."""
        return (self.checks[position - 1].name, self.checks[position - 1].settings) if position else ("counts", "")

    def _tally(self, position: int, chunk: Chunk, built: BuiltRows) -> Any:
        if position:
            return self.checks[position - 1].map(chunk)
        counts = built.counts
        return Counts(counts.num_rows, counts.changes, _cap(counts.reasons))


Workers = Callable[[Mapper, Iterator[Task]], Generator[Done, None, None]]


def scan(
    pieces: Iterable[Piece],
    builder: Builder,
    checks: Sequence[Check],
    *,
    workers: int | Workers = 1,
    cache: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    total_bytes: int | None = None,
) -> Scanned:
    """Let all checks look at all pieces, and return what they find.

    Args:
        pieces: the source, cut; taken once, in order.
        builder: makes examples of raw rows.
        checks: with names that differ.
        workers: how many processes; none is started for a single chunk, or with 1. Or something else that maps, such
            as ``spread.map_on_ray``.
        cache: folder of the tallies; ``None`` keeps them in a temporary one only as long as the scan lasts.
        on_progress: called in this process after each chunk.
        total_bytes: handed on to ``on_progress``.

    Raises:
        DataError: a piece cannot be read.
        ChildProcessError: a check failed in a worker; its last words are quoted.
        OutputError: the cache cannot be written.
    """
    names = [check.name for check in checks]
    assert len(set(names)) == len(names), f"two checks of one name: {names}"
    with contextlib.ExitStack() as stack:
        folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medcot-scan-")))
        work = _Scan(Mapper(builder, checks), TallyStore(folder), on_progress, total_bytes)
        work.map(pieces, workers)
        scanned = work.reduce()
        if cache is not None:
            TallyStore(cache).prune()
    return scanned


def map_locally(num_proc: int) -> Workers:
    """Return workers that are processes of this machine, or this process itself."""

    def run(mapper: Mapper, tasks: Iterator[Task]) -> Generator[Done, None, None]:
        begin = list(itertools.islice(tasks, 2))  # a single task is not worth a worker's start
        tasks = itertools.chain(begin, tasks)
        if num_proc == 1 or len(begin) < 2:
            yield from map(mapper, tasks)
        else:
            with contextlib.closing(map_in_children(mapper, tasks, num_proc)) as done:
                yield from done

    return run


class _Scan:
    """One scan on its way: the pieces seen so far, and how many tallies were made."""

    def __init__(
        self,
        mapper: Mapper,
        store: TallyStore,
        on_progress: Callable[[Progress], None] | None,
        total_bytes: int | None,
    ) -> None:
        self._mapper, self._store, self._on_progress, self._total_bytes = mapper, store, on_progress, total_bytes
        self._settings = [mapper.describe(position) for position in range(mapper.num_tallies)]  # once; some are hashed
        self._pieces: list[Piece] = []
        self._num_mapped = self._num_distrusted = 0
        self._done_rows = self._kept_rows = self._done_bytes = 0
        self._started = time.perf_counter()
        self._map_s = 0.0

    def map(self, pieces: Iterable[Piece], workers: int | Workers) -> None:
        """Make the tallies that the store does not hold."""
        run = map_locally(workers) if isinstance(workers, int) else workers
        with contextlib.closing(run(self._mapper, self._list_tasks(pieces))) as all_done:
            for done in all_done:
                piece = self._pieces[done.number]
                for position, tally in zip(done.wanted, done.tallies, strict=True):
                    self._store.save(self._make_key(piece, position), tally)
                self._num_mapped += len(done.tallies)
                self._advance(piece)
        self._map_s = time.perf_counter() - self._started

    def reduce(self) -> Scanned:
        """Let each check read its tallies."""
        counts = self._add_up()
        reader = PieceReader(self._pieces, self._mapper.builder)
        findings: list[Finding] = []
        reduce_s: dict[str, float] = {}
        for position, check in enumerate(self._mapper.checks, start=1):
            begin = time.perf_counter()
            findings += check.reduce(self._load_tallies(position), reader)
            reduce_s[check.name] = time.perf_counter() - begin
        figures = Figures(
            num_rows=counts.num_rows,
            num_examples=counts.num_rows - counts.reasons.total(),
            counts=counts,
            num_chunks=len(self._pieces),
            num_tallies=len(self._pieces) * self._mapper.num_tallies,
            num_mapped=self._num_mapped,
            num_distrusted=self._num_distrusted,
            map_s=self._map_s,
            reduce_s=reduce_s,
        )
        return Scanned(findings, figures)

    def _add_up(self) -> Counts:
        counts = Counts()
        for tally in self._load_tallies(0):
            counts = counts + tally
            counts = Counts(counts.num_rows, counts.changes, _cap(counts.reasons))
        return counts

    def _list_tasks(self, pieces: Iterable[Piece]) -> Iterator[Task]:
        """Yield the pieces of which tallies are missing; note all of them."""
        for number, piece in enumerate(pieces):
            self._pieces.append(piece)
            wanted = tuple(place for place in range(self._mapper.num_tallies) if not self._is_kept(piece, place))
            if wanted:
                yield Task(number, piece, wanted)
            else:
                self._kept_rows += piece.num_rows
                self._advance(piece)

    def _is_kept(self, piece: Piece, position: int) -> bool:
        try:
            return self._store.holds(self._make_key(piece, position))
        except UntrustedTallyError:
            self._num_distrusted += 1
            return False

    def _make_key(self, piece: Piece, position: int) -> str:
        places = piece.places
        where = [piece.first, list(places.names), list(places.before), places.several]
        return self._store.make_key(
            self._mapper.builder.settings, where, piece.digest, *self._mapper.describe(position)
        )

    def _load_tally(self, number: int, position: int) -> Any:
        """Return a check's tally of a chunk, making it anew where it has gone or been damaged meanwhile."""
        package = type(self._mapper.checks[position - 1]).__module__ if position else __name__
        piece = self._pieces[number]
        try:
            return self._store.load(self._make_key(piece, position), package)
        except UntrustedTallyError:
            self._num_distrusted += 1
            self._num_mapped += 1
            return pickle.loads(self._mapper(Task(number, piece, (position,))).tallies[0])

    def _load_tallies(self, position: int) -> Iterable[Any]:
        """Return a check's tallies in the order of the chunks, one in memory at a time; can be gone through again."""
        return _Tallies(functools.partial(self._load_tally, position=position), len(self._pieces))

    def _advance(self, piece: Piece) -> None:
        self._done_rows += piece.num_rows
        self._done_bytes += piece.num_bytes
        if self._on_progress is not None:
            seconds = time.perf_counter() - self._started
            self._on_progress(Progress(self._done_rows, self._kept_rows, self._done_bytes, self._total_bytes, seconds))


@dataclass(frozen=True, slots=True)
class _Tallies:
    load: Callable[[int], Any]
    num: int

    def __iter__(self) -> Iterator[Any]:
        return map(self.load, range(self.num))


class PieceReader:
    """Examples by the number of their row, read again from where they lie; the last few thousand are remembered."""

    def __init__(self, pieces: Sequence[Piece], builder: Builder) -> None:
        self._pieces, self._builder = pieces, builder
        self._firsts = [piece.first for piece in pieces]
        self._kept: OrderedDict[int, Example] = OrderedDict()

    def fetch(self, numbers: Sequence[int]) -> dict[int, Example]:
        """Return the examples of these rows, numbered from 1; all must be readable rows of the source."""
        found = {number: self._kept[number] for number in numbers if number in self._kept}
        for number in found:
            self._kept.move_to_end(number)
        missing = sorted(set(numbers) - found.keys())
        for place, group in itertools.groupby(missing, key=lambda number: bisect_right(self._firsts, number) - 1):
            fresh = self._fetch_from(self._pieces[place], list(group))
            found |= fresh
            self._kept |= fresh
        while len(self._kept) > _MOST_FETCHED:
            self._kept.popitem(last=False)
        return {number: found[number] for number in numbers}

    def _fetch_from(self, piece: Piece, numbers: list[int]) -> dict[int, Example]:
        rows = piece.pick([number - piece.first for number in numbers])
        found = {}
        for number, row in zip(numbers, rows, strict=True):
            examples = self._builder.build([row], number, piece.places).examples
            assert examples, f"row {number} makes no example, so no tally can have named it"
            found[number] = examples[0]
        return found


def _cap(reasons: Counter[str]) -> Counter[str]:
    """Keep the commonest reasons apart and the rest together, so that a reason that quotes its row cannot pile up."""
    kept = Counter(dict(reasons.most_common(_MOST_REASONS)))
    kept[_OTHER] += reasons.total() - kept.total()
    return +kept
