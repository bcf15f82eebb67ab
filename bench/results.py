"""Keeps what the benchmarks measured: one line in the table at the top of RESULTS.md, and the whole table below it.

A figure without its machine and its date is a rumour, so both are columns of the first table and neither can be left
out. Entries are added at the end and never replaced; the newest one of a kind is the last.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = "| date | machine | benchmark | result |\n|---|---|---|---|\n"
PREAMBLE = f"""# Results

Every figure in the README comes from here, and every entry here from a script in this folder, run with `--save`.
The first table has one line for each entry; what each of them printed follows below, oldest first.

{HEADER}"""


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns also line up in a terminal; the first is left-aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([line(columns), rule, *(line(row) for row in rows)])


def save_result(benchmark: str, machine: str, result: str, details: str, path: Path = RESULTS) -> None:
    """Add an entry.

    Args:
        benchmark: name of the script, without its ending.
        machine: processor or GPU, cores, memory, system.
        result: the figure that matters, in a few words.
        details: Markdown of all that was printed.
        path: the file.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else PREAMBLE
    head, found, rest = text.partition(HEADER)
    assert found, f"{path} has lost its table"
    lines = rest.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    today = datetime.date.today().isoformat()
    lines.insert(end, f"| {today} | {machine} | {benchmark} | {result} |\n")
    entry = f"\n## {today} {benchmark}\n\nMachine: {machine}\n\n{details.strip()}\n"
    path.write_text(head + HEADER + "".join(lines).rstrip("\n") + "\n" + entry, encoding="utf-8")
