"""Cost of the data doctor on synthetic rows: rows a second, processor time, memory, and how they grow with the data.

Every check that reads text runs: duplicates (exact, normalised, near), contamination against 1,273 questions, quality,
identifiers, forged tags. What needs tokens (the survival gate, lengths) looks at a sample, so it does not grow, and is
left out. Each size is scanned in a process of its own, whose memory and that of its workers is added up twenty times a
second (pages that they share count several times, so the true peak is a little lower). Wall time on a shared machine
says little; processor seconds say what the work costs. The second run finds all tallies in the cache.

The exponent is the slope of processor seconds over rows, between the two largest sizes, on a log scale: 1 is linear.

    python bench/data_doctor.py --rows 10000 100000 1000000 --save
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from medcot.data.columns import FIRST_ROWS, Purpose, choose_layout
from medcot.data.contamination import Contamination
from medcot.data.duplicates import Duplicates
from medcot.data.findings import Check
from medcot.data.identifiers import Identifiers
from medcot.data.pieces import SourcePieces
from medcot.data.quality import Quality
from medcot.data.scan import Scanned, scan
from medcot.data.sources import stream_rows
from medcot.data.tags import ForgedTags
from medcot.machine import describe_machine
from medcot.records import Example
from results import format_table, save_result
from synthetic_rows import NUM_ITEMS, make_question, write_rows

SAMPLE_S = 0.05
# Of the R1 distills; other models' are as many.
MARKERS = ("<think>", "</think>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


@dataclass(frozen=True)
class Measured:
    """One size.

    Attributes:
        planted: kind → rows.
        facts: what the scanning process printed.
        peak_mb: of the scanning process and its workers together.
    """

    num_rows: int
    num_bytes: int
    planted: Counter[str]
    facts: dict[str, Any]
    peak_mb: float

    @property
    def rows_per_s(self) -> float:
        """Of the first run, by the clock."""
        return self.num_rows / self.facts["seconds"]


def build_checks() -> list[Check]:
    """Return every check that reads text."""
    items = [
        ("synthetic", Example(f"item:{number}", make_question(number), "synthetic")) for number in range(NUM_ITEMS)
    ]
    return [Duplicates(), Contamination(tuple(items)), Quality(), Identifiers(), ForgedTags(MARKERS, (), None)]


def scan_file(path: Path, cache: Path, num_proc: int) -> dict[str, Any]:
    """Scan a file twice, in this process and its workers, and return what it cost and found."""
    started = time.perf_counter()
    first = _scan_once(path, cache, num_proc)
    seconds = time.perf_counter() - started
    cpu_s = sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    started = time.perf_counter()
    second = _scan_once(path, cache, num_proc)
    assert second.findings == first.findings and second.figures.num_mapped == 0, "the cache was not used"
    assert first.figures.num_distrusted == 0, "a tally could not be read back"
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "map_s": first.figures.map_s,
        "reduce_s": dict(first.figures.reduce_s),
        "again_s": time.perf_counter() - started,
        "num_rows": first.figures.num_rows,
        "cache_bytes": sum(file.stat().st_size for file in cache.glob("*/*.tally")),
        "findings": {finding.id: finding.count for finding in first.findings},
    }


def _scan_once(path: Path, cache: Path, num_proc: int) -> Scanned:
    rows = [row for row, _ in islice(stream_rows(str(path)), FIRST_ROWS)]
    plan = choose_layout(list(rows[0]), rows, source=str(path), purpose=Purpose.INSPECT)
    pieces = SourcePieces(stream_rows(str(path)), path.parent)
    return scan(pieces, plan, build_checks(), workers=num_proc, cache=cache)


def measure(num_rows: int, num_proc: int) -> Measured:
    """Make rows, scan them in another process, and watch it."""
    with tempfile.TemporaryDirectory(prefix="data_doctor-") as folder:
        path = Path(folder) / "rows.jsonl"
        planted = write_rows(path, num_rows)
        command = [sys.executable, __file__, "--scan", str(path), "--workers", str(num_proc)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak_mb = max(_watch(child), default=0.0)
        words, _ = child.communicate()
        if child.returncode != 0:
            raise SystemExit(f"The scan of {num_rows:,} rows ended with status {child.returncode}")
        return Measured(num_rows, path.stat().st_size, planted, json.loads(words), peak_mb)


def _watch(child: subprocess.Popen[str]) -> Iterator[float]:
    """Yield the memory of a process and its children, in MB, until it ends."""
    parent = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            family = [parent, *parent.children(recursive=True)]
            yield sum(process.memory_info().rss for process in family) / 1e6
        except psutil.NoSuchProcess:  # one of them ended meanwhile
            pass
        time.sleep(SAMPLE_S)


def describe(all_measured: list[Measured], num_proc: int) -> tuple[str, str]:
    """Return the printed text as Markdown, and the result in a few words."""
    head = ["rows", "MB", "seconds", "rows/s", "CPU s", "CPU ms a row", "map s", "reduce s", "again s", "peak MB"]
    table = format_table(head, [_costs(measured) for measured in all_measured])
    checks = list(all_measured[0].facts["reduce_s"])
    reduces = format_table(
        ["reduce, seconds", *checks],
        [[f"{m.num_rows:,}", *(f"{m.facts['reduce_s'][check]:.2f}" for check in checks)] for m in all_measured],
    )
    found = "\n".join(f"{m.num_rows:,} rows: planted {_list(m.planted)}; found {_list(m.facts['findings'])}; tallies"
                      f" {m.facts['cache_bytes'] / m.num_rows:,.0f} bytes a row." for m in all_measured)  # fmt: skip
    growth = ""
    if len(all_measured) > 1:
        small, large = all_measured[-2:]
        slope = math.log(large.facts["cpu_s"] / small.facts["cpu_s"]) / math.log(large.num_rows / small.num_rows)
        growth = f"CPU seconds grow with the rows to the power of {slope:.2f} (from {small.num_rows:,} on)."
    last = all_measured[-1]
    result = (
        f"{last.num_rows:,} rows ({last.num_bytes / 1e9:.2f} GB): {last.rows_per_s:,.0f} rows/s,"
        f" {1e3 * last.facts['cpu_s'] / last.num_rows:.2f} CPU ms a row, peak {last.peak_mb / 1e3:.2f} GB; {growth}"
    )
    return f"{num_proc} workers.\n\n{table}\n\n{reduces}\n\n{found}\n\n{growth}", result.strip(" ;")


def _costs(measured: Measured) -> list[str]:
    facts = measured.facts
    return [
        f"{measured.num_rows:,}",
        f"{measured.num_bytes / 1e6:,.0f}",
        f"{facts['seconds']:.1f}",
        f"{measured.rows_per_s:,.0f}",
        f"{facts['cpu_s']:.1f}",
        f"{1e3 * facts['cpu_s'] / measured.num_rows:.3f}",
        f"{facts['map_s']:.1f}",
        f"{sum(facts['reduce_s'].values()):.1f}",
        f"{facts['again_s']:.1f}",
        f"{measured.peak_mb:,.0f}",
    ]


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="sizes, smallest first")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)  # this process is the one that is watched
    options = parser.parse_args()
    if options.scan is not None:
        print(json.dumps(scan_file(options.scan, options.scan.parent / "cache", options.workers)))
        return
    machine = describe_machine()
    details, result = describe([measure(num_rows, options.workers) for num_rows in options.rows], options.workers)
    print(f"{machine}\n\n{details}\n\n{result}")
    if options.save:
        save_result("data_doctor", machine, result, details)


if __name__ == "__main__":
    main()
