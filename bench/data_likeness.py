"""What it costs to find repeated rows and leaked questions: the map of each check a row, and its reduce.

Rows are synthetic (synthetic_rows.py: 1 kB each, known shares of copies and of leaks from a benchmark made alike), and
made as they are needed, so that what is measured is the checks; reading and parsing files is bench/data_doctor.py's.

    python bench/data_likeness.py --rows 100000 --save
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medcot.data.contamination import Contamination
from medcot.data.duplicates import Duplicates
from medcot.data.findings import Chunk
from medcot.data.words import Windows, hash_words, normalise
from medcot.machine import describe_machine
from medcot.records import Example
from results import format_table, save_result
from synthetic_rows import NUM_ITEMS, make_question, make_row

CHUNK = 2_000


def make_example(number: int) -> Example:
    row, _ = make_row(number)
    return Example(f"synthetic:{number}", row["Question"], "synthetic", row["Complex_CoT"], row["Response"])


def make_chunks(num_rows: int) -> Iterator[Chunk]:
    for first in range(1, num_rows + 1, CHUNK):
        numbers = range(first, min(first + CHUNK, num_rows + 1))
        yield Chunk(first, len(numbers), [make_example(number) for number in numbers])


class Maker:
    """A reader that makes the rows asked for again, and knows how long that took."""

    def __init__(self) -> None:
        self.num = 0
        self.seconds = 0.0

    def fetch(self, numbers: Sequence[int]) -> dict[int, Example]:
        """Return rows by number."""
        started = time.perf_counter()
        rows = {number: make_example(number) for number in numbers}
        self.num += len(rows)
        self.seconds += time.perf_counter() - started
        return rows


def time_parts(chunk: Chunk) -> list[list[str]]:
    """Best of five, in microseconds a row, of the steps that both checks are made of."""
    texts = [f"{row.question}\n{row.response}" for row in chunk.examples]
    words = [normalise(text) for text in texts]
    windows = Windows(hash_words(words))
    parts: dict[str, Callable[[], object]] = {
        "normalise question and response": lambda: [normalise(text) for text in texts],
        "hash words": lambda: hash_words(words),
        "hash shingles": lambda: Windows(hash_words(words)).hash_shingles(5),
        "hash whole texts": windows.hash_texts,
    }
    rows = []
    for name, part in parts.items():
        best = min(_time(part) for _ in range(5))
        rows.append([name, f"{best / len(texts) * 1e6:.1f}"])
    return rows


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--save", action="store_true", help="add the result to RESULTS.md")
    args = parser.parse_args()
    items = tuple(("made", Example(str(number), make_question(number), "made")) for number in range(NUM_ITEMS))
    started = time.perf_counter()
    checks: list[Any] = [Duplicates(), Contamination(items)]
    table = [[f"build the index of {NUM_ITEMS:,} questions", f"{time.perf_counter() - started:.2f} s"]]
    spent = [0.0] * len(checks)
    tallies: list[list[Any]] = [[] for _ in checks]
    num_bytes = 0
    for chunk in make_chunks(args.rows):
        num_bytes += sum(
            len(row.question) + len(row.reasoning or "") + len(row.response or "") for row in chunk.examples
        )
        for place, check in enumerate(checks):
            started = time.perf_counter()
            tallies[place].append(check.map(chunk))
            spent[place] += time.perf_counter() - started
    table += [[name, f"{cost} µs a row"] for name, cost in time_parts(chunk)]
    for check, seconds, parts in zip(checks, spent, tallies, strict=True):
        table.append([f"{check.name}: map", f"{seconds / args.rows * 1e6:.0f} µs a row"])
        reader = Maker()
        started = time.perf_counter()
        findings = check.reduce(parts, reader)
        seconds = time.perf_counter() - started - reader.seconds
        table.append([f"{check.name}: reduce, {reader.num:,} rows read again", f"{seconds:.1f} s without reading"])
        table += [[f"  {finding.id}", f"{finding.count:,}"] for finding in findings]
    table.append(["most memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"])
    size = f"{args.rows:,} rows of {num_bytes / args.rows:.0f} characters"
    details = format_table([size, "one core"], table)
    print(details)
    if args.save:
        total = sum(spent) / args.rows * 1e6
        save_result("data_likeness", describe_machine(), f"{total:.0f} µs a row ({size})", details)


if __name__ == "__main__":
    main()
