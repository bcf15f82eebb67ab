"""What every page on a terminal needs: paragraphs, lines and tables that any stream can carry.

A terminal gets paragraphs wrapped at its width and tables that fit it; a file or a pipe gets one whole line a row, for
``grep``. What the stream cannot carry is replaced by signs that mean the same in ASCII. Nothing in a text is markup.

Tables are not Rich's own: those wrap at 80 columns in a pipe, have no heading over all columns, and break names such as
``DeepSeek-R1-Distill-Llama-8B`` anywhere but at a hyphen.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

_ASCII = {
    "\N{MULTIPLICATION X}": "x", "\N{BLACK UP-POINTING TRIANGLE}": "!", "→": "->", "…": "...", "⟦": "[[", "⟧": "]]",
    "\N{NARROW NO-BREAK SPACE}": " ", "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{PLUS-MINUS SIGN}": "+/-",
    "\N{MULTIPLICATION SIGN}": "x", "\N{MIDDLE DOT}": "-", "≥": ">=", "≤": "<=", "“": '"', "”": '"', "’": "'",
}  # fmt: skip

Part = tuple[str, str]  # a text and its style
Cell = str | Part
_GAP = 2  # columns between two cells
_NARROWEST = 12  # columns to which a cell is folded at least
_JOIN = re.compile(r"(?:-|(/))\n")  # where a head is broken for width alone


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column: its head (a line break in it saves width on a terminal), and how its cells stand."""

    head: str
    right: bool = False
    folds: bool = False  # gives way in a narrow window


@dataclass(frozen=True, slots=True)
class Heading:
    """A row of a table that is one line over all columns."""

    text: str


Row = Sequence[Cell] | Heading


