"""What every command shares: one console, medcot's own log messages on it, and errors as people want them.

A ``MedcotError`` becomes one message on standard error (what was met, the rule, the remedy) and its exit code, without
a traceback; Ctrl-C becomes exit code 130 and the command that goes on; anything else is a defect of ours and keeps its
traceback.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from medcot.errors import MedcotError, RecipeError, one_of

if TYPE_CHECKING:
    from rich.console import Console

_Choices = TypeVar("_Choices", bound=StrEnum)
LATEST = Path("runs/latest")
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def open_console() -> Console:
    """Return the console of this process, and let medcot's own log messages be shown on it."""
    from rich.console import Console

    console = Console()
    own = logging.getLogger("medcot")
    own.setLevel(logging.INFO)
    own.propagate = False
    own.handlers = [_ConsoleHandler(console)]
    return console


def read_choice(text: str, kind: type[_Choices], option: str) -> _Choices:
    """Return an option's word as one of a few.

    Raises:
        RecipeError: it is none of them.
    """
    if text not in list(kind):
        raise RecipeError(f"{option} {text}", *one_of(text, kind))
    return kind(text)


class _ConsoleHandler(logging.Handler):
    """Shows medcot's log messages above whatever bar is drawn at the moment."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        from medcot.train.progress import RunConsole

        self._screen = RunConsole(console)

    def emit(self, record: logging.LogRecord) -> None:
        from medcot.secrets import redact

        say = self._screen.warn if record.levelno >= logging.WARNING else self._screen.note
        say(redact(record.getMessage()))


@contextlib.contextmanager
def reporting(hint: str = "") -> Iterator[None]:
    """Turn a user's mistake into one message and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except MedcotError as error:
        _print_error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        from rich.console import Console

        Console(stderr=True).print("\nStopped." + (f" {hint}." if hint else ""), highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def _print_error(error: MedcotError) -> None:
    from rich.console import Console
    from rich.text import Text

    from medcot.secrets import redact

    console = Console(stderr=True)
    mark, arrow = ("x", "->") if console.options.ascii_only else ("✗", "→")
    value, rule, remedy = (redact(part.rstrip(".")) for part in (error.value, error.rule, error.remedy))
    for line in (
        Text.assemble((f"{mark} ", "bold red"), (value, "bold")),
        Text(f"  {rule}."),
        Text.assemble((f"  {arrow} ", "bold green"), f"{remedy}{'' if remedy.endswith('?') else '.'}"),
    ):
        console.print(line, highlight=False, soft_wrap=True)
