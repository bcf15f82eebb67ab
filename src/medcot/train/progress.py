"""What a person sees while a job runs: one tidy line a stage, and a live bar where there is a terminal to draw it on.

The libraries each bring a bar of their own, and a job that uses five of them looks like five programs arguing. Here one
object, ``RunConsole``, owns the screen for the whole job. On a terminal a stage shows a spinner or a bar while it runs
and leaves one line behind; elsewhere (a log file, a notebook's pipe, CI) nothing moves, and each logging step is one
plain line that ``grep`` can read. In a narrow window the least important numbers (memory, then speed) give way. Colours
follow ``NO_COLOR``, and symbols fall back to ASCII where the stream cannot carry them; both are Rich's own detection.
Nothing here imports torch.

    with console.stage("training") as stage, console.training(total_steps=60) as bar:
        bar.update(10, loss=1.9, learning_rate=1e-4)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

NAME_WIDTH = 24  # columns for a stage's name; longer ones push the rest to the right
PLAIN_EVERY_S = 30.0  # without a terminal, generation says how far it is this often
REFRESH_PER_S = 8.0


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: ``0.4 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_clock(seconds: float) -> str:
    """Return a duration as a clock shows it: ``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StageLine:
    """The stage that is running; whatever is put into ``detail`` stands on its line when it is done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.detail = ""


class Bar:
    """A bar with its count, its clock and, below it, a line of numbers; Rich asks it to draw itself again and again.

    Args:
        label: the words before the bar.
        total: the count at which it is full.
        ascii_only: whether to keep to plain characters.
    """

    def __init__(self, label: str, total: int, *, ascii_only: bool = False) -> None:
        self.label, self.total, self.done = label, total, 0
        self.parts: list[str] = []
        self._first_done: int | None = None
        self._started_s = time.monotonic()
        self._separator = " - " if ascii_only else " · "

    def advance_to(self, done: int) -> None:
        """Move to a count; the first count seen after a resume is where the clock's estimate begins."""
        if self._first_done is None:
            self._first_done = max(0, done - 1)
        self.done = done

    @property
    def elapsed_s(self) -> float:
        """Seconds since the bar was made."""
        return time.monotonic() - self._started_s

    @property
    def remaining_s(self) -> float | None:
        """Seconds to go at the mean pace so far; ``None`` before there is a pace."""
        progressed = self.done - (self._first_done or 0)
        if progressed <= 0:
            return None
        return self.elapsed_s / progressed * max(0, self.total - self.done)

    def clock(self) -> str:
        """Return ``elapsed<remaining``, as progress bars commonly write it."""
        remaining_s = self.remaining_s
        return f"{format_clock(self.elapsed_s)}<{'?' if remaining_s is None else format_clock(remaining_s)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        counts = f"{self.done}/{self.total}  {self.clock()}"
        label = f"  {self.label}"
        grid = Table.grid(padding=(0, 1))
        bar_width = min(40, options.max_width - len(label) - len(counts) - 4)
        cells: list[Text | ProgressBar] = [Text(label, no_wrap=True)]
        if bar_width >= 6:
            bar = ProgressBar(
                total=max(1, self.total),
                completed=self.done,
                width=bar_width,
                complete_style="cyan",
                finished_style="green",
            )
            cells.append(bar)
        grid.add_row(*cells, Text(counts, style="dim", no_wrap=True))
        yield grid
        if self.parts:
            yield Text("  " + self._fit(options.max_width - 3), style="dim", no_wrap=True, overflow="ellipsis")

    def _fit(self, width: int) -> str:
        parts = list(self.parts)
        while len(parts) > 1 and len(self._separator.join(parts)) > width:
            parts.pop()
        return self._separator.join(parts)


class TrainingProgress:
    """The numbers of a training run as it goes; made by ``RunConsole.training``."""

    def __init__(self, bar: Bar, print_plain: Callable[[str], None] | None) -> None:
        self._bar = bar
        self._print_plain = print_plain
        self._parts: list[str] = []
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.first_validation: float | None = None
        self.last_validation: float | None = None

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        learning_rate: float | None = None,
        tokens_per_s: float | None = None,
        trained_tokens_per_s: float | None = None,
        memory_gb: float | None = None,
    ) -> None:
        """Show that ``step`` optimizer steps are done; a step with a loss is a logging step.

        Args:
            step: steps done so far, of the run's total, steps before a resume included.
            loss: mean loss per trained token since the last logging step.
            learning_rate: the rate of this step.
            tokens_per_s: real tokens (none is padding) per second.
            trained_tokens_per_s: those of them that carry loss.
            memory_gb: peak memory.
        """
        self._bar.advance_to(step)
        parts = []
        if loss is not None:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.last_loss = loss
            parts.append(f"loss {loss:.4f}")
        if learning_rate is not None:
            parts.append(f"lr {learning_rate:.2e}")
        if tokens_per_s is not None:
            trained = f" ({trained_tokens_per_s:,.0f} trained)" if trained_tokens_per_s is not None else ""
            parts.append(f"{tokens_per_s:,.0f} tok/s{trained}")
        if memory_gb is not None:
            parts.append(f"{memory_gb:.1f} GB")
        if parts:
            self._show(parts)
        if self._print_plain is not None and loss is not None:
            width = len(str(self._bar.total))
            self._print_plain("  ".join([f"step {step:>{width}}/{self._bar.total}", *parts, self._bar.clock()]))

    def validated(self, step: int, loss: float) -> None:
        """Show the loss of the held-out rows after ``step`` optimizer steps."""
        self.first_validation = loss if self.first_validation is None else self.first_validation
        self.last_validation = loss
        self._show(self._parts)
        if self._print_plain is not None:
            width = len(str(self._bar.total))
            self._print_plain(f"step {step:>{width}}/{self._bar.total}  validation {loss:.4f}")

    def _show(self, parts: list[str]) -> None:
        """Have the bar show a step's numbers, and the last validation behind the loss that it is held against."""
        self._parts = parts
        watched = [] if self.last_validation is None else [f"validation {self.last_validation:.4f}"]
        self._bar.parts = [*parts[:1], *watched, *parts[1:]]