class Screen:
    """A console that takes plain text: nothing in it is markup, and what its stream cannot carry is replaced."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_ascii = console.options.ascii_only
        self._dots = self.fit("…")

    @property
    def is_plain(self) -> bool:
        """Whether lines go to a file or a pipe, whole."""
        return not self._console.is_terminal

    def has_room(self, width: int) -> bool:
        """Return whether a line may have so many columns; in a file, any."""
        return self.is_plain or self._console.width >= width

    def fit(self, text: str) -> str:
        """Return a text that the stream can carry."""
        if not self._is_ascii:
            return text
        return "".join(_ASCII.get(char, char) for char in text).encode("ascii", "replace").decode()

    def skip(self) -> None:
        """Leave a line free."""
        self._console.print()

    def say(self, *parts: Part, indent: int = 0) -> None:
        """Print texts, each with its style, as a paragraph: indented as a whole on a terminal, one line elsewhere."""
        text = Text.assemble(*((self.fit(part), style) for part, style in parts))
        if not self.is_plain:
            self._console.print(Padding(text, (0, 0, 0, indent)), highlight=False)
        else:
            self._console.print(Text(" " * indent) + text, soft_wrap=True, highlight=False)

    def say_line(self, parts: Sequence[Part], indent: int) -> None:
        """Print texts, each with its style, as one line that is cut at the window's edge."""
        left = max(20, self._console.width - indent - 1)
        line = Text(" " * indent)
        for text, style in parts:
            flat = self.fit(" ".join(text.split(" ")).replace("\n", " ").replace("\t", " "))
            if cell_len(flat) > left:
                line.append(set_cell_size(flat, max(0, left - cell_len(self._dots))).rstrip() + self._dots, style)
                break
            line.append(flat, style)
            left -= cell_len(flat)
        self._console.print(line, soft_wrap=True, highlight=False)

    def tabulate(self, columns: Sequence[Column], rows: Sequence[Row], indent: int = 0) -> None:
        """Print a table; a row that is one part is a heading over all columns."""
        cells = [_split_row(row) for row in rows if not isinstance(row, Heading)]
        heads = [column.head if not self.is_plain else _JOIN.sub(r"\1", column.head) for column in columns]
        widths = self._find_widths(columns, [[(head, "") for head in heads], *cells], indent)
        if any(heads):
            lines = [self.fit(head).split("\n") for head in heads]
            depth = max(map(len, lines))
            bottom = [[""] * (depth - len(line)) + line for line in lines]
            self._print_row(columns, widths, [(line, "dim") for line in bottom], indent)
        for row in rows:
            if isinstance(row, Heading):
                self.say((row.text, "bold cyan"), indent=indent)
                continue
            parts = zip(_split_row(row), columns, widths, strict=True)
            self._print_row(columns, widths, [(self._fold(text, column, width), style)
                                              for (text, style), column, width in parts], indent)  # fmt: skip

    def _find_widths(self, columns: Sequence[Column], rows: Sequence[Sequence[Part]], indent: int) -> list[int]:
        """Return each column's width: what its longest line wants, or less where it folds and the window is narrow."""
        widths = [max(cell_len(line) for row in rows for line in self.fit(row[place][0]).split("\n"))
                  for place in range(len(columns))]  # fmt: skip
        over = 0 if self.is_plain else sum(widths) + _GAP * (len(columns) - 1) + indent - self._console.width
        while over > 0:
            widest = max((place for place, column in enumerate(columns) if column.folds), key=widths.__getitem__,
                         default=None)  # fmt: skip
            if widest is None or widths[widest] <= _NARROWEST:
                break
            widths[widest] -= 1
            over -= 1
        return widths

    def _fold(self, text: str, column: Column, width: int) -> list[str]:
        fitted = self.fit(text).replace("\n", " ").replace("\t", " ")
        if cell_len(fitted) <= width or not column.folds:
            return [fitted]
        start = " " * (len(fitted) - len(fitted.lstrip()))
        # Signs of two columns each, as Chinese has, are counted as one by textwrap.
        room = width if cell_len(fitted) == len(fitted) else width // 2
        return textwrap.wrap(fitted.strip(), room, initial_indent=start, subsequent_indent=f"{start} ")

    def _print_row(
        self, columns: Sequence[Column], widths: Sequence[int], cells: Sequence[tuple[Sequence[str], str]], indent: int
    ) -> None:
        """Print a row whose cells have a line or more each."""
        for number in range(max(len(lines) for lines, _ in cells)):
            row = Text(" " * indent)
            for place, ((lines, style), column, width) in enumerate(zip(cells, columns, widths, strict=True)):
                text = lines[number] if number < len(lines) else ""
                blank = " " * (width - cell_len(text))
                row.append(" " * (_GAP if place else 0) + (blank if column.right else ""))
                row.append(text, style)
                row.append("" if column.right else blank)
            row.rstrip()
            self._console.print(row, soft_wrap=True, highlight=False)


def _split_row(row: Sequence[Cell]) -> list[Part]:
    return [(cell, "") if isinstance(cell, str) else cell for cell in row]


class Sections:
    """A table whose rows stand under headings; in a file the heading is each row's first cell.

    Args:
        screen: where it will be printed.
        head: what the headings are.
        columns: of the rows.
    """

    def __init__(self, screen: Screen, head: str, columns: Sequence[Column]) -> None:
        self._screen = screen
        self._columns = [Column(head), *columns] if screen.is_plain else list(columns)
        self._rows: list[Row] = []
        self._title = ""

    def open(self, title: str) -> None:
        """Begin a section."""
        self._title = title
        if not self._screen.is_plain:
            self._rows.append(Heading(title))

    def add(self, *cells: Cell, style: str = "") -> None:
        """Add a row, whose style is that of the cells that have none of their own; missing cells are empty."""
        styled = [(cell, style) if isinstance(cell, str) else cell for cell in cells]
        if self._screen.is_plain:
            styled.insert(0, (self._title, ""))
        else:
            styled[0] = (f"  {styled[0][0]}", styled[0][1])
        self._rows.append([*styled, *[""] * (len(self._columns) - len(styled))])

    def print(self) -> None:
        """Print all of it."""
        self._screen.tabulate(self._columns, self._rows)
