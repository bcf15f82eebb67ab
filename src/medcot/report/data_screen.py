"""The data doctor on a terminal: a bar while it looks, then the verdict, each finding, its remedy and a few rows.

The order is that of the page: the verdict in words first, the worst finding next. Of the evidence there is one line a
text, cut to the window and begun shortly before what is marked in it; the page shows all. Colours, signs and words say
the same, and a stream that carries ASCII only gets ASCII. Into a file or a pipe sentences go whole, for ``grep``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from medcot import __version__
from medcot.data.scan import Progress as ScanProgress
from medcot.report import words
from medcot.report.evidence import NAMES, Look, Passage, Piece, Shown, clean
from medcot.report.findings import FindingView, build_findings
from medcot.report.screen import Screen
from medcot.train.progress import PLAIN_EVERY_S

MAX_SHOWN = 2  # pieces of evidence a finding
MAX_SPANS = 10

_STYLES = {"red": "bold red", "yellow": "yellow", "info": "dim"}
_TONES = {"worse": "bold red", "open": "bold yellow", "better": "bold green"}
_BEFORE_MARK = 24  # characters


class Diagnosed(Protocol):
    """What can be asked for its report; ``diagnosis.Diagnosis`` in practice."""

    def report(self, version: str) -> dict[str, Any]:
        """Return data/report.json."""


def print_diagnosis(diagnosed: Mapping[str, Any] | Diagnosed, console: Console) -> None:
    """Print what the doctor found; the argument is a diagnosis or the content of a data/report.json."""
    report = diagnosed if isinstance(diagnosed, Mapping) else diagnosed.report(__version__)
    screen = Screen(console)
    verdict = words.judge_data(report)
    screen.say((verdict.headline, _TONES.get(verdict.tone, "bold")))
    screen.say((verdict.sentence, ""))
    if sentences := report.get("sentences"):
        screen.skip()
    for sentence in sentences or ():
        screen.say((clean(str(sentence)), "dim"))
    was_grave = True
    for finding in build_findings(report):
        if was_grave:  # those for the record stand together
            screen.skip()
        was_grave = finding.is_grave
        _print_finding(finding, screen)
    if counts := _say_counts(report.get("counts") or {}):
        screen.skip()
        screen.say((counts, "dim"))


@contextmanager
def watch_scan(console: Console, *, shown: bool = True) -> Iterator[Callable[[ScanProgress], None] | None]:
    """Yield what a scan is to call after each chunk: it moves a bar, or says a line now and then where none can move.

    Args:
        console: where to draw.
        shown: with ``False`` nothing is drawn, and ``None`` is yielded.
    """
    if not shown:
        yield None
    elif not console.is_terminal or console.is_dumb_terminal:
        yield _say_progress(console)
    else:
        columns = (TextColumn("looking at rows"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]}"),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None, rows="")

            def move(progress: ScanProgress) -> None:
                rows = f"{progress.num_rows:,} rows, {progress.rows_per_s:,.0f}/s"
                bar.update(task, total=progress.total_bytes, completed=progress.num_bytes, rows=rows)

            yield move


def _say_progress(console: Console) -> Callable[[ScanProgress], None]:
    last_said_s = time.monotonic()

    def say(progress: ScanProgress) -> None:
        nonlocal last_said_s
        if time.monotonic() - last_said_s >= PLAIN_EVERY_S:
            last_said_s = time.monotonic()
            console.print(f"looked at {progress.num_rows:,} rows, {progress.rows_per_s:,.0f} a second", soft_wrap=True,
                          highlight=False)  # fmt: skip

    return say


def _print_finding(finding: FindingView, screen: Screen) -> None:
    count = f"  {finding.count:,}" + (", accepted" if finding.is_accepted else "")
    style = _STYLES.get(finding.severity, "")
    screen.say((f"{finding.sign} {finding.severity:<7}", style), (finding.id, "bold"), (count, "dim"))
    screen.say((finding.says, "" if finding.is_grave else "dim"), indent=2)
    if not finding.is_grave:
        return
    if finding.fix:
        screen.say(("→ ", "bold green"), (finding.fix, ""), indent=2)
    for shown in finding.shown[:MAX_SHOWN]:
        _print_shown(shown, screen)


def _print_shown(shown: Shown, screen: Screen) -> None:
    if shown.row:
        screen.say_line([(shown.row, "cyan")], 4)
    for passage in (*shown.captions, *shown.passages):
        screen.say_line([(f"{passage.label}: ", "dim"), *_begin_near_mark(passage)], 6)
    spans = [piece for piece in shown.spans if piece.text.strip()]
    for piece in spans[:MAX_SPANS]:
        label = f"{NAMES.get(piece.look, piece.look)}, {'loss' if piece.has_loss else 'no loss'}: "
        screen.say_line([(label, "dim"), (piece.text.strip(), "green" if piece.has_loss else "dim")], 6)
    if (more := len(spans) - MAX_SPANS) > 0:
        screen.say_line([(f"… and {more} more pieces", "dim")], 6)


def _begin_near_mark(passage: Passage) -> Iterator[tuple[str, str]]:
    """Yield the texts of a passage with their styles; what lies far before the first mark is left out."""
    pieces = list(passage.pieces) or [Piece("(empty)")]
    if len(pieces) > 1 and pieces[0].look is Look.PLAIN and len(pieces[0].text) > _BEFORE_MARK:
        pieces[0] = Piece("…" + pieces[0].text[-_BEFORE_MARK:])
    for piece in pieces:
        yield (f"⟦{piece.text}⟧", "bold magenta") if piece.look is Look.MARKED else (piece.text, "")


def _say_counts(counts: Mapping[str, Any]) -> str:
    """Return the numbers on the way from raw rows to tokens in a sentence."""
    known = [(words.label(str(key)), value) for key, value in counts.items() if isinstance(value, int | float)]
    return "; ".join(f"{label} {words.count(value)}" for label, value in known)