class RunConsole:
    """The screen of one job.

    Args:
        console: where to draw; a new one on standard output if ``None``. A terminal gets live bars, anything else
            gets plain lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._ascii = self.console.options.ascii_only
        self._stage: StageLine | None = None
        self._shown: Live | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[StageLine]:
        """Show that a stage is running, and leave its line, with seconds and ``detail``, when it ends."""
        line = StageLine(name)
        outer, self._stage = self._stage, line
        started_s = time.monotonic()
        mark, style = ("x", "bold red") if self._ascii else ("✗", "bold red")
        try:
            with self._showing(Spinner("line" if self._ascii else "dots", Text(name), style="cyan")):
                yield line
            mark, style = ("ok", "bold green") if self._ascii else ("✓", "bold green")
        finally:
            self._stage = outer
            seconds = format_seconds(time.monotonic() - started_s)
            self._print_stage(
                Text.assemble((f"{mark} ", style), f"{name:<{NAME_WIDTH}} ", (f"{seconds:>11}", "dim")), line
            )

    @contextmanager
    def training(self, total_steps: int) -> Iterator[TrainingProgress]:
        """Show optimizer steps as they are done; the stage's line gets first and last loss unless it has a detail."""
        bar = Bar("steps", total_steps, ascii_only=self._ascii)
        progress = TrainingProgress(bar, None if self.live else self._print_plain)
        with self._showing(bar):
            yield progress
        if self._stage is not None and not self._stage.detail and progress.first_loss is not None:
            arrow = "->" if self._ascii else "→"
            self._stage.detail = f"loss {progress.first_loss:.3f} {arrow} {progress.last_loss:.3f}"
            if progress.first_validation is not None:
                ends = f"{progress.first_validation:.3f} {arrow} {progress.last_validation:.3f}"
                self._stage.detail += f", validation {ends}"

    @contextmanager
    def generating(self, label: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """Show questions as they are answered; yields the callback ``(done, total)`` that generation wants."""
        bar = Bar(label, total, ascii_only=self._ascii)
        last_said_s = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            nonlocal last_said_s
            bar.total = total
            bar.advance_to(done)
            now_s = time.monotonic()
            if not self.live and (done == total or now_s - last_said_s >= PLAIN_EVERY_S):
                last_said_s = now_s
                self._print_plain(f"{label}  {done}/{total}  {bar.clock()}")

        with self._showing(bar):
            yield on_progress

    def note(self, text: str) -> None:
        """Say something worth knowing; the text is shown as it is, markup in it is not read."""
        self._print_indented(Text("  "), Text(text, style="dim"))

    def warn(self, text: str) -> None:
        """Say something that is not as asked; the text is shown as it is."""
        self._print_indented(Text("! ", style="bold yellow"), Text(text))

    @contextmanager
    def _showing(self, renderable: Bar | Spinner) -> Iterator[None]:
        """Draw a renderable until the block ends; an outer one gives way, since a screen has room for one."""
        if not self.live:
            yield
            return
        outer = self._shown
        if outer is not None:
            outer.stop()
        shown = Live(renderable, console=self.console, transient=True, refresh_per_second=REFRESH_PER_S)
        self._shown = shown
        try:
            with shown:
                yield
        finally:
            self._shown = outer
            if outer is not None:
                outer.start(refresh=False)

    def _print_stage(self, text: Text, line: StageLine) -> None:
        if self.live and line.detail and text.cell_len + 2 + Text(line.detail).cell_len > self.console.width:
            self.console.print(text, highlight=False)
            self._print_indented(Text("  "), Text(line.detail))
        else:
            self.console.print(text + Text(f"  {line.detail}" if line.detail else ""), soft_wrap=True, highlight=False)

    def _print_indented(self, lead: Text, text: Text) -> None:
        """Print with a hanging indent on a screen; in a file a line stays whole."""
        if not self.live:
            self.console.print(lead + text, soft_wrap=True, highlight=False)
            return
        grid = Table.grid()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(lead, text)
        self.console.print(grid)

    def _print_plain(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)
